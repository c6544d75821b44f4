"""The process in which `prefork.testing` runs a pool: forked from a test, cut loose from it, and open to faults."""

import contextlib
import errno
import inspect
import json
import logging
import mmap
import os
import signal
import socket
import socketserver
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prefork.kernel.log_stderr as log_stderr
import prefork.kernel.lossy_writer as lossy_writer
import prefork.kernel.processes as processes
import prefork.servers.mixin as mixin
import prefork.servers.runner as runner
from prefork.errors import PreforkError


def prepare(directory: Path, refuse: mmap.mmap) -> None:
    """Forget what the test's process has set up for itself. While `refuse[0]` is set, forks of the pool fail."""
    os.setsid()
    _redirect(directory / "log")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    fork = processes.fork

    def refusing(main: Callable[[Callable[[], None]], int], *, freeze: bool = True) -> int:
        if refuse[0]:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork(main, freeze=freeze)

    processes.fork = refusing


def _redirect(log: Path) -> None:
    """Send standard output, standard error and the loggers to the log; empty standard input."""
    null = os.open(os.devnull, os.O_RDONLY)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for fd, source in ((0, null), (1, file), (2, file)):
        os.dup2(source, fd)
    os.close(null)
    os.close(file)
    sys.stdout, sys.stderr = (
        os.fdopen(fd, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False) for fd in (1, 2)
    )
    form = "%(asctime)s %(name)s[%(process)d] %(levelname)s: %(message)s"
    logging.root.handlers[:] = [log_stderr.Handler(lossy_writer.Writer(2), form)]
    logging.getLogger("prefork").setLevel(logging.INFO)


def make_servers(target: Any, handler: Any, address: Any, settings: dict[str, Any], directory: Path) -> list[Any]:
    """The servers of `prefork.testing.pool()`, bound."""
    if isinstance(target, type) and issubclass(target, socketserver.BaseServer):
        bases = (target,) if issubclass(target, mixin.PreforkMixIn) else (mixin.PreforkMixIn, target)
        kind: Any = type(target.__name__, bases, settings)
        where = _default(kind.address_family, directory) if address is None else address
        return [kind(where, handler if handler is not None else kind.RequestHandlerClass)]
    where = _default(socket.AF_INET, directory) if address is None else address
    returned = target(where) if _takes_argument(target) else target()
    servers = list(returned) if isinstance(returned, list | tuple) else [returned]
    for name, value in settings.items():
        setattr(servers[0], name, value)
    return servers


def _default(family: int, directory: Path) -> Any:
    if family == socket.AF_UNIX:
        return str(directory / "socket")
    return ("::1", 0) if family == socket.AF_INET6 else ("127.0.0.1", 0)


def _takes_argument(factory: Callable[..., Any]) -> bool:
    try:
        inspect.signature(factory).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def serve(make: Callable[[], list[Any]], tell: int) -> int:
    """Serve until the pool is stopped. The address is written to the descriptor `tell`. Returns the exit code."""
    try:
        servers = make()
        with contextlib.ExitStack() as stack:
            for server in servers:
                stack.callback(server.server_close)
            sock, address = servers[0].socket, servers[0].server_address
            where = os.fsdecode(address) if isinstance(address, bytes) else address
            os.write(tell, json.dumps([int(sock.family), int(sock.type), where]).encode())
            os.close(tell)
            runner.serve(*servers)
    except PreforkError as error:
        traceback.print_exc()
        return error.exit_code
    return 0
