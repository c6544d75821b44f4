"""The stages of a stop: what a signal means in each, and what is waited for between two of them."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.rules.stop_sequence import ESCALATION, HANDSHAKES, LAST_CALLS, SETTLE, Stage, StopSequence

SIGNALS = ("SIGTERM", "SIGINT", "SIGQUIT")


def test_every_signal_means_something_in_every_stage() -> None:
    """The table is whole, and no signal makes a stop softer."""
    assert set(ESCALATION) == {(number, stage) for number in SIGNALS for stage in Stage}
    assert all(after >= stage for (_, stage), after in ESCALATION.items())


def test_documentation_says_the_same() -> None:
    """The table of docs/reference/signals.md is the table of the code."""
    words = {"stop": Stage.SETTLING, "fast stop": Stage.FAST, "kill": Stage.KILL, "no effect": None}
    text = (Path(__file__).resolve().parents[2] / "docs/reference/signals.md").read_text()
    rows = {
        "serving": (Stage.SERVING,),
        "stopping gracefully": (Stage.SETTLING, Stage.DRAINING),
        "stopping fast": (Stage.FAST,),
    }
    for name, stages in rows.items():
        row = re.search(rf"^\| {name} \| ([^|]*) \| ([^|]*) \| ([^|]*) \|", text, re.MULTILINE)
        assert row, name
        for number, said in zip(SIGNALS, row.groups(), strict=True):
            for stage in stages:
                assert ESCALATION[number, stage] == (words[said] or stage), (name, number)


@pytest.mark.parametrize("handshakes", [True, False])
def test_a_graceful_stop(handshakes: bool) -> None:
    """Handshakes have a moment to complete where there can be any; then, and once, the queue is drained."""
    stop = StopSequence()
    assert not stop.begun and stop.due is None
    assert stop.rise(Stage.SETTLING, 100.0, handshakes=handshakes) and stop.begun
    assert stop.due == 100.0 + (SETTLE if handshakes else 0.0)
    assert not stop.may_have_queue(100.0), "nobody was told to leave yet"
    assert stop.settle(stop.due, half_open=False, graceful_timeout=30.0)
    assert (stop.stage, stop.due) == (Stage.DRAINING, None)
    assert not stop.settle(101.0, half_open=False, graceful_timeout=30.0)


def test_half_open_handshakes_are_waited_for_within_bounds() -> None:
    """Who is in the middle of a handshake is waited for, at most a quarter of a second."""
    stop, now = StopSequence(), 100.0
    stop.rise(Stage.SETTLING, now, handshakes=True)
    while not stop.settle(now, half_open=True, graceful_timeout=30.0):
        assert stop.due is not None and now < stop.due
        now = stop.due
    assert HANDSHAKES <= now - 100.0 <= HANDSHAKES + 2 * SETTLE


def test_queue_without_workers() -> None:
    """Where all workers were lost in a stop, some more may be forked for the queue, until one has seen its end."""
    stop = StopSequence()
    stop.rise(Stage.SETTLING, 0.0, handshakes=False)
    stop.settle(0.0, half_open=False, graceful_timeout=30.0)
    for _ in range(LAST_CALLS):
        assert stop.may_have_queue(29.9) and not stop.may_have_queue(30.0)
        stop.called()
    assert not stop.may_have_queue(1.0)
    other = StopSequence()
    other.rise(Stage.SETTLING, 0.0, handshakes=False)
    other.settle(0.0, half_open=False, graceful_timeout=30.0)
    other.found_empty()
    assert not other.may_have_queue(1.0)


EVENTS = st.lists(
    st.tuples(st.sampled_from([*SIGNALS, "settle", "half-open", "api"]), st.floats(0.0, 0.3)), min_size=1, max_size=40
)


@given(EVENTS)
def test_a_stop_only_becomes_harder(events: list[tuple[str, float]]) -> None:
    """Whatever comes in whatever order: no stage is left for a softer one, and only SETTLING waits for something."""
    stop, now, before = StopSequence(), 0.0, Stage.SERVING
    for event, seconds in events:
        now += seconds
        if event in SIGNALS:
            wanted = ESCALATION[event, stop.stage]
            assert stop.rise(wanted, now, handshakes=True) == (wanted > before)
        elif event == "api":
            stop.rise(Stage.SETTLING, now, handshakes=True)
        else:
            drained = stop.settle(now, half_open=event == "half-open", graceful_timeout=1.0)
            assert drained == (before is Stage.SETTLING and stop.stage is Stage.DRAINING)
        assert stop.stage >= before
        assert (stop.due is not None) == (stop.stage is Stage.SETTLING)
        assert stop.stage is Stage.DRAINING or not stop.may_have_queue(now)
        before = stop.stage
