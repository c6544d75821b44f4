"""The kernel, the clock and a master that does as it is told, for the model of the pool in `test_pool_model`.

`World` checks every order of the pool and every state that it reaches.
"""

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefork.rules.pool import Abort, Kill, Order, Pool, PoolEvent, Quit, Retire, Spawn
from prefork.rules.states import Rollout, State
from prefork.rules.stop_sequence import ESCALATION, HANDSHAKES, LAST_CALLS, SETTLE, Stage, StopSequence
from prefork.rules.worker_exit import Reason
from prefork.settings.settings import Options

PROMPT = 0.05  # seconds that a sound worker takes to boot, and to obey
LEAVING = (Reason.LEFT, Reason.REQUEST_TIMEOUT, Reason.EXITED)  # told by whom: outside, its deadline, the program
SIGNALS = ("SIGTERM", "SIGTERM", "SIGINT", "SIGQUIT")
Fate = Callable[[int], tuple[float | None, float | None]]


@dataclass(eq=False, slots=True)
class Process:
    """A worker as the kernel has it; `World.run` brings about its boot and its end."""

    pid: int
    slot: int
    generation: int
    born: float
    deaf: bool  # heeds SIGKILL only
    boots_at: float | None  # None: hangs
    dies_at: float | None  # None: when it is told to
    was_ready: bool = False
    condemned: bool = False
    told_at: float | None = None
    told: type[Order] | None = None  # the last order it was sent
    killed_at: float = 0.0
    signal_at: float = 0.0
    acknowledged: bool = False


