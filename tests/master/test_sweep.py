"""A sample of the sweep of failing system calls, and its table. All of the sweep is `make sweep`."""

import errno
import random
import time

import pytest

from sweep import faults, matrix, tracer
from sweep.life import Cell

SECONDS = 20.0  # after which no life begins; one takes 2 s, or 20 s where much is wrong


@pytest.mark.timeout(180)
def test_what_the_kernel_refuses_harms_nothing() -> None:
    """Whichever call of the master fails, and however, the pool serves, has its size, obeys, and leaves nothing."""
    if reason := tracer.missing():
        pytest.skip(reason)
    begun, seed = time.monotonic(), random.SystemRandom().randrange(1 << 32)
    counted = matrix.census()
    wrong = matrix.failures(counted)
    assert not wrong, f"without any fault: {wrong}"
    assert not matrix.unknown(counted), "sweep/faults.py has no errors for these calls, and no reason to leave them out"
    cells = matrix.sample(matrix.cells_of(counted), seed)
    results = matrix.run_all(cells, SECONDS - (time.monotonic() - begun))
    print(f"seed {seed}, of {len(cells)} cells {matrix.summary(results)}", matrix.table(results), sep="\n")
    if wrong := matrix.failures(results):
        pytest.fail(wrong, pytrace=False)


def test_each_call_fails_or_is_left_out() -> None:
    """Errors are the kernel's, and no call has both errors and a reason to be left out."""
    for call, errors in (*faults.ERRORS.items(), *faults.ERRORS_IN.items()):
        assert errors.split() and all(hasattr(errno, error) for error in errors.split()), call
    assert not [call for call in faults.ERRORS if faults.left_out(call)]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, {"first": "1..1", "three": "1..3", "always": "1+"}),
        (2, {"first": "1..1", "last": "2..2", "three": "1..3", "always": "1+"}),
        (9, {"first": "1..1", "middle": "5..5", "last": "9..9", "three": "5..7", "always": "1+"}),
    ],
)
def test_occurrences(number: int, expected: dict[str, str]) -> None:
    """No two cells of a call are the same, however often it is made; what passes by itself never fails for good."""
    spans = {
        fault.when: fault.expression.rpartition("=")[2]
        for fault in faults.of_call("serve", "clone", number)
        if fault.error == "ENOMEM"
    }
    assert spans == expected
    assert {fault.when for fault in faults.of_call("serve", "read", number) if fault.error == "EAGAIN"} == {
        *expected
    } - {"always"}


def test_a_sample_is_even() -> None:
    """The beginning of a sample has each call of each phase once, whatever the seed."""
    counts = {"clone": 3, "wait4": 9, "pipe2": 1}
    cells = [
        Cell("command", phase, fault)
        for phase in ("serve", "stop")
        for call, number in counts.items()
        for fault in faults.of_call(phase, call, number)
    ]
    for seed in range(5):
        begun = matrix.sample(cells, seed)[: 2 * len(counts)]
        assert len({(cell.phase, cell.fault and cell.fault.call) for cell in begun}) == 2 * len(counts)
        assert sorted(matrix.sample(cells, seed)) == sorted(cells)
