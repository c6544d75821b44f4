"""Listening sockets: whose path it is, how new clients are kept out, how the queue is emptied, what is closed and what
removed.

A stop must not reset anybody. A connection that the kernel has completed but nobody accepted is reset when the listener
closes, so first new ones are kept out, then the workers take the queue until it is empty, then it is closed:

- TCP on Linux: a socket filter drops segments that only say SYN. The client's kernel repeats them, and finds the
  successor, or a closed port; handshakes that had begun are waited for. (Closing at once: 315 resets in twenty stops
  under 16 clients; with the filter 0.)
- Unix streams: `shutdown(SHUT_RD)` refuses new ones, keeps the queue. It cannot be undone.
- UDP: a filter that drops everything; what is queued is answered.
- Unix datagrams: `shutdown(SHUT_RD)`, the sender is told.

Where no filter can be attached the queue is drained all the same, and who comes after that is reset.

A Unix path is held by a lock on `PATH.lock` for as long as the server exists, so that of two starting at once one is
refused, and a path left by a crash is known to be stale. The file is removed only while it is still the one that was
bound.
"""

import array
import contextlib
import errno
import fcntl
import grp
import os
import socket
import stat
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from typing import ClassVar

import prefork.kernel.host_port as host_port
import prefork.kernel.private_fds as private_fds
import prefork.kernel.readiness as readiness
from prefork.errors import OptionError

_SO_ATTACH_FILTER = 26
_SO_DETACH_FILTER = 27
_ACCEPT = (0x06, 0, 0, 0xFFFFFFFF)
_DROP = (0x06, 0, 0, 0)
# sock_diag(7): the kernel's own list of sockets by state. /proc/net/tcp takes 70 ms when there are many.
_SOCK_DIAG = 4
_DIAG_BY_FAMILY = 20
_DUMP = 0x301
_SYN_RECV = 1 << 3
_NO_NEW_CONNECTIONS = [
    (0x30, 0, 0, 13),  # load the byte of flags: data begins at the TCP header, for IPv4 and IPv6
    (0x54, 0, 0, 0x12),  # of which SYN and ACK
    (0x15, 0, 1, 0x02),  # only SYN?
    _DROP,
    _ACCEPT,
]
_NOTHING = [_DROP]
_QUEUE_SIZE = slice(28, 32)  # tcpi_sacked, which of a listener is the size of its queue
_LOCK = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


def describe(sock: socket.socket) -> str:
    """The address as an operator types it: `tcp://127.0.0.1:80`, `unix:/run/x`."""
    try:
        return name(sock.family, sock.type, sock.getsockname())
    except OSError:
        return "a closed socket"


