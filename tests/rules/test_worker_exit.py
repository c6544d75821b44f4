"""The one line that a worker's death leaves in the log."""

from dataclasses import replace

import pytest

from prefork.rules.worker_exit import Reason, WorkerExit

PLAIN = WorkerExit(2, 4711, 3, Reason.STOPPED, 0, None, 0.0, 12, None, 7.25)


def test_the_line_of_an_ordered_exit() -> None:
    """An exit that was ordered, with code 0, is told without a status."""
    assert str(PLAIN) == "worker 2 (pid 4711, generation 3) left: the pool stops; 12 requests in 7.2 s"


def test_the_line_of_a_hang() -> None:
    """All there is to say is in one line: reason, signal, request, counts, memory."""
    hang = replace(PLAIN, reason=Reason.REQUEST_TIMEOUT, status=-9, detail="a\nb")
    report = replace(hang, serving="192.0.2.1:55", busy_for=1.5, memory=3 << 20)
    assert str(report) == (
        "worker 2 (pid 4711, generation 3) left: its request was past request_timeout, SIGKILL, "
        "while serving 192.0.2.1:55 for 1.500 s; 12 requests in 7.2 s, peak 3.0 MiB"
    )


def test_the_line_of_a_recycling() -> None:
    """Which limit was reached, or what the application wished, stands beside the reason."""
    report = replace(PLAIN, reason=Reason.RECYCLED, why="max_requests: 12 of 12")
    assert " left: it was recycled (max_requests: 12 of 12); 12 requests" in str(report)


@pytest.mark.parametrize(
    ("reason", "status", "part"),
    [
        (Reason.EXITED, 0, "it exited by itself, exit code 0;"),
        (Reason.BOOT_FAILED, 3, "it failed before it was ready, exit code 3;"),
        (Reason.KILLED, -11, "it was killed by a signal, SIGSEGV;"),
        (Reason.KILLED, -63, "it was killed by a signal, signal 63;"),
        (Reason.STOPPED, None, "the pool stops, exit status unknown (reaped by somebody else);"),
    ],
)
def test_statuses(reason: Reason, status: int | None, part: str) -> None:
    """Codes, signals with and without a name, and a status that is lost."""
    assert part in str(replace(PLAIN, reason=reason, status=status))


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_one_line(reason: Reason) -> None:
    """Whatever the reason, the line is one, and says it."""
    line = str(replace(PLAIN, reason=reason, detail="Traceback\n..."))
    assert reason.value in line and "\n" not in line


def test_which_exits_are_ordered() -> None:
    """Deaths by a deadline are the master's act but somebody's fault; a TERM from outside is neither's."""
    ordered = {Reason.STOPPED, Reason.RESIZED, Reason.RELOADED, Reason.RECYCLED, Reason.LEFT}
    assert {reason for reason in Reason if reason.ordered} == ordered


def test_frozen() -> None:
    """A report can be kept: nobody changes it."""
    with pytest.raises(AttributeError):
        PLAIN.slot = 1  # type: ignore[misc]
