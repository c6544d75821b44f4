"""The decisions of the polling loop and of its threads, with times that nobody has measured."""

import pytest

from prefork.workers.wsgi.loop_rules import LONG, MANY, RETURN, SHORT, Crowd, EventBatch, Lead

QUICK, SLOW = SHORT / 2, SHORT


def test_a_first_turn_fetches_one_event() -> None:
    """As long as nothing is known of the requests each event is fetched alone."""
    assert EventBatch().size == 1


@pytest.mark.parametrize(
    ("seconds", "events", "size"),
    [(0.0, 0, 1), (0.0004, 1, MANY), (0.0005, 1, 1), (0.01, 32, MANY), (0.04, 64, 1)],
)
def test_many_events_after_brief_ones(seconds: float, events: int, size: int) -> None:
    """The next turn fetches many events if those of this one took less than half a millisecond each."""
    batch = EventBatch()
    batch.turned(100.0, 1)
    batch.turned(100.0 + seconds, events)
    assert batch.size == size


def test_long_requests_end_a_batch_of_many() -> None:
    """One turn of long requests is enough to fetch each event alone again."""
    batch = EventBatch()
    for now, events, size in [(0.0001, 1, MANY), (0.0002, 1, MANY), (0.1, 8, 1)]:
        batch.turned(now, events)
        assert batch.size == size


def test_a_try_at_each_eighth_connection() -> None:
    """Where nobody queues a second connection is tried for at each eighth one."""
    crowd = Crowd()
    tries = [number for number in range(1, 25) if crowd.accepted(1)]
    assert tries == [8, 16, 24]


def test_a_crowd_is_there_until_a_first_try_is_in_vain() -> None:
    """A second connection that was there makes each visit try for more, until one finds nobody at its first try."""
    crowd = Crowd()
    assert not crowd.accepted(1)
    assert crowd.accepted(2)
    crowd.nobody(1)
    assert crowd.accepted(1)
    crowd.nobody(2)
    assert not crowd.accepted(1)


def kept() -> Lead:
    """A lead that is kept."""
    lead = Lead()
    while not lead.served(QUICK):
        pass
    lead.watch()
    return lead


def test_the_lead_is_kept_after_many_short_requests() -> None:
    """The lead is kept once short requests outweigh two long ones, and the main thread is to be woken once."""
    lead = Lead()
    answers = [lead.served(QUICK) for _ in range(2 * LONG + 5)]
    assert (answers.index(True), answers.count(True), lead.is_kept) == (2 * LONG - 1, 1, True)


def test_a_long_request_outweighs_short_ones() -> None:
    """A long request costs as much credit as 300 short ones earn, and credit is never negative."""
    lead = Lead()
    assert not any(lead.served(SLOW) for _ in range(10))
    assert not any(lead.served(QUICK) for _ in range(2 * LONG - 1))
    assert not lead.served(SLOW)
    assert not any(lead.served(QUICK) for _ in range(LONG))
    assert lead.served(QUICK)


def test_a_leader_in_a_long_request_is_found() -> None:
    """No request since the last look, and nobody leads: a follower is promoted, and the lead is kept no more."""
    lead = kept()
    lead.begun += 3
    assert not lead.look(lead_is_free=True)
    assert lead.is_kept
    assert lead.look(lead_is_free=True)
    assert not lead.is_kept


def test_the_main_thread_sleeps_where_nobody_asks() -> None:
    """Five looks in a row without a request end the watch; a few short requests begin it again."""
    lead = kept()
    for begun in (0, 0, 1, 0, 0, 0, 0):
        lead.begun += begun
        assert not lead.look(lead_is_free=False)
        assert lead.is_kept
    assert not lead.look(lead_is_free=False)
    assert not lead.is_kept
    answers = [lead.served(QUICK) for _ in range(RETURN)]
    assert answers == [False] * (RETURN - 1) + [True]


def test_credit_is_bounded() -> None:
    """However many short requests there were, some long ones that are found in time end the watch for good."""
    lead = kept()
    for _ in range(100):
        lead.begun += 1000
        lead.look(lead_is_free=False)
    for _ in range(9):
        lead.look(lead_is_free=True)
    assert not any(lead.served(QUICK) for _ in range(LONG - 1))
    assert lead.served(QUICK)
