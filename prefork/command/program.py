"""The program that the command serves: `MODULE:NAME` and addresses.

The command's master never imports it. A short-lived child, the probe, does: it makes the servers that NAME stands for,
binds them as their classes say, and hands the listeners up (SCM_RIGHTS). Each worker imports the program afresh around
the inherited listeners, so that a reload loads new code. Before a reload another probe tries it: a program that cannot
be imported fails there, with its own traceback, and nothing else has happened.
"""

import contextlib
import importlib
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import prefork.kernel.import_path as import_path
import prefork.kernel.logs as logs
import prefork.kernel.private_fds as private_fds
import prefork.kernel.readiness as readiness
import prefork.servers.server_checks as server_checks
import prefork.servers.worker_class as worker_class
from prefork.command.addresses import BindAddress, leaves_ipv4
from prefork.command.probe import ProgramProbe, Work
from prefork.command.server_sockets import binding, by_address, in_order
from prefork.command.target import make_servers
from prefork.errors import OptionError, ProgramError
from prefork.kernel.listener import Listener
from prefork.kernel.program_directory import ProgramDirectory
from prefork.kernel.unix_path import Claim
from prefork.link.worker_context import WorkerContext
from prefork.settings.settings import Options, declared, with_whole_paths
from prefork.workers.base import Worker

log = logs.get("prefork")

FILE_SETTINGS = ("unix_mode", "unix_group")  # they count when a socket's file is made, and never again
_SWEEP = 0.005  # seconds between two looks at a probe that is to end


