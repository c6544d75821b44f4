"""The pool: slots, generations, and what is wanted of them. Pure: events in, orders out; no I/O, no clock, no `os`.

Events edit what is known or wanted and return nothing. `orders(now)` compares the two and says what to do next; calling
it again without an event or a passed deadline says nothing new, so a caller cannot spin on it. `next_deadline()` says
when to ask again. Stopping is a wanted size of zero.

Rules that every order keeps, whatever the events were:

- a ready worker is asked to leave only while more than `size` are ready;
- a voluntary spawn (for a reload, a recycling) happens only while fewer than `size + max_surge` processes exist;
- a missing worker is replaced at once, by the last good generation while another is unproven, unless its slot, or the
  system, is in back-off, or as many leave as are wanted;
- one generation at a time is unproven, with one worker, until that worker is ready.

A worker that leaves takes its slot with it until it is reaped, so that no two live workers ever share a slot.
"""

import enum
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import prefork.rules.pacing as pacing
from prefork.rules.states import ROLLOUT, TRANSITIONS, Event, Rollout, RolloutEvent, State
from prefork.rules.stop_sequence import Stage
from prefork.rules.worker_exit import Reason
from prefork.settings.settings import MAX_WORKERS, Options


class Need(enum.Enum):
    """Why a worker is started."""

    MISSING = "a worker is missing"
    CANDIDATE = "a reload tries its generation"
    REPLACEMENT = "a worker is to be replaced"


@dataclass(frozen=True, slots=True)
class Spawn:
    """Fork a worker. Answer with `spawned()` or `spawn_failed()`."""

    slot: int
    generation: int
    reason: Need = field(default=Need.MISSING, compare=False)


@dataclass(frozen=True, slots=True)
class _ToWorker:
    """An order about a worker that is there, with the reason that it leaves for."""

    pid: int
    reason: Reason = field(default=Reason.STOPPED, compare=False)


class Retire(_ToWorker):
    """Ask a worker to drain and leave (again, until it has acknowledged that)."""


class Quit(_ToWorker):
    """Ask a worker to leave at once (again, until it has acknowledged that)."""


class Abort(_ToWorker):
    """Make a worker say where it hangs; `Kill` follows."""


class Kill(_ToWorker):
    """SIGKILL (again, until the worker is gone)."""


Order = Spawn | Retire | Quit | Abort | Kill

SIGKILL = -9  # as an exit status


_SERVING = (State.STARTING, State.READY)


class PoolEvent(enum.Enum):
    """What happened to the pool as a whole, for the log."""

    READY = "pool ready"
    RELOAD_BEGINS = "reload begins"
    RELOAD_SERVES = "reload serves"
    RELOAD_FAILED = "reload failed"
    RELOAD_REMEMBERED = "reload remembered"  # it follows the one under way
    RELOAD_IGNORED = "reload ignored"  # the pool stops
    RELOAD_GIVEN_UP = "reload given up"  # by a stop, before the new generation was ready


@dataclass(eq=False, slots=True)
class Member:
    """The worker to the pool: what is wanted of it, and what it has answered.

    Its process and pipes are the master's `WorkerHandle`, its cells of shared memory a `Slot`.
    """

    slot: int
    pid: int
    generation: int
    options: Options  # of its generation
    born: float
    boot_deadline: float
    state: State = State.STARTING
    ready_at: float | None = None
    expires: float | None = None  # max_lifetime
    recycle_requested: bool = False  # should be replaced, although its generation is right
    reason: Reason | None = None  # why it leaves, once that is known
    why: str = ""  # the same in its own words, such as the limit that it has reached
    # While it leaves:
    quitting: bool = False
    acknowledged: bool = False
    signal_at: float = 0.0
    gap: float = 0.0
    kill_at: float | None = None
    aborted: bool = False
    killed: bool = False

    def on(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state, event]


