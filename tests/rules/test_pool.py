"""The rules of the pool one by one, each named. `test_pool_model` holds them against everything at once."""

import random

import pytest

from prefork.rules.pool import Abort, Kill, Member, Need, Order, Pool, PoolEvent, Quit, Retire, Spawn
from prefork.rules.states import State, Stop
from prefork.rules.worker_exit import Reason
from prefork.settings.settings import MAX_WORKERS, Options


class Bench:
    """A pool with a clock that stands until it is moved, and forks that succeed until `refuse` is set."""

    def __init__(self, workers: int = 2, *, ready: bool = True, **values: float) -> None:
        self.pool = Pool(Options({"workers": workers, **values}), random.Random(1))
        self.now, self.pid, self.refuse = 100.0, 0, False
        if ready:
            self.look()
            self.boot(*self.pool.members)
            assert self.look() == []
            self.pool.events.clear()

    def look(self, after: float = 0.0) -> list[Order]:
        """Carry out the orders, `after` so many seconds."""
        self.now += after
        orders = self.pool.orders(self.now)
        for order in orders:
            if isinstance(order, Spawn):
                self.pid += 1
                if self.refuse:
                    self.pool.spawn_failed(self.now)
                else:
                    self.pool.spawned(order, self.pid, self.now)
        return orders

    def boot(self, *pids: int) -> None:
        for pid in pids:
            self.pool.booted(pid, self.now)

    def exit(self, *pids: int, crashed: bool = False, served: bool = False) -> Member:
        """By themselves (`crashed`), as ordered, or killed from outside."""
        for pid in pids:
            asked = self.pool.members[pid].state is State.RETIRING
            member = self.pool.exited(pid, self.now, status=1 if crashed else 0 if asked else -9, served=served)
        return member

    def wait(self) -> float:
        """Sleep until the next deadline; how long that was."""
        due = self.pool.next_deadline()
        assert due is not None
        slept, self.now = due - self.now, due
        return round(slept, 6)

    @property
    def ready(self) -> list[int]:
        return [m.pid for m in self.pool.ready]

    def events(self) -> list[tuple[PoolEvent, int]]:
        events = list(self.pool.events)
        self.pool.events.clear()
        return events


# -- starting ---------------------------------------------------------------------------------------------------------


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


# -- replacing --------------------------------------------------------------------------------------------------------


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


# -- resizing ---------------------------------------------------------------------------------------------------------


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


# -- reloading --------------------------------------------------------------------------------------------------------


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
    bench.pool.wear_out(2)
    bench.look()
    bench.pool.acknowledged(1, bench.now)
    bench.look()
    assert bench.events()[-1] == (PoolEvent.RELOAD_SERVES, 2)


# -- recycling --------------------------------------------------------------------------------------------------------


def test_recycling_starts_the_replacement_first() -> None:
    """Worn workers go one after the other, each when its replacement is ready."""
    bench = Bench(2)
    bench.pool.wear_out(1)
    bench.pool.wear_out(2)
    assert bench.look() == [Spawn(2, 1)]
    bench.boot(3)
    assert bench.look() == [Retire(1)]
    assert bench.exit(1).reason is Reason.RECYCLED and bench.look() == [Spawn(0, 1)]


def test_lifetime() -> None:
    """A worker past `max_lifetime` is worn, at a moment that is drawn for each."""
    bench = Bench(2, max_lifetime=100.0)
    assert 90.0 <= bench.wait() <= 100.0
    assert bench.look() == [Spawn(2, 1)]


# -- leaving ----------------------------------------------------------------------------------------------------------


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
    bench.pool.wear_out(1, "max_requests: 3 of 3")
    (spawn,) = bench.look()
    assert isinstance(spawn, Spawn) and spawn.reason is Need.REPLACEMENT
    bench.boot(3)
    (retire,) = bench.look()
    assert isinstance(retire, Retire) and (retire.pid, retire.reason) == (1, Reason.RECYCLED)
    assert (bench.exit(1).reason, bench.exit(2).reason) == (Reason.RECYCLED, Reason.KILLED)
    bench = Bench(1)
    bench.pool.wear_out(1, "max_requests: 3 of 3")
    bench.pool.stop(Stop.GRACEFUL, bench.now)
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
    bench.pool.stop(Stop.FAST, bench.now)
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
        bench.pool.wear_out(pid)
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


# -- stopping ---------------------------------------------------------------------------------------------------------


def test_graceful_stop() -> None:
    """All are asked to leave, nobody is replaced, and with the last one the pool is done."""
    bench = Bench(2)
    bench.pool.stop(Stop.GRACEFUL, bench.now)
    assert bench.look() == [Retire(1), Retire(2)]
    assert bench.exit(1).reason is Reason.STOPPED and not bench.pool.done
    bench.exit(2)
    assert bench.look() == [] and bench.pool.done and bench.pool.next_deadline() is None


def test_fast_stop() -> None:
    """Who must leave at once is killed if it does not say that it heard, else after the time for its teardown."""
    bench = Bench(2)
    bench.pool.stop(Stop.FAST, bench.now)
    assert bench.look() == [Quit(1), Quit(2)]
    bench.pool.acknowledged(2, bench.now)
    assert bench.look(Pool.UNHEARD) == [Kill(1)]
    bench.exit(1)
    assert bench.look(Pool.TEARDOWN - Pool.UNHEARD) == [Kill(2)]


def test_stops_only_rise() -> None:
    """A harder stop replaces a softer one at once, never the other way."""
    bench = Bench(1)
    for how, orders in [
        (Stop.GRACEFUL, [Retire(1)]),
        (Stop.GRACEFUL, []),
        (Stop.FAST, [Quit(1)]),
        (Stop.GRACEFUL, []),
        (Stop.KILL, [Kill(1)]),
        (Stop.KILL, []),
    ]:
        bench.pool.stop(how, bench.now)
        assert bench.look() == orders
        bench.pool.acknowledged(1, bench.now)


def test_a_stop_ends_a_reload() -> None:
    """Stopping is obeyed at once in the middle of a reload, and no reload begins after it."""
    bench = Bench(1)
    bench.pool.reload()
    bench.look()
    bench.pool.stop(Stop.GRACEFUL, bench.now)
    bench.pool.reload()
    assert bench.look() == [Retire(1), Retire(2)] and not bench.pool.reloading
    bench.exit(1, 2)
    assert bench.pool.done


def test_stopping_an_empty_pool() -> None:
    """A pool of which every worker is in back-off stops at once."""
    bench = Bench(1)
    bench.exit(1, crashed=True)
    bench.pool.stop(Stop.GRACEFUL, bench.now)
    assert bench.look() == [] and bench.pool.done
