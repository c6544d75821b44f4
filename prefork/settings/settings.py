"""Every setting, declared once: the class attributes, the command's flags and the checks are all made from `Settings`.

`Settings` is what a server inherits: attributes to be overridden, as socketserver's own are. `Options` is a frozen,
checked copy of them, taken when serving starts and at each reload; all code behind the server reads only that.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from prefork.errors import OptionError
from prefork.kernel.cgroup import usable_cpus
from prefork.settings.declaration import Setting, setting

MAX_WORKERS = 2048  # slots on the scoreboard must hold a whole pool twice (a reload with the greatest surge)


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
    """The same settings, with absolute paths: the program may change its directory."""
    path = values.get("access_log")
    absolute_paths = {"access_log": absolute(path)} if isinstance(path, str) and path not in ("", "-") else {}
    return {**values, **absolute_paths}


class Options(Settings):
    """A checked and frozen copy of all settings.

    Raises
    ------
    OptionError
        for the first setting that is wrong, in one line.
    """

    def __init__(self, values: Mapping[str, object]) -> None:
        known = {item.name: item for item in declared()}
        for name in values:
            if name not in known:
                raise OptionError(f"{name}: there is no such setting")
        checked = {name: item.check(values.get(name, getattr(self, name))) for name, item in known.items()}
        self.__dict__.update(checked)

    @classmethod
    def of(cls, server: object, absolute: Callable[[str], str] = os.path.abspath) -> "Options":
        """Read and check the settings that a server (or its class) carries. Relative paths in them become absolute."""
        values = {item.name: getattr(server, item.name) for item in declared() if hasattr(server, item.name)}
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
