"""The master: the one loop that joins the system with what decides (`rules`).

Events change what is wanted; orders bring reality toward it; the loop sleeps until the next deadline. Stopping is a
wanted size of zero in the same loop: there is no second loop, no nested wait. Errors of the system are back-off, never
an exit.

`Master` has the turns, the sleep, and what signals and other threads ask for. It owns one object for each task, and
calls them in turn; none of them calls it back, and each uses only those before it:

- `error_guard`: what fails in one step keeps no other from being done;
- `stop`: a stop, from the listeners to the last worker;
- `roster`: the processes, what is ordered of them and what they say;
- `reaper`: deaths, up to their line in the log;
- `late_requests`: requests past their deadline;
- `reload`: the probe of the program, up to the new generation.

Operators may ask by a control socket (`prefork.operations`), which `attach()` joins to the loop: the master knows it as
a descriptor that is readable, and a time.
"""

import collections
import random
import signal
import threading
import time
from collections.abc import Callable, Container, Sequence
from typing import Any, Protocol, TypedDict

import prefork.kernel.log_rotation as log_rotation
import prefork.kernel.logs as logs
import prefork.kernel.signal_inbox as signal_inbox
import prefork.link.lifeline as lifeline
import prefork.master.pool_log as pool_log
import prefork.rules.pacing as pacing
import prefork.rules.pool as pool
import prefork.rules.stop_sequence as stop_sequence
from prefork.errors import BootError
from prefork.kernel.listener import Listener
from prefork.kernel.own_process import prepare
from prefork.link.scoreboard import Scoreboard
from prefork.master.error_guard import Guard
from prefork.master.late_requests import Judge
from prefork.master.reaper import Reaper
from prefork.master.reload import Probe, Reload
from prefork.master.roster import Roster
from prefork.master.snapshot import PoolSnapshot, snapshot
from prefork.master.stop import Stop
from prefork.master.worker_handle import Start
from prefork.rules.reload_history import Ticket
from prefork.rules.stop_sequence import Stage
from prefork.rules.worker_exit import WorkerExit
from prefork.settings.settings import MAX_WORKERS, Options

log = logs.get("prefork")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTTIN, signal.SIGTTOU)
LONGEST_SLEEP = 86400.0  # seconds; epoll takes no more than 24 days
FAULT_PAUSE = 0.1  # seconds between two turns while something in them fails
SHORTEST_POLL = 0.001  # seconds between two calls of `service_actions`


class Hooks(Protocol):
    """What the face lets a program override in the master's process."""

    def service_actions(self) -> None: ...

    def worker_exited(self, report: WorkerExit) -> None: ...


class MasterOptions(TypedDict, total=False):
    """What else a `Master` may be given; see there."""

    probe: Callable[[], Probe] | None
    settings: Callable[[], Options] | None
    collect: Callable[[], float | None]
    use_pidfd: bool
    adopts: bool


class Control(Protocol):
    """A control socket. It calls methods of the master, in the loop's thread, and never waits."""

    fd: int  # readable when there is something to do

    @property
    def due(self) -> float | None:
        """When there is something to do although nothing is readable; None: never."""

    def serve(self) -> None:
        """Do what there is to do."""


