"""Where control sockets lie: the folder for a new one, and those that are there.

Each pool has a file of its own, `prefork-PID.sock`. systemd gives a service a folder (`RUNTIME_DIRECTORY`), a session
has one (`XDG_RUNTIME_DIR`). A pool whose master was killed leaves its file; it is known to be stale by its lock, and is
removed by whoever looks for pools next.
"""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator, Mapping

import prefork.kernel.unix_path as unix_path

OFF = "none"  # for a path
_BEGIN, _END = "prefork-", ".sock"
_SYSTEMD = "/run"  # in it is the folder of each service that has one


def folder(environment: Mapping[str, str]) -> str | None:
    """The folder for a new control socket; None: the environment names none."""
    if services := environment.get("RUNTIME_DIRECTORY"):
        return services.split(":")[0]
    if session := environment.get("XDG_RUNTIME_DIR"):
        return os.path.join(session, "prefork")
    return None


def file_names(pid: int) -> Iterator[str]:
    """Names for the socket of a process, the preferred first. Processes of two containers may have the same pid."""
    yield f"{_BEGIN}{pid}{_END}"
    for number in range(2, 10):
        yield f"{_BEGIN}{pid}-{number}{_END}"


def paths(environment: Mapping[str, str], uid: int) -> list[str]:
    """The control sockets of a user, in order; for root those of everybody. Stale ones of its own are removed."""
    found = []
    for directory in _folders(environment, uid):
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith(_BEGIN) and entry.name.endswith(_END) and _belongs(entry, uid):
                    found.append(entry.path)
    return sorted(set(filter(_is_there, map(unix_path.real_path, found))))


def _folders(environment: Mapping[str, str], uid: int) -> Iterator[str]:
    yield from filter(None, environment.get("RUNTIME_DIRECTORY", "").split(":"))
    if session := environment.get("XDG_RUNTIME_DIR"):
        yield os.path.join(session, "prefork")
    # Whoever asks has not the environment of the service, and root not that of the session.
    with contextlib.suppress(OSError), os.scandir(_SYSTEMD) as entries:
        yield from (entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
    if uid == 0:
        with contextlib.suppress(OSError), os.scandir(os.path.join(_SYSTEMD, "user")) as entries:
            yield from (os.path.join(entry.path, "prefork") for entry in entries)
    else:
        yield os.path.join(_SYSTEMD, "user", str(uid), "prefork")


def _belongs(entry: "os.DirEntry[str]", uid: int) -> bool:
    with contextlib.suppress(OSError):
        file = entry.stat(follow_symlinks=False)
        return stat.S_ISSOCK(file.st_mode) and uid in (0, file.st_uid)
    return False


def _is_there(path: str) -> bool:
    """Whether a pool has this socket. A stale one that is the caller's own is removed: its lock is free."""
    with contextlib.suppress(OSError):
        if os.lstat(path).st_uid == os.geteuid():
            unix_path.clear(path, socket.SOCK_STREAM)
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    return False
