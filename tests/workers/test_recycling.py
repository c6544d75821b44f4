"""When a worker asks to be replaced."""

import os
from collections.abc import Callable
from typing import Any

import pytest

import prefork.link.uplink as uplink
from prefork.link.scoreboard import Slot
from prefork.link.worker_context import WorkerContext
from prefork.settings.settings import Options
from prefork.workers.recycling import MEMORY_PERIOD, Recycling

MIB = 1 << 20


def sizes(*mib: float) -> Callable[[], int]:
    """The memory of a worker, measurement by measurement; there must be no further measurement."""
    rest = iter(mib)
    return lambda: int(next(rest) * MIB)


class Bench:
    """The limits of worker 3, and what it has said to its master."""

    def __init__(self, memory: Callable[[], int], **options: Any) -> None:
        context = WorkerContext(3, 1, Options(options), Slot.detached(), -1, -1, b"", True, "", 0)
        self.said: list[tuple[bytes, str]] = []
        self.recycling = Recycling(context, lambda kind, text: self.said.append((kind, text)), memory)
        self.check, self.first_check = self.recycling.check, self.recycling.first_check

    @property
    def reasons(self) -> list[str]:
        assert all(kind == uplink.RECYCLE for kind, _ in self.said)
        return [text for _, text in self.said]


def test_without_a_limit() -> None:
    """Neither many requests nor much memory are a reason where nothing is limited."""
    bench = Bench(sizes())
    bench.check(bench.first_check, 1.0)
    assert not bench.said


def test_the_number_of_requests() -> None:
    """It is a reason from the number on that is the limit, which is the first to be checked; it is told once."""
    bench = Bench(sizes(), max_requests=7, max_requests_jitter=0)
    assert bench.first_check == 7
    bench.check(6, 1.0)
    assert not bench.said
    bench.check(7, 1.0)
    bench.check(8, 1.0)
    assert bench.reasons == ["max_requests: 7 of 7"]


def test_a_number_that_is_passed_at_once() -> None:
    """Requests that end together may pass the limit without one that ends at its number."""
    bench = Bench(sizes(), max_requests=7, max_requests_jitter=0)
    bench.check(9, 1.0)
    assert bench.reasons == ["max_requests: 9 of 7"]


def test_the_memory_is_measured_now_and_then() -> None:
    """Memory is measured after the first request, and then once a period; more than the limit is a reason."""
    bench = Bench(sizes(50, 100, 100.5), max_memory=100 * MIB)
    assert bench.first_check == 1
    bench.check(1, 10.0)
    bench.check(2, 10.0 + MEMORY_PERIOD * 0.9)  # too early to measure again
    bench.check(3, 10.0 + MEMORY_PERIOD)
    assert not bench.said, "the limit is allowed"
    bench.check(4, 10.0 + MEMORY_PERIOD * 2)
    bench.check(5, 10.0 + MEMORY_PERIOD * 3)  # nothing is measured after the request to be replaced
    assert bench.reasons == ["max_memory: 100.5 MiB of 100.0 MiB"]


def test_a_reason_of_the_program() -> None:
    """What the program asks for is told with its words, and no limit is told after it."""
    bench = Bench(sizes(), max_requests=1, max_requests_jitter=0, max_memory=MIB)
    bench.recycling.request("Redis went away")
    bench.recycling.request("once more")
    bench.check(1, 10.0)
    assert bench.reasons == ["Redis went away"]


def test_a_memory_that_cannot_be_told(caplog: pytest.LogCaptureFixture) -> None:
    """Where the memory cannot be told that is logged once, and nobody looks again; requests are counted still."""

    def failing() -> int:
        raise OSError("ordered trouble")

    bench = Bench(failing, max_requests=5, max_requests_jitter=0, max_memory=MIB)
    for number in range(1, 5):
        bench.check(number, number * 10.0)
    assert not bench.said
    bench.check(5, 50.0)
    assert bench.reasons == ["max_requests: 5 of 5"]
    trouble = "cannot read its memory: ordered trouble; max_memory has no effect [PF0414]"
    said = f"worker {os.getpid()} (slot 3, generation 1) {trouble}"
    assert [record.getMessage() for record in caplog.records] == [said]
