"""Listening sockets: how new clients are kept out, how the queue is emptied, how a listener is opened again.

A stop must not reset any connection. The kernel resets those that it has completed and nobody has accepted when the
listener closes. So first new clients are kept out, then the workers take the queue until it is empty, then the listener
is closed:

- TCP on Linux: a socket filter (see `stop_filter`); handshakes that had begun are waited for. (Closing at once: 315
  resets in twenty stops under 16 clients; with the filter 0.)
- Unix streams: `shutdown(SHUT_RD)` refuses new clients and keeps the queue. It cannot be undone.
- UDP: a filter that drops everything; what is queued is answered.
- Unix datagrams: `shutdown(SHUT_RD)`, the sender is told.

Where no filter can be attached the queue is drained all the same, and clients that come after that are reset.
"""

import contextlib
import os
import socket
import stat
import sys

import prefork.kernel.host_port as host_port
import prefork.kernel.private_fds as private_fds
import prefork.kernel.stop_filter as stop_filter
import prefork.kernel.unix_path as unix_path
from prefork.kernel.readiness import has_ended, is_readable

_QUEUE_SIZE = slice(28, 32)  # tcpi_sacked: for a listener the size of its queue


def describe(sock: socket.socket) -> str:
    """The address as an operator types it: `tcp://127.0.0.1:80`, `unix:/run/x`."""
    try:
        return describe_address(sock.family, sock.type, sock.getsockname())
    except OSError:
        return "a closed socket"


def describe_address(family: int, kind: int, address: object) -> str:
    """The address of a socket of this family and kind, as an operator types it."""
    stream = kind == socket.SOCK_STREAM
    if family == socket.AF_UNIX:
        path = os.fsdecode(address) if isinstance(address, str | bytes) else str(address)
        return ("unix:" if stream else "unixgram:") + path.replace("\0", "@", 1)
    if isinstance(address, tuple) and len(address) >= 2:
        return f"{'tcp' if stream else 'udp'}://{host_port.host_port(str(address[0]), address[1])}"
    return str(address)


class Listener:
    """What the master does with one listening socket of a server. It never accepts from it.

    Parameters
    ----------
    held
        The socket has the filter of a former stop.
    claim
        The right to its path, where it is a Unix socket.
    """

    def __init__(self, sock: socket.socket, *, held: bool = False, claim: unix_path.Claim | None = None) -> None:
        self._server_socket, self._claim = sock, claim
        self._owner = os.getpid()
        # A descriptor of the master's own: the program may close its server while the pool still drains.
        with private_fds.fork_lock():
            self.socket = socket.socket(sock.family, sock.type, sock.proto)
            os.dup2(sock.fileno(), self.socket.fileno(), inheritable=False)
            private_fds.add([self.socket.fileno()])
        self.stream = sock.type == socket.SOCK_STREAM
        self.unix = sock.family == socket.AF_UNIX
        self.spent = False  # shut down for good: to serve again it must be bound anew
        self.held = held  # the socket has our filter, perhaps since a former stop
        self._backlog = _backlog(sock)

    def open(self, *, blocking: bool) -> None:
        """Make the socket as the workers need it: undo what a former stop did."""
        if self.held:
            stop_filter.detach(self.socket)
            self.held = False
        self._server_socket.setblocking(blocking)

    def close(self) -> None:
        """Give the master's own descriptor back."""
        if os.getpid() == self._owner and self.socket.fileno() >= 0:
            private_fds.close([self.socket.detach()])

    def __del__(self) -> None:
        # A listener that nobody closed must not leave its number among the private descriptors: another file will get
        # it.
        if hasattr(self, "socket"):
            self.close()

    def hold(self) -> None:
        """Keep new clients out; those in the queue stay."""
        if self.unix:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RD)
                self.spent = True
        elif stop_filter.attach(self.socket):
            self.held = True

    def empty(self) -> None:
        """Let the workers find the end of the queue: from now on an accept says EAGAIN instead of waiting.

        The flag belongs to the socket, which all workers share. So there is no window in which one of them would still
        wait.
        """
        with contextlib.suppress(OSError):
            os.set_blocking(self.socket.fileno(), False)

    def half_open(self) -> bool:
        """Whether a client is between its SYN and the end of the handshake."""
        return self.stream and not self.unix and stop_filter.has_half_open(self.socket)

    def waiting(self) -> bool:
        """Whether a client is in the queue."""
        return is_readable(self.socket.fileno())

    def is_shut(self) -> bool:
        """Whether a process has called shutdown() on the socket, which all processes of the pool share."""
        return has_ended(self.socket.fileno())

    def revive(self) -> None:
        """Listen again after a shutdown() by a worker or the program, for the workers that are forked from now on.

        TCP listens again on the same socket. Other kinds cannot: a new socket is bound and put in the place of the old.

        Raises
        ------
        OSError
            The system refuses it.
        """
        address = self.socket.getsockname()
        if self.stream and not self.unix:
            with contextlib.suppress(OSError):  # EINVAL: it has kept its port, as a port that was chosen by number is
                self.socket.bind(address)
            self.socket.listen(self._backlog)
            return
        with socket.socket(self.socket.family, self.socket.type) as fresh:
            if self.unix:
                self._bind_path(fresh, address)
            else:
                self._bind_beside(fresh, address)
            if self.stream:
                fresh.listen(self._backlog)
            fresh.setblocking(os.get_blocking(self.socket.fileno()))
            for sock in (self.socket, self._server_socket):
                os.dup2(fresh.fileno(), sock.fileno(), inheritable=False)

    def _bind_path(self, fresh: socket.socket, path: str) -> None:
        """Bind on the path, with the mode and the owner of the file that is replaced."""
        former = os.stat(path)
        with unix_path.permissions(stat.S_IMODE(former.st_mode)):
            os.unlink(path)
            fresh.bind(path)
        if self._claim is not None:
            self._claim.bound()
        os.chown(path, former.st_uid, former.st_gid)

    def _bind_beside(self, fresh: socket.socket, address: object) -> None:
        """Bind on the address while workers that are about to end still have the old socket."""
        options = socket.SOL_SOCKET, socket.SO_REUSEADDR
        former = self.socket.getsockopt(*options)
        for sock in (self.socket, fresh):
            sock.setsockopt(*options, 1)
        fresh.bind(address)  # type: ignore[arg-type]
        fresh.setsockopt(*options, former)


def _backlog(sock: socket.socket) -> int:
    """How many connections the listener's queue holds; 1024 where the system does not tell."""
    if sys.platform == "linux" and sock.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _QUEUE_SIZE.stop)
            return int.from_bytes(info[_QUEUE_SIZE], sys.byteorder)
    return 1024
