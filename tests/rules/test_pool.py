"""How a pool reaches its size and keeps it, one rule per test. `test_pool_model` holds all rules at once."""

import pytest

from prefork.rules.pool import Abort, Kill, Pool, PoolEvent, Retire, Spawn
from prefork.rules.worker_exit import Reason
from prefork.settings.settings import MAX_WORKERS
from rules.bench import Bench

# -- starting ----------------------------------------------------------------------------------------------------------


def test_all_start_at_once() -> None:
    """A pool begins with all its workers, in the lowest slots, and says once that it is ready."""
    bench = Bench(3, ready=False)
    assert bench.look() == [Spawn(0, 1), Spawn(1, 1), Spawn(2, 1)]
    bench.boot(1, 2)
    bench.look()
    assert bench.events() == []
    bench.boot(3, 3)
    bench.look()
    assert bench.events() == [(PoolEvent.READY, 1)]
    assert bench.look(1000.0) == [] and bench.pool.next_deadline() is None, "an idle pool never wakes up"


def test_boot_failed() -> None:
    """If every slot fails before anybody was ready, the pool is done: nothing is tried twice."""
    bench = Bench(2, ready=False)
    bench.look()
    assert bench.exit(1, crashed=True).reason is Reason.BOOT_FAILED
    assert bench.look(29.0) == [] and not bench.pool.done
    bench.exit(2, crashed=True)
    assert bench.pool.boot_failed and bench.pool.done and bench.look(60.0) == []


def test_a_first_generation_is_not_over_while_a_fork_waits() -> None:
    """Where one worker's boot failed and another one's fork was refused, the pool waits for what that one will say."""
    bench = Bench(2, ready=False)
    bench.refuse = True
    assert bench.look() == [Spawn(0, 1), Spawn(1, 1)]
    bench.refuse = False
    bench.wait()
    assert bench.look() == [Spawn(0, 1), Spawn(1, 1)]
    bench = Bench(2, ready=False)
    first, second = bench.pool.orders(bench.now)
    assert isinstance(first, Spawn) and isinstance(second, Spawn)
    bench.pool.spawned(first, 1, bench.now)
    bench.pool.spawn_failed(bench.now)
    bench.exit(1, crashed=True)
    assert not bench.pool.boot_failed and not bench.pool.done
    bench.wait()
    assert bench.look() == [Spawn(1, 1)]
    bench.exit(1, crashed=True)
    assert bench.pool.boot_failed and bench.pool.done and bench.pool.next_deadline() is None


def test_one_that_boots_saves_the_others() -> None:
    """Once one worker was ready, the slots that failed are tried again."""
    bench = Bench(2, ready=False)
    bench.look()
    bench.exit(1, crashed=True)
    bench.boot(2)
    assert bench.look() == [] and 0.08 <= bench.wait() <= 0.1
    assert bench.look() == [Spawn(0, 1)] and not bench.pool.boot_failed


def test_hanging_boot() -> None:
    """A worker that is not ready in time shows its stacks and is killed, and its reason says so."""
    bench = Bench(1, ready=False, boot_timeout=5.0)
    bench.look()
    assert bench.wait() == 5.0 and bench.look()[0] == Abort(1)
    assert bench.wait() == Pool.DUMP and bench.look() == [Kill(1)]
    assert bench.exit(1).reason is Reason.BOOT_TIMEOUT


def test_a_first_generation_that_hangs_is_over_after_one_boot_timeout() -> None:
    """Where all hang in their first boot, nobody is started in their place, and the pool says so."""
    bench = Bench(2, ready=False, boot_timeout=5.0)
    bench.look()
    assert bench.look(5.0) == [Abort(1), Abort(2)]
    assert bench.look(Pool.DUMP) == [Kill(1), Kill(2)]
    bench.exit(1, 2)
    assert bench.pool.boot_failed


# -- replacing ---------------------------------------------------------------------------------------------------------


def test_lost_workers_are_replaced_at_once() -> None:
    """Workers that were killed are respawned in their slots without a delay."""
    bench = Bench(2)
    bench.exit(1, 2)
    assert bench.look() == [Spawn(0, 1), Spawn(1, 1)]


def test_crash_loop() -> None:
    """A slot whose workers fail, in their boot or right after it, waits longer each time; the others do not."""
    bench = Bench(2, ready=True)
    bench.exit(1, crashed=True)
    waits = []
    for failure in range(9):
        assert bench.look() == []
        waits.append(bench.wait())
        assert bench.look() == [Spawn(0, 1)]
        if failure % 2:
            bench.boot(bench.pid)
        bench.exit(bench.pid, crashed=True)
    full = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert all(0.8 * most <= wait <= most for wait, most in zip(waits, full, strict=True))
    bench.exit(2, served=True)
    assert Spawn(1, 1) in bench.look()


@pytest.mark.parametrize(("after", "served"), [(1.0, False), (0.0, True)])
def test_a_healthy_spell_ends_the_back_off(after: float, served: bool) -> None:
    """A worker that served anybody, or for a second, was no failure, however it ends."""
    bench = Bench(1)
    bench.exit(1, crashed=True)
    bench.look(0.1)
    bench.boot(2)
    bench.look(after)
    bench.exit(2, crashed=True, served=served)
    assert bench.look() == [Spawn(0, 1)]


