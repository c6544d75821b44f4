"""From the object that NAME stands for to the servers to be served, and the class of workers that serves them.

What the object is taken for is decided by `prefork.rules.program_kind`; here a factory is called, each server gets its
address, and a class of workers that was typed (`-k`) overrules. This runs in children of the command only: in the probe
that tries the program, and again in each worker.
"""

import inspect
import socket
import socketserver
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import prefork.kernel.import_path as import_path
import prefork.servers.mixin as mixin
import prefork.servers.worker_class as worker_class
import prefork.workers.intake.dispatch as dispatch
from prefork.command.addresses import BindAddress, BindAddresses
from prefork.command.inspection import describe, shape
from prefork.command.probe import own_traceback
from prefork.command.target import load
from prefork.errors import OptionError, PreforkError, ProgramError
from prefork.kernel.program_directory import ProgramDirectory
from prefork.rules.program_kind import ProgramKind, kind_of
from prefork.workers.worker import Worker

_SERVERS: dict[tuple[bool, int], type[Any]] = {
    (False, socket.SOCK_STREAM): mixin.PreforkTCPServer,
    (False, socket.SOCK_DGRAM): mixin.PreforkUDPServer,
    (True, socket.SOCK_STREAM): mixin.PreforkUnixStreamServer,
    (True, socket.SOCK_DGRAM): mixin.PreforkUnixDatagramServer,
}
_FACTORIES = (ProgramKind.FACTORY, ProgramKind.OPTIONAL_ADDRESS_FACTORY, ProgramKind.ADDRESS_FACTORY)


@dataclass(frozen=True)
class ServedProgram:
    """What is served: the servers, in the order of the addresses, and how."""

    name: str  # MODULE:NAME, with () where it was called
    kind: ProgramKind
    servers: Sequence[Any]
    worker_class: type[Worker]

    @property
    def speaks_http(self) -> bool:
        """Whether a browser can open its addresses."""
        if worker_class.protocol(self.worker_class):
            return True
        module = sys.modules.get("http.server")  # where it was never imported nothing is of it
        if module is None:
            return False
        handler = getattr(self.servers[0], "RequestHandlerClass", None)
        is_handler = isinstance(handler, type) and issubclass(handler, module.BaseHTTPRequestHandler)
        return is_handler or isinstance(self.servers[0], module.HTTPServer)


def make_servers(
    target: str, addresses: BindAddresses, place: ProgramDirectory, given: type[Worker] | None = None
) -> ServedProgram:
    """Import `target` and make its servers. Inside `binding()` these get their sockets from the command.

    Parameters
    ----------
    place
        Where the program is; entered already.
    given
        The class of workers, where the command was given one. It overrules what NAME is taken for.

    Raises
    ------
    ProgramError
        NAME cannot be imported, or stands for nothing that can be served.
    OptionError
        It cannot be told what NAME is, or the addresses or the class of workers do not fit it.
    OSError
        An address cannot be bound.
    """
    name, named = load(target, place)
    kind = _kind(named, given)
    if kind in _FACTORIES:
        called = _call(name, named, kind, addresses)
        if isinstance(called, list):
            return _served(name, kind, called, given)
        name, named = f"{name}()", called
        kind = _kind(named, given)
        if kind in (*_FACTORIES, ProgramKind.NOTHING):
            raise ProgramError(
                f"{name} returned {_shown(named)}: no application, no handler class and no server", code="PF0124"
            )
    _refuse(name, named, kind, given)
    if kind is ProgramKind.SERVER:
        _refuse_address(name, addresses)
        return _served(name, kind, [named], given)
    if kind is ProgramKind.SERVER_CLASS:
        return _served(name, kind, _servers_of_class(named, addresses), given)
    needed = addresses.of_kind(_socket_kind(named, kind))
    if kind.is_handler:
        for address in needed:
            dispatch.check_handler(named, address.kind)
    return _served(name, kind, [_make_server(_server_class(kind, each), each, named) for each in needed], given)


