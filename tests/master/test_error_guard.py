"""The guard: what fails inside is reported and ends there."""

import logging

import pytest

from prefork.master.error_guard import REPORTS_KEPT, Guard


class Unspeakable:
    """Whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError


def fail(guard: Guard, text: str = "step %d failed", *arguments: object, error: Exception | None = None) -> None:
    with guard.protect(text, *(arguments or (1,))):
        raise error or OSError("ordered trouble")


def test_a_failure_is_reported_and_ends() -> None:
    """What is raised goes no further, and is remembered until it is forgiven."""
    guard = Guard()
    assert not guard.forgive()
    fail(guard)
    assert guard.failed and guard.forgive()
    assert not guard.failed and not guard.forgive()


def test_the_same_failure_is_said_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    """Of equal failures in a row one is logged, with its traceback; another failure is logged at once."""
    guard = Guard()
    with caplog.at_level(logging.ERROR, "prefork"):
        for _ in range(50):
            fail(guard)
        fail(guard, "step %d failed", 2)
        fail(guard, error=ValueError("other trouble"))
    assert [record.getMessage() for record in caplog.records] == ["step 1 failed", "step 2 failed", "step 1 failed"]
    assert all(record.exc_info for record in caplog.records)


def test_memory_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Failures that differ each time do not pile up."""
    guard = Guard()
    with caplog.at_level(logging.CRITICAL, "prefork"):
        for number in range(10 * REPORTS_KEPT):
            fail(guard, "step %d failed", number)
    assert len(guard._reported) <= REPORTS_KEPT


def test_a_report_that_fails() -> None:
    """A failure that cannot even be put into words ends as well."""
    guard = Guard()
    fail(guard, "%s failed", Unspeakable())
    assert guard.failed


def test_hooks_of_the_program(caplog: pytest.LogCaptureFixture) -> None:
    """Each failure of a hook is logged, and the loop does not wait for it."""
    guard = Guard()
    with caplog.at_level(logging.ERROR, "prefork"):
        for _ in range(3):
            with guard.protect_hook("the hook raised"):
                raise ValueError("ordered trouble")
    assert [record.getMessage() for record in caplog.records] == ["the hook raised"] * 3
    assert not guard.failed


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_no_failure_goes_through(error: type[BaseException]) -> None:
    """An order to the process is not kept from it."""
    guard = Guard()
    with pytest.raises(error), guard.protect("step"):
        raise error
