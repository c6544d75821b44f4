"""How single workers leave a pool, and how a pool stops, one rule per test."""

import pytest

from prefork.rules.pool import Abort, Kill, Need, Pool, PoolEvent, Quit, Retire, Spawn
from prefork.rules.states import State
from prefork.rules.stop_sequence import Stage
from prefork.rules.worker_exit import Reason
from prefork.settings.settings import Options
from rules.bench import Bench

# -- leaving -----------------------------------------------------------------------------------------------------------


def test_orders_are_repeated_until_understood() -> None:
    """Retire goes out again and again, at growing intervals, until the worker's slot says that it was understood."""
    bench = Bench(2)
    bench.pool.resize(1)
    assert bench.look() == [Retire(2)]
    gaps = []
    for _ in range(7):
        gaps.append(bench.wait())
        assert bench.look() == [Retire(2)] and bench.look() == []
    assert gaps == [0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5]
    bench.pool.acknowledged(2, bench.now)
    assert bench.wait() > 20.0


def test_settings_belong_to_a_generation() -> None:
    """A reload brings settings of its own; the workers of the old generation keep theirs. A failure changes none."""
    bench = Bench(2, boot_timeout=5.0, graceful_timeout=7.0, request_timeout=9.0)
    new = Options({"workers": 3, "boot_timeout": 1.0, "graceful_timeout": 2.0, "request_timeout": 4.0})
    bench.pool.reload(new)
    assert bench.look() == [Spawn(2, 2)] and bench.pool.request_timeout == 4.0
    assert bench.look(1.0) == [Abort(3)], "the new one's boot_timeout"
    bench.exit(3)
    assert (bench.pool.size, bench.pool.options.workers, bench.pool.request_timeout) == (2, 2, 9.0)
    bench.pool.reload(new)
    assert bench.look() == [Spawn(2, 3)]
    bench.boot(4)
    assert bench.pool.options is new and bench.pool.size == 3
    bench.look()
    bench.boot(*bench.pool.members)
    retired = [order.pid for order in bench.look() if isinstance(order, Retire)]
    bench.pool.acknowledged(retired[0], bench.now)
    assert bench.pool.members[retired[0]].kill_at == bench.now + 7.0, "the old one's graceful_timeout"


def test_an_ordered_size_outlives_reloads() -> None:
    """How many workers an operator has asked for counts more than the settings of a new generation."""
    bench = Bench(2)
    bench.pool.resize(1)
    bench.pool.reload(Options({"workers": 5}))
    bench.look()
    bench.boot(*bench.pool.members)
    assert bench.pool.size == 1


def test_a_reload_that_waits_has_the_last_settings() -> None:
    """Of several reloads that come during one, the settings of the last one count."""
    bench = Bench(1)
    for workers in (2, 3, 4):
        bench.pool.reload(Options({"workers": workers}))
    for _ in range(40):
        bench.look()
        bench.boot(*bench.pool.members)
        for pid in [pid for pid, member in bench.pool.members.items() if member.state is State.RETIRING]:
            bench.exit(pid)
    assert bench.pool.options.workers == bench.pool.size == 4 and bench.pool.generation == 3


def test_why_a_worker_left() -> None:
    """Its own words count where it is recycled for them, and are dropped where it leaves for another reason."""
    bench = Bench(2)
    bench.pool.request_recycle(1, "max_requests: 3 of 3")
    (spawn,) = bench.look()
    assert isinstance(spawn, Spawn) and spawn.reason is Need.REPLACEMENT
    bench.boot(3)
    (retire,) = bench.look()
    assert isinstance(retire, Retire) and (retire.pid, retire.reason) == (1, Reason.RECYCLED)
    assert (bench.exit(1).reason, bench.exit(2).reason) == (Reason.RECYCLED, Reason.KILLED)
    bench = Bench(1)
    bench.pool.request_recycle(1, "max_requests: 3 of 3")
    bench.pool.stop(Stage.DRAINING, bench.now)
    member = bench.exit(1)
    assert (member.reason, member.why) == (Reason.STOPPED, "")


@pytest.mark.parametrize("heard", [False, True])
def test_graceful_timeout(heard: bool) -> None:
    """Who has not left after `graceful_timeout` shows its stacks and is killed, again and again until it is gone."""
    bench = Bench(2, graceful_timeout=5.0)
    bench.pool.resize(1)
    bench.look()
    if heard:
        bench.pool.acknowledged(2, bench.now)
    assert bench.look(4.999) == ([] if heard else [Retire(2)])
    assert bench.look(0.001) == [Abort(2)] and bench.look(Pool.DUMP) == [Kill(2)]
    assert bench.look(Pool.AGAIN - 0.01) == [] and bench.look(0.01) == [Kill(2)] and bench.look() == []
    assert bench.exit(2).reason is Reason.GRACEFUL_TIMEOUT


def test_no_time_to_drain_is_time_to_leave() -> None:
    """With a `graceful_timeout` of 0 a worker is still asked first, so that an idle one leaves by itself."""
    bench = Bench(2, graceful_timeout=0.0)
    bench.pool.resize(1)
    assert bench.look() == [Retire(2)]


