"""Whether connections end so soon that there is nothing to share out, as the batches of an event loop show it."""

import pytest

from prefork.workers.intake.connection_batch import RECENT, SIZE, Batch


def batch(*events: tuple[float, int, int]) -> Batch:
    """What is left of batches: each began at a time, of a worker that held so many, and took so many."""
    made = Batch()
    for now, held, taken in events:
        made.begin(now, held)
        made.taken = taken
    return made


@pytest.mark.parametrize(
    ("before", "held", "ends_soon"),
    [
        ([(1.0, 0, 1)], 0, True),  # the one that was taken has ended
        ([(1.0, 0, 1)], 1, False),
        ([(1.0, 3, 1)], 3, True),  # others stay
        ([(1.0, 3, 2)], 4, True),  # there was no batch before: one is enough
        ([(1.0, 0, 4), (1.001, 0, 6)], 2, True),  # as many as the batch before the last has taken
        ([(1.0, 0, 4), (1.001, 0, 6)], 3, False),
        ([(1.0, 0, 4), (1.001, 4, 0)], 4, False),  # none has ended
        ([(1.0, 0, 0)], 0, False),
    ],
)
def test_whether_connections_end_soon(before: list[tuple[float, int, int]], held: int, ends_soon: bool) -> None:
    """They do where at least as many have ended since the last batch as the one before it took, and one at least."""
    now = before[-1][0] + RECENT / 2
    assert batch(*before, (now, held, 0)).ends_soon is ends_soon


def test_a_batch_of_long_ago() -> None:
    """That connections ended is no sign that they end soon if it took longer than a moment."""
    assert batch((1.0, 0, 1), (1.0 + RECENT * 0.9, 0, 0)).ends_soon
    assert not batch((1.0, 0, 1), (1.0 + RECENT * 1.1, 0, 0)).ends_soon


def test_the_end_of_a_batch() -> None:
    """A batch tells how many connections its worker held at its begin, and the next one is empty."""
    full = batch((1.0, 3, SIZE))
    assert (full.taken, full.held) == (SIZE, 3)
    full.begin(2.0, 5)
    assert (full.taken, full.held) == (0, 5)
