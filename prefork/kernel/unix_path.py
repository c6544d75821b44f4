"""The path of a Unix socket: the right to it, its file, and the permissions of that file.

A path is held by a lock on `PATH.lock` for as long as the server exists. So of two servers that start at once one is
refused, and a path left by a crash is known to be stale. The file is removed only while it is still the one that was
bound.
"""

import contextlib
import errno
import fcntl
import grp
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from typing import ClassVar

import prefork.kernel.private_fds as private_fds
from prefork.errors import CodedOSError, OptionError

_LOCK = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


class Claim:
    """The right to a Unix path: a lock beside it, and the identity of the file that is ours.

    Raises
    ------
    OSError
        EADDRINUSE, where another server lives on the path, or something that is no socket lies there.
    """

    # Is called with path and kind of each claim, once it has its lock and before anything else.
    announce: ClassVar[Callable[[str, int], object] | None] = None

    def __init__(self, path: str, kind: int) -> None:
        self.path = real_path(path)
        self._owner = os.getpid()
        self._file: tuple[int, int] | None = None
        self._lock = self._acquire(self.path + ".lock")
        try:
            if Claim.announce is not None:
                Claim.announce(self.path, kind)
            self._clear(kind)
        except BaseException:
            self.release()
            raise

    def _acquire(self, lock: str) -> int:
        while True:
            is_new = True
            with private_fds.fork_lock():
                try:
                    fd = os.open(lock, _LOCK | os.O_CREAT | os.O_EXCL, 0o600)
                except FileExistsError:
                    is_new = False
                    try:
                        fd = os.open(lock, _LOCK)
                    except FileNotFoundError:
                        continue
                private_fds.add([fd])
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The former owner may have removed the file between our open and our lock.
                if _identity(os.fstat(fd)) == _identity(os.stat(lock)):
                    return fd
            except FileNotFoundError:
                pass
            except BlockingIOError:
                private_fds.close([fd])
                raise self._in_use() from None
            except BaseException:
                if is_new:  # another process that has opened it meanwhile still finds out whether the path is in use
                    with contextlib.suppress(OSError):
                        os.unlink(lock)
                private_fds.close([fd])
                raise
            private_fds.close([fd])

    def _clear(self, kind: int) -> None:
        """Remove a stale socket. The lock is ours, so only a server that is not prefork's can still be alive on it."""
        try:
            file = os.lstat(self.path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(file.st_mode):
            raise CodedOSError(errno.EADDRINUSE, "the path exists and is not a socket", self.path, code="PF0405")
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
        raise self._in_use()

    def _in_use(self) -> CodedOSError:
        return CodedOSError(errno.EADDRINUSE, "another server is running on this path", self.path, code="PF0404")

    def bound(self) -> None:
        """Remember which file is ours. Call it right after the bind."""
        self._file = _identity(os.lstat(self.path))

    def give(self, group: int, mode: int) -> None:
        """Give our file to a group, and give the file the permissions that were kept back until now.

        Raises
        ------
        OSError
            EPERM: this process is not in the group.
        """
        name, fd = self.path, -1
        if sys.platform == "linux":
            # A process that may write to the folder could put another file in its place meanwhile.
            fd = os.open(self.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            if os.path.exists(f"/proc/self/fd/{fd}"):
                name = f"/proc/self/fd/{fd}"
        try:
            if _identity(os.stat(name)) != self._file:
                raise self._in_use()
            try:
                os.chown(name, -1, group)
            except OSError as error:
                why = f"its group cannot be set to {group}: {error.strerror}"
                raise CodedOSError(error.errno, why, self.path, code="PF0416") from None
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
                file = os.lstat(self.path)
            except FileNotFoundError:
                break
            except OSError:  # the system refuses to tell; a file that stays is known to be stale, by its lock
                continue
            return _identity(file) == self._file
        return False


def _identity(file: os.stat_result) -> tuple[int, int]:
    return file.st_dev, file.st_ino


def real_path(path: str) -> str:
    """A path that stays what it is now: the program may change its directory, and a deploy a link in the path."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def clear(path: str, kind: int) -> None:
    """Remove what a process that had claimed a path has left, unless a server lives on it."""
    with contextlib.suppress(OSError):
        Claim(path, kind).release()


def is_held(path: str) -> bool:
    """Whether a server has the right to a path.

    Raises
    ------
    OSError
        EACCES: the lock is another user's.
    """
    try:
        fd = os.open(real_path(path) + ".lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def group_id(name: str) -> int | None:
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
    """Have a bind inside make its file with `mode`. A chmod after the bind would leave it wider for a moment."""
    with _umask:
        former = os.umask(0o777 & ~mode)
        try:
            yield
        finally:
            os.umask(former)
