"""The master: the one loop that joins the kernel (floor 1) with what decides (`pool`, `policy`).

Events change what is wanted; orders bring reality toward it; the loop sleeps until the next deadline. Stopping is a
wanted size of zero in the same loop: there is no second loop, no nested wait, no sleep. Errors of the system are
back-off, never an exit; a hook that raises is logged. The master knows a worker only by its pid, its slot, and its two
pipes.
"""

import collections
import contextlib
import logging
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import prefork.lifeline as lifeline
import prefork.policy as policy
import prefork.pool as pool
import prefork.processes as processes
import prefork.signals as signals
from prefork.crew import Hand, Start, launch, log_exit, report_of
from prefork.errors import BootError
from prefork.listeners import HANDSHAKES, SETTLE, Listener
from prefork.options import MAX_WORKERS, Options
from prefork.reports import Reason, WorkerExit
from prefork.scoreboard import Scoreboard
from prefork.states import Phase, State, Stop
from prefork.workers.child import INTERRUPT, prepare, reopen_logs

log = logging.getLogger("prefork")

SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGTTIN,
    signal.SIGTTOU,
)
SWEEP = 0.005  # how soon to look again for an exit whose pipe is closed already
LONGEST = 86400.0  # epoll takes no more than 24 days
TICK = 0.5  # how often to look for exits where the kernel has no pidfd


class Hooks(Protocol):
    """What the face lets a program override in the master's process."""

    def service_actions(self) -> None: ...

    def worker_exited(self, report: WorkerExit) -> None: ...


class Check(Protocol):
    """A trial of the program before a reload, in a child of its own."""

    fd: int  # readable when there is something new
    deadline: float

    def over(self) -> bool:
        """Whether there is a result. Does not wait."""

    def result(self) -> str | None:
        """None if all is well, else what is wrong. Reaps the child, or kills it if it is not over."""


