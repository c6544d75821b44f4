"""The program that the command serves: `MODULE:NAME` and addresses.

The command's master never imports it. A short-lived child, the scout, does: it builds the servers that NAME stands for,
binds them as their classes say, and hands the listeners up (SCM_RIGHTS). Each worker imports the program afresh around
the inherited listeners, so that a reload loads new code. The scout is also the trial before a reload: what cannot be
imported fails there, with its own traceback, and nothing else has happened.
"""

import contextlib
import importlib
import importlib.machinery
import inspect
import json
import os
import socket
import socketserver
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import prefork.kernel.import_path as import_path
import prefork.kernel.listener as listener
import prefork.kernel.logs as logs
import prefork.kernel.private_fds as private_fds
import prefork.kernel.readiness as readiness
import prefork.kernel.unix_path as unix_path
import prefork.servers.mixin as mixin
import prefork.servers.preparation as preparation
import prefork.servers.worker_class as worker_class
import prefork.workers.intake.dispatch as dispatch
from prefork.command.probe import Scout, Work, own_traceback
from prefork.errors import OptionError, ProgramError
from prefork.link.worker_context import WorkerContext
from prefork.settings.settings import Options, declared, with_whole_paths
from prefork.workers.base import Worker

log = logs.get("prefork")

UNIX_PATH = 107  # bytes
_BOUND = ("unix_mode", "unix_group")  # settings of what is bound once
SWEEP = 0.005  # seconds between two looks at a scout that is to end


@dataclass(frozen=True, slots=True)
class Bind:
    """An address from the command line."""

    family: int
    kind: int
    address: Any
    text: str

    @classmethod
    def parse(cls, text: str, place: import_path.Place) -> "Bind":
        """`tcp://HOST:PORT`, `udp://HOST:PORT`, `unix:PATH`, `unixgram:PATH`; an IPv6 host in brackets; a path that
        begins with @ is a name without a file (Linux).

        Parameters
        ----------
        place
            Where a relative path begins.

        Raises
        ------
        OptionError
            naming the part that is wrong.
        """
        for scheme, kind in (("unix:", socket.SOCK_STREAM), ("unixgram:", socket.SOCK_DGRAM)):
            if text.startswith(scheme):
                path = text[len(scheme) :]
                if not path:
                    raise OptionError(f"--bind: {text!r} names no path; write {scheme}/run/name.sock")
                if len(os.fsencode(path)) > UNIX_PATH:
                    raise OptionError(
                        f"--bind: the path in {text!r} is longer than the {UNIX_PATH} bytes a Unix socket may have"
                    )
                if path[0] == "@":
                    return cls(socket.AF_UNIX, kind, _abstract(path, text), text)
                # The program may change its directory before it is bound; a path that is too long then stays as it is.
                whole = place.absolute(path)
                return cls(socket.AF_UNIX, kind, whole if len(os.fsencode(whole)) <= UNIX_PATH else path, text)
        for scheme, kind in (("tcp://", socket.SOCK_STREAM), ("udp://", socket.SOCK_DGRAM)):
            if text.startswith(scheme):
                host, colon, port = text[len(scheme) :].rpartition(":")
                six = host.startswith("[") and host.endswith("]")
                if not colon or (":" in host and not six):
                    raise OptionError(
                        f"--bind: {text!r} needs a host and a port: {scheme}127.0.0.1:9999, {scheme}[::1]:9999"
                    )
                if not (port.isascii() and port.isdigit() and int(port) <= 65535):
                    raise OptionError(f"--bind: {port!r} in {text!r} is no port; use 0 to 65535")
                family = socket.AF_INET6 if six else socket.AF_INET
                return cls(family, kind, (host[1:-1] if six else host, int(port)), text)
        raise OptionError(
            f"--bind: {text!r} is no address; use tcp://HOST:PORT, udp://HOST:PORT, unix:PATH or unixgram:PATH"
        )

    @property
    def is_abstract(self) -> bool:
        """Whether it is a name of Unix sockets that is no file."""
        return self.family == socket.AF_UNIX and self.address[0] == "\0"


