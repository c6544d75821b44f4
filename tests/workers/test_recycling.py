"""When a worker asks to be replaced."""

from collections.abc import Callable

import pytest

from prefork.workers.recycling import MEMORY_PERIOD, RecycleLimits

MIB = 1 << 20


def sizes(*mib: float) -> Callable[[], int]:
    """What a worker's memory is found to be, look by look; there must be no further look."""
    rest = iter(mib)
    return lambda: int(next(rest) * MIB)


def test_without_a_limit() -> None:
    """Neither many requests nor much memory are a reason where nothing is limited."""
    limits = RecycleLimits(0, 0, None, sizes())
    assert limits.reason(limits.first_check, 1.0) is None


def test_the_number_of_requests() -> None:
    """It is a reason from the number on that is the limit, which is the first to be checked."""
    limits = RecycleLimits(0, 7, None, sizes())
    assert limits.first_check == 7
    assert limits.reason(6, 1.0) is None
    assert limits.reason(7, 1.0) == "max_requests: 7 of 7"
    assert limits.reason(9, 1.0) == "max_requests: 9 of 7"


def test_the_memory_is_looked_at_now_and_then() -> None:
    """Memory is looked at after the first request, and then once a period; more than the limit is a reason."""
    limits = RecycleLimits(0, 0, 100 * MIB, sizes(50, 100, 100.5))
    assert limits.first_check == 1
    assert limits.reason(1, 10.0) is None
    assert limits.reason(2, 10.0 + MEMORY_PERIOD * 0.9) is None, "it is too early for another look"
    assert limits.reason(3, 10.0 + MEMORY_PERIOD) is None, "the limit is allowed"
    assert limits.reason(4, 10.0 + MEMORY_PERIOD * 2) == "max_memory: 100.5 MiB of 100.0 MiB"


def test_a_memory_that_cannot_be_told(caplog: pytest.LogCaptureFixture) -> None:
    """Where the memory cannot be told that is logged once, and nobody looks again; requests are counted still."""

    def failing() -> int:
        raise OSError("ordered trouble")

    limits = RecycleLimits(3, 5, MIB, failing)
    for number in range(1, 5):
        assert limits.reason(number, number * 10.0) is None
    assert limits.reason(5, 50.0) == "max_requests: 5 of 5"
    said = "worker 3: max_memory has no effect; its memory cannot be told: ordered trouble"
    assert [record.getMessage() for record in caplog.records] == [said]
