"""The control socket: operators ask a running pool, in the master's own loop.

A connection carries one request and its answer:

- READING until its line is complete: at most `REQUEST_LIMIT` bytes, within `READ_TIMEOUT`;
- ANSWERING until all of the answer was taken, within `ANSWER_TIMEOUT`; the answer is made piece by piece;
- closed: by either, by an end of the stream, by a failure of any kind.

At most `CLIENTS` are connected; one more is refused with a line that says so. Only the user of the master, and root, is
heard: the file has mode 0600, and the kernel tells who connects. Nothing here waits or raises. A failure ends the
connection that it concerns; where the listener itself fails it rests for `REST` seconds.

The master sees one descriptor, an epoll with the listener and all clients in it. A child that it forks keeps none of
them.
"""

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import prefork.kernel.logs as logs
import prefork.kernel.private_fds as private_fds
import prefork.kernel.unix_path as unix_path
import prefork.operations.protocol as protocol
from prefork.master.loop import Master
from prefork.operations.answers import Answers
from prefork.operations.protocol import REQUEST_LIMIT, ControlError

log = logs.get("prefork")

CLIENTS = 8
READ_TIMEOUT = 1.0  # seconds that a client has for its request
ANSWER_TIMEOUT = 2.0  # seconds that it has to take the answer
REST = 1.0  # seconds to the next accept, where the system has refused one
BACKLOG = 16
_ACCEPTS = 8  # in one turn of the loop
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid (unix(7))


class Client:
    """One connection."""

    def __init__(self, sock: socket.socket, pid: int, uid: int, deadline: float) -> None:
        self.socket, self.pid, self.uid, self.deadline = sock, pid, uid, deadline
        self.received = bytearray()
        self.unsent = b""
        self.pieces: Iterator[bytes] | None = None  # of the answer; None while it is READING

    def send(self) -> bool:
        """Send what fits, and make the next piece once all was sent. Whether there is none any more."""
        assert self.pieces is not None
        if not self.unsent:
            self.unsent = next(self.pieces, b"")
        if self.unsent:
            self.unsent = self.unsent[self.socket.send(self.unsent) :]
        if not self.unsent:
            self.unsent = next(self.pieces, b"")
        return not self.unsent