def _abstract(path: str, text: str) -> str:
    if sys.platform != "linux":
        raise OptionError(f"--bind: {text!r} names an abstract socket, which only Linux has; write ./{path} for a file")
    if path == "@":
        raise OptionError(f"--bind: {text!r} names no socket; write {text}name")
    return "\0" + path[1:]


_SERVERS: dict[tuple[bool, int], type[socketserver.BaseServer]] = {
    (False, socket.SOCK_STREAM): mixin.PreforkTCPServer,
    (False, socket.SOCK_DGRAM): mixin.PreforkUDPServer,
    (True, socket.SOCK_STREAM): mixin.PreforkUnixStreamServer,
    (True, socket.SOCK_DGRAM): mixin.PreforkUnixDatagramServer,
}


def find(target: str, place: import_path.Place) -> Any:
    """Import `MODULE:NAME` and return what it names, or what that returns where NAME ends in `()`.

    Raises
    ------
    ProgramError
        with the program's own traceback, if its import or its call raises.
    """
    called = target.endswith("()")
    module_name, colon, name = target.removesuffix("()").partition(":")
    if not colon or not module_name or not name:
        raise OptionError(f"{target!r} is no program; write MODULE:NAME, such as myserver:Handler")
    refuse_shadowed(module_name.partition(".")[0])
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ProgramError(f"there is no module {error.name!r} in {place} or on the module path") from None
        raise ProgramError(f"{module_name!r} cannot be imported\n{own_traceback()}") from None
    except BaseException:
        raise ProgramError(f"{module_name!r} cannot be imported\n{own_traceback()}") from None
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ProgramError(f"module {module_name!r} has no {name!r}") from None
    if not called:
        return found
    try:
        return found()
    except BaseException:
        raise ProgramError(f"{target} raised\n{own_traceback()}") from None


def refuse_shadowed(name: str) -> None:
    """Raises ProgramError for a module of the program that nobody can import, since another one has its name."""
    imported = sys.modules.get(name)
    if imported is None and name not in sys.builtin_module_names:
        return
    wanted = importlib.machinery.PathFinder.find_spec(name)
    file = getattr(imported, "__file__", None)
    if wanted is not None and wanted.origin and os.path.realpath(wanted.origin) != os.path.realpath(file or ""):
        what = f"{file}, which prefork stands on" if file else "a module that is built into Python"
        raise ProgramError(f"{wanted.origin} cannot be imported: {name!r} is the name of {what}; rename it")


def check(servers: Sequence[Any], kind: type[Worker] | None) -> None:
    """As `service.check()`. Raises ProgramError where the program could not import in a worker what it has imported
    here: there prefork has imported a standard module of that name before."""
    preparation.checked_options(servers, kind)
    for name, module in import_path.doubles.items():
        file = getattr(module, "__file__", None)
        raise ProgramError(f"{file or name} has the name of a standard module that its worker_class needs; rename it")


