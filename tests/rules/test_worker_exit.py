"""The one line that a worker's death leaves in the log."""

from dataclasses import replace

import pytest

from prefork.rules.worker_exit import REQUEST_GOES_ON, Reason, WorkerExit

PLAIN = WorkerExit(2, 4711, 3, Reason.STOPPED, 0, None, 0.0, 12, None, 7.25)


def test_the_line_of_an_ordered_exit() -> None:
    """An exit that was ordered, with code 0, is told without a status."""
    assert str(PLAIN) == "worker 4711 (slot 2, generation 3) exited: the pool stops; 12 requests in 7.2 s"


def test_the_line_of_a_hang() -> None:
    """All there is to say is in one line: reason, signal, request, counts, memory."""
    hang = replace(PLAIN, reason=Reason.REQUEST_TIMEOUT, status=-9, detail="a\nb")
    report = replace(hang, serving="192.0.2.1:55", busy_for=1.5, memory=3 << 20)
    assert str(report) == (
        "worker 4711 (slot 2, generation 3) exited: its request exceeded request_timeout, SIGKILL, "
        "while serving 192.0.2.1:55 for 1.500 s; 12 requests in 7.2 s, peak memory 3.0 MiB [PF0206]"
    )


def test_the_line_of_a_recycling() -> None:
    """Which limit was reached, or what the application wished, stands beside the reason."""
    report = replace(PLAIN, reason=Reason.RECYCLED, why="max_requests: 12 of 12")
    assert " exited: it was recycled (max_requests: 12 of 12); 12 requests" in str(report)


@pytest.mark.parametrize(
    ("reason", "status", "part"),
    [
        (Reason.EXITED, 0, "it ended by itself, exit code 0;"),
        (Reason.BOOT_FAILED, 3, "it failed before it was ready, exit code 3;"),
        (Reason.KILLED, -11, "a signal killed it, SIGSEGV;"),
        (Reason.KILLED, -63, "a signal killed it, signal 63;"),
        (Reason.STOPPED, None, "the pool stops, exit status unknown (other code in the master collected it);"),
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


@pytest.mark.parametrize(
    ("code", "reason", "status", "why"),
    [
        ("", Reason.STOPPED, 0, ""),
        ("", Reason.RELOADED, None, ""),
        ("PF0201", Reason.EXITED, 0, ""),
        ("PF0201", Reason.EXITED, 1, ""),
        ("PF0202", Reason.KILLED, -11, ""),
        ("PF0202", Reason.BOOT_FAILED, -6, ""),
        ("PF0203", Reason.KILLED, -9, ""),
        ("PF0203", Reason.BOOT_FAILED, -9, ""),
        ("PF0204", Reason.KILLED, -12, ""),
        ("PF0204", Reason.KILLED, -63, ""),
        ("PF0205", Reason.EXITED, None, ""),
        ("PF0206", Reason.REQUEST_TIMEOUT, -6, ""),
        ("PF0206", Reason.REQUEST_TIMEOUT, 0, ""),
        ("PF0207", Reason.BOOT_TIMEOUT, -9, ""),
        ("PF0208", Reason.BOOT_FAILED, 1, ""),
        ("PF0209", Reason.GRACEFUL_TIMEOUT, -6, ""),
        ("PF0210", Reason.LEFT, 0, ""),
        ("PF0211", Reason.RECYCLED, 0, "max_requests: 12 of 12"),
        ("PF0212", Reason.RECYCLED, 0, "max_memory: 2.0 MiB of 1.0 MiB"),
        ("PF0213", Reason.RECYCLED, 0, "max_lifetime: 5 s"),
        ("PF0214", Reason.RECYCLED, 0, "the cache is old"),
        ("PF0214", Reason.RECYCLED, 0, ""),
        ("PF0215", Reason.RECYCLED, 0, REQUEST_GOES_ON),
        ("PF0216", Reason.STOPPED, -9, ""),
        ("PF0217", Reason.RELOADED, 1, ""),
        ("PF0217", Reason.RECYCLED, 1, "max_lifetime: 5 s"),
    ],
)
def test_codes(code: str, reason: Reason, status: int | None, why: str) -> None:
    """An exit by which an operator may act has the code of its page as the last thing on its line, and only there."""
    report = replace(PLAIN, reason=reason, status=status, why=why)
    assert report.code == code and "PF" not in report.text
    assert str(report) == (f"{report.text} [{code}]" if code else report.text)


def test_which_exits_are_ordered() -> None:
    """Deaths by a deadline are the master's act but somebody's fault; a TERM from outside is neither's."""
    ordered = {Reason.STOPPED, Reason.RESIZED, Reason.RELOADED, Reason.RECYCLED, Reason.LEFT}
    assert {reason for reason in Reason if reason.ordered} == ordered


def test_frozen() -> None:
    """A report can be kept: nobody changes it."""
    with pytest.raises(AttributeError):
        PLAIN.slot = 1  # type: ignore[misc]