def test_condemned() -> None:
    """A worker that hangs shows its stacks, is killed, and replaced at once; a late answer does not save it."""
    bench = Bench(1)
    bench.pool.condemn(1, Reason.REQUEST_TIMEOUT, bench.now)
    bench.pool.acknowledged(1, bench.now)
    assert bench.look() == [Abort(1), Spawn(1, 1)]
    bench.pool.condemn(1, Reason.REQUEST_TIMEOUT, bench.now)
    assert bench.look(Pool.DUMP) == [Kill(1)] and bench.exit(1).reason is Reason.REQUEST_TIMEOUT


def test_condemned_while_it_leaves() -> None:
    """The answer to an earlier order does not put off the end of a worker that hangs."""
    bench = Bench(1)
    bench.pool.stop(Stage.FAST, bench.now)
    bench.look()
    bench.pool.condemn(1, Reason.REQUEST_TIMEOUT, bench.now)
    bench.pool.acknowledged(1, bench.now)
    assert bench.look() == [Kill(1)]


def test_late_ready_byte() -> None:
    """The ready byte of a worker that was asked to leave changes nothing."""
    bench = Bench(1)
    bench.pool.resize(2)
    bench.look()
    bench.pool.resize(1)
    bench.look()
    bench.boot(2)
    assert bench.pool.members[2].state is State.RETIRING and bench.ready == [1]


def test_messages_of_strangers() -> None:
    """Messages for pids that are gone, or never were, are ignored."""
    bench = Bench(1)
    for pid in (0, -1, 99):
        bench.boot(pid)
        bench.pool.request_recycle(pid)
        bench.pool.leaves(pid, bench.now)
        bench.pool.acknowledged(pid, bench.now)
        bench.pool.condemn(pid, Reason.REQUEST_TIMEOUT, bench.now)
    assert bench.look() == [] and bench.ready == [1]


def test_grant() -> None:
    """Time that the master missed counts against nobody's boot, and nobody's drain."""
    bench = Bench(2, boot_timeout=5.0, graceful_timeout=5.0)
    bench.pool.resize(1)
    bench.look()
    bench.pool.acknowledged(2, bench.now)
    bench.pool.resize(2)
    bench.look()
    bench.pool.grant(100.0)
    assert bench.look(104.9) == [] and len(bench.look(0.1)) == 3, "both aborted, one replaced"


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_graceful_stop() -> None:
    """All are asked to leave, nobody is replaced, and with the last one the pool is done."""
    bench = Bench(2)
    bench.pool.stop(Stage.DRAINING, bench.now)
    assert bench.look() == [Retire(1), Retire(2)]
    assert bench.exit(1).reason is Reason.STOPPED and not bench.pool.done
    bench.exit(2)
    assert bench.look() == [] and bench.pool.done and bench.pool.next_deadline() is None


def test_fast_stop() -> None:
    """Who must leave at once is killed if it does not say that it heard, else after the time for its teardown."""
    bench = Bench(2)
    bench.pool.stop(Stage.FAST, bench.now)
    assert bench.look() == [Quit(1), Quit(2)]
    bench.pool.acknowledged(2, bench.now)
    assert bench.look(Pool.QUIT_ANSWER) == [Kill(1)]
    bench.exit(1)
    assert bench.look(Pool.TEARDOWN - Pool.QUIT_ANSWER) == [Kill(2)]


def test_stops_only_rise() -> None:
    """A harder stop replaces a softer one at once, never the other way."""
    bench = Bench(1)
    for how, orders in [
        (Stage.DRAINING, [Retire(1)]),
        (Stage.DRAINING, []),
        (Stage.FAST, [Quit(1)]),
        (Stage.DRAINING, []),
        (Stage.KILL, [Kill(1)]),
        (Stage.KILL, []),
    ]:
        bench.pool.stop(how, bench.now)
        assert bench.look() == orders
        bench.pool.acknowledged(1, bench.now)


def test_a_stop_ends_a_reload() -> None:
    """Stopping is obeyed at once in the middle of a reload, and no reload begins after it."""
    bench = Bench(1)
    bench.pool.reload()
    bench.look()
    bench.pool.stop(Stage.DRAINING, bench.now)
    bench.pool.reload()
    assert bench.look() == [Retire(1), Retire(2)] and not bench.pool.reloading
    bench.exit(1, 2)
    assert bench.pool.done


def test_a_remembered_reload_does_not_follow_a_stop() -> None:
    """Where a reload is to follow the one under way, and a stop begins, it does not follow, also before the workers are
    told of the stop."""
    bench = Bench(1)
    bench.pool.reload()
    bench.look()
    bench.pool.reload()
    bench.pool.forget_reload()
    bench.exit(2, crashed=True)
    bench.look()
    assert [event for event, _ in bench.events()] == [
        PoolEvent.RELOAD_BEGINS,
        PoolEvent.RELOAD_REMEMBERED,
        PoolEvent.RELOAD_FAILED,
    ]


def test_stopping_an_empty_pool() -> None:
    """A pool of which every worker is in back-off stops at once."""
    bench = Bench(1)
    bench.exit(1, crashed=True)
    bench.pool.stop(Stage.DRAINING, bench.now)
    assert bench.look() == [] and bench.pool.done
