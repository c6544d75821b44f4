"""A loop that waits for listeners and for connections from which a whole request has not come yet, in one epoll.

So neither a client that idles between two requests nor one that is slow holds a worker. A request that is there is
served at once, in the main thread (`threads` = 1, where `RequestTimeout` can interrupt it) or in one of several, which
take turns at that epoll: `turns` has the rules.

Connections are looked through for their deadlines twice a second, and only while there are any: that is cheaper than to
order them anew at each request, and an idle worker does not wake up.
"""

import contextlib
import heapq
import os
import socket
import threading
from collections.abc import Sequence
from time import monotonic
from typing import Any

import prefork.kernel.host_port as host_port
import prefork.kernel.logs as logs
import prefork.kernel.readiness as readiness
from prefork.kernel.unpatched import refuse_patched, select
from prefork.link.worker_context import WorkerContext
from prefork.workers.base import Worker
from prefork.workers.intake.acceptor import PAUSE, RESOURCE_ERRORS
from prefork.workers.intake.balance import ASIDE, YIELD, ConnectionBalancer
from prefork.workers.wsgi.parser import BODY, DONTWAIT, HEAD, IDLE, LINGER, READ, Connection, Limits, ListenerContext
from prefork.workers.wsgi.response import Clock, refusal
from prefork.workers.wsgi.threads import NEVER, LeaderFollowers

log = logs.get("prefork")

_BATCH = 64  # events looked at between two looks at the clock
_BRIEF = 0.0005  # seconds for each event of a turn, its wait included, up to which the next one may have a whole batch
_LEAVING_TICK = 0.02
_TURN = 8  # connections that a worker may take, serve and close before it looks at anything else


