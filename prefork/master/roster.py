"""The workers' processes: forked, signalled and heard here, and forgotten once they were reaped.

The pool orders, this module carries out, and tells the pool what the workers say. The master knows a worker only by its
pid, its slot and its two pipes.
"""

import signal
import time
from collections.abc import Sequence

import prefork.kernel.inherited_pipes as inherited_pipes
import prefork.kernel.logs as logs
import prefork.kernel.processes as processes
import prefork.link.uplink as uplink
import prefork.rules.pool as pool
from prefork.kernel.listener import Listener, describe
from prefork.kernel.signal_inbox import Inbox
from prefork.link.scoreboard import Scoreboard
from prefork.master.error_guard import Guard
from prefork.master.stop import Stop
from prefork.master.worker_handle import Start, WorkerHandle, launch
from prefork.rules.states import Phase, State
from prefork.rules.stop_sequence import Stage
from prefork.rules.worker_exit import Reason

log = logs.get("prefork")

_SIGNAL_OF = {
    pool.Retire: signal.SIGTERM,
    pool.Quit: signal.SIGQUIT,
    pool.Abort: signal.SIGABRT,
    pool.Kill: signal.SIGKILL,
}


class Roster:
    """The processes of one pool, by pid.

    Parameters
    ----------
    start
        Runs in the child: makes the worker of a context and lives its life.
    title
        Of the pool's addresses, for the titles of the processes.
    use_pidfd
        False: deaths are noticed in the portable way.
    """

    def __init__(
        self,
        members: pool.Pool,
        board: Scoreboard,
        listeners: Sequence[Listener],
        stop: Stop,
        inbox: Inbox,
        guard: Guard,
        start: Start,
        title: str,
        use_pidfd: bool,
    ) -> None:
        self.handles: dict[int, WorkerHandle] = {}
        self._pool, self._board, self._listeners, self._stop = members, board, listeners, stop
        self._inbox, self._guard = inbox, guard
        self._start, self._title, self._use_pidfd = start, title, use_pidfd
        self._pipes = inherited_pipes.snapshot()
        self._threads_named = False
        self._refused_in: float | None = None  # the last turn in which the system refused a fork

    # -- orders ----------------------------------------------------------------------------------------------------

    def carry_out_all(self, now: float) -> None:
        """Bring about what the pool wants now."""
        for order in self._pool.orders(now):
            with self._guard.protect("the master cannot carry out %s; it goes on [PF0410]", order):
                if isinstance(order, pool.Spawn):
                    self.spawn(order, now)
                elif order.pid in self.handles:
                    self.send(order.pid, _SIGNAL_OF[type(order)])

    def send(self, pid: int, signum: int) -> None:
        handle = self.handles[pid]
        try:
            handle.child.send(signum)
        except OSError as error:  # EPERM: it has another user now
            self._guard.report(error, "%s cannot be signalled; the master tries again [PF0411]", handle.name)

    def spawn(self, order: pool.Spawn, turn: float) -> None:
        """Fork a worker. A refusal by the system is logged once in a `turn` of the loop."""
        if not self._threads_named and (names := processes.threads_left_behind()):
            self._threads_named = True
            log.debug("workers do not inherit these threads of the master: %s", ", ".join(names))
        if not self._stop.begun:
            self.revive_listeners()
        try:
            handle = launch(
                self._board,
                order.slot,
                order.generation,
                self._pool.options_of(order.generation),
                self._title,
                self._start,
                use_pidfd=self._use_pidfd,
                pipes=self._pipes,
            )
        except OSError as error:
            now = time.monotonic()
            self._pool.spawn_failed(now)
            if self._refused_in != turn:
                self._refused_in = turn
                why, delay = error.strerror or error, max(0.0, self._pool.system_backoff.until - now)
                log.error("slot %d: no worker can be started: %s; next try in %.1f s [PF0407]", order.slot, why, delay)
            return
        except Exception:
            self._pool.spawn_failed(time.monotonic())
            raise
        pid = handle.child.pid
        self.handles[pid] = handle
        self._pool.spawned(order, pid, handle.born)
        self._inbox.watch(handle.link.fd, lambda: self.hear(handle))
        if handle.child.pidfd is not None:
            self._inbox.watch(handle.child.pidfd, handle.child.note_end)

    def revive_listeners(self) -> None:
        """A worker, or the program, may have shut down what all of them share: nobody could connect any more."""
        for listener in self._listeners:
            if listener.is_shut():
                name = describe(listener.socket)
                text = "a worker or the program has shut down %s, and it cannot be opened again [PF0415]"
                with self._guard.protect(text, name):
                    listener.revive()
                    log.error("a worker or the program has shut down %s; the master has opened it again [PF0412]", name)

    # -- what workers say ------------------------------------------------------------------------------------------

    def hear(self, handle: WorkerHandle) -> None:
        """Something arrived on a worker's uplink."""
        messages, closed = handle.link.read()
        now, pid = time.monotonic(), handle.child.pid
        if closed and handle.closed_at is None:
            handle.closed_at = now
            self._inbox.unwatch(handle.link.fd)
        for message, text in messages.items():
            if message == uplink.READY:
                self._pool.booted(pid, now)
            elif message == uplink.LEAVES:
                self._pool.leaves(pid, now)
            elif message == uplink.STUCK:
                self._pool.leaves(pid, now, Reason.REQUEST_TIMEOUT)
            elif message == uplink.EXITS:
                self._pool.leaves(pid, now, Reason.EXITED)
            elif message == uplink.RECYCLE:
                self._pool.request_recycle(pid, _plain(text))
            elif message == uplink.STOP:
                log.info("%s asks the pool to stop: shutdown() was called in it", handle.name)
                self._stop.escalate(Stage.SETTLING)

    def read_slots(self, now: float) -> None:
        """Whether a worker has acknowledged its order is written in its slot."""
        for member in self._pool.members.values():
            if member.state is State.RETIRING and not member.acknowledged:
                phase = self._board.phase(member.slot)
                if phase >= (Phase.LEAVING if member.quitting else Phase.DRAINING):
                    self._pool.acknowledged(member.pid, now)

    # -- the end ---------------------------------------------------------------------------------------------------

    def forget(self, handle: WorkerHandle) -> None:
        """It was reaped: give back what the master holds of it."""
        self._inbox.unwatch(handle.link.fd)
        if handle.child.pidfd is not None:
            self._inbox.unwatch(handle.child.pidfd)
        del self.handles[handle.child.pid]
        handle.release()


def _plain(text: str) -> str:
    """What a worker said, on one line."""
    return "".join(c if c.isprintable() else "?" for c in text)