class Master:
    """Supervises one pool.

    Parameters
    ----------
    listeners
        Bound and activated. The master holds, empties, but never closes them.
    options
        Checked settings.
    start
        Runs in the child: makes the worker of a context and lives its life.
    hooks
        `service_actions` is called every `poll_interval` seconds if it is given one, `worker_exited` for each death.
    probe
        Begins a try of the program before each reload; None where the program is in this process already.
    settings
        Reads the settings anew for a reload without a probe; it raises PreforkError where they are wrong.
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
        probe: Callable[[], Probe] | None = None,
        settings: Callable[[], Options] | None = None,
        collect: Callable[[], float | None] = lambda: None,
        use_pidfd: bool = True,
        adopts: bool = False,
    ) -> None:
        self.listeners, self.hooks = list(listeners), hooks
        self.pool = pool.Pool(options, random.Random())
        self.board = Scoreboard()
        self._inbox = signal_inbox.Inbox((*SIGNALS, signal.SIGCHLD) if adopts else SIGNALS)
        self._guard = Guard()
        self._stop = stop = Stop(self.listeners, self.pool, self.board)
        self._roster = roster = Roster(
            self.pool, self.board, self.listeners, stop, self._inbox, self._guard, start, title, use_pidfd
        )
        self._reaper = Reaper(roster, self.pool, self.board, stop, self._guard, hooks.worker_exited, collect, adopts)
        self._judge = Judge(self.pool, self.board, roster)
        self._reload = Reload(self.pool, roster, stop, self._inbox, probe, settings)
        self._attention = pacing.Attention()
        self._asked: collections.deque[Callable[[], object]] = collections.deque()  # by other threads
        self._detach = False  # `run()` returns as soon as the stop has reached every worker
        self._turned_at = 0.0
        self._began = time.monotonic()
        self._poll_interval: float | None = None
        self._poll_at = 0.0
        self._control: Control | None = None

    # -- for any thread --------------------------------------------------------------------------------------------

    @property
    def pids(self) -> set[int]:
        return set(self._roster.handles)

    def reload(self) -> None:
        """Begin the next generation."""
        self._ask(self._reload.begin)

    def scale(self, size: int) -> None:
        """Change the number of workers."""
        self._ask(lambda: self.resize(size))

    def stop(self, stage: Stage = Stage.SETTLING, *, detach: bool = False) -> None:
        """Stop the pool: gracefully, or as hard as `stage` says. `run()` returns when it is over or, with `detach`, as
        soon as every worker was asked to leave: call it again to see the drain through."""
        self._detach = detach
        self._ask(lambda: self._stop.escalate(stage))

    def _ask(self, order: Callable[[], object]) -> None:
        self._asked.append(order)
        self._inbox.wake()

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self, poll_interval: float | None = None) -> None:
        """Serve until stopped.

        Parameters
        ----------
        poll_interval
            Seconds between two calls of `service_actions`; None: never call it, sleep until something happens.

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
                # would ever wake the loop for it again.
                if self._over():
                    break
                self._sleep()
        finally:
            if former is not None:
                signal.signal(signal.SIGCHLD, former)
            self._inbox.restore()
        if self.pool.boot_failed:
            raise BootError(f"no worker became ready\n{self._reaper.last_words}".rstrip())

    def close(self) -> None:
        """Give back what the loop needs. Nothing of the pool may be left."""
        self._reload.close()
        for listener in self.listeners:
            listener.close()
        self._inbox.close()

    # -- for the loop's thread: hooks of the program, and the control socket -----------------------------------------

    def snapshot(self, now: float, slots: Container[int] | None = None) -> PoolSnapshot:
        """The pool as it is, with all workers or those of some slots."""
        stage, exits, reloads = self._stop.stage, self._reaper.last_exits, self._reload.history
        return snapshot(now, self.pool, self.board, stage, exits, reloads, self._began, slots)

    @property
    def stopping(self) -> bool:
        return self._stop.begun

    def attach(self, control: Control) -> None:
        """Serve a control socket in the loop, until `detach()`."""
        self._control = control
        self._inbox.watch(control.fd, control.serve)

    def silence(self, control: Control) -> None:
        """Do not wait for its descriptor until it is attached again; its `due` counts."""
        self._inbox.unwatch(control.fd)

    def detach(self) -> None:
        if self._control is not None:
            self._inbox.unwatch(self._control.fd)
            self._control = None

    def begin_reload(self) -> int | None:
        """Begin the next generation. Returns a ticket for `reload_ticket()`; None: the pool stops."""
        return self._reload.begin()

    def reload_ticket(self, number: int) -> Ticket | None:
        """What has become of a reload; None: there is no such ticket, or not any more."""
        return self._reload.history.ticket(number)

    def resize(self, size: int) -> None:
        """Change the number of workers. One that is out of range is the nearest that is not."""
        wanted, now = min(max(1, size), MAX_WORKERS), self.pool.size
        if self._stop.begun:
            log.warning("resize ignored: the pool stops [PF0309]")
        elif wanted != now:
            log.info("resize: the pool is to have %d workers, before: %d", wanted, now)
            self.pool.resize(wanted)
        elif wanted != size:
            text = "resize ignored: the number of workers stays %d; 1 to %d is possible [PF0307]"
            log.warning(text, now, MAX_WORKERS)

    def recycle(self, slot: int) -> int | None:
        """Replace the worker of a slot. Returns its pid; None: no worker serves there."""
        for member in self.pool.serving:
            if member.slot == slot:
                self.pool.request_recycle(member.pid, "an operator asked for it")
                return member.pid
        return None

    def _over(self) -> bool:
        if self.pool.done and not self._roster.handles:
            return True
        if self._detach and self.pool.stage is not Stage.SERVING:
            self._detach = False
            return True
        return False

    def _turn(self) -> None:
        self._turned_at = now = time.monotonic()
        for step in (
            self._notice_absence,
            self._hear_threads,
            self._reap,
            self._watch_probe,
            self._stop.settle,
            self._last_call,  # after it: where no worker was left when the pool began to drain, this is the only turn
            self._roster.read_slots,
            self._judge.judge,
            self._roster.carry_out_all,
            self._tell,
            self._service,
            self._serve_control,
        ):
            with self._guard.protect("the master failed at %s(); it goes on [PF0410]", step.__name__):
                step(now)

    def _sleep(self) -> None:
        """Until something happens or the next deadline."""
        due: float | None = self._turned_at
        with self._guard.protect("the master failed at its deadlines; it goes on [PF0410]"):
            due = self._next_deadline()
        self._attention.expect(due, self._turned_at)
        if self._guard.forgive():
            self._inbox.pause(FAULT_PAUSE)
            due = self._turned_at  # it may have come meanwhile
        timeout = None if due is None else min(max(0.0, due - time.monotonic()), LONGEST_SLEEP)
        callbacks, arrived = self._inbox.wait(0.0 if self._asked else timeout)
        for callback in callbacks:
            with self._guard.protect("the master failed at a message of a worker; it goes on [PF0410]"):
                callback()
        for signum in arrived:
            with self._guard.protect("the master failed at %s; it goes on [PF0410]", signum.name):
                self._obey(signum)

    def _next_deadline(self) -> float | None:
        """The earliest time at which a turn has something to do without a further event; None: there is none."""
        times = (
            self.pool.next_deadline(),
            self._judge.due,
            self._stop.due,
            self._reaper.due,
            self._reload.due,
            None if self._control is None else self._control.due,
            None if self._poll_interval is None else self._poll_at,
        )
        return min((time for time in times if time is not None), default=None)

    # -- steps of a turn -------------------------------------------------------------------------------------------

    def _notice_absence(self, now: float) -> None:
        if missed := self._attention.missed(now):
            log.warning("the master did not run for %.1f s; all deadlines are extended by that time [PF0413]", missed)
            self.pool.grant(missed)
            self._judge.grant(now, missed)

    def _hear_threads(self, now: float) -> None:
        while self._asked:
            self._asked.popleft()()

    def _reap(self, now: float) -> None:
        self._reaper.reap(now, probing=self._reload.probing)

    def _last_call(self, now: float) -> None:
        """All workers were killed while the pool stops, and there is a queue: fork one more for it."""
        if not self._roster.handles and (order := self._stop.last_call(now)) is not None:
            self._roster.spawn(order, now)

    def _watch_probe(self, now: float) -> None:
        if self._reload.watch():
            self._reaper.look_at(time.monotonic())  # the child of the probe is to end now

    def _tell(self, now: float) -> None:
        """Log what happened to the pool as a whole."""
        events, self.pool.events = self.pool.events, []
        for event, generation in events:
            self._reload.happened(event, generation, now, self._reaper.last_said(generation))
            pool_log.tell(self.pool, event, generation, now - self._began)

    def _service(self, now: float) -> None:
        if self._poll_interval is None or now < self._poll_at:
            return
        self._poll_at = now + max(SHORTEST_POLL, self._poll_interval)
        with self._guard.protect_hook("service_actions() raised; the pool serves on [PF0701]"):
            self.hooks.service_actions()

    def _serve_control(self, now: float) -> None:
        if self._control is not None and (due := self._control.due) is not None and now >= due:
            self._control.serve()

    # -- what an operator orders -----------------------------------------------------------------------------------

    def _obey(self, signum: signal.Signals) -> None:
        if signum is signal.SIGCHLD:
            return  # it has waked the loop, which looks for exits in each turn
        log.info("received %s", signum.name)
        if stage := stop_sequence.ESCALATION.get((signum.name, self._stop.stage)):
            self._stop.escalate(stage)
        elif signum is signal.SIGHUP:
            self._reload.begin()
        elif signum is signal.SIGTTIN:
            self.resize(self.pool.size + 1)
        elif signum is signal.SIGTTOU:
            self.resize(self.pool.size - 1)
        elif signum is signal.SIGUSR1:
            log_rotation.reopen()
            for pid in self._roster.handles:
                self._roster.send(pid, signal.SIGUSR1)


def _collectable() -> Any:
    """Undo an inherited SIG_IGN for SIGCHLD, under which exit statuses are thrown away. Returns what to put back."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        return signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return None