def name(family: int, kind: int, address: object) -> str:
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
        It has the filter of a former stop.
    claim
        The right to its path, where it is a Unix socket.
    """

    def __init__(self, sock: socket.socket, *, held: bool = False, claim: "Claim | None" = None) -> None:
        self._servers, self._claim = sock, claim
        self._owner = os.getpid()
        # A descriptor of the master's own: the program may close its server while the pool still drains.
        with private_fds.fork_lock():
            self.socket = socket.socket(sock.family, sock.type, sock.proto)
            os.dup2(sock.fileno(), self.socket.fileno(), inheritable=False)
            private_fds.add([self.socket.fileno()])
        self.stream = sock.type == socket.SOCK_STREAM
        self.unix = sock.family == socket.AF_UNIX
        self.spent = False  # shut down for good: to serve again it must be bound anew
        self.held = held  # it has our filter, perhaps since a former stop
        self._backlog = _backlog(sock)

    def open(self, *, blocking: bool) -> None:
        """Make it as the workers need it, undoing what a former stop did."""
        if self.held:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
            self.held = False
        self._servers.setblocking(blocking)

    def close(self) -> None:
        """Give the master's own descriptor back."""
        if os.getpid() == self._owner and self.socket.fileno() >= 0:
            private_fds.close([self.socket.detach()])

    def __del__(self) -> None:
        # One that nobody closed must not leave its number among the private descriptors: it will be somebody else's.
        if hasattr(self, "socket"):
            self.close()

    def hold(self) -> None:
        """Keep new clients out; those in the queue stay."""
        if self.unix:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RD)
                self.spent = True
        elif sys.platform == "linux":
            with contextlib.suppress(OSError):
                _attach(self.socket, _NO_NEW_CONNECTIONS if self.stream else _NOTHING)
                self.held = True

    def empty(self) -> None:
        """Let the workers find the end of the queue: from now on it says EAGAIN instead of waiting.

        The flag belongs to the socket, which all workers share, so there is no window in which one of them would still
        wait.
        """
        with contextlib.suppress(OSError):
            os.set_blocking(self.socket.fileno(), False)

    def half_open(self) -> bool:
        """Whether a client is between its SYN and the end of the handshake: it may believe already that it is
        connected."""
        if self.unix or not self.stream or sys.platform != "linux":
            return False
        with contextlib.suppress(OSError), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as kernel:
            kernel.settimeout(0.05)
            asked = struct.pack(
                "=IHHII BBBxI",
                72,
                _DIAG_BY_FAMILY,
                _DUMP,
                0,
                0,
                int(self.socket.family),
                socket.IPPROTO_TCP,
                0,
                _SYN_RECV,
            )
            kernel.send(asked + struct.pack("!H46x", self.socket.getsockname()[1]))
            # One answer a socket, or the end of an empty list.
            return bool(struct.unpack_from("=IH", kernel.recv(65536))[1] == _DIAG_BY_FAMILY)
        return False

    def waiting(self) -> bool:
        """Whether somebody is in the queue."""
        return readiness.is_readable(self.socket.fileno())

    def is_shut(self) -> bool:
        """Whether somebody has called shutdown() on the socket, which all processes of the pool share."""
        return readiness.has_ended(self.socket.fileno())

    def revive(self) -> None:
        """Listen again after a shutdown() of somebody else's, for the workers that are forked from now on.

        TCP listens again on the same socket. The others cannot: a new socket is bound and put in the place of the old.

        Raises
        ------
        OSError
            The system refuses it.
        """
        address = self.socket.getsockname()
        if self.stream and not self.unix:
            with contextlib.suppress(OSError):  # EINVAL: it has kept its port, as one has that was chosen by number
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
            for each in (self.socket, self._servers):
                os.dup2(fresh.fileno(), each.fileno(), inheritable=False)

    def _bind_path(self, fresh: socket.socket, path: str) -> None:
        """With the mode and the owner of the file that it replaces."""
        former = os.stat(path)
        with permissions(stat.S_IMODE(former.st_mode)):
            os.unlink(path)
            fresh.bind(path)
        if self._claim is not None:
            self._claim.bound()
        os.chown(path, former.st_uid, former.st_gid)

    def _bind_beside(self, fresh: socket.socket, address: object) -> None:
        """Where workers still have the old socket, which are about to end."""
        options = socket.SOL_SOCKET, socket.SO_REUSEADDR
        former = self.socket.getsockopt(*options)
        for each in (self.socket, fresh):
            each.setsockopt(*options, 1)
        fresh.bind(address)  # type: ignore[arg-type]
        fresh.setsockopt(*options, former)


def _backlog(sock: socket.socket) -> int:
    """How many connections the listener's queue holds; 1024 where the system does not tell."""
    if sys.platform == "linux" and sock.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _QUEUE_SIZE.stop)
            return int.from_bytes(info[_QUEUE_SIZE], sys.byteorder)
    return 1024


def _attach(sock: socket.socket, program: list[tuple[int, int, int, int]]) -> None:
    code = array.array("B", b"".join(struct.pack("=HBBI", *one) for one in program))
    address, _ = code.buffer_info()
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), address))