def _kind(named: Any, given: type[Worker] | None) -> ProgramKind:
    """What an object is taken for, with the class of workers that the command was given."""
    kind = kind_of(describe(named))
    if given is None or not given.application or kind in (ProgramKind.SERVER, ProgramKind.SERVER_CLASS):
        return kind
    # The application of a class of the user's own may be anything that can be called. To ours, what takes one argument
    # may be one.
    is_open = kind is ProgramKind.ADDRESS_FACTORY if worker_class.protocol(given) else kind is not ProgramKind.NOTHING
    return ProgramKind.UNKNOWN if is_open else kind


def _served(name: str, kind: ProgramKind, servers: list[Any], given: type[Worker] | None) -> ServedProgram:
    return ServedProgram(name, kind, servers, given or _own_class(name, kind, servers))


def _own_class(name: str, kind: ProgramKind, servers: list[Any]) -> type[Worker]:
    if not kind.worker_class:
        return worker_class.resolve(getattr(servers[0], "worker_class", "sync"))
    try:
        return worker_class.resolve(kind.worker_class)
    except OptionError as error:  # a library is missing
        raise OptionError(
            f"{name} is {kind.value}; {str(error).removeprefix('worker_class: ')}", code=error.code
        ) from None


# -- what does not fit -------------------------------------------------------------------------------------------------


def _refuse(name: str, named: Any, kind: ProgramKind, given: type[Worker] | None) -> None:
    """Raise where NAME is nothing that can be served, where that cannot be told, or where the class given is of the
    other sort."""
    if kind is ProgramKind.NOTHING:
        if isinstance(named, types.ModuleType):
            raise ProgramError(
                f"{name} is a module; type prefork {named.__name__}, or {named.__name__}:NAME", code="PF0124"
            )
        raise ProgramError(
            f"{name} is {_shown(named)}: no application, no handler class, no server and no factory", code="PF0124"
        )
    if kind is ProgramKind.UNKNOWN and (given is None or not given.application):
        seen = shape(named)
        mend = "type -k wsgi or -k asgi for an application, or name a handler class"
        if seen.startswith("a coroutine"):
            mend = "an ASGI application takes (scope, receive, send), and a factory is a plain function"
        raise OptionError(f"{name} is {seen}, and prefork cannot tell what it serves; {mend}", code="PF0105")
    if kind is ProgramKind.ASGI_2 and given is None:
        raise OptionError(
            f"{name} is {shape(named)}, {kind.value}; make it async (scope, receive, send), or type -k asgi",
            code="PF0105",
        )
    if given is None:
        return
    typed = worker_class.name_of(given)
    is_other = kind is ProgramKind.ASGI and worker_class.protocol(given) == "wsgi"  # none of it can be called as WSGI
    if is_other or (kind.is_application and not given.application):
        raise OptionError(
            f"{name} is {kind.value}, which the worker class {typed} does not serve; leave -k out, or type "
            f"-k {kind.worker_class}",
            code="PF0105",
        )
    if kind.is_handler and given.application:
        raise OptionError(
            f"{name} is {kind.value}, and the worker class {typed} serves applications; leave -k out, or type "
            f"-k {kind.worker_class}",
            code="PF0105",
        )


def _refuse_address(name: str, addresses: BindAddresses) -> None:
    if addresses.typed:
        raise OptionError(f"{name} has an address already; leave -b out", code="PF0104")


def _shown(named: Any) -> str:
    """An object in one line of an error."""
    try:
        text = " ".join(repr(named).split())
    except Exception:  # of the program's
        text = shape(named)
    return text if len(text) <= 80 else text[:77] + "..."


# -- servers -----------------------------------------------------------------------------------------------------------


def _call(name: str, factory: Any, kind: ProgramKind, addresses: BindAddresses) -> Any:
    """What a factory returns: a list of servers, or whatever else is to be judged."""
    if kind is ProgramKind.ADDRESS_FACTORY or (kind is ProgramKind.OPTIONAL_ADDRESS_FACTORY and addresses.typed):
        return [
            server
            for each in addresses.of_kind(socket.SOCK_STREAM)
            for server in _servers(f"{name}(address)", _result(f"{name}({each.address!r})", factory, each.address))
        ]
    returned = _result(f"{name}()", factory)
    if not isinstance(returned, (list, tuple, socketserver.BaseServer)):
        return returned
    _refuse_address(f"the server of {name}()", addresses)
    return _servers(f"{name}()", returned)