class Pool:
    """The members of a pool, and what is wanted of them.

    Parameters
    ----------
    options
        Of the first generation. It reads `workers`, `max_surge`, the timeouts in seconds, and `max_lifetime`. A reload
        may bring others: each generation has its own, and its workers keep them to their end.
    rng
        Source of jitter.
    """

    # Seconds:
    SIGNAL_GAP = 0.02  # to the first repetition of an order that was not acknowledged; doubles
    LAST_GAP = 0.5  # and at most
    QUIT_ANSWER = 0.3  # until a worker is killed that was told to leave at once and has not acknowledged it
    BOOT_ANSWER = 0.3  # the same for a worker that was told to leave while it booted
    LEAST_GRACE = 0.3  # to drain, however short graceful_timeout is: a worker without a request leaves by itself
    TEARDOWN = 2.0  # that a worker which said so has for its teardown
    DUMP = 0.5  # between the order to show its stacks, of which it dies, and SIGKILL for one that is stopped
    AGAIN = 0.5  # between two SIGKILLs: the system may have refused the first

    def __init__(self, options: Options, rng: random.Random) -> None:
        self.size = options.workers
        self.generation = 1  # the last proven generation, or the first
        self.candidate: int | None = None  # the generation that a reload tries
        self.stage = Stage.SERVING
        self.members: dict[int, Member] = {}
        self.events: list[tuple[PoolEvent, int]] = []
        self._rng = rng
        self._newest = 1
        self._options = {1: options}
        self._resized = False  # by an order, which counts more than the settings of a generation
        self._remembered: Options | None = None  # of the reload that is to follow the present reload
        self.rollout = Rollout.NONE
        self._ever_ready = False
        self._announced = False
        self.slot_backoffs: dict[int, pacing.Backoff] = {}
        self.system_backoff = pacing.Backoff()

    # -- queries ---------------------------------------------------------------------------------------------------

    @property
    def serving(self) -> list[Member]:
        """Workers that serve or will: neither leaving nor gone, oldest slot first."""
        return sorted((m for m in self.members.values() if m.state in _SERVING), key=lambda m: m.slot)

    @property
    def ready(self) -> list[Member]:
        return [m for m in self.serving if m.state is State.READY]

    @property
    def starting(self) -> list[Member]:
        return [m for m in self.serving if m.state is State.STARTING]

    @property
    def options(self) -> Options:
        """Of the last good generation."""
        return self._options[self.generation]

    def options_of(self, generation: int) -> Options:
        return self._options[generation]

    @property
    def request_timeout(self) -> float | None:
        """The shortest of all workers, in seconds; None: no worker has a limit."""
        limits = (m.options.request_timeout for m in self.members.values())
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def goal(self) -> int:
        """The generation that every worker should have."""
        return self.generation if self.candidate is None else self.candidate

    @property
    def reloading(self) -> bool:
        return self.rollout is not Rollout.NONE

    @property
    def boot_failed(self) -> bool:
        """Whether the first generation is over before any of its workers was ready: each had its try, all failed."""
        if self._ever_ready or self.members or self.candidate is not None or not self.slot_backoffs:
            return False
        return next(self._wanted_spawns(), None) is None  # a worker that the system refused to fork has not had its try

    @property
    def done(self) -> bool:
        return not self.members and (self.stage is not Stage.SERVING or self.boot_failed)

    def last_call(self) -> Spawn | None:
        """The order for one more worker, for a graceful stop in which none is left to empty the queue; None: no worker
        was ever ready, so this worker would not be either."""
        if self.stage is Stage.DRAINING and not self.members and self._ever_ready:
            return Spawn(0, self.generation)
        return None

    def backoff_of(self, slot: int, now: float) -> float:
        """Seconds until this slot may start its next worker; 0.0: at once, or it starts none."""
        backoff = self.slot_backoffs.get(slot)
        if backoff is None or self.stage is not Stage.SERVING:
            return 0.0
        is_wanted = any(wanted == slot for wanted, *_ in self._wanted_spawns())
        return max(0.0, backoff.until - now) if is_wanted else 0.0

    def _fresh(self, member: Member) -> bool:
        return member.generation == self.goal and not member.recycle_requested

    # -- events ----------------------------------------------------------------------------------------------------

    def spawned(self, order: Spawn, pid: int, now: float) -> Member:
        options = self._options[order.generation]
        member = Member(order.slot, pid, order.generation, options, now, now + options.boot_timeout)
        self.members[pid] = member
        # Of several forks at once some may be refused: a fork that succeeds does not undo that.
        if now >= self.system_backoff.until:
            self.system_backoff.reset()
        return member

    def spawn_failed(self, now: float) -> None:
        """The system refused a fork or a descriptor: a reason to wait, for the whole pool."""
        if now >= self.system_backoff.until:  # refusals of the same moment are one failure
            self.system_backoff.failed(now, self._rng)

    def booted(self, pid: int, now: float) -> None:
        """A worker said that it is ready."""
        member = self.members.get(pid)
        if member is None or member.ready_at is not None:
            return
        member.on(Event.BOOTED)
        member.ready_at = now
        if life := pacing.lifetime(member.options.max_lifetime, self._rng):
            member.expires = now + life
        self._ever_ready = True
        if self.stage is Stage.DRAINING and member.state is State.READY:
            self._retire(member, Reason.STOPPED, now)
        if member.state is State.READY and member.generation == self.candidate:
            self.generation, self.candidate = self.candidate, None
            self._roll(RolloutEvent.PROVEN)
            self.slot_backoffs.clear()  # what failed was another generation
            if not self._resized:
                self.size = member.options.workers

    def request_recycle(self, pid: int, why: str = "") -> None:
        """A worker asks to be replaced."""
        if member := self.members.get(pid):
            member.recycle_requested = True
            member.why = why

    def leaves(self, pid: int, now: float, reason: Reason = Reason.LEFT) -> None:
        """A worker says that it drains, although perhaps nobody here asked it to."""
        member = self.members.get(pid)
        if member is None:
            return
        if member.state is not State.RETIRING:
            self._retire(member, reason, now)
        if not member.quitting:
            self.acknowledged(pid, now)

    def acknowledged(self, pid: int, now: float) -> None:
        """A worker's slot says that the order in force has reached it."""
        member = self.members.get(pid)
        if member is not None and member.state is State.RETIRING and not (member.acknowledged or member.killed):
            member.acknowledged = True
            if member.quitting:
                member.kill_at = now + self.TEARDOWN
            elif member.ready_at is None:
                member.kill_at = now + member.options.graceful_timeout

    def condemn(self, pid: int, reason: Reason, now: float) -> None:
        """A worker hangs: have it show where, then kill it."""
        member = self.members.get(pid)
        if member is not None and not member.aborted and not member.killed:
            member.reason = reason
            member.kill_at = now
            member.acknowledged = True  # or the answer to an earlier order would put it off
            if member.state is not State.RETIRING:
                member.on(Event.RETIRED)

    def exited(self, pid: int, now: float, *, status: int | None, served: bool) -> Member:
        """A worker was reaped. Why it left is decided here: it is the member's `reason`.

        status
            Its exit code, or the negative number of the signal that ended it; None where that is unknown.
        served
            It had taken at least one request.
        """
        member = self.members.pop(pid)
        booting = member.state is State.STARTING or member.reason is Reason.BOOT_TIMEOUT
        asked = member.state is State.RETIRING and member.reason not in (Reason.BOOT_TIMEOUT, Reason.EXITED)
        member.on(Event.EXITED)
        if member.reason is None:
            member.reason = Reason.BOOT_FAILED if booting else Reason.EXITED
        healthy = served or (member.ready_at is not None and now - member.ready_at >= pacing.HEALTHY)
        # A worker that dies right after it was ready, having served nobody, is a crash loop as much as a failed boot.
        crashed = member.ready_at is not None and not healthy and not asked and status != SIGKILL
        # It was told to leave while it booted, by somebody or by itself at every boot: back-off, but no failed reload.
        told_in_boot = member.reason in (Reason.LEFT, Reason.EXITED) and member.ready_at is None and not booting
        if booting or crashed or told_in_boot:
            self.slot_backoffs.setdefault(member.slot, pacing.Backoff()).failed(now, self._rng)
        if (booting or crashed) and member.generation == self.candidate:
            self._abandon()
        if member.ready_at is not None and healthy:
            self.slot_backoffs.pop(member.slot, None)
        killed_by_others = status is not None and status < 0 and not (member.killed or member.aborted)
        if killed_by_others and (member.reason.ordered or member.reason is Reason.EXITED):
            member.reason = Reason.KILLED
        if member.reason is not Reason.RECYCLED:
            member.why = ""  # it wanted to be replaced, and left for something else
        return member

    def resize(self, size: int) -> None:
        self.size, self._resized = min(max(1, size), MAX_WORKERS), True

    def reload(self, options: Options | None = None) -> int | None:
        """Begin the next generation; during a reload, remember to begin once more.

        Returns the number that the generation has, or will have; None: the pool stops.

        options
            Of the new generation; by default those of the last proven generation.
        """
        if self.stage is not Stage.SERVING:
            self.events.append((PoolEvent.RELOAD_IGNORED, self.generation))
            return None
        options = options or self.options
        number = self._newest + 1
        if self.reloading:
            self._remembered = options
            self._roll(RolloutEvent.ASKED)
            self.events.append((PoolEvent.RELOAD_REMEMBERED, self.goal))
        else:
            self._begin(options)
        return number

    def forget_reload(self) -> None:
        """A stop has begun, of which the workers are not told yet: the reload under way is not followed by another."""
        self._remembered = None

    def stop(self, stage: Stage, now: float) -> None:
        """Ask for a size of zero: DRAINING or a harder stage. A harder stage replaces a softer one, not the reverse.

        SETTLING does not come here: in it the workers are not asked for anything yet.
        """
        if stage <= self.stage:
            return
        self.stage = stage
        if self.candidate is not None:
            self.events.append((PoolEvent.RELOAD_GIVEN_UP, self.candidate))
        self.candidate, self._remembered = None, None
        self._roll(RolloutEvent.STOPPED)
        for member in list(self.members.values()):
            if stage is Stage.DRAINING and member.state is State.RETIRING:
                continue
            self._retire(member, Reason.STOPPED, now)

    def grant(self, seconds: float) -> None:
        """The master was away for so many seconds: extend every deadline by them."""
        for member in self.members.values():
            member.boot_deadline += seconds
            if member.kill_at is not None and not (member.aborted or member.killed):
                member.kill_at += seconds

    # -- orders ----------------------------------------------------------------------------------------------------

    def orders(self, now: float) -> list[Order]:
        """What to do now. Each order is to be carried out, and a `Spawn` answered, before the next call."""
        for member in self.members.values():
            if member.expires is not None and now >= member.expires:
                member.recycle_requested, member.expires = True, None
                member.why = f"max_lifetime: {member.options.max_lifetime:g} s"
            if member.state is State.STARTING and now >= member.boot_deadline:
                self.condemn(member.pid, Reason.BOOT_TIMEOUT, now)
        if self.stage is Stage.SERVING:
            self._reduce(now)
        orders: list[Order] = [order for m in self.members.values() if (order := self._escalate(m, now)) is not None]
        if self.stage is Stage.SERVING:
            self._settle()
            orders += self._increase(now)
        return orders

    def next_deadline(self) -> float | None:
        """The earliest time at which `orders()` may have something new to say without a further event."""
        return min(self._deadlines(), default=None)

    def _deadlines(self) -> Iterator[float]:
        for m in self.members.values():
            if m.state is State.STARTING:
                yield m.boot_deadline
            if m.expires is not None:
                yield m.expires
            if m.state is State.RETIRING:
                if m.kill_at is not None:
                    yield m.kill_at
                if not (m.acknowledged or m.aborted or m.killed):
                    yield m.signal_at
        if self.stage is Stage.SERVING:
            for slot, *_ in self._wanted_spawns():
                backoff = self.slot_backoffs.get(slot)
                yield max(self.system_backoff.until, backoff.until if backoff else 0.0)

    def _escalate(self, m: Member, now: float) -> Order | None:
        """The next step of making a worker leave. The last step is repeated until it is gone."""
        if m.state is not State.RETIRING:
            return None
        if m.kill_at is not None and now >= m.kill_at:
            # Where nobody will read the stacks, or there is no request, there is no dump.
            unread = self.stage >= Stage.FAST or (m.ready_at is None and m.reason is not Reason.BOOT_TIMEOUT)
            if m.killed or m.aborted or unread:
                m.killed = True
                m.kill_at = now + self.AGAIN
                return Kill(m.pid, m.reason or Reason.STOPPED)
            m.aborted = True
            m.kill_at = now + self.DUMP
            if m.reason not in (Reason.BOOT_TIMEOUT, Reason.REQUEST_TIMEOUT):
                m.reason = Reason.GRACEFUL_TIMEOUT
            return Abort(m.pid, m.reason)
        if not (m.acknowledged or m.aborted or m.killed) and now >= m.signal_at:
            m.signal_at = now + m.gap
            m.gap = min(self.LAST_GAP, m.gap * 2)
            return (Quit if m.quitting else Retire)(m.pid, m.reason or Reason.STOPPED)
        return None

    def _retire(self, member: Member, reason: Reason, now: float) -> None:
        if member.killed or (member.aborted and self.stage is not Stage.KILL):
            return
        if member.state is not State.RETIRING:
            member.on(Event.RETIRED)
            member.reason = reason
        member.signal_at, member.gap = now, self.SIGNAL_GAP
        if self.stage is Stage.KILL:
            member.kill_at = now
            return
        member.quitting = self.stage is Stage.FAST
        member.acknowledged = False
        if member.quitting:
            member.kill_at = now + self.QUIT_ANSWER
        elif member.ready_at is None:
            member.kill_at = now + self.BOOT_ANSWER
        else:
            member.kill_at = now + max(self.LEAST_GRACE, member.options.graceful_timeout)

    def _reduce(self, now: float) -> None:
        """Ask the workers to leave that are not needed any more."""
        stale = [m for m in self.serving if not self._fresh(m)]
        kept = (self.generation, self.candidate)
        for m in stale:
            # A boot that leads nowhere: its generation was given up, or has been replaced.
            if m.state is State.STARTING and m.generation not in kept:
                self._retire(m, Reason.RELOADED, now)
        excess = len(self.ready) - self.size
        leavers = [m for m in stale if m.state is State.READY][: max(0, excess)]
        for m in leavers:
            self._retire(m, Reason.RECYCLED if m.recycle_requested else Reason.RELOADED, now)
        if self.candidate is not None:
            return
        surplus = len(self.serving) - self.size
        if any(not self._fresh(m) for m in self.serving):
            # Replacements are on their way; only those beyond the size are too many.
            surplus = len([m for m in self.serving if self._fresh(m)]) - self.size
        for m in reversed(self.starting):
            if surplus > 0 and self._fresh(m):
                self._retire(m, Reason.RESIZED, now)
                surplus -= 1
        spare = len(self.ready) - self.size
        for m in reversed(self.ready):
            if surplus > 0 and spare > 0 and self._fresh(m):
                self._retire(m, Reason.RESIZED, now)
                surplus, spare = surplus - 1, spare - 1

    def _increase(self, now: float) -> list[Order]:
        """Spawn the workers that are missing and not in back-off."""
        if now < self.system_backoff.until:
            return []
        orders: list[Order] = []
        for slot, generation, need in self._wanted_spawns():
            backoff = self.slot_backoffs.get(slot)
            if backoff is None or now >= backoff.until:
                orders.append(Spawn(slot, generation, need))
        return orders

    def _wanted_spawns(self) -> Iterator[tuple[int, int, Need]]:
        """The workers that are missing, each as slot, generation and need, whether or not a back-off delays them."""
        # Before any worker was ever ready, those that leave are waited for: perhaps their boot has failed.
        here = self.serving if self._ever_ready else self.members.values()
        proven = [m for m in here if m.generation != self.candidate]
        surge = self.size + self.options.max_surge - len(self.members)
        # While a generation is unproven, the lost are replaced by the last good one. Workers that leave may take their
        # time, but not pile up: there are never more of them than `size`.
        lost = max(0, min(self.size - len(proven), self.size + surge))
        if self.candidate is not None:
            more = 1 - sum(m.generation == self.candidate for m in self.members.values())
        else:
            more = self.size - sum(map(self._fresh, proven)) - lost
        more = max(0, min(more, surge - lost))
        extra = Need.REPLACEMENT if self.candidate is None else Need.CANDIDATE
        wanted = [(self.generation, Need.MISSING)] * lost + [(self.goal, extra)] * more
        taken = {m.slot for m in self.members.values()}
        free = (slot for slot in itertools.count() if slot not in taken)
        for slot, (generation, need) in zip(free, wanted, strict=False):
            # Before any worker was ever ready, a slot that failed is tried again by the next generation only.
            if self._ever_ready or slot not in self.slot_backoffs or generation == self.candidate:
                yield slot, generation, need

    # -- reload ----------------------------------------------------------------------------------------------------

    def _begin(self, options: Options) -> None:
        self._newest += 1
        self.candidate = self._newest
        self._options = {self.generation: self.options, self.candidate: options}
        self._remembered = None
        self._roll(RolloutEvent.ASKED)
        # The operator says that the program is mended: try at once.
        for backoff in self.slot_backoffs.values():
            backoff.until = 0.0
        self.events.append((PoolEvent.RELOAD_BEGINS, self.candidate))

    def _roll(self, event: RolloutEvent) -> None:
        self.rollout = ROLLOUT[self.rollout, event]

    def _abandon(self) -> None:
        assert self.candidate is not None
        self.events.append((PoolEvent.RELOAD_FAILED, self.candidate))
        self.candidate = None
        self._roll(RolloutEvent.FAILED)
        if self._remembered:
            self._begin(self._remembered)

    def _settle(self) -> None:
        """Notice that the pool is as it is wanted."""
        ready = self.ready
        # Whether some are to be recycled does not matter: a pool that recycles all the time would never settle.
        if self.candidate is not None or len(ready) < self.size or any(m.generation != self.generation for m in ready):
            return
        if any(m.generation != self.generation and m.ready_at and not m.acknowledged for m in self.members.values()):
            return  # it may still accept
        if not self._announced:
            self._announced = True
            self.events.append((PoolEvent.READY, self.generation))
        if self.rollout is Rollout.ROLLING:
            self._roll(RolloutEvent.REPLACED)
            self.events.append((PoolEvent.RELOAD_SERVES, self.generation))
            if self._remembered:
                self._begin(self._remembered)