def build(target: str, binds: Sequence[Bind], place: import_path.Place, kind: type[Worker] | None = None) -> list[Any]:
    """Make the servers: bound and activated, or adopted inside `adopting()`.

    Parameters
    ----------
    place
        Entered already.
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
    found = find(target, place)
    server_class = isinstance(found, type) and issubclass(found, socketserver.BaseServer)
    if kind is not None and kind.application and not server_class:
        if not callable(found):
            raise ProgramError(f"{target} is {found!r}, which is no application: it cannot be called")
        _need(binds, target)
        return [_made(_SERVERS[bind.family == socket.AF_UNIX, bind.kind], bind, found) for bind in binds]
    if isinstance(found, type) and (issubclass(found, socketserver.BaseRequestHandler) or dispatch.is_async(found)):
        _need(binds, target)
        for bind in binds:
            dispatch.check_handler(found, bind.kind)
        return [_made(_SERVERS[bind.family == socket.AF_UNIX, bind.kind], bind, found) for bind in binds]
    if server_class:
        _need(binds, target)
        if not issubclass(found, mixin.PreforkMixIn):
            found = type(found.__name__, (mixin.PreforkMixIn, found), {})
        return [_made(found, bind, getattr(found, "RequestHandlerClass", None)) for bind in binds]
    if isinstance(found, socketserver.BaseServer):
        if binds:
            raise OptionError(f"{target} is a server that has an address already; leave -b out")
        return [found]
    if not callable(found):
        raise ProgramError(
            f"{target} is {found!r}: no handler class, no server class, and no callable that returns a server"
        )
    if not binds:
        return _called(found, target, None)
    return [one for bind in binds for one in _called(found, target, bind)]


def _need(binds: Sequence[Bind], target: str) -> None:
    if not binds:
        raise OptionError(f"{target} needs an address; add -b tcp://127.0.0.1:9999")


def _made(kind: type[Any], bind: Bind, handler: Any) -> Any:
    """One server of a class, at one address of the command line."""
    if getattr(kind, "socket_type", bind.kind) != bind.kind:
        raise OptionError(f"{kind.__name__} cannot serve {bind.text}: the one takes streams, the other datagrams")
    if (kind.address_family == socket.AF_UNIX) != (bind.family == socket.AF_UNIX):
        raise OptionError(f"{kind.__name__} cannot serve {bind.text}: it is of another address family")
    if bind.family != kind.address_family:
        kind = type(kind.__name__, (kind,), {"address_family": bind.family})
    try:
        return kind(bind.address, handler) if handler is not None else kind(bind.address)
    except OSError as error:
        if error.filename is None:
            error.filename = bind.text
        raise


def _called(factory: Callable[..., Any], target: str, bind: Bind | None) -> list[Any]:
    try:
        inspect.signature(factory).bind(*([] if bind is None else [bind.address]))
    except TypeError:
        how = "without an address (leave -b out)" if bind is not None else "with an address (add -b)"
        raise OptionError(
            f"{target} must be called {how}, if it makes servers; if it is an application, name its kind of workers "
            "(--worker-class wsgi or asgi)"
        ) from None
    except ValueError:
        pass  # a builtin tells nothing about its parameters
    made = factory() if bind is None else factory(bind.address)
    made = list(made) if isinstance(made, list | tuple) else [made]
    for one in made:
        if not isinstance(one, socketserver.BaseServer):
            raise ProgramError(f"{target} returned {one!r}, which is no socketserver server")
    return made


@contextlib.contextmanager
def adopting(take: Callable[[Any], socket.socket | None]) -> Iterator[None]:
    """Servers made inside get an existing listener from `take(server)`; where that is None they bind.

    Patched is socketserver's own `server_bind`, where every override ends, in a process that does nothing else.
    """
    bind, activate, claim = (
        socketserver.TCPServer.server_bind,
        socketserver.TCPServer.server_activate,
        mixin.PreforkMixIn.server_bind,
    )
    adopted: set[int] = set()

    def server_bind(self: Any) -> None:
        sock = take(self)
        if sock is None:
            bind(self)
            return
        self.socket.close()
        self.socket = sock
        self.server_address = sock.getsockname()
        adopted.add(id(self))

    def server_activate(self: Any) -> None:
        if id(self) not in adopted:
            activate(self)

    def unclaimed(self: Any) -> None:
        super(mixin.PreforkMixIn, self).server_bind()

    socketserver.TCPServer.server_bind = server_bind  # type: ignore[method-assign]
    socketserver.TCPServer.server_activate = server_activate  # type: ignore[method-assign]
    mixin.PreforkMixIn.server_bind = unclaimed  # type: ignore[method-assign]
    try:
        yield
    finally:
        socketserver.TCPServer.server_bind = bind  # type: ignore[method-assign]
        socketserver.TCPServer.server_activate = activate  # type: ignore[method-assign]
        mixin.PreforkMixIn.server_bind = claim  # type: ignore[method-assign]


class Program:
    """The program, as the master knows it: a name, sockets, and what the scout told of its settings.

    Parameters
    ----------
    flags
        The settings that the command was given; the others are the program's.
    """

    def __init__(
        self,
        target: str,
        binds: Sequence[Bind],
        place: import_path.Place,
        flags: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self.target, self.binds, self._place, self._flags = target, list(binds), place, flags
        self._worker_class = flags.get("worker_class")
        # They count when a server binds, before anybody sees it.
        self._of_files = {name: flags[name] for name in _BOUND if name in flags}
        self.sockets: list[socket.socket] = []
        self.claims: list[unix_path.Claim] = []
        self.settings: dict[str, object] = {}
        self._asked: list[object] = []  # the addresses as they were asked for, before the kernel chose a port
        self._scouts: list[Scout] = []

    def open(self, timeout: float) -> None:
        """Have a scout import the program and bind.

        Raises
        ------
        ProgramError, OptionError, OSError
            as `build()` does.
        """
        if isinstance(self._worker_class, str):
            self._worker_class = worker_class.reference(self._worker_class)
            if self._worker_class in worker_class.CLASSES.values():
                worker_class.resolve(self._worker_class)  # imported here, once, and before the program
        scout = self._scout(self._bind, timeout)
        try:
            while not scout.over():
                readiness.wait_readable(scout.fd, scout.deadline - time.monotonic())
            answer, fds = scout.finish()
        except BaseException:
            scout.abandon()
            raise
        number = len(answer["asked"])
        self.claims = [
            unix_path.Claim.take_over(path, tuple(file) if file else None, lock)
            for (path, file), lock in zip(answer["claims"], fds[number:], strict=True)
        ]
        self.settings, self._asked = answer["settings"], answer["asked"]
        self.sockets = [socket.socket(fileno=fd) for fd in fds[:number]]
        self._import(answer)

    def trial(self, timeout: float) -> Scout:
        """Begin to try the program as it is now, without binding what is bound already."""
        return self._scout(self._try, timeout)

    def worker(self, context: WorkerContext) -> Worker:
        """In a worker: import the program around the inherited listeners."""
        kind = self._enter()
        left = list(self.sockets)
        with adopting(lambda made: left.pop(0) if left else None):
            servers = build(self.target, self.binds, self._place, kind)
        kind = kind or worker_class.resolve(getattr(servers[0], "worker_class", "sync"))
        return worker_class.make_worker(kind, servers, context)

    def collect(self) -> float | None:
        """Collect the scouts that are over. When to look again (of `time.monotonic()`); None: none is to end."""
        now = time.monotonic()
        self._scouts = [one for one in self._scouts if not one.collect(now)]
        return now + SWEEP if any(one.leaves for one in self._scouts) else None

    def close(self) -> None:
        for claim in self.claims:
            claim.release()
        private_fds.close(sock.detach() for sock in self.sockets)
        self.sockets, self.claims = [], []
        for one in self._scouts:
            one.abandon()
        while self.collect() is not None:
            time.sleep(SWEEP)

    def _scout(self, work: Work, timeout: float) -> Scout:
        scout = Scout(work, timeout, self._use)
        self._scouts.append(scout)
        return scout

    def _use(self, answer: Mapping[str, Any]) -> Options:
        """The settings of a new generation: what the command was given, and else what the program says now."""
        options = self.options_of(answer["settings"])
        for name in _BOUND:
            if name not in self._flags and answer["settings"].get(name) != self.settings.get(name):
                log.warning("%s: a change takes a new start; the socket's file is there already", name)
        self._import(answer)
        return options

    def options_of(self, settings: Mapping[str, object]) -> Options:
        """Of a generation, from what its program sets.

        Raises
        ------
        OptionError
            naming the first that is wrong.
        """
        return Options(with_whole_paths({**settings, **self._flags}, self._place.absolute))

    def _import(self, answer: Mapping[str, Any]) -> None:
        """Import those of prefork's modules that the program uses: once for all workers, and before an upgrade replaces
        them on the disk."""
        for name in answer["modules"]:
            with contextlib.suppress(Exception):  # it will be a worker's, whose report says what is wrong
                importlib.import_module(name)

    # -- in a child ------------------------------------------------------------------------------------------------

    def _enter(self) -> type[Worker] | None:
        """Go to where the program is. The worker class that the command was given, if it was."""
        self._place.enter()
        return None if self._worker_class is None else worker_class.resolve(self._worker_class)

    # -- in the scout ----------------------------------------------------------------------------------------------

    def _bind(self) -> tuple[dict[str, Any], list[int]]:
        kind = self._enter()
        asked: dict[int, object] = {}
        begun: list[Any] = []
        bind, binds, of_files = socketserver.TCPServer.server_bind, self.binds, self._of_files
        claim = mixin.PreforkMixIn.server_bind

        def server_claim(self: Any) -> None:
            vars(self).update(of_files)
            claim(self)

        def server_bind(self: Any) -> None:
            asked[id(self)] = _plain(self.server_address)
            begun.append(self)
            if _is_beside_ipv4(self, binds):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bind(self)

        socketserver.TCPServer.server_bind = server_bind  # type: ignore[method-assign]
        mixin.PreforkMixIn.server_bind = server_claim  # type: ignore[method-assign]
        try:
            servers = build(self.target, self.binds, self._place, kind)
            check(servers, kind)
            # In the order in which they were bound, which is the order in which a worker will ask for them.
            bound = [one for one in begun if any(one is other for other in servers)]
            if len(bound) != len(begun):
                raise ProgramError(f"{self.target} binds a server that it does not return; no worker could have it")
            if len(bound) != len(servers):
                raise ProgramError(f"{self.target} returned a server that is not bound")
            claims = [one._claim.hand_over() for one in bound if getattr(one, "_claim", None) is not None]
            settings = _settings_of(servers[0])
        except BaseException:
            for one in begun:  # or the path of a first address would outlive the failure of a second
                with contextlib.suppress(Exception):
                    one.server_close()
            raise
        # Their servers end with this function; the descriptors outlive them.
        fds = [one.socket.detach() for one in bound] + [lock for _, _, lock in claims]
        answer = {
            "settings": settings,
            "asked": [asked[id(one)] for one in bound],
            "claims": [[path, file] for path, file, _ in claims],
            "modules": _own_modules(),
        }
        return answer, fds

    def _try(self) -> tuple[dict[str, Any], list[int]]:
        kind = self._enter()
        left, socks = list(self._asked), list(self.sockets)

        def take(made: Any) -> socket.socket | None:
            address = _plain(made.server_address)
            if left and left[0] == address:
                left.pop(0)
                return socks.pop(0)
            if made.address_family != socket.AF_UNIX:  # there a probe would leave its file
                with socket.socket(made.address_family, made.socket_type) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(made.server_address)
            where = listener.describe_address(made.address_family, made.socket_type, made.server_address)
            raise OptionError(f"the program now wants {where}; other addresses take a new start")

        try:
            with adopting(take):
                servers = build(self.target, self.binds, self._place, kind)
                check(servers, kind)
            settings = _settings_of(servers[0])
        finally:
            for sock in self.sockets:
                sock.close()  # this child may be there for a while yet
        if left:
            raise OptionError("the program now serves fewer addresses; that takes a new start")
        return {"settings": settings, "modules": _own_modules()}, []


def _settings_of(made: Any) -> dict[str, object]:
    """What a server of the program sets. Raises OptionError where that is wrong."""
    settings = {
        one.name: value
        for one in declared()
        if one.flag
        and one.name != "worker_class"
        and (value := getattr(made, one.name, None)) is not None
        and value != one.__get__(None)
    }
    Options(settings)
    return settings


def _own_modules() -> list[str]:
    return [name for name in sys.modules if name.startswith("prefork.")]


def _is_beside_ipv4(made: Any, binds: Sequence[Bind]) -> bool:
    """Whether a server of all IPv6 addresses is to leave those of IPv4, on the same port, to another `-b`. Alone it
    takes what the system gives it, which is usually both."""
    if made.address_family != socket.AF_INET6:
        return False
    host, port = made.server_address[:2]
    try:
        every = not host or not any(socket.inet_pton(socket.AF_INET6, host))
    except OSError:  # a name, or an address with a zone
        return False
    ports = [bind.address[1] for bind in binds if (bind.family, bind.kind) == (socket.AF_INET, made.socket_type)]
    return every and port != 0 and port in ports


def _plain(address: object) -> object:
    """An address as JSON gives it back."""
    return json.loads(json.dumps(address if not isinstance(address, bytes) else os.fsdecode(address)))
