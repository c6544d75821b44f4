"""The master: the one loop that joins the kernel (floor 1) with what decides (`pool`, `policy`).

Events change what is wanted; orders bring reality toward it; the loop sleeps until the next deadline. Stopping is a
wanted size of zero in the same loop: there is no second loop, no nested wait. Errors of the system are back-off, never
an exit. The master knows a worker only by its pid, its slot, and its two pipes.

Each step of a turn, each event and each order is guarded by itself: what fails in one keeps no other from being done,
however often it fails. It is logged, and the loop goes on slowly. The guard itself uses nothing that can fail.
"""

import collections
import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import prefork.kernel.inherited_pipes as inherited_pipes
import prefork.kernel.log_rotation as log_rotation
import prefork.kernel.logs as logs
import prefork.kernel.processes as processes
import prefork.kernel.signal_inbox as signal_inbox
import prefork.link.lifeline as lifeline
import prefork.rules.deadlines as deadlines
import prefork.rules.pacing as pacing
import prefork.rules.pool as pool
import prefork.rules.stop_sequence as stop_sequence
from prefork.errors import BootError, PreforkError
from prefork.kernel.listener import Listener, describe
from prefork.kernel.own_process import prepare
from prefork.link.scoreboard import Scoreboard
from prefork.link.worker_context import INTERRUPT
from prefork.master.worker_handle import Start, WorkerHandle, launch, log_exit
from prefork.rules.states import Phase, State
from prefork.rules.stop_sequence import Stage
from prefork.rules.worker_exit import Reason, WorkerExit
from prefork.settings.settings import MAX_WORKERS, Options

