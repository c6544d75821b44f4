"""The loop of a WSGI worker: one epoll waits for the listeners and for all connections without a complete request.

So neither a client that idles between two requests nor a slow client occupies the worker. A connection with a request
is served at once: in the main thread (`threads` = 1, where `RequestTimeout` can interrupt it), or in one of several, of
which one leads and waits in the epoll (`leader_followers` has the rules).

The way of a request leads downward: `turn` waits, the connection's parser is fed, the worker's `serve` answers and
returns what the connection waits for next, and the table `WaitingConnections` keeps it.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Protocol

import prefork.kernel.readiness as readiness
import prefork.workers.wsgi.accepting as accepting
import prefork.workers.wsgi.leader_followers as leader_followers
from prefork.kernel.unpatched import select
from prefork.settings.settings import Options
from prefork.workers.intake.acceptor import PAUSE
from prefork.workers.intake.balance import ConnectionBalancer, SlotOwner
from prefork.workers.intake.waiting import BODY, HEAD, IDLE, LINGER, WaitingConnections, WaitPhase
from prefork.workers.wsgi.limits import DONTWAIT, READ, ListenerContext
from prefork.workers.wsgi.loop_rules import EventBatch
from prefork.workers.wsgi.parser import Connection

_LEAVING_TICK = 0.02


class PollingWorker(accepting.AcceptingWorker, leader_followers.ThreadsWorker, Protocol):
    """What the loop uses of its worker; the times are those of `Limits`."""

    TICK: float
    LAST_WORD: float
    FIRST_WORD: float
    HEAD_TIMEOUT: float
    BODY_TIMEOUT: float
    LINGER: float

    options: Options

    def finish(self) -> None: ...


class PollingLoop:
    """Accepts, reads, and keeps connections until a request has come and between two requests.

    At `max_connections` waiting connections those that have idled longest are closed; where none idles no more are
    accepted. A client that reconnects costs less than one that is turned away.

    Parameters
    ----------
    contexts
        The servers, with what the connections of each one's listener share.
    serve
        Answers the requests that a connection has ready. Returns what the connection waits for next; None: it is to be
        closed. With threads any of them calls it.
    refuse
        Answers a connection that was not understood with its `fault`.
    """

    def __init__(
        self,
        worker: PollingWorker,
        contexts: Mapping[Any, ListenerContext],
        serve: Callable[[Connection], WaitPhase | None],
        refuse: Callable[[Connection], None],
    ) -> None:
        self._worker, self._contexts, self._answer, self._refuse = worker, contexts, serve, refuse
        self._idle = worker.options.keepalive_timeout
        patience = {IDLE: self._idle, HEAD: worker.HEAD_TIMEOUT, BODY: worker.BODY_TIMEOUT, LINGER: worker.LINGER}
        # Those that wait or that a thread has.
        self.connections: WaitingConnections[Connection]
        self.connections = WaitingConnections(worker.options.max_connections, patience, worker.threads > 1)
        self.followers = leader_followers.LeaderFollowers(worker, self) if worker.threads > 1 else None
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._tick = min(worker.TICK, max(0.02, self._idle / 4)) if self._idle else worker.TICK
        self._tick_at = 0.0
        self._batch = EventBatch()
        # Whether the application has forked: then a close alone does not end a connection, of which there are copies.
        self._has_forked = False
        os.register_at_fork(after_in_parent=self._note_fork)

    def _note_fork(self) -> None:
        self._has_forked = True

    def wake(self) -> None:
        """The worker is to leave. Called by a signal handler."""
        readiness.wake_reader(self._wake_read, self._wake_write)
        if self.followers is not None:
            self.followers.wake()

    def open(self) -> None:
        """Make what is needed to wait."""
        self._epoll = select.epoll()

    def run(self, accounts: SlotOwner) -> None:
        """Serve until the worker is to leave, and then until every client has its answer."""
        worker = self._worker
        acceptor = self._acceptor = worker.acceptor
        self._listeners = set(acceptor.fds)
        balancer = ConnectionBalancer(acceptor.fds, list(self._contexts), accounts)
        self.connections.open(self._epoll, balancer.hold)
        self._accepting = accepting.Accepting(worker, self, self._epoll, balancer)
        for server, context in self._contexts.items():
            if context.verify is None:
                acceptor.take_bare(server)
        with self._epoll:
            self._epoll.register(self._wake_read, select.EPOLLIN)
            if not worker.draining:  # else the acceptor has put its listeners away
                self._accepting.start()
            if self.followers is not None:
                self.followers.run()
            while not worker.draining:
                self.turn()
            self._accepting.end()
            self.see_out()

    # -- a turn ----------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Wait for events, and serve the requests that they bring, or hand them over."""
        connections, room = self.connections.by_fd, self._batch.size
        wait = self._accepting.wait or (self._tick if connections else -1.0)
        if (followers := self.followers) is not None:
            room = followers.room
            if wait < 0.0 and followers.busy:
                wait = self._tick
            if not room:
                followers.wait(wait)
        events: list[tuple[int, int]] = self._epoll.poll(wait, room) if room else []
        for fd, _ in events:
            connection = connections.get(fd)
            if connection is not None:
                if connection.in_service:
                    self.connections.mute(connection)
                else:
                    self._read(connection)
            elif fd in self._listeners:
                self._accepting.accept(fd)
            elif fd == self._wake_read and not os.read(fd, 64):
                self._epoll.unregister(fd)  # the end of the pipe would wake this loop for ever
        if wait > 0.0:
            now = monotonic()
            self._batch.turned(now, len(events))
            if now >= self._tick_at or self._accepting.is_yielded:
                self.look()

    @property
    def pause(self) -> float:
        """Seconds between two looks at deadlines."""
        return PAUSE if self._accepting.wait else self._tick

    def look(self) -> None:
        """Look at deadlines, if it is time, and at a queue that is left to siblings."""
        if (now := monotonic()) >= self._tick_at:
            self._tick_at = now + self.pause
            for connection in self.connections.late(now):
                self._expire(connection)
            self._accepting.retry(now)
        self._accepting.take_back()

    # -- a connection ----------------------------------------------------------------------------------------------

    def welcome(self, server: Any, sock: socket.socket, peer: Any) -> None:
        """A new connection. Its request is nearly always there, so it is read at once."""
        context = self._contexts[server]
        if context.verify is not None and not _is_verified(server, sock, peer):
            sock.close()
            return
        if sock.gettimeout() is not None:  # the program's default timeout, for which MSG_DONTWAIT would wait
            sock.settimeout(None)
        connection = Connection(context, sock, peer)
        connection.deadline = monotonic() + self._worker.HEAD_TIMEOUT
        self._read(connection)

    def _read(self, connection: Connection) -> None:
        """Serve the connection, hand it over, or have it wait: as much as has come of its request allows."""
        try:
            data = connection.sock.recv(READ, DONTWAIT)
        except BlockingIOError:
            self._park(connection)
            return
        except OSError:
            data = b""
        if not data:
            self.close(connection)
            return
        if connection.phase is LINGER:
            self._park(connection)
            return
        connection.feed(data)
        requests = connection.requests
        if requests and (requests[0].complete or requests[0].early):
            if self.followers is None:
                self.settle(connection, self._answer(connection))  # as `serve()`, which costs one call more
            else:
                if requests[0].keep:
                    self.connections.by_fd[connection.fd] = connection  # a new one counts when they are shared out
                self.followers.hand_over(connection)
        elif connection.fault:
            self._turn_away(connection)
        elif requests:
            self._park(connection, None if connection.phase is BODY else BODY)
        elif connection.phase is IDLE and connection.served:
            self._park(connection, HEAD)
        else:
            connection.phase = HEAD  # since the connection
            self._park(connection)

    def serve(self, connection: Connection) -> None:
        """Answer the requests that are ready."""
        self.settle(connection, self._answer(connection))

    def settle(self, connection: Connection, phase: WaitPhase | None) -> None:
        """After an answer: have the connection wait for this, or close it."""
        if phase is None:
            self.close(connection)
        elif phase is LINGER:
            self._linger(connection)
        elif connection.fault:
            self._turn_away(connection)
        else:
            try:
                self.connections.park(connection, phase)
            except OSError as error:
                self._close_for_want_of_room(connection, error)

    def _park(self, connection: Connection, phase: WaitPhase | None = None) -> None:
        try:
            self.connections.park(connection, phase)
        except OSError as error:
            self._close_for_want_of_room(connection, error)

    def _close_for_want_of_room(self, connection: Connection, error: OSError) -> None:
        self._acceptor.say_full(error, "watch another connection", "it closes that connection")
        self.close(connection)

    def _expire(self, connection: Connection) -> None:
        """The time of a connection is over, unless bytes have come that were not read yet."""
        phase = connection.phase
        if phase is LINGER:
            with contextlib.suppress(OSError):  # also BlockingIOError: there is nothing that would cause a reset
                connection.sock.recv(READ, DONTWAIT)
            self.close(connection)
        elif readiness.is_readable(connection.fd):
            self._read(connection)
        elif phase is IDLE:
            self.close(connection)
        else:
            seconds = self.connections.patience[phase]
            connection.spoil(408, f"the {phase.name.lower()} did not arrive within {seconds:g} s")
            self._turn_away(connection)

    def close_idle(self) -> bool:
        """Close a part of the idle connections. Returns whether there is room now."""
        for connection in self.connections.longest_idle():
            self._expire(connection)
        return self.connections.has_room

    def _turn_away(self, connection: Connection) -> None:
        self._refuse(connection)
        self._linger(connection)

    def _linger(self, connection: Connection) -> None:
        """The last answer was sent. Read and forget what the client still sends, until it closes or its time is over.

        A close with unread input would reset the connection, and the client might lose the answer.
        """
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close(connection)
        else:
            self._park(connection, LINGER)

    def close(self, connection: Connection) -> None:
        self.connections.remove(connection)
        if self._has_forked and not connection.broken:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()

    # -- leaving ---------------------------------------------------------------------------------------------------

    def see_out(self) -> None:
        """Accept no more. Every client gets the answer to what it has sent, and is let go.

        A client that was active a moment ago may have sent its next request, so it has a moment more. A worker in a
        hurry gives nobody a moment: a client that is not served now is cut off.
        """
        worker = self._worker

        def shift(connection: Connection) -> float:
            if connection.phase is LINGER:
                return worker.LAST_WORD - worker.LINGER
            return worker.LAST_WORD - self._idle if connection.served else worker.FIRST_WORD - worker.HEAD_TIMEOUT

        self._tick, self._tick_at = _LEAVING_TICK, 0.0
        self.connections.shorten({IDLE: worker.LAST_WORD, LINGER: worker.LAST_WORD}, shift)
        self._wait_out()
        while not worker.quitting and self._is_given_back():
            self._wait_out()

    def _is_given_back(self) -> bool:
        """Wait for the requests of threads. Returns whether one gave a connection back, which may ask once more."""
        if self.followers is not None:
            self.followers.wait_begun()
            self._worker.finish()
            # A request is over before its thread gives the connection back. One that is late may never be over.
            self.followers.wait_free(self._worker.LAST_WORD)
        else:
            self._worker.finish()
        return bool(self.connections.waiting())

    def _wait_out(self) -> None:
        while waiting := self.connections.waiting():
            if self._worker.quitting:
                for connection in waiting:
                    self.close(connection)
            else:
                self.turn()


def _is_verified(server: Any, sock: socket.socket, peer: Any) -> bool:
    try:
        return bool(server.verify_request(sock, peer))
    except Exception:
        server.handle_error(sock, peer)
        return False
