"""Every setting, declared once: the class attributes, the command's flags and the checks are all made from `Settings`.

A setting is declared with its type, default, bounds and one sentence of help. `Settings` is what a server inherits:
attributes to be overridden, as socketserver's own are. `Options` is a frozen, checked copy of them, taken when serving
starts; everything behind the face reads only that.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

from prefork.errors import OptionError
from prefork.kernel.cgroup import usable_cpus

T = TypeVar("T")

MAX_WORKERS = 2048  # slots on the scoreboard must hold a whole pool twice (a reload with the greatest surge)


class Setting:
    """A class attribute with a default, its bounds, and its help. Overriding it is plain assignment."""

    def __init__(
        self,
        default: object,
        kind: type,
        help: str,
        *,
        low: float | None,
        high: float | None,
        none: bool,
        flag: bool,
        unit: str,
        octal: bool,
    ) -> None:
        self.default, self.kind, self.help, self.low, self.high, self.none = default, kind, help, low, high, none
        self.flag, self.unit, self.octal = flag, unit, octal
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type | None = None) -> object:
        return self.default() if callable(self.default) and not isinstance(self.default, type) else self.default

    def check(self, value: object) -> object:
        """Return `value` as the setting's type.

        Raises
        ------
        OptionError
            naming the setting, what it takes, and what it was given.
        """
        if value is None and self.none:
            return None
        if self.kind is object:
            return value
        good = isinstance(value, self.kind) or (self.kind is float and isinstance(value, int))
        if not good or (isinstance(value, bool) and self.kind is not bool):
            raise self._wrong(value)
        if self.kind in (int, float):
            try:
                number = self.kind(cast(Any, value))
            except OverflowError:  # a whole number that no float holds
                raise self._wrong(value) from None
            if (
                (isinstance(number, float) and not math.isfinite(number))
                or (self.low is not None and number < self.low)
                or (self.high is not None and number > self.high)
            ):
                raise self._wrong(value)
            return cast(object, number)
        return value

    def _wrong(self, value: object) -> OptionError:
        try:
            shown = " ".join(repr(value).split())  # one line
        except Exception:  # a stranger's repr, or a whole number of too many digits
            shown = f"a value of type {type(value).__name__}"
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return OptionError(f"{self.name}: must be {self._wanted()}, not {shown}")

    def _wanted(self) -> str:
        what = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}[self.kind]
        if self.unit:
            what += f" of {self.unit}"
        if self.octal:
            what = f"an octal number from 0o{self.low or 0:o} to 0o{self.high or 0:o}"
        elif self.low is not None and self.high is not None:
            what += f" from {self.low:g} to {self.high:g}"
        elif self.low is not None:
            what += f", {self.low:g} or more"
        return what + (" (or None)" if self.none else "")


def setting(
    default: T,
    kind: type,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    none: bool = False,
    flag: bool = True,
    unit: str = "",
    octal: bool = False,
) -> T:
    """Declare a setting. To a type checker it is its value, as with `dataclasses.field`.

    Parameters
    ----------
    octal
        The command reads it, and errors show its bounds, as chmod(1) does.
    """
    declared = Setting(default, kind, help, low=low, high=high, none=none, flag=flag, unit=unit, octal=octal)
    return cast(T, declared)


class Settings:
    """The settings of a pool, as class attributes."""

    workers: int = setting(
        cast(int, usable_cpus),
        int,
        "worker processes; default: processors, as many as its cgroup may use",
        low=1,
        high=MAX_WORKERS,
    )
    worker_class: Any = setting("sync", object, "a Worker class: sync, thread, asyncio, wsgi, asgi, or MODULE:NAME")
    threads: int | None = setting(
        None,
        int,
        "requests at once in a worker of the class thread (default: 16) or wsgi (1)",
        low=1,
        high=1024,
        none=True,
    )
    max_connections: int = setting(
        1000,
        int,
        "connections at once in a worker of the class asyncio, wsgi or asgi; thread: that wait for has_request()",
        low=1,
        high=1_000_000,
    )
    request_timeout: float | None = setting(
        None,
        float,
        "after so long a request is interrupted, and if that does not help its worker is replaced; default: never",
        low=0.01,
        none=True,
        unit="seconds",
    )
    boot_timeout: float = setting(30.0, float, "a worker must be ready so soon", low=0.05, unit="seconds")
    graceful_timeout: float = setting(
        30.0, float, "a worker that leaves may finish its request for so long", low=0.0, unit="seconds"
    )
    keepalive_timeout: float = setting(
        5.0,
        float,
        "wsgi, asgi, BufferedHTTPMixIn: close a connection that is idle for so long; 0: after each reply",
        low=0.0,
        unit="seconds",
    )
    max_body: int = setting(0, int, "wsgi: refuse a request with a longer body; 0: no limit", low=0, unit="bytes")
    access_log: str = setting("", str, "wsgi, asgi: a file for one line a request; -: standard output")
    max_requests: int = setting(0, int, "recycle a worker after so many requests; 0: never", low=0)
    max_requests_jitter: int | None = setting(
        None, int, "spread max_requests by up to so many; default: a tenth of it", low=0, none=True
    )
    max_memory: int = setting(0, int, "recycle a worker that owns so much memory (USS; 0: never)", low=0, unit="bytes")
    max_lifetime: float = setting(0.0, float, "recycle a worker after so long; 0: never", low=0.0, unit="seconds")
    max_surge: int = setting(
        1, int, "a reload or a recycling may run so many workers more than wanted", low=1, high=MAX_WORKERS
    )
    block_on_close: bool = setting(
        True, bool, "server_close() waits for the drain (False: orders it and returns)", flag=False
    )
    unix_mode: int | None = setting(
        None,
        int,
        "permissions of a Unix socket's file, in octal; default: 0600, with unix_group 0660",
        low=0,
        high=0o777,
        none=True,
        octal=True,
    )
    unix_group: str = setting("", str, "group of a Unix socket's file, by name or number; default: the process's")


def declared() -> Iterator[Setting]:
    """Every setting, in order."""
    for value in vars(Settings).values():
        if isinstance(value, Setting):
            yield value


def with_whole_paths(values: Mapping[str, object], absolute: Callable[[str], str]) -> dict[str, object]:
    """The same settings for processes whose program may change its directory."""
    log = values.get("access_log")
    whole = {"access_log": absolute(log)} if isinstance(log, str) and log not in ("", "-") else {}
    return {**values, **whole}


class Options(Settings):
    """A checked and frozen copy of all settings.

    Raises
    ------
    OptionError
        for the first setting that is wrong, in one line.
    """

    def __init__(self, values: Mapping[str, object]) -> None:
        known = {one.name: one for one in declared()}
        for name in values:
            if name not in known:
                raise OptionError(f"{name}: there is no such setting")
        self.__dict__.update({name: one.check(values.get(name, getattr(self, name))) for name, one in known.items()})

    @classmethod
    def of(cls, server: object, absolute: Callable[[str], str] = os.path.abspath) -> "Options":
        """Read and check the settings that a server (or its class) carries. Relative paths in them become absolute."""
        values = {one.name: getattr(server, one.name) for one in declared() if hasattr(server, one.name)}
        try:
            return cls(with_whole_paths(values, absolute))
        except FileNotFoundError:  # there is no current directory any more
            return cls(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"options are frozen; {name} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"options are frozen; {name} cannot be deleted")

    @property
    def requests_jitter(self) -> int:
        """By how many requests at most `max_requests` is brought forward, so that workers do not recycle together."""
        jitter = self.max_requests // 10 if self.max_requests_jitter is None else self.max_requests_jitter
        return min(jitter, max(0, self.max_requests - 1))