def _result(call: str, factory: Any, *address: Any) -> Any:
    try:
        return factory(*address)
    except (PreforkError, OSError):  # OSError: an address cannot be bound
        raise
    except Exception:
        why = "; a factory of servers takes an address, that of an application takes nothing" if address else ""
        raise ProgramError(f"{call} raised{why}\n{own_traceback()}", code="PF0124") from None


def _servers(call: str, returned: Any) -> list[Any]:
    servers = list(returned) if isinstance(returned, list | tuple) else [returned]
    if not servers or not all(isinstance(server, socketserver.BaseServer) for server in servers):
        raise ProgramError(f"{call} returned {_shown(returned)}, which is no server", code="PF0124")
    return servers


def _socket_kind(named: Any, kind: ProgramKind) -> int:
    """The kind of socket that a handler or an application needs."""
    module = sys.modules.get("prefork.workers.eventloop.handlers")
    datagrams = (socketserver.DatagramRequestHandler, getattr(module, "AsyncDatagramRequestHandler", ()))
    return socket.SOCK_DGRAM if kind.is_handler and issubclass(named, datagrams) else socket.SOCK_STREAM


def _server_class(kind: ProgramKind, address: BindAddress) -> type[Any]:
    """The server for a handler or an application at an address."""
    is_unix = address.family == socket.AF_UNIX
    if kind is not ProgramKind.HTTP_HANDLER or address.kind != socket.SOCK_STREAM:
        return _SERVERS[is_unix, address.kind]
    with import_path.OwnImports():
        import prefork.servers.http as http
    return http.PreforkUnixHTTPServer if is_unix else http.PreforkHTTPServer


def is_own_server(server: Any) -> bool:
    """Whether the class of a server is prefork's, and nothing of the program is in it."""
    return all(
        base.__module__.startswith(("prefork.", "socketserver", "http.server", "builtins"))
        for base in type(server).__mro__
    )


def _servers_of_class(kind: type[Any], addresses: BindAddresses) -> list[Any]:
    if not issubclass(kind, mixin.PreforkMixIn):
        kind = type(kind.__name__, (mixin.PreforkMixIn, kind), {})
    if not addresses.typed and kind.address_family == socket.AF_UNIX:
        raise OptionError(f"{kind.__name__} serves Unix sockets; add -b unix:/run/name.sock", code="PF0104")
    handler = getattr(kind, "RequestHandlerClass", None)
    needed = addresses.of_kind(getattr(kind, "socket_type", socket.SOCK_STREAM))
    try:
        inspect.signature(kind).bind(*([None] if handler is None else [None, handler]))
    except TypeError as error:
        mend = (
            "set RequestHandlerClass in it, or name the handler class" if handler is None else "take (address, handler)"
        )
        raise OptionError(f"{kind.__name__} cannot be made for an address: {error}; {mend}", code="PF0104") from None
    except ValueError:
        pass  # it tells nothing about its parameters
    return [_make_server(kind, address, handler) for address in needed]


def _make_server(kind: type[Any], address: BindAddress, handler: Any) -> Any:
    """A server of a class, at one address of the command line."""
    if getattr(kind, "socket_type", address.kind) != address.kind:
        raise OptionError(
            f"{kind.__name__} cannot serve {address.text}: the one takes streams, the other datagrams", code="PF0104"
        )
    if (kind.address_family == socket.AF_UNIX) != (address.family == socket.AF_UNIX):
        raise OptionError(
            f"{kind.__name__} cannot serve {address.text}: it is of another address family", code="PF0104"
        )
    if address.family != kind.address_family:
        kind = type(kind.__name__, (kind,), {"address_family": address.family})
    try:
        return kind(address.address, handler) if handler is not None else kind(address.address)
    except OSError as error:
        if error.filename is None:
            error.filename = address.text
        raise