class Program:
    """The program, as the master knows it: a name, sockets, and the settings that the last probe has told.

    Parameters
    ----------
    flags
        The settings that the command was given; the others are the program's.
    """

    def __init__(
        self,
        target: str,
        addresses: Sequence[BindAddress],
        place: ProgramDirectory,
        flags: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self.target, self.addresses, self._place, self._flags = target, list(addresses), place, flags
        self._worker_class = flags.get("worker_class")
        self._file_settings = {name: flags[name] for name in FILE_SETTINGS if name in flags}
        self.sockets: list[socket.socket] = []
        self._claims: list[Claim | None] = []  # of each socket
        self.settings: dict[str, object] = {}
        self._asked: list[object] = []  # the addresses as they were asked for, before the kernel chose a port
        self._probes: list[ProgramProbe] = []

    def open(self, timeout: float) -> None:
        """Have a probe import the program and bind.

        Raises
        ------
        ProgramError, OptionError, OSError
            as `make_servers()` does.
        """
        if isinstance(self._worker_class, str):
            self._worker_class = worker_class.reference(self._worker_class)
            if self._worker_class in worker_class.CLASSES.values():
                worker_class.resolve(self._worker_class)  # imported here, once, and before the program
        probe = self._begin(self._first_probe, timeout)
        try:
            while not probe.over():
                readiness.wait_readable(probe.fd, probe.deadline - time.monotonic())
            answer, fds = probe.finish()
        except BaseException:
            probe.abandon()
            raise
        self.settings, self._asked = answer["settings"], answer["asked"]
        number = len(self._asked)
        locks = iter(fds[number:])
        for claim in answer["claims"]:
            if claim is not None:
                path, file = claim
                claim = Claim.take_over(path, tuple(file) if file else None, next(locks))
            self._claims.append(claim)
        self.sockets = [socket.socket(fileno=fd) for fd in fds[:number]]
        self._import(answer)

    def listeners(self) -> list[Listener]:
        """For the master: a listener for each socket."""
        return [Listener(sock, claim=claim) for sock, claim in zip(self.sockets, self._claims, strict=True)]

    def probe(self, timeout: float) -> ProgramProbe:
        """Begin to try the program as it is now, without binding what is bound already."""
        return self._begin(self._reload_probe, timeout)

    def worker(self, context: WorkerContext) -> Worker:
        """In a worker: import the program around the inherited listeners."""
        kind = self._enter()
        with binding(in_order(self.sockets)):
            servers = make_servers(self.target, self.addresses, self._place, kind)
        kind = kind or worker_class.resolve(getattr(servers[0], "worker_class", "sync"))
        return worker_class.make_worker(kind, servers, context)

    def collect(self) -> float | None:
        """Collect the probes that have ended. Returns when to look again (`time.monotonic()`); None: none is to end."""
        now = time.monotonic()
        self._probes = [probe for probe in self._probes if not probe.collect(now)]
        return now + _SWEEP if any(probe.leaves for probe in self._probes) else None

    def close(self) -> None:
        for claim in filter(None, self._claims):
            claim.release()
        private_fds.close(sock.detach() for sock in self.sockets)
        self.sockets, self._claims = [], []
        for probe in self._probes:
            probe.abandon()
        while self.collect() is not None:
            time.sleep(_SWEEP)

    def _begin(self, work: Work, timeout: float) -> ProgramProbe:
        probe = ProgramProbe(work, timeout, self._next_options)
        self._probes.append(probe)
        return probe

    def _next_options(self, answer: Mapping[str, Any]) -> Options:
        """The settings of a new generation: the command's flags, and for the rest what the program says now."""
        options = self.options_of(answer["settings"])
        for name in FILE_SETTINGS:
            if name not in self._flags and answer["settings"].get(name) != self.settings.get(name):
                log.warning("%s: a change takes a new start; the socket's file is there already", name)
        self._import(answer)
        return options

    def options_of(self, settings: Mapping[str, object]) -> Options:
        """The options of a generation whose program has these settings.

        Raises
        ------
        OptionError
            naming the first that is wrong.
        """
        return Options(with_whole_paths({**settings, **self._flags}, self._place.absolute))

    def _import(self, answer: Mapping[str, Any]) -> None:
        """Import the modules of prefork that the program uses: once for all workers, and before an upgrade replaces
        them on the disk."""
        for name in answer["modules"]:
            with contextlib.suppress(Exception):  # a worker will fail at it, and its report says what is wrong
                importlib.import_module(name)

    # -- in a child ------------------------------------------------------------------------------------------------

    def _enter(self) -> type[Worker] | None:
        """Go to where the program is. Returns the worker class that the command was given, if it was."""
        self._place.enter()
        return None if self._worker_class is None else worker_class.resolve(self._worker_class)

    def _make_servers(self, kind: type[Worker] | None) -> list[Any]:
        """The program's servers, in a probe: checked."""
        servers = make_servers(self.target, self.addresses, self._place, kind)
        server_checks.checked_options(servers, kind)
        for name, module in import_path.shadowing.items():  # a worker could not import what was imported here
            file = getattr(module, "__file__", None)
            raise ProgramError(
                f"{file or name} has the name of a standard module that its worker_class needs; rename it"
            )
        return servers

    def _first_probe(self) -> tuple[dict[str, Any], list[int]]:
        """Bind, and hand up the listeners with what the master is to know."""
        kind = self._enter()

        def take(server: Any) -> None:
            if leaves_ipv4(server, self.addresses):
                server.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)

        with binding(take, claims=self._file_settings) as asked:
            try:
                servers = self._make_servers(kind)
                # In the order in which they were bound, which is the order in which a worker will ask for them.
                bound = [(made, address) for made, address in asked if any(made is server for server in servers)]
                if len(bound) != len(asked):
                    raise ProgramError(f"{self.target} binds a server that it does not return; no worker could have it")
                if len(bound) != len(servers):
                    raise ProgramError(f"{self.target} returned a server that is not bound")
                claims = [getattr(made, "_claim", None) for made, _ in bound]
                handed = [claim and claim.hand_over() for claim in claims]
                settings = _settings_of(servers[0])
            except BaseException:
                for made, _ in asked:  # or the path of a first address would outlive the failure of a second
                    with contextlib.suppress(Exception):
                        made.server_close()
                raise
        # Their servers end with this function; the descriptors outlive them.
        fds = [made.socket.detach() for made, _ in bound] + [claim[2] for claim in handed if claim]
        answer = {
            "settings": settings,
            "asked": [address for _, address in bound],
            "claims": [claim and claim[:2] for claim in handed],
            "modules": _own_modules(),
        }
        return answer, fds

    def _reload_probe(self) -> tuple[dict[str, Any], list[int]]:
        """Try the program around the listeners that are there."""
        kind = self._enter()
        try:
            with binding(by_address(self._asked, self.sockets)) as asked:
                servers = self._make_servers(kind)
            settings = _settings_of(servers[0])
        finally:
            for sock in self.sockets:
                sock.close()  # this child may be there for a while yet
        if len(asked) < len(self._asked):
            raise OptionError("the program now serves fewer addresses; that takes a new start")
        return {"settings": settings, "modules": _own_modules()}, []


def _settings_of(server: Any) -> dict[str, object]:
    """What a server of the program sets. Raises OptionError where that is wrong."""
    settings = {
        setting.name: value
        for setting in declared()
        if setting.flag
        and setting.name != "worker_class"
        and (value := getattr(server, setting.name, None)) is not None
        and value != setting.__get__(None)
    }
    Options(settings)
    return settings


def _own_modules() -> list[str]:
    return [name for name in sys.modules if name.startswith("prefork.")]
