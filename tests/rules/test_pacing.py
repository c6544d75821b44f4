"""Paces and limits, with invented times."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prefork.rules.pacing as pacing
from prefork.rules.pacing import Attention, Backoff, Deadlines, Reading


class Low(random.Random):
    """No jitter at all."""

    def random(self) -> float:
        return 0.0


RNG = Low()


def test_backoff_doubles() -> None:
    """0.1 s, doubling to 10 s and staying there, however often it fails."""
    backoff, waits = Backoff(), []
    for _ in range(2000):
        backoff.failed(100.0, RNG)
        waits.append(round(backoff.until - 100.0, 6))
    assert waits[:9] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0] and waits[-1] == 10.0


def test_backoff_resets() -> None:
    """After a reset the first delay is the first again, and nothing is waited for."""
    backoff = Backoff()
    backoff.failed(5.0, RNG)
    backoff.reset()
    assert (backoff.failures, backoff.until) == (0, 0.0)


@given(failures=st.integers(0, 10**6), seed=st.integers())
@settings(deadline=None, database=None, derandomize=False)
def test_backoff_jitter(failures: int, seed: int) -> None:
    """Jitter shortens a delay by at most a fifth; none is shorter than 0.08 s or longer than 10 s."""
    backoff = Backoff(failures)
    backoff.failed(0.0, random.Random(seed))
    full = min(10.0, 0.1 * 2 ** min(failures, 20))
    assert 0.8 * full - 1e-9 <= backoff.until <= full


def test_recycle_after() -> None:
    """A limit is brought forward by at most the jitter, never put off; 0 is never."""
    rng = random.Random(1)
    drawn = {pacing.recycle_after(100, 10, rng) for _ in range(1000)}
    assert drawn == set(range(90, 101))
    assert pacing.recycle_after(0, 0, rng) == 0


def test_lifetime() -> None:
    """A life is shortened by at most a tenth; without a limit there is no end."""
    rng = random.Random(1)
    drawn = [pacing.lifetime(100.0, rng) or 0.0 for _ in range(1000)]
    assert 90.0 <= min(drawn) < 91.0 and 99.0 < max(drawn) <= 100.0
    assert pacing.lifetime(0.0, rng) is None


def test_attention() -> None:
    """The master notices that it came back late, once; a little late is nothing, nor is a sleep without an end."""
    attention = Attention()
    assert attention.missed(5.0) == 0.0
    attention.expect(10.0, 6.0)
    assert attention.missed(9.0) == 0.0, "early: something happened"
    attention.expect(10.0, 9.0)
    assert attention.missed(10.5) == 0.0
    attention.expect(10.0, 9.0)
    assert attention.missed(25.0) == 15.0
    assert attention.missed(40.0) == 0.0, "said once"
    attention.expect(None, 40.0)
    assert attention.missed(1000.0) == 0.0


def test_what_was_due_before_a_turn_tells_of_no_absence() -> None:
    """Something may stay due, as a spawn does that has failed: only the time since the turn can have been missed."""
    attention = Attention()
    attention.expect(0.0, 5000.0)
    assert attention.missed(5000.1) == 0.0
    attention.expect(0.0, 5000.0)
    assert attention.missed(5010.0) == 10.0, "it was stopped in the middle of the turn"


def one(deadline: float, *, serial: int = 1, interrupted: bool = False, pid: int = 7) -> Reading:
    return Reading(pid, deadline, serial, interrupted)


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
    verdicts, again = Deadlines().judge(100.0, [one(1.0)])
    assert (verdicts.interrupt, verdicts.condemn, again) == ([], [], None)


def test_when_to_look_again() -> None:
    """At the next deadline, or when a request that begins now would be due."""
    judge = Judge()
    assert judge(100.0) == ([], [], 110.0)
    assert judge(100.0, one(0.0)) == ([], [], 110.0)
    assert judge(100.0, one(103.0), one(102.0, pid=8), one(200.0, pid=9)) == ([], [], 102.0)


def test_interrupted_then_condemned() -> None:
    """Past its deadline a request is interrupted once; where nobody notices, the worker is condemned."""
    judge = Judge()
    assert judge(100.0, one(100.0)) == ([7], [], 100.15)
    assert judge(100.1, one(100.0)) == ([], [], 100.15)
    assert judge(100.15, one(100.0))[:2] == ([], [7])


def test_threads_keep_a_signal_waiting() -> None:
    """Beside other threads that want the interpreter a worker has longer to notice: 20 ms for each of them."""
    judge = Judge()
    many = Reading(7, 100.0, 1, interrupted=False, threads=16)
    assert judge(100.0, many) == ([7], [], 100.45)
    assert judge(100.2, many) == ([], [], 100.45)
    assert judge(100.45, many)[:2] == ([], [7])


def test_late_by_no_more_than_a_quarter_second() -> None:
    """From the deadline to the verdict over a hang there is less than 0.25 s, if the master looks when it should."""
    judge, now, condemned = Judge(), 90.0, list[int]()
    while not condemned:
        _, condemned, again = judge(now, one(95.0))
        now = again if again is not None and not condemned else now
    assert 95.0 < now < 95.25


def test_cleanup() -> None:
    """A handler that saw its RequestTimeout has two seconds for its `finally` blocks, then it hangs as well."""
    judge = Judge()
    judge(100.0, one(100.0))
    assert judge(100.15, one(100.0, interrupted=True)) == ([], [], 102.0)
    assert judge(101.9, one(100.0, interrupted=True))[:2] == ([], [])
    assert judge(102.0, one(100.0, interrupted=True))[:2] == ([], [7])


def test_the_next_request_is_judged_by_itself() -> None:
    """A request that is late inherits nothing from the late one before it."""
    judge = Judge()
    judge(100.0, one(100.0))
    assert judge(100.15, one(100.1, serial=2)) == ([7], [], 100.3)


def test_extended() -> None:
    """A request that extends its deadline is not late any more; late again, it is interrupted again."""
    judge = Judge()
    judge(100.0, one(100.0))
    assert judge(100.1, one(105.0)) == ([], [], 105.0)
    assert judge(105.0, one(105.0)) == ([7], [], 105.15)


def test_a_worker_that_finished_is_forgotten() -> None:
    """Idle or gone, it is not condemned for what it did before."""
    judge = Judge()
    judge(100.0, one(100.0))
    assert judge(100.2, one(0.0)) == ([], [], 110.2)
    judge(100.3, one(100.3, serial=1))
    assert judge(100.4)[:2] == ([], [])
    assert judge(100.5, one(100.5, serial=1)) == ([7], [], 100.65), "the pid may be another worker's by now"


def test_amnesty() -> None:
    """What the master missed is granted: nobody is interrupted or condemned before it has been had once more."""
    judge = Judge()
    judge(100.0, one(100.0))
    judge.deadlines.grant(120.0, 20.0)
    assert judge(120.0, one(100.0), one(125.0, pid=8)) == ([], [], 130.0)
    assert judge(139.9, one(100.0), one(125.0, pid=8)) == ([], [], 140.0)
    assert judge(140.0, one(100.0), one(125.0, pid=8)) == ([7, 8], [], 140.15)
    judge.deadlines.grant(140.1, 1.0)
    judge.deadlines.grant(140.2, 0.5)
    assert judge(140.2, one(100.0)) == ([], [], 141.1), "the longer amnesty counts"


@pytest.mark.parametrize("deadline", [1e-300, 1e300, float("inf")])
def test_hostile_slots(deadline: float) -> None:
    """Whatever number a slot holds, the judge never loops."""
    Judge()(100.0, one(deadline))