class Control:
    """The control socket of one pool.

    Parameters
    ----------
    path
        Where its file is made.

    Raises
    ------
    OSError
        It cannot be made; nothing was left.
    """

    def __init__(self, path: str) -> None:
        if not hasattr(select, "epoll") or not hasattr(socket, "SO_PEERCRED"):
            raise OSError(errno.ENOSYS, "this system has no control sockets", path)
        self._clients: dict[int, Client] = {}
        self._rests_until: float | None = None
        self._uids = {0, os.geteuid()}
        self._master: Master | None = None
        self._answers: Answers | None = None
        with private_fds.fork_lock():
            self._epoll = select.epoll()
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._own = [self._epoll.fileno(), self._listener.fileno()]
            private_fds.add(self._own)
        self.fd = self._epoll.fileno()
        try:
            self._claim = unix_path.Claim(path, socket.SOCK_STREAM)
        except BaseException:
            self._close_descriptors()
            raise
        try:
            self.path = self._claim.path
            self._listener.setblocking(False)
            with unix_path.permissions(0o600):
                self._bind()
            self._claim.bound()
            self._listener.listen(BACKLOG)
            self._epoll.register(self._listener, select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    def _bind(self) -> None:
        try:
            self._listener.bind(self.path)
        except OSError as error:  # a path that is too long has no number
            raise OSError(error.errno or errno.ENAMETOOLONG, error.strerror or str(error), self.path) from None

    def join(self, master: Master, about: dict[str, Any]) -> None:
        """Answer for a master, from its loop, until `close()`. `about` is a part of each answer about the pool."""
        self._master, self._answers = master, Answers(master, {**about, "path": self.path})
        master.attach(self)
        log.info("control socket: %s", self.path)

    @property
    def due(self) -> float | None:
        """When a client has had its time, or the listener has rested; None: nobody is connected."""
        times = [client.deadline for client in self._clients.values()]
        if self._rests_until is not None:
            times.append(self._rests_until)
        return min(times, default=None)

    def serve(self) -> None:
        """Do what can be done without waiting."""
        try:
            self._serve(time.monotonic())
        except Exception as error:
            self._rest(error)

    def _serve(self, now: float) -> None:
        if self._rests_until is not None:
            if now < self._rests_until or self._master is None:
                return
            self._rests_until = None
            self._master.attach(self)
        for fd, _ in self._epoll.poll(0, CLIENTS + 1):
            if fd == self._listener.fileno():
                self._accept(now)
            elif (client := self._clients.get(fd)) is not None:
                self._attend(client, now)
        for client in [client for client in self._clients.values() if now >= client.deadline]:
            self._expire(client)

    def _rest(self, error: Exception) -> None:
        """The listener or the epoll fails, perhaps for lack of descriptors: nobody is heard for a while."""
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        log.warning("the control socket fails: %s; it pauses for %g s [PF0801]", reason, REST)
        for client in list(self._clients.values()):
            self._drop(client)
        if self._master is not None:
            self._master.silence(self)
        self._rests_until = time.monotonic() + REST

    def close(self) -> None:
        """Remove the file, and end all connections."""
        if self._master is not None:
            self._master.detach()
            self._master = None
        for client in list(self._clients.values()):
            self._drop(client)
        self._close_descriptors()
        self._claim.release()

    def _close_descriptors(self) -> None:
        private_fds.forget(self._own)
        for owner in (self._listener, self._epoll):
            with contextlib.suppress(OSError):  # the descriptor is gone whatever close(2) says
                owner.close()

    # -- one connection --------------------------------------------------------------------------------------------

    def _accept(self, now: float) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_ACCEPTS):
                with private_fds.fork_lock():
                    sock, _ = self._listener.accept()
                    private_fds.add([sock.fileno()])
                self._admit(sock, now)

    def _admit(self, sock: socket.socket, now: float) -> None:
        sock.setblocking(False)
        client = Client(sock, 0, -1, now + READ_TIMEOUT)
        try:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            client.pid, client.uid, _ = _CREDENTIALS.unpack(credentials)
            if client.uid not in self._uids:
                raise ControlError("forbidden", f"only uid {os.geteuid()} and root may ask this pool")
            if len(self._clients) >= CLIENTS:
                raise ControlError("busy", f"{CLIENTS} clients are connected already")
            self._epoll.register(sock, select.EPOLLIN)
            self._clients[sock.fileno()] = client
            self._attend(client, now)
        except ControlError as error:
            with contextlib.suppress(OSError):
                sock.send(protocol.error_line(error))
            self._drop(client)
        except OSError:
            self._drop(client)

    def _attend(self, client: Client, now: float) -> None:
        """Something can be read from it, or written to it."""
        try:
            if client.pieces is None:
                data = client.socket.recv(REQUEST_LIMIT + 1 - len(client.received))
                client.received += data
                line, end, _ = client.received.partition(b"\n")
                if end or len(client.received) > REQUEST_LIMIT:
                    self._answer(client, bytes(line), now)
                elif not data:
                    self._drop(client)
            # At once, in the same turn of the loop: a turn looks at every worker.
            if client.pieces is not None and client.send():
                self._drop(client)
        except BlockingIOError:
            pass
        except Exception as error:
            if not isinstance(error, OSError):
                log.error("the control socket cannot answer pid %d [PF0802]", client.pid, exc_info=error)
            self._drop(client)

    def _answer(self, client: Client, line: bytes, now: float) -> None:
        client.deadline = now + ANSWER_TIMEOUT
        client.pieces = iter([protocol.error_line(ControlError("failed", "the pool cannot answer; see its log"))])
        self._epoll.modify(client.socket, select.EPOLLOUT)
        try:
            request = protocol.parse_request(line)
            if request.do in protocol.ORDERS:
                log.info("control: %s, asked by pid %d of uid %d", request, client.pid, client.uid)
            if self._answers is not None:
                client.pieces = self._answers.answer(request)
        except ControlError as error:
            client.pieces = iter([protocol.error_line(error)])
        except Exception as error:
            log.error("the control socket cannot answer pid %d [PF0802]", client.pid, exc_info=error)

    def _expire(self, client: Client) -> None:
        if client.pieces is None:
            with contextlib.suppress(OSError):
                text = f"a request must be there within {READ_TIMEOUT:g} s"
                client.socket.send(protocol.error_line(ControlError("too-slow", text)))
        self._drop(client)

    def _drop(self, client: Client) -> None:
        fd = client.socket.fileno()
        if fd < 0:
            return
        # First out of the epoll: a child that was forked just now may hold a copy for a moment.
        with contextlib.suppress(OSError, ValueError, KeyError):
            self._epoll.unregister(fd)
        self._clients.pop(fd, None)
        private_fds.forget([fd])
        with contextlib.suppress(OSError):
            client.socket.close()
