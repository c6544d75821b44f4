"""What is done to servers before anything is forked for them: checks of settings and handlers, and their listeners.

Nothing here changes a server that does not pass.
"""

import os
import socket
import socketserver
from collections.abc import Callable, Sequence
from typing import Any

import prefork.kernel.standard_streams as standard_streams
import prefork.servers.worker_class as worker_class
from prefork.errors import OptionError
from prefork.kernel.listener import Listener
from prefork.kernel.unpatched import refuse_patched
from prefork.settings.settings import Options
from prefork.workers.worker import Worker

_FORKING = socketserver.ForkingMixIn  # programs, and tests, put PreforkMixIn in its place
_MASTERS = ("select", "threading")  # standard modules that a master needs as they are


def prepare(servers: Sequence[Any], kind: type[Worker] | None = None, *, mend: str) -> Options:
    """`checked_options()` in a process that is to be a master. `mend` tells a program that has patched a module that a
    master needs what else it can do."""
    refuse_patched(_MASTERS, "a master", mend)
    options = checked_options(servers, kind)
    for server in servers:
        standard_streams.free_number_of(server.socket)
    return options


def checked_options(
    servers: Sequence[Any], kind: type[Worker] | None = None, absolute: Callable[[str], str] = os.path.abspath
) -> Options:
    """The settings of the first server, with paths made `absolute`. Raises OptionError where a setting, a server, or a
    handler does not fit the class of workers (`kind`; default: that of the settings)."""
    if not servers:
        raise OptionError("serve() needs at least one server", code="PF0111")
    for server in servers:
        if isinstance(server, _FORKING):
            raise OptionError(
                f"{type(server).__name__} has ForkingMixIn, which would collect the workers; remove it", code="PF0111"
            )
        if server.fileno() < 0:
            raise OptionError("the server is closed; make a new one", code="PF0111")
        if server.socket_type == socket.SOCK_STREAM and not _listens(server):
            raise OptionError("the server does not listen yet; call server_bind() and server_activate()", code="PF0111")
    options = Options.of(servers[0], absolute)
    kind = kind or worker_class.resolve(options.worker_class)
    for server in servers:
        kind.check(server)
    return options


def _listens(server: Any) -> bool:
    if getattr(server, "_spent", False):
        return True  # it will be bound anew
    try:
        return bool(server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except (AttributeError, OSError):
        return True  # a system that does not tell


def listener_of(server: Any) -> Listener:
    """The server's listener. A Unix socket that a former stop has shut down for good is bound anew on the same path."""
    if getattr(server, "_spent", False):
        server._spent = False
        server.socket.close()
        server._unclaim()
        server.socket = socket.socket(server.address_family, server.socket_type)
        server.server_bind()
        server.server_activate()
    return Listener(server.socket, held=getattr(server, "_held", False), claim=getattr(server, "_claim", None))