class Master:
    """Supervises one pool.

    Parameters
    ----------
    listeners
        Bound and activated. The master holds, empties, but never closes them.
    options
        Checked settings.
    start
        Runs in the child: makes the worker of a seat and lives its life.
    hooks
        `service_actions` is called every `poll_interval` seconds if it is given one, `worker_exited` for each death.
    check
        Begins a trial of the program before each reload; None where the program is in this process already.
    use_pidfd
        False forces the portable way of noticing deaths.
    adopts
        This is process 1 and has no children but the pool's: collect the orphans that the kernel hands to it.
    """

    def __init__(
        self,
        listeners: Sequence[Listener],
        options: Options,
        start: Start,
        hooks: Hooks,
        *,
        title: str = "",
        check: Callable[[], Check] | None = None,
        use_pidfd: bool = True,
        adopts: bool = False,
    ) -> None:
        self.listeners, self.options, self.hooks = list(listeners), options, hooks
        self.pool = pool.Pool(options, random.Random())
        self.board = Scoreboard()
        self._start, self._title, self._use_pidfd = start, title, use_pidfd
        self._pipes = processes.pipes()
        self._hands: dict[int, Hand] = {}
        self._asked: collections.deque[Callable[[], None]] = collections.deque()
        self._adopts = adopts
        self._inbox = signals.Inbox((*SIGNALS, signal.SIGCHLD) if adopts else SIGNALS)
        self._attention = policy.Attention()
        self._deadlines = policy.Deadlines(options.request_timeout)
        self._judge_at: float | None = None
        self._empty_at: float | None = None
        self._handshakes_until = 0.0
        self._sweep_at: float | None = None
        self._queue_until = 0.0  # while a graceful stop has not seen the end of the queue
        self._last_calls = 3
        self._make_check = check
        self._check: Check | None = None
        self._check_again = False
        self._last_words = ""
        self._warned = False
        self._detach = False
        self._refused = False  # the system refused a fork in this turn
        self._began = time.monotonic()
        self._poll_interval: float | None = None
        self._poll_at = 0.0

    # -- for any thread --------------------------------------------------------------------------------------------

    @property
    def pids(self) -> set[int]:
        return set(self._hands)

    def reload(self) -> None:
        """Begin the next generation."""
        self._ask(self._reload)

    def scale(self, size: int) -> None:
        """Change the number of workers."""
        self._ask(lambda: self._resize(size))

    def stop(self, how: Stop = Stop.GRACEFUL, *, detach: bool = False) -> None:
        """Stop the pool. `run()` returns when it is over or, with `detach`, as soon as every worker was asked to leave:
        call it again to see the drain through."""
        self._detach = detach
        self._ask(lambda: self._stop(how))

    def _ask(self, what: Callable[[], None]) -> None:
        self._asked.append(what)
        self._inbox.wake()

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self, poll_interval: float | None = None) -> None:
        """Serve until stopped.

        Parameters
        ----------
        poll_interval
            Seconds between two calls of `service_actions`; None: never call it, sleep for as long as nothing happens.

        Raises
        ------
        BootError
            No worker of the first generation became ready.
        """
        self._poll_interval, self._poll_at = poll_interval, time.monotonic()
        prepare(memory=bool(self.options.max_memory))
        self._inbox.install()
        former = _collectable()
        try:
            while self._once():
                pass
        finally:
            if former is not None:
                signal.signal(signal.SIGCHLD, former)
            self._inbox.restore()
        if self.pool.boot_failed:
            raise BootError(f"no worker became ready\n{self._last_words}".rstrip())

    def _once(self) -> bool:
        """One turn and the sleep after it. False when all is over."""
        try:
            self._turn()
            # Asked between the turn and the sleep: the last exit may have been collected just now, and nothing would
            # ever wake us for it again.
            if self._over():
                return False
            self._sleep(None)
        except Exception:
            # A fault of our own must not take the service down. It is logged in full and the loop goes on, slowly.
            log.exception("the master's loop failed; it goes on")
            self._sleep(0.1)
        return True

    def close(self) -> None:
        """Give back what the loop needs. Nothing of the pool may be left."""
        if self._check is not None:
            self._check.result()
            self._check = None
        for one in self.listeners:
            one.close()
        self._inbox.close()

    def _over(self) -> bool:
        if self.pool.done and not self._hands:
            return True
        if self._detach and self.pool.stopping is not Stop.NO:
            self._detach = False
            return True
        return False

    def _turn(self) -> None:
        now = time.monotonic()
        if missed := self._attention.missed(now):
            log.warning("the master did not run for %.1f s; everybody's time is extended by that", missed)
            self.pool.grant(missed)
            self._deadlines.grant(now, missed)
        while self._asked:
            self._asked.popleft()()
        self._reap(now)
        self._last_call(now)
        self._watch_check()
        self._empty(now)
        self._listen_to_slots(now)
        self._judge(now)
        self._refused = False
        for order in self.pool.orders(now):
            try:
                self._carry_out(order)
            except Exception:
                # The pool believes that its orders are given; one that fails must not take the others with it.
                log.exception("an order of the pool failed: %s", order)
        self._tell()
        self._service(now)

    def _sleep(self, timeout: float | None) -> None:
        """Until something happens or the next deadline (or, after a fault, `timeout`)."""
        due = self._next()
        self._attention.expect(due)
        if timeout is None and due is not None:
            timeout = min(max(0.0, due - time.monotonic()), LONGEST)
        for one in self._inbox.wait(0.0 if self._asked else timeout):
            try:
                self._obey(one)
            except Exception:
                log.exception("%s could not be obeyed", one.name)

    def _next(self) -> float | None:
        times = [self.pool.next_deadline(), self._judge_at, self._empty_at, self._sweep_at]
        if self._check is not None:
            times.append(self._check.deadline)
        if self._poll_interval is not None:
            times.append(self._poll_at)
        return min((t for t in times if t is not None), default=None)

    # -- what comes in ---------------------------------------------------------------------------------------------

    def _obey(self, one: signal.Signals) -> None:
        if one is signal.SIGCHLD:
            return  # it has waked the loop, which looks for exits in each turn
        stopping = self.pool.stopping if self._empty_at is None else Stop.GRACEFUL
        log.info("%s", one.name)
        if one is signal.SIGTERM:
            self._stop(Stop.GRACEFUL if stopping is Stop.NO else Stop.FAST)
        elif one is signal.SIGINT:
            self._stop(Stop.FAST if stopping < Stop.FAST else Stop.KILL)
        elif one is signal.SIGQUIT:
            self._stop(Stop.FAST)
        elif one is signal.SIGHUP:
            self._reload()
        elif one is signal.SIGTTIN:
            self._resize(self.pool.size + 1)
        elif one is signal.SIGTTOU:
            self._resize(self.pool.size - 1)
        elif one is signal.SIGUSR1:
            reopen_logs()
            for hand in self._hands.values():
                hand.child.send(signal.SIGUSR1)

    def _resize(self, size: int) -> None:
        size = min(max(1, size), MAX_WORKERS)
        if size != self.pool.size:
            log.info("workers wanted: %d, was %d", size, self.pool.size)
            self.pool.resize(size)

    def _stop(self, how: Stop) -> None:
        now = time.monotonic()
        if how <= self.pool.stopping or (how is Stop.GRACEFUL and self._empty_at is not None):
            return
        log.info("stopping" if how is Stop.GRACEFUL else f"stopping: {how.name.lower()}")
        if how is Stop.GRACEFUL:
            tcp = [one for one in self.listeners if one.stream and not one.unix]
            for one in tcp:
                one.hold()
            self._empty_at = now + SETTLE if tcp else now
            self._handshakes_until = now + HANDSHAKES
        else:
            self._empty_at = None
            self.pool.stop(how, now)

    def _empty(self, now: float) -> None:
        """The second half of a graceful stop: handshakes that had begun are over, now the queue is all there is."""
        if self._empty_at is None or now < self._empty_at:
            return
        if now < self._handshakes_until and any(one.half_open() for one in self.listeners):
            self._empty_at = now + SETTLE
            return
        self._empty_at = None
        self.board.drain(True)
        for one in self.listeners:
            one.hold()
            one.empty()
        self.pool.stop(Stop.GRACEFUL, now)
        self._queue_until = now + self.options.graceful_timeout

    def _last_call(self, now: float) -> None:
        """Everybody was killed while the pool stops, and there is a queue: fork one more for it."""
        if now < self._queue_until and not self._hands and any(one.waiting() for one in self.listeners):
            order = self.pool.last_call()
            if order is not None and self._last_calls:
                self._last_calls -= 1
                self._spawn(order)

    def _heard(self, hand: Hand) -> None:
        """Something arrived on a worker's uplink."""
        messages, hand.closed = hand.link.read()
        now, pid = time.monotonic(), hand.child.pid
        for message in messages:
            if message == lifeline.READY:
                self.pool.booted(pid, now)
            elif message == lifeline.LEAVES:
                self.pool.leaves(pid, now)
            elif message == lifeline.STUCK:
                self.pool.leaves(pid, now, Reason.REQUEST_TIMEOUT)
            elif message == lifeline.EXITS:
                self.pool.leaves(pid, now, Reason.EXITED)
            elif message == lifeline.WORN:
                self.pool.wear_out(pid)
            elif message == lifeline.STOP:
                self._stop(Stop.GRACEFUL)
        if hand.closed:
            self._inbox.unwatch(hand.link.fd)
            hand.closed_at = self._sweep_at = now

    def _listen_to_slots(self, now: float) -> None:
        """Whether orders were understood is written in the slots of those who have orders."""
        for member in self.pool.members.values():
            if member.state is State.RETIRING and not member.understood:
                phase = self.board.phase(member.slot)
                if phase >= (Phase.LEAVING if member.quitting else Phase.DRAINING):
                    self.pool.understood(member.pid, now)

    def _judge(self, now: float) -> None:
        """Interrupt or condemn those whose request is past its deadline."""
        if self.options.request_timeout is None or (self._judge_at is not None and now < self._judge_at):
            return
        readings = []
        for member in self.pool.members.values():
            if not member.aborted and not member.killed:
                deadline, interrupted = self.board.deadline(member.slot)
                serial = int(deadline * 1e9) if deadline < 1e9 else 0
                threads = self.board.threads(member.slot)
                readings.append(policy.Reading(member.pid, deadline, serial, interrupted, threads))
        verdicts, self._judge_at = self._deadlines.judge(now, readings)
        for pid in verdicts.interrupt:
            log.warning("worker %d (pid %d): its request is past its deadline", self.pool.members[pid].slot, pid)
            self._hands[pid].child.send(INTERRUPT)
        for pid in verdicts.condemn:
            self.pool.condemn(pid, Reason.REQUEST_TIMEOUT, now)
        if not self.pool.members:
            self._judge_at = None

    # -- deaths ----------------------------------------------------------------------------------------------------

    def _reap(self, now: float) -> None:
        sweep = self._sweep_at is not None and now >= self._sweep_at
        if sweep:
            self._sweep_at = None
        for hand in list(self._hands.values()):
            # Two notices of a death: the pidfd, and the end of the uplink. The pipe closes a moment before there is an
            # exit to collect, and may be held open by a child of the worker; without a pidfd it is therefore looked at
            # again.
            if self._collect(hand, try_it=sweep or hand.child.ended or hand.closed):
                continue
            if hand.closed:
                # One that closed its uplink by mistake and lives on must not keep the master awake.
                self._sweep_at = now + (SWEEP if now - hand.closed_at < TICK else TICK)
            elif hand.child.pidfd is None and self._sweep_at is None:
                self._sweep_at = now + TICK
        if self._adopts and (self._check is not None or processes.reap_strangers(self._hands)):
            self._sweep_at = now + TICK

    def _collect(self, hand: Hand, *, try_it: bool) -> bool:
        """Reap one worker if it is over, and say so. Whether it is gone."""
        exit = hand.child.reap() if try_it else None
        if exit is None:
            return False
        if not hand.closed:
            self._heard(hand)  # what it said before it died comes before its death
        status, memory = exit
        now, pid = time.monotonic(), hand.child.pid
        entry = self.board.read(hand.slot, now)
        # One that was ended by its first request has taken it: it is no crash loop, the clients set its pace.
        served = entry.requests > 0 or entry.busy_for > 0
        member = self.pool.exited(pid, now, crashed=status != -signal.SIGKILL, served=served)
        reason = member.reason or Reason.EXITED
        killed = status is not None and status < 0
        if killed and not (member.killed or member.aborted) and (reason.ordered or reason is Reason.EXITED):
            reason = Reason.KILLED
        if reason is Reason.STOPPED and status == 0 and member.ready_at is not None:
            self._queue_until = 0.0  # it left because it found the queue empty
        report = report_of(hand, self.board, reason, status, memory)
        self._forget(hand)
        if reason in (Reason.BOOT_FAILED, Reason.BOOT_TIMEOUT):
            log_exit(report, known=self._last_words)
            self._last_words = report.detail or str(report)
        else:
            log_exit(report)
        with _logged("worker_exited"):
            self.hooks.worker_exited(report)
        return True

    def _forget(self, hand: Hand) -> None:
        self._inbox.unwatch(hand.link.fd)
        if hand.child.pidfd is not None:
            self._inbox.unwatch(hand.child.pidfd)
        del self._hands[hand.child.pid]
        hand.release()

    # -- what goes out ---------------------------------------------------------------------------------------------

    def _carry_out(self, order: pool.Order) -> None:
        if isinstance(order, pool.Spawn):
            self._spawn(order)
        elif hand := self._hands.get(order.pid):
            hand.child.send(_SIGNAL_OF[type(order)])

    def _spawn(self, order: pool.Spawn) -> None:
        if not self._warned and (names := processes.threads_left_behind()):
            self._warned = True
            log.debug("workers are forked without these threads of the master: %s", ", ".join(names))
        try:
            hand = launch(
                self.board,
                order.slot,
                order.generation,
                self.options,
                self._title,
                self._start,
                use_pidfd=self._use_pidfd,
                pipes=self._pipes,
            )
        except OSError as error:
            if not self._refused:
                self._refused = True
                log.error("cannot start worker %d: %s; trying again later", order.slot, error.strerror or error)
            self.pool.spawn_failed(time.monotonic())
            return
        except Exception:
            self.pool.spawn_failed(time.monotonic())
            raise
        pid = hand.child.pid
        self._hands[pid] = hand
        self.pool.spawned(order, pid, hand.born)
        try:
            self._inbox.watch(hand.link.fd, lambda: self._heard(hand))
            if hand.child.pidfd is not None:
                self._inbox.watch(hand.child.pidfd, hand.child.note_end)
        except OSError as error:  # ENOSPC, ENOMEM: epoll has limits of its own
            log.error("cannot watch worker %d: %s", order.slot, error.strerror or error)
            hand.child.send(signal.SIGKILL)
            self._sweep_at = time.monotonic()

    def _tell(self) -> None:
        """Log what happened to the pool as a whole."""
        for news, generation in self.pool.news:
            if news is pool.News.READY:
                took = time.monotonic() - self._began
                log.info("pool ready: %d workers, generation %d, %.3f s", self.pool.size, generation, took)
            elif news is pool.News.RELOAD_BEGINS:
                log.info("reload: generation %d begins", generation)
            elif news is pool.News.RELOAD_SERVES:
                log.info("reload: generation %d serves", generation)
            else:
                good = self.pool.generation
                log.error("reload failed: generation %d did not boot; generation %d serves on", generation, good)
        self.pool.news.clear()

    def _service(self, now: float) -> None:
        if self._poll_interval is None or now < self._poll_at:
            return
        with _logged("service_actions"):
            self.hooks.service_actions()
        self._poll_at = now + max(0.001, self._poll_interval)

    # -- reload ----------------------------------------------------------------------------------------------------

    def _reload(self) -> None:
        if self.pool.stopping is not Stop.NO or self._empty_at is not None:
            return
        if self._make_check is None:
            self.pool.reload()
        elif self._check is not None:
            self._check_again = True
        else:
            self._check_again = False
            try:
                self._check = self._make_check()
            except OSError as error:
                log.error("reload failed: the program cannot be tried: %s; generation %d serves on", error, self.goal)
                return
            self._inbox.watch(self._check.fd, lambda: None)

    @property
    def goal(self) -> int:
        return self.pool.generation

    def _watch_check(self) -> None:
        """A trial of the program is over, or has had its time."""
        check = self._check
        if check is None or not check.over():
            return
        self._inbox.unwatch(check.fd)
        self._check = None
        wrong = check.result()
        if self.pool.stopping is not Stop.NO:
            return
        if wrong is None:
            self.pool.reload()
        else:
            log.error("reload failed: generation %d serves on: %s", self.goal, wrong)
        if self._check_again:
            self._reload()


_SIGNAL_OF = {
    pool.Retire: signal.SIGTERM,
    pool.Quit: signal.SIGQUIT,
    pool.Abort: signal.SIGABRT,
    pool.Kill: signal.SIGKILL,
}


@contextlib.contextmanager
def _logged(name: str) -> Iterator[None]:
    """A hook of the program may raise; the pool does not die of it."""
    try:
        yield
    except Exception:
        log.exception("%s() raised; the pool goes on", name)


def _collectable() -> Any:
    """Undo an inherited SIG_IGN for SIGCHLD, under which exit statuses are thrown away. Returns what to put back."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        return signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return None
