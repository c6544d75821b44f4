"""Makes the control socket of a pool that begins: at a path that somebody gave, or where the environment has room.

One that was asked for by its path must come about, as any address must. One by default is a convenience: where it
cannot be made (a read-only file system, a full disk, no folder) the log says so, and the pool serves without it.
"""

import errno
import os
from collections.abc import Mapping

import prefork.kernel.logs as logs
import prefork.operations.instances as instances
from prefork.operations.control import Control

log = logs.get("prefork")


def make(path: str) -> Control:
    """The control socket of that path.

    Raises
    ------
    OSError
        It cannot be made.
    """
    return Control(path)


def make_by_default(environment: Mapping[str, str]) -> Control | None:
    """A control socket where the environment has room for it; None, and a line of the log: there is none."""
    folder = instances.folder(environment)
    if folder is None:
        log.info("no control socket: neither RUNTIME_DIRECTORY nor XDG_RUNTIME_DIR names a folder; see --control")
        return None
    try:
        if not environment.get("RUNTIME_DIRECTORY"):  # one that systemd names is systemd's to make
            _prepare(folder)
        instances.paths(environment, os.geteuid())  # removes those that a kill has left
        return _first_free(folder)
    except OSError as error:
        log.info("no control socket: %s: %s; see --control", error.filename or folder, error.strerror or error)
        return None


def _prepare(folder: str) -> None:
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        if os.stat(folder).st_uid not in (0, os.geteuid()):
            raise OSError(errno.EPERM, "the folder belongs to another user", folder) from None


def _first_free(folder: str) -> Control:
    names = instances.file_names(os.getpid())
    while True:
        path = os.path.join(folder, next(names))
        try:
            return Control(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or path.endswith("-9.sock"):
                raise
