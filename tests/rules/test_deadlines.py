"""The judging of requests past their deadline, with invented times."""

import pytest

from prefork.rules.deadlines import Deadlines, Reading


def reading(deadline: float | None, *, interrupted: bool = False, pid: int = 7) -> Reading:
    return Reading(pid, deadline, interrupted)


class Judge:
    """`Deadlines` with a timeout of 10 s, and what it said."""

    def __init__(self) -> None:
        self.deadlines = Deadlines()
        self.deadlines.timeout = 10.0

    def __call__(self, now: float, *readings: Reading) -> tuple[list[int], list[int], float | None]:
        verdicts, again = self.deadlines.judge(now, readings)
        assert again is not None and again > now, "busy loop"
        return verdicts.interrupt, verdicts.condemn, round(again, 6)


def test_no_timeout_no_verdict() -> None:
    """Without request_timeout nobody is judged, and nobody looks again."""
    verdicts, again = Deadlines().judge(100.0, [reading(1.0)])
    assert (verdicts.interrupt, verdicts.condemn, again) == ([], [], None)


def test_when_to_look_again() -> None:
    """At the next deadline, or when a request that begins now would be due."""
    judge = Judge()
    assert judge(100.0) == ([], [], 110.0)
    assert judge(100.0, reading(None)) == ([], [], 110.0)
    assert judge(100.0, reading(103.0), reading(102.0, pid=8), reading(200.0, pid=9)) == ([], [], 102.0)


def test_interrupted_then_condemned() -> None:
    """Past its deadline a request is interrupted once; where nobody notices, the worker is condemned."""
    judge = Judge()
    assert judge(100.0, reading(100.0)) == ([7], [], 100.15)
    assert judge(100.1, reading(100.0)) == ([], [], 100.15)
    assert judge(100.15, reading(100.0))[:2] == ([], [7])


def test_threads_keep_a_signal_waiting() -> None:
    """Beside other threads that want the interpreter a worker has longer to notice: 20 ms for each of them."""
    judge = Judge()
    many = Reading(7, 100.0, interrupted=False, threads=16)
    assert judge(100.0, many) == ([7], [], 100.45)
    assert judge(100.2, many) == ([], [], 100.45)
    assert judge(100.45, many)[:2] == ([], [7])


def test_late_by_no_more_than_a_quarter_second() -> None:
    """From the deadline to the verdict over a hang there is less than 0.25 s, if the master looks when it should."""
    judge, now, condemned = Judge(), 90.0, list[int]()
    while not condemned:
        _, condemned, again = judge(now, reading(95.0))
        now = again if again is not None and not condemned else now
    assert 95.0 < now < 95.25


def test_cleanup() -> None:
    """A handler that saw its RequestTimeout has two seconds for its `finally` blocks, then it hangs as well."""
    judge = Judge()
    judge(100.0, reading(100.0))
    assert judge(100.15, reading(100.0, interrupted=True)) == ([], [], 102.0)
    assert judge(101.9, reading(100.0, interrupted=True))[:2] == ([], [])
    assert judge(102.0, reading(100.0, interrupted=True))[:2] == ([], [7])


def test_the_next_request_is_judged_by_itself() -> None:
    """A request that is late inherits nothing from the late one before it."""
    judge = Judge()
    judge(100.0, reading(100.0))
    assert judge(100.15, reading(100.1)) == ([7], [], 100.3)


def test_extended() -> None:
    """A request that extends its deadline is not late any more; late again, it is interrupted again."""
    judge = Judge()
    judge(100.0, reading(100.0))
    assert judge(100.1, reading(105.0)) == ([], [], 105.0)
    assert judge(105.0, reading(105.0)) == ([7], [], 105.15)


def test_a_worker_that_finished_is_forgotten() -> None:
    """Idle or gone, it is not condemned for what it did before."""
    judge = Judge()
    judge(100.0, reading(100.0))
    assert judge(100.2, reading(None)) == ([], [], 110.2)
    judge(100.3, reading(100.3))
    assert judge(100.4)[:2] == ([], [])
    assert judge(100.5, reading(100.5)) == ([7], [], 100.65), "the pid may be another worker's by now"


def test_amnesty() -> None:
    """What the master missed is granted: nobody is interrupted or condemned before it has been had once more."""
    judge = Judge()
    judge(100.0, reading(100.0))
    judge.deadlines.grant(120.0, 20.0)
    assert judge(120.0, reading(100.0), reading(125.0, pid=8)) == ([], [], 130.0)
    assert judge(139.9, reading(100.0), reading(125.0, pid=8)) == ([], [], 140.0)
    assert judge(140.0, reading(100.0), reading(125.0, pid=8)) == ([7, 8], [], 140.15)
    judge.deadlines.grant(140.1, 1.0)
    judge.deadlines.grant(140.2, 0.5)
    assert judge(140.2, reading(100.0)) == ([], [], 141.1), "the longer amnesty counts"


@pytest.mark.parametrize("deadline", [1e-300, 1e300, float("inf")])
def test_hostile_slots(deadline: float) -> None:
    """Whatever number a slot holds, the judge never loops."""
    Judge()(100.0, reading(deadline))
