"""The tables of `states`."""

from itertools import product

from prefork.rules.states import ROLLOUT, TRANSITIONS, Event, Phase, Rollout, RolloutEvent, State
from prefork.rules.stop_sequence import Stage

DRAWING = """
            booted      retired     exited
starting    ready       retiring    gone
ready       ready       retiring    gone
retiring    retiring    retiring    gone
"""


def test_every_live_state_answers_every_event() -> None:
    """Whatever happens to a live worker, the table says what it is then; the dead have no future."""
    assert set(TRANSITIONS) == set(product(set(State) - {State.GONE}, Event))


def test_drawn() -> None:
    """The table is the one that was designed."""
    rows = [["", *(event.value for event in Event)]]
    rows += [[s.value, *(TRANSITIONS[s, e].value for e in Event)] for s in State if s is not State.GONE]
    drawn = "\n".join("".join(cell.ljust(12) for cell in row).rstrip() for row in rows)
    assert drawn == DRAWING.strip("\n")


def test_there_is_no_way_back() -> None:
    """A worker that leaves never serves again, and one that is ready never starts again."""
    order = list(State)
    assert all(order.index(after) >= order.index(before) for (before, _), after in TRANSITIONS.items())


def test_orders_of_severity() -> None:
    """Stops and phases are compared by number: harder and further is greater."""
    assert list(Stage) == sorted(Stage)
    assert Phase.BOOTING < Phase.SERVING < Phase.DRAINING < Phase.LEAVING
    assert int(Phase.BOOTING) == 0, "a cleared slot is that of a booting worker"


def test_a_reload_can_be_asked_for_and_stopped_at_any_time() -> None:
    """A reload is remembered while another is under way, and a stop ends it, however far it has come."""
    for rollout in Rollout:
        assert ROLLOUT[rollout, RolloutEvent.ASKED] is (Rollout.PROVING if rollout is Rollout.NONE else rollout)
        assert ROLLOUT[rollout, RolloutEvent.STOPPED] is Rollout.NONE


def test_only_an_unproven_generation_fails() -> None:
    """Once a worker of a generation was ready there is no way back to the former one."""
    assert {before for before, event in ROLLOUT if event is RolloutEvent.FAILED} == {Rollout.PROVING}
    assert {before for before, event in ROLLOUT if event is RolloutEvent.REPLACED} == {Rollout.ROLLING}