log = logs.get("prefork")

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
FAULT_PAUSE = 0.1  # seconds between two turns while something in them fails
FAULT_SAID = 1.0  # and between two reports of the same failure


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

    def result(self) -> Options | str:
        """The settings of the new generation, or what is wrong. The child is to leave, and is collected by whoever made
        it."""


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
    settings
        Reads the settings anew for a reload without a trial; it raises PreforkError where they are wrong.
    use_pidfd
        False forces the portable way of noticing deaths.
    collect
        Collects other children that are over, and says when to look again; None: there are none.
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
        settings: Callable[[], Options] | None = None,
        collect: Callable[[], float | None] = lambda: None,
        use_pidfd: bool = True,
        adopts: bool = False,
    ) -> None:
        self.listeners, self.hooks = list(listeners), hooks
        self.pool = pool.Pool(options, random.Random())
        self.board = Scoreboard()
        self._start, self._title, self._use_pidfd = start, title, use_pidfd
        self._pipes = inherited_pipes.snapshot()
        self._handles: dict[int, WorkerHandle] = {}
        self._asked: collections.deque[Callable[[], None]] = collections.deque()
        self._adopts = adopts
        self._inbox = signal_inbox.Inbox((*SIGNALS, signal.SIGCHLD) if adopts else SIGNALS)
        self._attention = pacing.Attention()
        self._deadlines = deadlines.Deadlines()
        self._judge_at: float | None = None
        self._stopping = stop_sequence.StopSequence()
        self._sweep_at: float | None = None
        self._make_check, self._settings, self._collect_others = check, settings, collect
        self._check: Check | None = None
        self._check_again = False
        self._last_words = ""
        self._warned = False
        self._detach = False
        self._refused = False  # the system refused a fork in this turn
        self._faulty = False  # something has failed since the last sleep
        self._faults: dict[str, float] = {}  # when which failure was said last
        self._turned_at = 0.0
        self._began = time.monotonic()
        self._poll_interval: float | None = None
        self._poll_at = 0.0

    # -- for any thread --------------------------------------------------------------------------------------------

    @property
    def pids(self) -> set[int]:
        return set(self._handles)

    def reload(self) -> None:
        """Begin the next generation."""
        self._ask(self._reload)

    def scale(self, size: int) -> None:
        """Change the number of workers."""
        self._ask(lambda: self._resize(size))

    def stop(self, stage: Stage = Stage.SETTLING, *, detach: bool = False) -> None:
        """Stop the pool. `run()` returns when it is over or, with `detach`, as soon as every worker was asked to leave:
        call it again to see the drain through."""
        self._detach = detach
        self._ask(lambda: self._stop(stage))

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
        prepare(memory=bool(self.pool.options.max_memory))
        lifeline.prepare()
        former = _collectable()
        try:
            self._inbox.install()
            while True:
                self._turn()
                # Asked between the turn and the sleep: the last exit may have been collected just now, and nothing
                # would ever wake us for it again.
                if self._over():
                    break
                self._sleep()
        finally:
            if former is not None:
                signal.signal(signal.SIGCHLD, former)
            self._inbox.restore()
        if self.pool.boot_failed:
            raise BootError(f"no worker became ready\n{self._last_words}".rstrip())

    def close(self) -> None:
        """Give back what the loop needs. Nothing of the pool may be left."""
        if self._check is not None:
            self._check.result()
            self._check = None
        for one in self.listeners:
            one.close()
        self._inbox.close()

    def _over(self) -> bool:
        if self.pool.done and not self._handles:
            return True
        if self._detach and self.pool.stage is not Stage.SERVING:
            self._detach = False
            return True
        return False

    def _turn(self) -> None:
        self._turned_at = now = time.monotonic()
        self._refused = False
        for step in (
            self._notice_absence,
            self._hear_threads,
            self._reap,
            self._last_call,
            self._watch_check,
            self._settle,
            self._listen_to_slots,
            self._judge,
            self._carry_out_all,
            self._tell,
            self._service,
        ):
            with self._guarded("the master's loop failed at %s; it goes on", step.__name__):
                step(now)

    def _notice_absence(self, now: float) -> None:
        if missed := self._attention.missed(now):
            log.warning("the master did not run for %.1f s; all deadlines are extended by that", missed)
            self.pool.grant(missed)
            self._deadlines.grant(now, missed)

    def _hear_threads(self, now: float) -> None:
        while self._asked:
            self._asked.popleft()()

    def _carry_out_all(self, now: float) -> None:
        for order in self.pool.orders(now):
            with self._guarded("an order of the pool failed: %s", order):
                self._carry_out(order)

    def _sleep(self) -> None:
        """Until something happens or the next deadline."""
        due: float | None = self._turned_at
        with self._guarded("the master's loop failed at its deadlines; it goes on"):
            due = self._next()
        self._attention.expect(due, self._turned_at)
        if self._faulty:
            self._faulty = False
            self._inbox.pause(FAULT_PAUSE)
            due = self._turned_at  # it may have come meanwhile
        timeout = None if due is None else min(max(0.0, due - time.monotonic()), LONGEST)
        callbacks, arrived = self._inbox.wait(0.0 if self._asked else timeout)
        for callback in callbacks:
            with self._guarded("the master's loop failed at what a worker said; it goes on"):
                callback()
        for one in arrived:
            with self._guarded("%s could not be obeyed", one.name):
                self._obey(one)

    def _next(self) -> float | None:
        times = [self.pool.next_deadline(), self._judge_at, self._stopping.due, self._sweep_at]
        if self._check is not None:
            times.append(self._check.deadline)
        if self._poll_interval is not None:
            times.append(self._poll_at)
        return min((t for t in times if t is not None), default=None)

    @contextlib.contextmanager
    def _guarded(self, text: str, *arguments: object, hook: bool = False) -> Iterator[None]:
        """What fails inside does not take the service down. After a failure of the master's own, unlike that of a
        `hook` of the program, the next turn waits."""
        try:
            yield
        except Exception as error:
            if hook:
                log.error(text, *arguments, exc_info=error)
            else:
                self._faulty = True
                self._report(error, text, *arguments)

    def _report(self, error: Exception, text: str, *arguments: object) -> None:
        """Log a failure in full, but the same one at most once a second."""
        with contextlib.suppress(Exception):
            what = f"{text % arguments}: {type(error).__name__}: {error}"
            now = time.monotonic()
            if now - self._faults.get(what, -FAULT_SAID) >= FAULT_SAID:
                if len(self._faults) >= 100:
                    self._faults.clear()
                self._faults[what] = now
                log.error(text, *arguments, exc_info=error)

    # -- what comes in ---------------------------------------------------------------------------------------------

    def _obey(self, one: signal.Signals) -> None:
        if one is signal.SIGCHLD:
            return  # it has waked the loop, which looks for exits in each turn
        log.info("%s", one.name)
        if stage := stop_sequence.ESCALATION.get((one.name, self._stopping.stage)):
            self._stop(stage)
        elif one is signal.SIGHUP:
            self._reload()
        elif one is signal.SIGTTIN:
            self._resize(self.pool.size + 1)
        elif one is signal.SIGTTOU:
            self._resize(self.pool.size - 1)
        elif one is signal.SIGUSR1:
            log_rotation.reopen()
            for handle in self._handles.values():
                self._send(handle, signal.SIGUSR1)

    def _resize(self, size: int) -> None:
        size = min(max(1, size), MAX_WORKERS)
        if size != self.pool.size:
            log.info("workers wanted: %d, was %d", size, self.pool.size)
            self.pool.resize(size)

    def _stop(self, stage: Stage) -> None:
        now = time.monotonic()
        tcp = [one for one in self.listeners if one.stream and not one.unix]
        if not self._stopping.rise(stage, now, handshakes=bool(tcp)):
            return
        if stage is Stage.SETTLING:
            for one in tcp:
                one.hold()
        else:
            self.pool.stop(stage, now)
        log.info("stopping" if stage is Stage.SETTLING else f"stopping: {stage.name.lower()}")

    def _settle(self, now: float) -> None:
        """The second half of a graceful stop: handshakes that had begun are over, now the queue is all there is."""
        due = self._stopping.due
        if due is None or now < due:
            return
        half_open = any(one.half_open() for one in self.listeners)
        if not self._stopping.settle(now, half_open=half_open, graceful_timeout=self.pool.options.graceful_timeout):
            return
        self.board.drain(True)
        for one in self.listeners:
            one.hold()
            one.empty()
        self.pool.stop(Stage.DRAINING, now)

    def _last_call(self, now: float) -> None:
        """Everybody was killed while the pool stops, and there is a queue: fork one more for it."""
        if self._handles or not self._stopping.may_have_queue(now) or not any(one.waiting() for one in self.listeners):
            return
        if (order := self.pool.last_call()) is not None:
            self._stopping.called()
            self._spawn(order)

    def _on_uplink(self, handle: WorkerHandle) -> None:
        """Something arrived on a worker's uplink."""
        messages, closed = handle.link.read()
        now, pid = time.monotonic(), handle.child.pid
        if closed and not handle.closed:
            handle.closed = True
            self._inbox.unwatch(handle.link.fd)
            handle.closed_at = self._sweep_at = now
        for message, text in messages.items():
            if message == uplink.READY:
                self.pool.booted(pid, now)
            elif message == uplink.LEAVES:
                self.pool.leaves(pid, now)
            elif message == uplink.STUCK:
                self.pool.leaves(pid, now, Reason.REQUEST_TIMEOUT)
            elif message == uplink.EXITS:
                self.pool.leaves(pid, now, Reason.EXITED)
            elif message == uplink.RECYCLE:
                self.pool.wear_out(pid, _plain(text))
            elif message == uplink.STOP:
                log.info("worker %d (pid %d) asks the pool to stop: shutdown() was called in it", handle.slot, pid)
                self._stop(Stage.SETTLING)

    def _listen_to_slots(self, now: float) -> None:
        """Whether orders were understood is written in the slots of those who have orders."""
        for member in self.pool.members.values():
            if member.state is State.RETIRING and not member.acknowledged:
                phase = self.board.phase(member.slot)
                if phase >= (Phase.LEAVING if member.quitting else Phase.DRAINING):
                    self.pool.acknowledged(member.pid, now)

    def _judge(self, now: float) -> None:
        """Interrupt or condemn those whose request is past its deadline."""
        timeout = self.pool.request_timeout
        if timeout != self._deadlines.timeout:  # a generation has come, or gone, that has another
            self._deadlines.timeout, self._judge_at = timeout, None
        if timeout is None or (self._judge_at is not None and now < self._judge_at):
            return
        readings = []
        for member in self.pool.members.values():
            if not member.aborted and not member.killed:
                deadline, interrupted = self.board.deadline(member.slot)
                threads = self.board.threads(member.slot)
                readings.append(deadlines.Reading(member.pid, deadline or None, interrupted, threads))
        verdicts, self._judge_at = self._deadlines.judge(now, readings)
        for pid in verdicts.interrupt:
            log.warning("worker %d (pid %d): its request is past its deadline", self.pool.members[pid].slot, pid)
            self._send(self._handles[pid], INTERRUPT)
        for pid in verdicts.condemn:
            self.pool.condemn(pid, Reason.REQUEST_TIMEOUT, now)
        if not self.pool.members:
            self._judge_at = None

    # -- deaths ----------------------------------------------------------------------------------------------------

    def _reap(self, now: float) -> None:
        sweep = self._sweep_at is not None and now >= self._sweep_at
        if sweep:
            self._sweep_at = None
        for handle in list(self._handles.values()):
            # Two notices of a death: the pidfd, and the end of the uplink. The pipe closes a moment before there is an
            # exit to collect, and may be held open by a child of the worker; without a pidfd it is therefore looked at
            # again.
            with self._guarded("worker %d (pid %d) cannot be collected", handle.slot, handle.child.pid):
                if self._collect(handle, try_it=sweep or handle.child.ended or handle.closed):
                    continue
            if handle.closed:
                # One that closed its uplink by mistake and lives on must not keep the master awake.
                self._sweep_at = now + (SWEEP if now - handle.closed_at < TICK else TICK)
            elif handle.child.pidfd is None and self._sweep_at is None:
                self._sweep_at = now + TICK
        if (again := self._collect_others()) is not None:
            self._sweep_at = again if self._sweep_at is None else min(again, self._sweep_at)
        if self._adopts and (self._check is not None or processes.reap_strangers(self._handles)):
            self._sweep_at = now + TICK

    def _collect(self, handle: WorkerHandle, *, try_it: bool) -> bool:
        """Reap one worker if it is over, and say so. Whether it is gone."""
        exit = handle.child.reap() if try_it else None
        if exit is None:
            return False
        if not handle.closed:
            with self._guarded("worker %d (pid %d) cannot be heard", handle.slot, handle.child.pid):
                self._on_uplink(handle)  # what it said before it died comes before its death
        status, memory = exit
        now = time.monotonic()
        entry = self.board.read(handle.slot, now)
        self._forget(handle)
        # One that was ended by its first request has taken it: it is no crash loop, the clients set its pace.
        served = entry.requests > 0 or entry.busy_for > 0
        member = self.pool.exited(handle.child.pid, now, status=status, served=served)
        report = handle.report(entry, member.reason or Reason.EXITED, status, memory, now, member.why)
        if report.reason is Reason.STOPPED and status == 0 and member.ready_at is not None:
            self._stopping.found_empty()
        if report.reason in (Reason.BOOT_FAILED, Reason.BOOT_TIMEOUT):
            log_exit(report, known=self._last_words)
            self._last_words = report.detail or str(report)
        else:
            log_exit(report)
        with self._guarded("worker_exited() raised; the pool goes on", hook=True):
            self.hooks.worker_exited(report)
        return True

    def _forget(self, handle: WorkerHandle) -> None:
        self._inbox.unwatch(handle.link.fd)
        if handle.child.pidfd is not None:
            self._inbox.unwatch(handle.child.pidfd)
        del self._handles[handle.child.pid]
        handle.release()

    # -- what goes out ---------------------------------------------------------------------------------------------

    def _carry_out(self, order: pool.Order) -> None:
        if isinstance(order, pool.Spawn):
            self._spawn(order)
        elif handle := self._handles.get(order.pid):
            self._send(handle, _SIGNAL_OF[type(order)])

    def _send(self, handle: WorkerHandle, signum: int) -> None:
        try:
            handle.child.send(signum)
        except OSError as error:  # EPERM: it has another user now
            self._report(error, "worker %d (pid %d) cannot be signalled", handle.slot, handle.child.pid)

    def _spawn(self, order: pool.Spawn) -> None:
        if not self._warned and (names := processes.threads_left_behind()):
            self._warned = True
            log.debug("workers are forked without these threads of the master: %s", ", ".join(names))
        if not self._stopping.begun:
            self._revive_listeners()
        try:
            handle = launch(
                self.board,
                order.slot,
                order.generation,
                self.pool.options_of(order.generation),
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
        pid = handle.child.pid
        self._handles[pid] = handle
        self.pool.spawned(order, pid, handle.born)
        self._inbox.watch(handle.link.fd, lambda: self._on_uplink(handle))
        if handle.child.pidfd is not None:
            self._inbox.watch(handle.child.pidfd, handle.child.note_end)

    def _revive_listeners(self) -> None:
        """A worker, or the program, may have shut down what all of them share: nobody could connect any more."""
        for one in self.listeners:
            if one.is_shut():
                name = describe(one.socket)
                with self._guarded("%s was shut down by a worker or the program, and cannot be opened again", name):
                    one.revive()
                    log.error("%s was shut down by a worker or the program; it is open again", name)

    def _tell(self, now: float) -> None:
        """Log what happened to the pool as a whole."""
        news_of_pool, self.pool.events = self.pool.events, []
        for events, generation in news_of_pool:
            if events is pool.PoolEvent.READY:
                took = now - self._began
                log.info("pool ready: %d workers, generation %d, %.3f s", self.pool.size, generation, took)
            elif events is pool.PoolEvent.RELOAD_BEGINS:
                log.info("reload: generation %d begins", generation)
            elif events is pool.PoolEvent.RELOAD_SERVES:
                log.info("reload: generation %d serves", generation)
            else:
                good = self.pool.generation
                log.error("reload failed: generation %d did not boot; generation %d serves on", generation, good)

    def _service(self, now: float) -> None:
        if self._poll_interval is None or now < self._poll_at:
            return
        self._poll_at = now + max(0.001, self._poll_interval)
        with self._guarded("service_actions() raised; the pool goes on", hook=True):
            self.hooks.service_actions()

    # -- reload ----------------------------------------------------------------------------------------------------

    def _reload(self) -> None:
        if self._stopping.begun:
            return
        self._revive_listeners()  # or it would be refused, as that of a server that does not listen
        if self._make_check is None:
            try:
                self.pool.reload(self._settings() if self._settings is not None else None)
            except PreforkError as error:
                log.error("reload failed: %s; generation %d serves on", error, self.goal)
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

    def _watch_check(self, now: float) -> None:
        """A trial of the program is over, or has had its time."""
        check = self._check
        if check is None or not check.over():
            return
        self._inbox.unwatch(check.fd)
        self._check = None
        result = check.result()
        self._sweep_at = time.monotonic()  # its child is to end now
        if self._stopping.begun:
            return
        if isinstance(result, Options):
            self.pool.reload(result)
        else:
            log.error("reload failed: generation %d serves on: %s", self.goal, result)
        if self._check_again:
            self._reload()


_SIGNAL_OF = {
    pool.Retire: signal.SIGTERM,
    pool.Quit: signal.SIGQUIT,
    pool.Abort: signal.SIGABRT,
    pool.Kill: signal.SIGKILL,
}


def _plain(text: str) -> str:
    """What a worker said, on one line."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _collectable() -> Any:
    """Undo an inherited SIG_IGN for SIGCHLD, under which exit statuses are thrown away. Returns what to put back."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        return signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return None