class PollingWorker(Limits, Worker):
    """Keeps connections until a request has come, and between two; a subclass says how one is served.

    At `max_connections` connections that wait, the longest idle are closed, and where none is idle no more are
    accepted: a client that reconnects costs less than one that is turned away.
    """

    SERVER = "prefork"  # the Server header; "": none
    TICK = 0.5  # seconds between two looks at deadlines
    LAST_WORD = 0.5  # seconds for which a leaving worker still expects a next request from a client, since the last one
    FIRST_WORD = 2.0  # the same for a first request, since the connection

    def site(self, server: Any) -> ListenerContext:
        """What the connections of one listener share."""
        raise NotImplementedError

    def serve(self, connection: Connection) -> None:
        """Answer what `connection.requests` has ready, the first of them and those that follow; then `park()` it, or
        `close()` or `linger()`. Any thread may."""
        raise NotImplementedError

    # -- life ------------------------------------------------------------------------------------------------------

    def __init__(self, servers: Sequence[Any], context: WorkerContext) -> None:
        # Not in setup(), which belongs to subclasses.
        super().__init__(servers, context)
        self.threads = self.options.threads or 1
        if self.threads > 1:
            refuse_patched(("threading",), "wsgi with threads", "set threads to 1")
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._sites = {server: self.site(server) for server in self.servers}
        self._connections: dict[int, Connection] = {}  # those that wait or that a thread has, by descriptor
        self.clock = Clock(self.SERVER)
        self._idle = self.options.keepalive_timeout
        self._tick = min(self.TICK, max(0.02, self._idle / 4)) if self._idle else self.TICK
        # How long a connection may be in a phase.
        self._patience = {IDLE: self._idle, HEAD: self.HEAD_TIMEOUT, BODY: self.BODY_TIMEOUT, LINGER: self.LINGER}
        self._tick_at = self._turned_at = 0.0
        self._batch = 1
        self._taken = 0
        self._crowded = False  # whether more than one was found waiting the last time
        self._resume_at = NEVER  # when to accept again
        self._aside = -1  # the listener whose queue is left to siblings
        # Whether the application has forked: then a close alone does not end a connection, of which there are copies.
        self._forked = False
        os.register_at_fork(after_in_parent=self._has_forked)
        # With threads.
        self._turns = LeaderFollowers(self)
        self._giving = threading.Lock()  # against a turn that looks at what is just given back, or closed

    def _has_forked(self) -> None:
        self._forked = True

    def drain(self) -> None:
        readiness.wake_reader(self._wake_read, self._wake_write)
        self._turns.wake()

    def prepare_to_accept(self) -> None:
        super().prepare_to_accept()
        self._epoll = select.epoll()

    def run(self) -> None:
        acceptor = self.acceptor
        self._listeners = set(acceptor.fds)
        self._share = ConnectionBalancer(acceptor.fds, self.servers, self._requests)
        for server, site in self._sites.items():
            if site.verify is None:
                acceptor.take_bare(server)
        with self._epoll:
            self._epoll.register(self._wake_read, select.EPOLLIN)
            if self.draining:
                self._resume_at = 0.0  # told before there was an acceptor, which then has put its listener away
            else:
                self._accept_again()
            if self.threads > 1:
                self._turns.run()
            while not self.draining:
                self.turn()
            self._stop_accepting(NEVER)
            if not self.quitting:
                for fd in acceptor.fds:
                    self._take_last(fd, acceptor.last_look())
            self._see_out()

    # -- the loop --------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Wait for whatever comes, and serve it, or hand it over.

        A batch saves system calls, but whose next request comes just after one was fetched waits for that batch, and
        then behind all others in the next. Where requests are long each is fetched alone: the kernel keeps their order.
        """
        connections, room = self._connections, self._batch
        if self._resume_at == NEVER:
            wait = self._tick if connections else -1.0
        else:
            wait = PAUSE if self._aside < 0 else ASIDE
        if self.threads > 1:
            room = self._turns.room
            if wait < 0.0 and self._turns.busy:
                wait = self._tick
        events: list[tuple[int, int]] = []
        if room:
            events = self._epoll.poll(wait, room)
            for fd, _ in events:
                connection = connections.get(fd)
                if connection is not None:
                    if connection.deadline < NEVER:
                        self._read(connection)
                    else:
                        self._mute(connection)
                elif fd in self._listeners:
                    self._take(fd)
                elif fd == self._wake_read and not os.read(fd, 64):
                    self._epoll.unregister(fd)  # at its end it would wake this loop for ever
        else:
            self._turns.wait(wait)
        if wait > 0.0:
            now = monotonic()
            self._batch = _BATCH if now - self._turned_at < len(events) * _BRIEF else 1
            self._turned_at = now
            if now >= self._tick_at or self._aside >= 0:
                self.look()

    @property
    def pause(self) -> float:
        """Seconds between two looks at deadlines."""
        return self._tick if self._resume_at == NEVER else PAUSE

    def look(self) -> None:
        """At deadlines, if it is time, and at a queue that is left to siblings."""
        if (now := monotonic()) >= self._tick_at:
            self._tick_at = now + self.pause
            for connection in [one for one in self._waiting() if one.deadline <= now]:
                self._expire(connection)
            room = self._aside < 0 and self._resume_at <= now
            if room and (len(self._connections) < self.options.max_connections or self._close_idle()):
                self._accept_again()
        if self._aside >= 0 and not self._is_theirs(self._aside):
            self._accept_again()

    def _take(self, fd: int) -> None:
        """Take and serve what the listener has, as long as it has more and nobody else's turn has come.

        To ask without having been told that somebody is there saves a poll where there is, a twentieth of what a short
        connection costs, and costs twice as much where there is not: it is done while it succeeds, and tried at times.
        """
        try_take = self.acceptor.try_take
        for number in range(1, _TURN + 1):
            waiting = len(self._connections)
            if waiting >= self.options.max_connections and not self._close_idle():
                self._stop_accepting(0.0)
                return
            try:
                taken = try_take(fd)
            except OSError as error:
                self._pause_if_full(error)
                self._close_idle()
                taken = None
            if taken is None:
                self._crowded = self._crowded and number == 1
                break
            self._welcome(*taken)
            self._taken += 1
            self._crowded = self._crowded or number > 1
            # Who has got a connection to keep lets others have the next one. One that is over already leaves nothing
            # to be fair about.
            if len(self._connections) > waiting or self.draining or not (self._crowded or self._taken % _TURN == 0):
                break
        if self._resume_at < NEVER:
            return
        held = len(self._connections)
        if held > waiting and self._is_theirs(fd):
            self._stop_accepting(0.0, aside=fd)
        elif held > waiting or number > 1:
            try:
                self.acceptor.step_back(self._epoll, fd)
            except OSError as error:
                self._pause_if_full(error)

    def _pause_if_full(self, error: OSError) -> None:
        if error.errno not in RESOURCE_ERRORS:
            raise error
        self.acceptor.say_full(error)
        self._stop_accepting(monotonic() + PAUSE)

    def _take_last(self, fd: int, number: int) -> None:
        """What is queued when this worker is told to leave."""
        for _ in range(number):
            try:
                taken = self.acceptor.try_take(fd)
            except OSError:
                return
            if taken is None:
                return
            self._welcome(*taken)

    def _stop_accepting(self, resume_at: float, aside: int = -1) -> None:
        """Until then, if it has not stopped already."""
        if self._resume_at == NEVER:
            self.acceptor.poll_without(self._epoll)
        self._resume_at, self._aside = resume_at, aside

    def _is_theirs(self, fd: int) -> bool:
        return self._share.whose(fd, len(self._connections), single=self.threads == 1) == YIELD

    def _accept_again(self) -> None:
        try:
            self.acceptor.poll_with(self._epoll)
        except OSError as error:
            if error.errno not in RESOURCE_ERRORS:
                raise
            self.acceptor.say_full(error)
            self._resume_at, self._aside = monotonic() + PAUSE, -1
        else:
            self._resume_at, self._aside = NEVER, -1

    def _see_out(self) -> None:
        """Nothing new is accepted any more: every client gets the answer to what it has sent, and is let go.

        One that was active a moment ago may have sent its next request: it has a moment more. In a hurry nobody has:
        whoever is not served at this moment is cut off.
        """
        self._tick, self._tick_at = _LEAVING_TICK, 0.0
        with self._giving:
            for one in list(self._connections.values()):
                if one.phase == IDLE:
                    one.deadline += self.LAST_WORD - self._idle if one.served else self.FIRST_WORD - self.HEAD_TIMEOUT
                elif one.phase == LINGER:
                    one.deadline += self.LAST_WORD - self.LINGER
            self._patience |= {IDLE: self.LAST_WORD, LINGER: self.LAST_WORD}
        self._wait_out()
        while not self.quitting and self._given_back():
            self._wait_out()

    def _given_back(self) -> bool:
        """Wait for what threads have in hand. Whether any connection was given back, whose last word it may not be."""
        self._turns.wait_begun()
        self.finish()
        # A request is over before its thread has given its connection back; one that is late never is.
        self._turns.wait_free(self.LAST_WORD)
        return bool(self._waiting())

    def _wait_out(self) -> None:
        while waiting := self._waiting():
            if self.quitting:
                for connection in waiting:
                    self.close(connection)
            else:
                self.turn()

    # -- a connection that waits -----------------------------------------------------------------------------------

    def _welcome(self, server: Any, sock: socket.socket, peer: Any) -> None:
        """A new connection. Its request is nearly always there, so it is read at once."""
        site = self._sites[server]
        if site.verify is not None and not self._is_welcome(server, sock, peer):
            sock.close()
            return
        if sock.gettimeout() is not None:  # the program's default timeout, with which MSG_DONTWAIT waits all the same
            sock.settimeout(None)
        connection = Connection(site, sock, peer)
        connection.deadline = monotonic() + self.HEAD_TIMEOUT
        self._read(connection)

    def _is_welcome(self, server: Any, sock: socket.socket, peer: Any) -> bool:
        try:
            return bool(server.verify_request(sock, peer))
        except Exception:
            server.handle_error(sock, peer)
            return False

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(READ, DONTWAIT)
        except BlockingIOError:
            self.park(connection)
        except OSError:
            self.close(connection)
        else:
            self._receive(connection, data)

    def _receive(self, connection: Connection, data: bytes) -> None:
        """Serve it, hand it over, or wait on: as much as has come of it allows."""
        if not data:
            self.close(connection)
            return
        if connection.phase == LINGER:
            self.park(connection)
            return
        connection.feed(data)
        requests = connection.requests
        if requests and (requests[0].complete or requests[0].early):
            if self.threads == 1:
                self.serve(connection)
            else:
                if requests[0].keep:
                    self._connections[connection.fd] = connection  # so a new one is among those that are shared out
                self._turns.hand_over(connection)
        elif connection.fault:
            self.turn_away(connection)
        elif requests:
            self.park(connection, BODY if connection.phase != BODY else None)
        elif connection.phase == IDLE and connection.served:
            self.park(connection, HEAD)
        else:
            connection.phase = HEAD  # since the connection
            self.park(connection)

    def park(self, connection: Connection, phase: int | None = None) -> None:
        """Wait for more of it: in a new phase, with its time, or (None) as before."""
        if self.threads > 1:
            self._give_back(connection, phase)
            return
        if phase is not None:
            connection.phase, connection.deadline = phase, monotonic() + self._patience[phase]
        if not connection.parked and not self._register(connection):
            self.close(connection)

    def _register(self, connection: Connection) -> bool:
        """Have the epoll wait for it. Whether it has room for one more; if not, this one is to end, and no other."""
        connection.parked = True
        self._connections[connection.fd] = connection
        try:
            self._epoll.register(connection.fd, select.EPOLLIN)
        except OSError as error:
            self.acceptor.say_full(error, "wait for one more connection", "it is closed")
            return False
        return True

    def _expire(self, connection: Connection) -> None:
        """Its time is over, unless something has come that was not looked at yet."""
        try:
            data = connection.sock.recv(READ, DONTWAIT)
        except BlockingIOError:
            if connection.phase in (HEAD, BODY):
                what = "head" if connection.phase == HEAD else "body"
                connection.spoil(408, f"the {what} did not come within {self._patience[connection.phase]:g} s")
                self.turn_away(connection)
            else:
                self.close(connection)
        except OSError:
            self.close(connection)
        else:
            if connection.phase == LINGER:
                self.close(connection)
            else:
                self._receive(connection, data)

    def _close_idle(self) -> bool:
        """Let go of a part of those that idle, the longest idle first. Whether there is room now."""
        idle = [one for one in self._waiting() if one.phase == IDLE]
        for one in heapq.nsmallest(1 + len(idle) // 16, idle, key=lambda one: one.deadline):
            self._expire(one)
        return len(self._connections) < self.options.max_connections

    def turn_away(self, connection: Connection) -> None:
        """Answer what could not be understood with its `fault`, and no more on this connection."""
        head, body = refusal(connection.fault, self.clock)
        with contextlib.suppress(OSError):
            connection.sock.send(head + body, DONTWAIT)
        self.refused(connection, len(body))
        self.linger(connection)

    def refused(self, connection: Connection, size: int) -> None:
        """It was told of its `fault`, with a body of this size. Say so, before another thread may have it."""
        peer, reason = host_port.of_peer(connection.peer), connection.reason
        log.info("worker %d: refused %d from %s: %s", self.slot, connection.fault, peer, reason)

    def linger(self, connection: Connection) -> None:
        """The answer is over; what the client still sends is read and forgotten, until it closes or its time is over.

        A close with unread input would reset the connection, and the client might lose the answer.
        """
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close(connection)
        else:
            self.park(connection, LINGER)

    def close(self, connection: Connection) -> None:
        if self.threads > 1:
            with self._giving:
                self._forget(connection)
        elif connection.parked:
            self._forget(connection)
        if self._forked and not connection.broken:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()

    def _forget(self, connection: Connection) -> None:
        if self._connections.pop(connection.fd, None) is not None:
            self._share.hold(len(self._connections))
            self._unpark(connection)

    def _unpark(self, connection: Connection) -> None:
        if connection.parked:
            try:
                self._epoll.unregister(connection.fd)  # by hand, as it would stay where a forked process has a copy
                connection.parked = False
            except OSError:
                pass  # it is not there; or it is reported again, or goes with its descriptor

    # -- threads ---------------------------------------------------------------------------------------------------

    def _give_back(self, connection: Connection, phase: int | None) -> None:
        """From the thread that had it to whoever has the turn, whose it is with the last step of this."""
        deadline = connection.deadline if phase is None else monotonic() + self._patience[phase]
        with self._giving:
            if phase is not None:
                connection.phase = phase
            connection.deadline = deadline
            kept = connection.parked or self._register(connection)
            if not kept:
                connection.deadline = NEVER  # it stays the thread's
        if not kept:
            self.close(connection)

    def _mute(self, connection: Connection) -> None:
        """Something has come from one that a thread has: it is reported again when it has been given back."""
        with self._giving:
            if connection.deadline == NEVER:
                self._unpark(connection)

    def _waiting(self) -> list[Connection]:
        """Those that nobody serves."""
        with self._giving:
            return [one for one in list(self._connections.values()) if one.deadline < NEVER]

    def begun(self, connection: Connection) -> None:
        """A thread has its request in hand."""
        self._turns.begin(connection)

    @property
    def disowned(self) -> bool:
        return self._disowned