def test_refused_forks() -> None:
    """When the system refuses forks the whole pool waits; those refused in one round count once."""
    bench = Bench(4, ready=False)
    bench.refuse = True
    assert len(bench.look()) == 4 and bench.look() == []
    assert 0.08 <= bench.wait() <= 0.1
    assert len(bench.look()) == 4 and 0.16 <= bench.wait() <= 0.2
    bench.refuse = False
    assert len(bench.look()) == 4 and not bench.pool.boot_failed


def test_a_fork_that_succeeds_does_not_hide_one_that_was_refused() -> None:
    """Of two forks one is refused, the other not: the pool waits nevertheless before it tries again."""
    bench = Bench(2, ready=False)
    first, _ = bench.pool.orders(bench.now)
    bench.pool.spawn_failed(bench.now)
    assert isinstance(first, Spawn)
    bench.pool.spawned(first, 1, bench.now)
    assert bench.look() == [] and bench.wait() >= 0.08


def test_term_from_outside() -> None:
    """A worker that drains by itself is replaced at once, in another slot; it is heard, so not asked again."""
    bench = Bench(1)
    bench.pool.leaves(1, bench.now)
    assert bench.look() == [Spawn(1, 1)] and bench.exit(1).reason is Reason.LEFT


def test_a_worker_that_leaves_of_its_own_accord() -> None:
    """It is replaced at once like one that was told to; but one that always does so, having served nobody, is a crash
    loop, before it is ready and after."""
    bench = Bench(1)
    bench.pool.leaves(1, bench.now, Reason.EXITED)
    assert bench.look() == [Spawn(1, 1)]
    assert bench.exit(1, crashed=True, served=True).reason is Reason.EXITED
    bench.boot(2)
    bench.pool.leaves(2, bench.now, Reason.EXITED)
    assert bench.look() == [Spawn(0, 1)]
    bench.exit(2, crashed=True)
    bench.pool.leaves(3, bench.now, Reason.EXITED)
    assert bench.look() == [] and 0.08 <= bench.wait() <= 0.1
    assert bench.look() == [Spawn(1, 1)]
    bench.exit(3, crashed=True)
    bench.exit(4, crashed=True)
    assert bench.look() == [] and 0.08 <= bench.wait() <= 0.1


def test_a_request_that_cannot_be_interrupted() -> None:
    """A worker that leaves because one of its requests hangs is replaced at once, has graceful_timeout for the others,
    and its reason stays with it to its end."""
    bench = Bench(1)
    bench.pool.leaves(1, bench.now, Reason.REQUEST_TIMEOUT)
    assert bench.look() == [Spawn(1, 1)]
    bench.boot(2)
    assert bench.look(29.9) == []
    assert bench.look(0.2) == [Abort(1)] and bench.look(Pool.DUMP) == [Kill(1)]
    assert bench.exit(1).reason is Reason.REQUEST_TIMEOUT


def test_leavers_do_not_pile_up() -> None:
    """While as many leave as are wanted and more may run, nobody else is started."""
    bench = Bench(2, graceful_timeout=1000.0)
    for _ in range(5):
        for pid in list(bench.pool.members):
            bench.pool.leaves(pid, bench.now)
        bench.look()
    assert len(bench.pool.members) == 2 * 2 + 1


# -- resizing ----------------------------------------------------------------------------------------------------------


def test_grow_and_shrink() -> None:
    """New workers take the next slots; those in the highest slots are asked to leave."""
    bench = Bench(2)
    bench.pool.resize(4)
    assert bench.look() == [Spawn(2, 1), Spawn(3, 1)]
    bench.boot(3, 4)
    bench.pool.resize(1)
    assert bench.look() == [Retire(2), Retire(3), Retire(4)]
    assert bench.exit(4).reason is Reason.RESIZED


def test_bounds() -> None:
    """There is at least one worker, and never more than the scoreboard has room for."""
    bench = Bench(1)
    bench.pool.resize(-5)
    assert bench.pool.size == 1
    bench.pool.resize(10**6)
    assert bench.pool.size == MAX_WORKERS


def test_shrinking_takes_those_first_who_do_not_serve_yet() -> None:
    """A worker in its boot is dropped before one that serves."""
    bench = Bench(1)
    bench.pool.resize(2)
    bench.look()
    bench.pool.resize(1)
    assert bench.look() == [Retire(2)] and bench.ready == [1]


# -- recycling ---------------------------------------------------------------------------------------------------------


def test_recycling_starts_the_replacement_first() -> None:
    """Worn workers go one after the other, each when its replacement is ready."""
    bench = Bench(2)
    bench.pool.request_recycle(1)
    bench.pool.request_recycle(2)
    assert bench.look() == [Spawn(2, 1)]
    bench.boot(3)
    assert bench.look() == [Retire(1)]
    assert bench.exit(1).reason is Reason.RECYCLED and bench.look() == [Spawn(0, 1)]


def test_lifetime() -> None:
    """A worker past `max_lifetime` is replaced, at a moment that is drawn for each."""
    bench = Bench(2, max_lifetime=100.0)
    assert 90.0 <= bench.wait() <= 100.0
    assert bench.look() == [Spawn(2, 1)]
