"""From `MODULE:NAME` to servers: imports the program, and makes of what NAME stands for the servers to be served.

NAME may be a handler class, a server class, a server, a callable that returns servers, or, for a class of workers that
serves one, an application. This runs in children of the command only.
"""

import importlib
import importlib.machinery
import inspect
import os
import socket
import socketserver
import sys
from collections.abc import Callable, Sequence
from typing import Any

import prefork.servers.mixin as mixin
import prefork.workers.intake.dispatch as dispatch
from prefork.command.addresses import BindAddress
from prefork.command.probe import own_traceback
from prefork.errors import OptionError, ProgramError
from prefork.kernel.program_directory import ProgramDirectory
from prefork.workers.base import Worker

_SERVERS: dict[tuple[bool, int], type[socketserver.BaseServer]] = {
    (False, socket.SOCK_STREAM): mixin.PreforkTCPServer,
    (False, socket.SOCK_DGRAM): mixin.PreforkUDPServer,
    (True, socket.SOCK_STREAM): mixin.PreforkUnixStreamServer,
    (True, socket.SOCK_DGRAM): mixin.PreforkUnixDatagramServer,
}


def make_servers(
    target: str, addresses: Sequence[BindAddress], place: ProgramDirectory, kind: type[Worker] | None = None
) -> list[Any]:
    """Import `target` and make its servers. Inside `binding()` these get their sockets from the command.

    Parameters
    ----------
    place
        Where the program is; entered already.
    kind
        The class of workers, where the command was given one: some serve an application in the place of a handler.

    Raises
    ------
    ProgramError
        NAME cannot be imported, or stands for nothing that can be served.
    OptionError
        The addresses do not fit it.
    OSError
        An address cannot be bound.
    """
    named = load(target, place)
    is_class = isinstance(named, type)
    is_server_class = is_class and issubclass(named, socketserver.BaseServer)
    is_handler = is_class and (issubclass(named, socketserver.BaseRequestHandler) or dispatch.is_async(named))
    is_application = kind is not None and kind.application and not is_server_class
    if is_application and not callable(named):
        raise ProgramError(f"{target} is {named!r}, which is no application: it cannot be called")
    if (is_server_class or is_application or is_handler) and not addresses:
        raise OptionError(f"{target} needs an address; add -b tcp://127.0.0.1:9999")
    if is_server_class:
        if not issubclass(named, mixin.PreforkMixIn):
            named = type(named.__name__, (mixin.PreforkMixIn, named), {})
        return [_make_server(named, address, getattr(named, "RequestHandlerClass", None)) for address in addresses]
    if is_application or is_handler:
        if not is_application:
            for address in addresses:
                dispatch.check_handler(named, address.kind)
        return [
            _make_server(_SERVERS[address.family == socket.AF_UNIX, address.kind], address, named)
            for address in addresses
        ]
    if isinstance(named, socketserver.BaseServer):
        if addresses:
            raise OptionError(f"{target} is a server that has an address already; leave -b out")
        return [named]
    if not callable(named):
        raise ProgramError(
            f"{target} is {named!r}: no handler class, no server class, and no callable that returns a server"
        )
    calls = [[address.address] for address in addresses] or [[]]
    return [server for arguments in calls for server in _call(named, target, arguments)]


def load(target: str, place: ProgramDirectory) -> Any:
    """Import `MODULE:NAME` and return what it names, or what that returns where NAME ends in `()`.

    Raises
    ------
    ProgramError
        with the program's own traceback, if its import or its call raises.
    """
    is_call = target.endswith("()")
    module_name, colon, name = target.removesuffix("()").partition(":")
    if not colon or not module_name or not name:
        raise OptionError(f"{target!r} is no program; write MODULE:NAME, such as myserver:Handler")
    _refuse_shadowed(module_name.partition(".")[0])
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ProgramError(f"there is no module {error.name!r} in {place} or on the module path") from None
        raise ProgramError(f"{module_name!r} cannot be imported\n{own_traceback()}") from None
    except BaseException:
        raise ProgramError(f"{module_name!r} cannot be imported\n{own_traceback()}") from None
    named: Any = module
    for part in name.split("."):
        try:
            named = getattr(named, part)
        except AttributeError:
            raise ProgramError(f"module {module_name!r} has no {name!r}") from None
    if not is_call:
        return named
    try:
        return named()
    except BaseException:
        raise ProgramError(f"{target} raised\n{own_traceback()}") from None


def _refuse_shadowed(name: str) -> None:
    """Raises ProgramError for a module of the program that cannot be imported, since another one has its name."""
    imported = sys.modules.get(name)
    if imported is None and name not in sys.builtin_module_names:
        return
    spec = importlib.machinery.PathFinder.find_spec(name)
    file = getattr(imported, "__file__", None)
    if spec is not None and spec.origin and os.path.realpath(spec.origin) != os.path.realpath(file or ""):
        other = f"{file}, which prefork stands on" if file else "a module that is built into Python"
        raise ProgramError(f"{spec.origin} cannot be imported: {name!r} is the name of {other}; rename it")


def _make_server(kind: type[Any], address: BindAddress, handler: Any) -> Any:
    """A server of a class, at one address of the command line."""
    if getattr(kind, "socket_type", address.kind) != address.kind:
        raise OptionError(f"{kind.__name__} cannot serve {address.text}: the one takes streams, the other datagrams")
    if (kind.address_family == socket.AF_UNIX) != (address.family == socket.AF_UNIX):
        raise OptionError(f"{kind.__name__} cannot serve {address.text}: it is of another address family")
    if address.family != kind.address_family:
        kind = type(kind.__name__, (kind,), {"address_family": address.family})
    try:
        return kind(address.address, handler) if handler is not None else kind(address.address)
    except OSError as error:
        if error.filename is None:
            error.filename = address.text
        raise


def _call(factory: Callable[..., Any], target: str, arguments: list[Any]) -> list[Any]:
    """The servers that a callable returns, which is given an address or nothing."""
    try:
        inspect.signature(factory).bind(*arguments)
    except TypeError:
        how = "without an address (leave -b out)" if arguments else "with an address (add -b)"
        raise OptionError(
            f"{target} must be called {how}, if it makes servers; if it is an application, name its kind of workers "
            "(--worker-class wsgi or asgi)"
        ) from None
    except ValueError:
        pass  # a builtin tells nothing about its parameters
    returned = factory(*arguments)
    servers = list(returned) if isinstance(returned, list | tuple) else [returned]
    for server in servers:
        if not isinstance(server, socketserver.BaseServer):
            raise ProgramError(f"{target} returned {server!r}, which is no socketserver server")
    return servers
