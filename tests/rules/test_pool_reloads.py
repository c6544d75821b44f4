"""How a pool goes from one generation to the next, one rule per test."""

import pytest

from prefork.rules.pool import Abort, Kill, Pool, PoolEvent, Retire, Spawn
from prefork.rules.stop_sequence import Stage
from prefork.rules.worker_exit import Reason
from rules.bench import Bench


def test_reload() -> None:
    """One of the next generation first; when it is ready, one of the old for each of the new, never below the size."""
    bench = Bench(2)
    bench.pool.reload()
    assert bench.look() == [Spawn(2, 2)] and bench.pool.reloading
    assert bench.look(1.0) == [], "nothing more before it is ready"
    bench.boot(3)
    assert bench.look() == [Retire(1)]
    bench.exit(1)
    assert bench.look() == [Spawn(0, 2)]
    bench.boot(4)
    assert bench.look() == [Retire(2)] and bench.exit(2).reason is Reason.RELOADED
    bench.look()
    assert bench.ready == [4, 3] and not bench.pool.reloading
    assert bench.events() == [(PoolEvent.RELOAD_BEGINS, 2), (PoolEvent.RELOAD_SERVES, 2)]


def test_reload_with_a_surge() -> None:
    """The first one is alone until it is ready; then `max_surge` at a time."""
    bench = Bench(4, max_surge=3)
    bench.pool.reload()
    assert bench.look() == [Spawn(4, 2)]
    bench.boot(5)
    assert bench.look() == [Retire(1), Spawn(5, 2), Spawn(6, 2)]
    bench.boot(6, 7)
    assert bench.look() == [Retire(2), Retire(3)]


@pytest.mark.parametrize("hangs", [False, True])
def test_failed_reload(hangs: bool) -> None:
    """If the next generation does not boot, the old one serves on, untouched, and its number stays in force."""
    bench = Bench(2, boot_timeout=5.0)
    bench.pool.reload()
    bench.look()
    if hangs:
        assert bench.look(5.0) == [Abort(3)] and bench.look(Pool.DUMP) == [Kill(3)]
    bench.exit(3, crashed=not hangs)
    assert bench.look(60.0) == [] and bench.ready == [1, 2] and bench.pool.goal == 1
    assert bench.events() == [(PoolEvent.RELOAD_BEGINS, 2), (PoolEvent.RELOAD_FAILED, 2)]


def test_reloads_coalesce() -> None:
    """However many reloads are asked for meanwhile, one more follows, of a new number, also after a failed one."""
    bench = Bench(1)
    for _ in range(5):
        bench.pool.reload()
    assert bench.look() == [Spawn(1, 2)]
    bench.exit(2, crashed=True)
    assert [events for events, _ in bench.events()] == [
        PoolEvent.RELOAD_BEGINS,
        *[PoolEvent.RELOAD_REMEMBERED] * 4,
        PoolEvent.RELOAD_FAILED,
        PoolEvent.RELOAD_BEGINS,
    ]
    bench.look(1.0)
    bench.boot(bench.pid)
    assert bench.look() == [Retire(1)]
    assert bench.events() == []  # the old worker may still accept
    bench.pool.acknowledged(1, bench.now)
    bench.look()
    assert bench.events() == [(PoolEvent.RELOAD_SERVES, 3)]


def test_a_reload_that_follows_begins_in_the_same_look() -> None:
    """When the last old worker has understood, the next reload begins at once, not at a later event."""
    bench = Bench(1, max_surge=2)
    bench.pool.reload()
    bench.pool.reload()
    bench.look()
    bench.boot(2)
    assert bench.look() == [Retire(1)]
    bench.pool.acknowledged(1, bench.now)
    assert bench.look() == [Spawn(2, 3)] and bench.look() == []


def test_losses_while_a_generation_is_unproven() -> None:
    """Those who die during a reload are replaced at once by the last good generation, also if nobody is left."""
    bench = Bench(2)
    bench.pool.reload()
    bench.look()
    bench.exit(1, 2)
    assert bench.look() == [Spawn(0, 1), Spawn(1, 1)]


def test_a_reload_is_tried_although_the_old_generation_crashes() -> None:
    """The reload that mends a crash loop does not wait for its end, and ends the back-off."""
    bench = Bench(2)
    bench.exit(1, crashed=True)
    bench.pool.reload()
    assert bench.look() == [Spawn(0, 1), Spawn(2, 2)]
    bench.exit(3, crashed=True)
    bench.boot(4)
    assert bench.look() == [Spawn(0, 2)]


def test_boots_that_lead_nowhere() -> None:
    """When the next generation is proven, workers of the last one that are still in their boot are dropped."""
    bench = Bench(2)
    bench.exit(1)
    bench.pool.reload()
    assert bench.look() == [Spawn(0, 1), Spawn(2, 2)]
    bench.boot(4)
    assert bench.look() == [Retire(3)] and bench.ready == [2, 4]
    assert bench.exit(3).reason is Reason.RELOADED


def test_reload_before_anybody_was_ready() -> None:
    """A reload during the first boot is another chance: the pool is not done before that failed as well."""
    bench = Bench(1, ready=False)
    bench.look()
    bench.pool.reload()
    assert bench.look() == [Spawn(1, 2)]
    bench.exit(1, crashed=True)
    assert not bench.pool.boot_failed and bench.look(29.0) == []
    bench.exit(2, crashed=True)
    assert bench.pool.boot_failed


def test_reload_while_workers_wear_out() -> None:
    """A reload is through when all are of its generation, even if some ask to be recycled already."""
    bench = Bench(1)
    bench.pool.reload()
    bench.look()
    bench.boot(2)
    bench.pool.request_recycle(2)
    bench.look()
    bench.pool.acknowledged(1, bench.now)
    bench.look()
    assert bench.events()[-1] == (PoolEvent.RELOAD_SERVES, 2)


def test_a_reload_during_a_stop_is_told() -> None:
    """A stop gives up the generation that is not ready yet, and a reload during a stop is ignored; both are told."""
    bench = Bench(1)
    bench.pool.reload()
    bench.look()
    bench.events()
    bench.pool.stop(Stage.DRAINING, bench.now)
    bench.pool.reload()
    assert bench.events() == [(PoolEvent.RELOAD_GIVEN_UP, 2), (PoolEvent.RELOAD_IGNORED, 1)]


def test_back_off_of_a_slot() -> None:
    """The delay of a slot is told while it will be waited for: not before any worker was ready, nor in a stop."""
    bench = Bench(1)
    assert bench.pool.backoff_of(0, bench.now) == 0.0
    bench.exit(1, crashed=True)
    assert 0.08 <= bench.pool.backoff_of(0, bench.now) <= 0.1
    assert bench.pool.backoff_of(0, bench.now + 1.0) == 0.0 == bench.pool.backoff_of(1, bench.now)
    bench.pool.stop(Stage.DRAINING, bench.now)
    assert bench.pool.backoff_of(0, bench.now) == 0.0