class Claim:
    """The right to a Unix path: a lock beside it, and the knowledge of which file is ours.

    Raises
    ------
    OSError
        EADDRINUSE, where another server lives on the path, or something that is no socket lies there.
    """

    made: ClassVar[Callable[[str, int], object] | None] = None  # told of each, by path and kind, before anything else

    def __init__(self, path: str, kind: int) -> None:
        self.path = real_path(path)
        self._owner = os.getpid()
        self._file: tuple[int, int] | None = None
        self._lock = self._acquire(self.path + ".lock")
        try:
            if Claim.made is not None:
                Claim.made(self.path, kind)
            self._clear(kind)
        except BaseException:
            self.release()
            raise

    def _acquire(self, lock: str) -> int:
        while True:
            made = True
            with private_fds.fork_lock():
                try:
                    fd = os.open(lock, _LOCK | os.O_CREAT | os.O_EXCL, 0o600)
                except FileExistsError:
                    made = False
                    try:
                        fd = os.open(lock, _LOCK)
                    except FileNotFoundError:
                        continue
                private_fds.add([fd])
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The former owner may have removed the file between our open and our lock.
                mine, there = os.fstat(fd), os.stat(lock)
                if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                    return fd
            except FileNotFoundError:
                pass
            except BlockingIOError:
                private_fds.close([fd])
                raise OSError(errno.EADDRINUSE, "another server is running on this path", self.path) from None
            except BaseException:
                if made:  # whoever has opened it meanwhile still finds out whether somebody listens on the path
                    with contextlib.suppress(OSError):
                        os.unlink(lock)
                private_fds.close([fd])
                raise
            private_fds.close([fd])

    def _clear(self, kind: int) -> None:
        """Remove a stale socket. Holding the lock, only a server that is not ours can still be alive on it."""
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise OSError(errno.EADDRINUSE, "the path exists and is no socket", self.path)
        with socket.socket(socket.AF_UNIX, kind) as probe:
            probe.setblocking(False)
            try:
                probe.connect(self.path)
            except ConnectionRefusedError:
                os.unlink(self.path)
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                    raise
        raise OSError(errno.EADDRINUSE, "another server is running on this path", self.path)

    def bound(self) -> None:
        """Remember which file is ours. Call it right after the bind."""
        found = os.lstat(self.path)
        self._file = found.st_dev, found.st_ino

    def give(self, group: int, mode: int) -> None:
        """Give our file to a group, and it the permissions that were kept back until now.

        Raises
        ------
        OSError
            EPERM: this process is not in the group.
        """
        name, fd = self.path, -1
        if sys.platform == "linux":
            # Whoever may write to the folder could put another file in its place, meanwhile.
            fd = os.open(self.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            if os.path.exists(f"/proc/self/fd/{fd}"):
                name = f"/proc/self/fd/{fd}"
        try:
            file = os.stat(name)
            if (file.st_dev, file.st_ino) != self._file:
                raise OSError(errno.EADDRINUSE, "another server has taken this path", self.path)
            try:
                os.chown(name, -1, group)
            except OSError as error:
                why = f"it cannot be given to group {group}: {error.strerror}"
                raise OSError(error.errno, why, self.path) from None
            os.chmod(name, mode)
        finally:
            if fd >= 0:
                os.close(fd)

    def hand_over(self) -> tuple[str, tuple[int, int] | None, int]:
        """What another process needs to become the owner: path, identity of the file, and the lock's descriptor."""
        return self.path, self._file, self._lock

    @classmethod
    def take_over(cls, path: str, file: tuple[int, int] | None, lock: int) -> "Claim":
        """Become the owner of a claim that another process made and will not release."""
        claim = cls.__new__(cls)
        claim.path, claim._file, claim._lock, claim._owner = path, file, lock, os.getpid()
        private_fds.add([lock])
        return claim

    def release(self) -> None:
        """Remove our file and the lock. In a child of the owner: do nothing."""
        if self._owner != os.getpid() or self._lock < 0:
            return
        with contextlib.suppress(OSError):
            if self._is_there():
                os.unlink(self.path)
        with contextlib.suppress(OSError):
            os.unlink(self.path + ".lock")
        private_fds.close([self._lock])
        self._lock = -1

    def _is_there(self) -> bool:
        """Whether the file on the path is ours."""
        if self._file is None:
            return False
        for _ in range(4):
            try:
                found = os.lstat(self.path)
            except FileNotFoundError:
                break
            except OSError:  # the system refuses to tell; a file that stays is known to be stale, by its lock
                continue
            return (found.st_dev, found.st_ino) == self._file
        return False


def real_path(path: str) -> str:
    """A path whose folder is what it is now: the program may change its directory, and a deploy a link in the path."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def clear(path: str, kind: int) -> None:
    """Remove what a process has left that had claimed a path, unless somebody lives there."""
    with contextlib.suppress(OSError):
        Claim(path, kind).release()


def group(name: str) -> int | None:
    """The number of a group, by its name or number; None for "".

    Raises
    ------
    OptionError
        There is none of this name.
    """
    if not name:
        return None
    if name.isascii() and name.isdigit() and int(name) < 2**32 - 1:
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):  # ValueError: a NUL in it
        raise OptionError(f"unix_group: there is no group {name!r} on this system") from None


_umask = threading.Lock()


@contextlib.contextmanager
def permissions(mode: int) -> Iterator[None]:
    """A bind inside makes its file with `mode`. There is no moment in which it is wider, as with a chmod after it."""
    with _umask:
        former = os.umask(0o777 & ~mode)
        try:
            yield
        finally:
            os.umask(former)
