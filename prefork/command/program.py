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
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import prefork.command.foreign_options as foreign_options
import prefork.kernel.import_path as import_path
import prefork.kernel.logs as logs
import prefork.kernel.private_fds as private_fds
import prefork.kernel.readiness as readiness
import prefork.servers.server_checks as server_checks
import prefork.servers.worker_class as worker_class
from prefork.command.addresses import BindAddresses, is_ipv6_wildcard, leaves_ipv4
from prefork.command.probe import ProgramProbe, Work
from prefork.command.program_servers import ServedProgram, is_own_server, make_servers
from prefork.command.server_sockets import binding, by_address, in_order
from prefork.errors import OptionError, ProgramError
from prefork.kernel.listener import Listener
from prefork.kernel.program_directory import ProgramDirectory
from prefork.kernel.unix_path import Claim
from prefork.link.worker_context import WorkerContext
from prefork.rules.program_kind import ProgramKind
from prefork.settings.settings import Options, declared, with_whole_paths
from prefork.workers.worker import Worker

log = logs.get("prefork")

FILE_SETTINGS = ("unix_mode", "unix_group")  # they count when a socket's file is made, and never again
_LASTING = (*FILE_SETTINGS, "control")  # a reload does not change them
_SWEEP = 0.005  # seconds between two looks at a probe that is to end


class ProgramSummary(NamedTuple):
    """What the last probe has taken the program for, in words of the log."""

    name: str
    kind: str
    worker_class: str
    speaks_http: bool

    @classmethod
    def of(cls, served: ServedProgram) -> "ProgramSummary":
        # What cannot be told is served as what a class of workers that was typed serves.
        kind = "an application" if served.kind is ProgramKind.UNKNOWN else served.kind.value
        return cls(served.name, kind, worker_class.name_of(served.worker_class), served.speaks_http)

    def __str__(self) -> str:
        return f"{self.name} is {self.kind}; worker class {self.worker_class}"


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
        addresses: BindAddresses,
        place: ProgramDirectory,
        flags: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self.target, self._addresses, self._place, self._flags = target, addresses, place, flags
        self._worker_class = flags.get("worker_class")
        self._file_settings = {name: flags[name] for name in FILE_SETTINGS if name in flags}
        self.sockets: list[socket.socket] = []
        self._claims: list[Claim | None] = []  # of each socket
        self.settings: dict[str, object] = {}
        self.summary = ProgramSummary("", "", "", False)
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
            typed, self._worker_class = self._worker_class, worker_class.reference(self._worker_class)
            if typed == self._worker_class and (text := foreign_options.class_refusal(typed)):
                raise OptionError(text, code="PF0109")
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
        self.summary = ProgramSummary(*answer["summary"])
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
        given = self._enter()
        with binding(in_order(self.sockets)):
            served = make_servers(self.target, self._addresses, self._place, given)
        return worker_class.make_worker(served.worker_class, served.servers, context)

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
        for name in _LASTING:
            if name not in self._flags and answer["settings"].get(name) != self.settings.get(name):
                log.warning("%s: a change needs a restart [PF0306]", name)
        self._import(answer)
        summary = ProgramSummary(*answer["summary"])
        if summary != self.summary:
            log.info("%s", summary)
            self.summary = summary
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

    def _make_servers(self, given: type[Worker] | None) -> ServedProgram:
        """The program's servers, in a probe: checked."""
        served = make_servers(self.target, self._addresses, self._place, given)
        server_checks.checked_options(served.servers, served.worker_class)
        for name, module in import_path.shadowing.items():  # a worker could not import what was imported here
            file = getattr(module, "__file__", None)
            raise ProgramError(
                f"{file or name} has the name of a standard module that its worker_class needs; rename it",
                code="PF0127",
            )
        return served

    def _first_probe(self) -> tuple[dict[str, Any], list[int]]:
        """Bind, and hand up the listeners with what the master is to know."""
        kind = self._enter()

        def take(server: Any) -> None:
            if is_ipv6_wildcard(server):
                only = leaves_ipv4(server, self._addresses.typed)
                if only or is_own_server(server):  # a class of the program may have chosen by itself
                    server.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)

        with binding(take, claims=self._file_settings) as asked:
            try:
                program = self._make_servers(kind)
                servers = program.servers
                # In the order in which they were bound, which is the order in which a worker will ask for them.
                bound = [(made, address) for made, address in asked if any(made is server for server in servers)]
                if len(bound) != len(asked):
                    raise ProgramError(
                        f"{program.name} is not the only server that is made: another one is bound, and no worker "
                        "could have it; name that one, or make it under `if __name__ == '__main__':`",
                        code="PF0128",
                    )
                if len(bound) != len(servers):
                    raise ProgramError(f"{self.target} returned a server that is not bound", code="PF0128")
                claims = [getattr(made, "_claim", None) for made, _ in bound]
                handed = [claim and claim.hand_over() for claim in claims]
                settings = _settings_of(program)
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
            "summary": ProgramSummary.of(program),
            "modules": _own_modules(),
        }
        return answer, fds

    def _reload_probe(self) -> tuple[dict[str, Any], list[int]]:
        """Try the program around the listeners that are there."""
        kind = self._enter()
        try:
            with binding(by_address(self._asked, self.sockets)) as asked:
                program = self._make_servers(kind)
            settings = _settings_of(program)
        finally:
            for sock in self.sockets:
                sock.close()  # this child may be there for a while yet
        if len(asked) < len(self._asked):
            raise OptionError("the program now serves fewer addresses; that needs a restart", code="PF0303")
        return {"settings": settings, "summary": ProgramSummary.of(program), "modules": _own_modules()}, []


def _settings_of(program: ServedProgram) -> dict[str, object]:
    """What the program sets. Raises OptionError where that is wrong."""
    server = program.servers[0]
    settings: dict[str, object] = {
        setting.name: value
        for setting in declared()
        if setting.flag
        and setting.name != "worker_class"
        and (value := getattr(server, setting.name, None)) is not None
        and value != setting.__get__(None)
    }
    settings["worker_class"] = worker_class.name_of(program.worker_class)
    Options(settings)
    return settings


def _own_modules() -> list[str]:
    return [name for name in sys.modules if name.startswith("prefork.")]