class World:
    """A pool, its kernel and its clock. Each method but `look`, `run` and `finish` is one event."""

    def __init__(self, seed: object = 0, fate: Fate = lambda generation: (None, None), **values: Any) -> None:
        self.rng = random.Random(str(seed))
        self.options = Options({"workers": 2, "boot_timeout": 5.0, "graceful_timeout": 3.0, **values})
        self.pool = Pool(self.options, self.rng)
        self.fate = fate  # of a generation: the seconds from the fork to ready, and to the crash
        self.now = 1000.0
        self.processes: dict[int, Process] = {}
        self.failing: list[bool] = []  # which of the next forks are refused
        self.deaf = 0.0  # the share of deaf workers
        self.last_pid = 100
        self.peak = self.options.workers  # the greatest size since the pool was last settled
        self.proven: set[int] = set()  # generations of which a worker has been ready
        self.spawns: Counter[int] = Counter()  # by slot
        self.failed_at = 0.0  # when a fork or a worker last failed
        self.granted = 0.0
        self.under_way: int | None = None  # the generation of which a reload was begun and not finished
        self.sequence = StopSequence()
        self.last_generation = 0  # that had begun by then
        self.stop_at = 0.0  # when it began, and when the workers were told of it
        self.drain_at = 0.0
        self.queued = False  # clients wait at the listeners
        self.last_calls: set[int] = set()  # the pids that were forked for the queue
        self.trace: deque[tuple[object, ...]] = deque(maxlen=50)

    # -- events -------------------------------------------------------------------------------------------------------

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def sleep(self) -> None:
        """Nothing happens until the pool wants to be asked."""
        due = self.next_deadline()
        self.now = self.now if due is None else max(self.now, due)

    def suspend(self, seconds: float) -> None:
        """The machine was away, and the master noticed."""
        self.now += seconds
        self.granted += seconds
        self.pool.grant(seconds)

    def refuse(self, forks: list[bool]) -> None:
        self.failing = list(forks)

    def boot(self, pid: int) -> None:
        self.pool.booted(pid, self.now)
        if (member := self.pool.members.get(pid)) and member.state is State.READY:
            self.processes[pid].was_ready = True
            self.proven.add(member.generation)
            assert member.generation in (self.pool.generation, *self.proven)

    def understand(self, pid: int) -> None:
        self.pool.acknowledged(pid, self.now)
        if pid in self.processes and self.processes[pid].told is not None:
            self.processes[pid].acknowledged = True

    def leave(self, pid: int, reason: Reason = Reason.LEFT) -> None:
        """A worker says that it leaves, told to by somebody else or for a reason of its own."""
        before = self.pool.members.get(pid)
        serving = before is not None and before.state is not State.RETIRING
        self.pool.leaves(pid, self.now, reason)
        assert not serving or before is None or before.reason is reason, "the reason is not the one that was told"
        if process := self.processes.get(pid):
            process.told_at = self.now if process.told_at is None else process.told_at
            process.acknowledged |= process.told is not Quit

    def wear(self, pid: int) -> None:
        self.pool.request_recycle(pid)

    def condemn(self, pid: int) -> None:
        self.pool.condemn(pid, Reason.REQUEST_TIMEOUT, self.now)
        if process := self.processes.get(pid):
            process.condemned = True

    def exit(self, pid: int, crashed: bool, served: bool) -> None:
        process = self.processes.pop(pid)
        generation, ready = self.pool.generation, self.pool.ready
        was_ready = pid in {m.pid for m in ready}
        heard = process.told in (Retire, Quit) and not process.deaf
        status = 1 if crashed else 0 if heard else -9
        member = self.pool.exited(pid, self.now, status=status, served=served and process.was_ready)
        assert member.state is State.GONE and member.reason is not None
        if member.reason is Reason.STOPPED and status == 0 and process.was_ready:
            self.sequence.found_empty()
            self.queued = False
        if not was_ready or crashed:
            self.failed_at = self.now
        assert self.pool.generation == generation, "a death does not change what is in force"
        assert [m for m in ready if m is not member] == self.pool.ready, "nor does it touch the others"

    def resize(self, size: int) -> None:
        self.pool.resize(size)
        self.peak = max(self.peak, self.pool.size)

    def reload(self) -> None:
        if not self.sequence.begun:
            self.pool.reload()

    def signal(self, name: str) -> None:
        """A signal, or for TERM a call of `shutdown()`."""
        before = self.sequence.stage
        stage = ESCALATION[name, before]
        if not self.sequence.rise(stage, self.now, handshakes=True):
            assert stage is before
            return
        if before is Stage.SERVING:
            self.last_generation = self.pool.candidate or self.pool.generation
            self.stop_at, self.queued = self.now, self.rng.random() < 0.7
        if stage is Stage.SETTLING:
            self.pool.forget_reload()
        else:
            self._stop_workers(stage)

    def _stop_workers(self, stage: Stage) -> None:
        self.pool.stop(stage, self.now)
        for process in self.processes.values():
            process.told_at = self.now if process.told_at is None else process.told_at

    # -- the master ---------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """Of the pool and of the stop."""
        return min((at for at in (self.pool.next_deadline(), self.sequence.due) if at is not None), default=None)

    def _go_on_stopping(self) -> None:
        """As in a turn of the master: the end of the handshakes, then the last call."""
        sequence = self.sequence
        half_open = self.rng.random() < 0.5
        if sequence.settle(self.now, half_open=half_open, graceful_timeout=self.options.graceful_timeout):
            assert self.now >= self.stop_at + SETTLE - 1e-6, "handshakes were cut off"
            self.drain_at = self.now
            self._stop_workers(Stage.DRAINING)
        if not self.processes and self.queued and sequence.may_have_queue(self.now):
            assert self.now < self.drain_at + self.options.graceful_timeout, "a last call after graceful_timeout"
            if (order := self.pool.last_call()) is not None:
                sequence.called()
                self._start(order)
                assert len(self.last_calls) <= LAST_CALLS

    def look(self) -> None:
        """Carry out the orders; then there must be nothing to do before the next deadline."""
        self._go_on_stopping()
        pool = self.pool
        before = {m.pid for m in pool.ready}
        orders = pool.orders(self.now)
        after = {m.pid for m in pool.ready}
        assert before == after or len(after) >= pool.size, "a ready worker was retired without a ready replacement"
        for order in orders:
            self.trace.append((round(self.now, 4), order))
            self._carry_out(order)
        assert pool.orders(self.now) == [], "more orders without an event"
        due = pool.next_deadline()
        assert due is None or due > self.now, "busy loop"
        self._check(due)

    def _carry_out(self, order: Order) -> None:
        if isinstance(order, Spawn):
            self._fork(order)
            return
        process = self.processes[order.pid]
        member = self.pool.members[order.pid]
        options, stopping = self.options, self.pool.stage
        assert member.state is State.RETIRING
        if process.told is Kill:
            assert isinstance(order, Kill), "another order after Kill"
            assert self.now - process.killed_at > Pool.AGAIN - 1e-6, "kills come in a storm"
            process.killed_at = self.now
            return
        process.killed_at = self.now
        assert process.told is not Abort or isinstance(order, Kill), "only Kill follows Abort"
        overdue = not process.was_ready and self.now >= process.born + options.boot_timeout
        if isinstance(order, Retire | Quit):
            assert isinstance(order, Quit) == (stopping is Stage.FAST)
            process.acknowledged &= process.told is Quit or isinstance(order, Retire)
            assert not process.acknowledged, "an order that was understood is repeated"
            if process.told is type(order):
                assert self.now - process.signal_at > Pool.SIGNAL_GAP - 1e-6, "orders come in a storm"
            process.signal_at = self.now
            process.told_at = self.now if process.told_at is None else process.told_at
        elif stopping < Stage.FAST and not process.condemned and not overdue:
            assert process.told_at is not None, "killed without having been asked"
            grace = options.graceful_timeout if process.was_ready else min(Pool.BOOT_ANSWER, options.graceful_timeout)
            assert self.now >= process.told_at + grace - 1e-6, "killed too early"
        process.told = type(order)

    def _fork(self, order: Spawn) -> None:
        pool, live = self.pool, len(self.processes)
        assert pool.stage is Stage.SERVING
        assert all(p.slot != order.slot for p in self.processes.values()), "two in one slot"
        settled_ones = [m for m in pool.serving if m.generation != pool.candidate]
        surge = pool.size + self.options.max_surge
        if len(settled_ones) >= pool.size or order.generation == pool.candidate:
            assert live < surge, "a voluntary spawn beyond the surge"
        assert live < pool.size + surge, "workers that leave pile up"
        assert order.slot < self.peak * 2 + self.options.max_surge
        self._start(order)

    def _start(self, order: Spawn) -> None:
        if self.failing and self.failing.pop(0):
            self.failed_at = self.now
            self.pool.spawn_failed(self.now)
            return
        self.last_pid += 1
        pid = self.last_pid
        boots, dies = self.fate(order.generation)
        self.processes[pid] = Process(
            pid, order.slot, order.generation, self.now, self.rng.random() < self.deaf,
            None if boots is None else self.now + boots, None if dies is None else self.now + dies,
        )  # fmt: skip
        self.spawns[order.slot] += 1
        self.pool.spawned(order, pid, self.now)
        if self.pool.stage is not Stage.SERVING:
            self.last_calls.add(pid)

    def _check(self, due: float | None) -> None:
        pool, surge = self.pool, self.options.max_surge
        members = pool.members
        assert members.keys() == self.processes.keys()
        assert len({m.slot for m in members.values()}) == len(members), "two in one slot"
        serving = pool.serving
        assert len(serving) <= self.peak + surge, "more serve than the size and the surge"
        assert len(members) <= 2 * self.peak + surge, "too many processes"
        unproven = [m for m in members.values() if m.generation not in self.proven and m.generation > 1]
        assert len(unproven) <= 1, "more than one worker of an unproven generation"
        assert not self.proven or pool.generation in self.proven
        assert (pool.candidate is not None) == (pool.rollout is Rollout.PROVING)
        for events, generation in pool.events:
            if events is PoolEvent.RELOAD_BEGINS:
                assert not self.sequence.begun or generation <= self.last_generation, "a reload begins during a stop"
                assert self.under_way is None
                self.under_way = generation
            elif events in (PoolEvent.RELOAD_FAILED, PoolEvent.RELOAD_SERVES):
                assert generation == self.under_way, "a reload ends once, and after it began"
                self.under_way = None
        pool.events.clear()
        assert pool.stage is (Stage.SERVING if self.sequence.stage is Stage.SETTLING else self.sequence.stage)
        due_stop = self.sequence.due
        assert due_stop is None or self.now < due_stop <= self.stop_at + HANDSHAKES + 2 * SETTLE, "handshakes for ever"
        if pool.stage is not Stage.SERVING:
            assert {m.pid for m in serving} <= self.last_calls
            return
        # Long after the last failure nobody is missing, unless too many are on their way out.
        missing = pool.size - len([m for m in serving if m.generation != pool.candidate])
        if self.proven and self.now - self.failed_at > 10.0 and len(members) < 2 * pool.size + surge:
            assert missing <= 0, "a lost worker was not replaced at once"
        if self.settled:
            self.peak = pool.size
            assert due is None or self.options.max_lifetime, "an idle pool wakes up"

    @property
    def settled(self) -> bool:
        pool, wanted = self.pool, (State.READY, False, self.pool.goal)
        return (
            len(pool.members) == pool.size
            and not pool.reloading
            and all((m.state, m.recycle_requested, m.generation) == wanted for m in pool.members.values())
        )

    # -- a kernel without faults --------------------------------------------------------------------------------------

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False, steps: int = 100_000) -> bool:
        """Let time pass; workers meet their fate, and obey unless they are deaf. Whether `until` came true."""
        end = self.now + seconds
        for _ in range(steps):
            self.look()
            if until():
                return True
            due = self.next_deadline()
            at, process = min(((self._next(p), p) for p in self.processes.values()), default=(end, None), key=_first)
            self.now = max(self.now, min(end, at, end if due is None else due))
            if process is not None and at <= self.now:
                self._happen(process)
            elif self.now >= end:
                return False
        raise AssertionError(f"no end within {steps} steps")

    def _next(self, process: Process) -> float:
        if process.told is Kill:
            return self.now
        leaves = process.told_at + PROMPT if process.told_at is not None and not process.deaf else None
        boots = process.boots_at if not process.was_ready and process.told_at is None else None
        return min((at for at in (leaves, boots, process.dies_at) if at is not None), default=float("inf"))

    def _happen(self, process: Process) -> None:
        if process.told is Kill or process.told_at is not None:
            self.exit(process.pid, crashed=False, served=False)
        elif process.dies_at is not None and process.dies_at <= self.now:
            self.exit(process.pid, crashed=True, served=False)
        else:
            process.boots_at = None
            self.boot(process.pid)

    def finish(self) -> None:
        """The faults end: the pool must come to what is wanted. Who hangs or is deaf stays so until he is killed."""
        self.failing, self.deaf = [], 0.0
        self.fate = lambda generation: (PROMPT, None)
        for process in self.processes.values():
            if not process.was_ready and process.pid % 3:
                process.boots_at = self.now + PROMPT
        bound = 30.0 + 3 * (self.options.boot_timeout + self.options.graceful_timeout) + self.granted
        pool = self.pool
        if self.sequence.begun:
            assert self.run(bound, lambda: pool.done, 2000), "does not stop"
            assert not self.processes and pool.next_deadline() is None
            assert self.sequence.due is None or pool.boot_failed, "it is over before the workers were told of the stop"
            left = self.queued and self.sequence.may_have_queue(self.now) and pool.last_call() is not None
            assert not left, "clients are left in the queue"
        elif not self.run(bound, lambda: self.settled or pool.boot_failed, 3000):
            raise AssertionError("does not converge")
        elif pool.boot_failed:
            assert not self.proven and pool.done and pool.next_deadline() is None
        else:
            assert self.under_way is None


def _first(pair: tuple[float, object]) -> float:
    return pair[0]


def options_of(pick: random.Random) -> dict[str, Any]:
    return {
        "workers": pick.randint(1, 5),
        "max_surge": pick.choice((1, 1, 2, 3, 8)),
        "boot_timeout": pick.choice((0.05, 0.5, 5.0)),
        "graceful_timeout": pick.choice((0.0, 0.5, 5.0)),
        "max_lifetime": pick.choice((0.0, 0.0, 20.0)),
    }
