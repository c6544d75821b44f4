"""Paces and limits, with invented times."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

import prefork.rules.pacing as pacing
from prefork.rules.pacing import Attention, Backoff


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
