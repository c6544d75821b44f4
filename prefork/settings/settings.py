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

_NO_PATHS = ("", "-", "none")  # what may stand in the place of a path
MAX_WORKERS = 2048  # slots on the scoreboard must hold a whole pool twice (a reload with the greatest surge)


class Settings:
    """The settings of a pool, as class attributes."""

    workers: int = setting(
        cast(int, usable_cpus),
        int,
        "number of worker processes; default: the processors that the cgroup may use",
        low=1,
        high=MAX_WORKERS,
    )
    worker_class: Any = setting(
        "sync", object, "class of the workers: sync, thread, asyncio, wsgi, asgi, or MODULE:NAME"
    )
    threads: int | None = setting(
        None,
        int,
        "requests that one worker serves at the same time; default: 16 in thread, 1 in wsgi",
        low=1,
        high=1024,
        none=True,
    )
    max_connections: int = setting(
        1000,
        int,
        "connections per worker in asyncio, wsgi and asgi; in thread: those that wait for has_request()",
        low=1,
        high=1_000_000,
    )
    request_timeout: float | None = setting(
        None,
        float,
        "interrupt a request after this time; if it goes on, replace its worker; default: never",
        low=0.01,
        none=True,
        unit="seconds",
    )
    boot_timeout: float = setting(30.0, float, "time a new worker may take to become ready", low=0.05, unit="seconds")
    graceful_timeout: float = setting(
        30.0, float, "time a departing worker has to finish its requests", low=0.0, unit="seconds"
    )
    keepalive_timeout: float = setting(
        5.0,
        float,
        "wsgi, asgi, BufferedHTTPMixIn: close an idle connection after this time; 0: after each reply",
        low=0.0,
        unit="seconds",
    )
    max_body: int = setting(0, int, "wsgi: refuse a request whose body is longer; 0: no limit", low=0, unit="bytes")
    access_log: str = setting("", str, "wsgi, asgi: write one line per request to this file; -: standard output")
    max_requests: int = setting(0, int, "replace a worker after this number of requests; 0: never", low=0)
    max_requests_jitter: int | None = setting(
        None,
        int,
        "lower max_requests by up to this number at random, per worker; default: a tenth of it",
        low=0,
        none=True,
    )
    max_memory: int = setting(
        0, int, "replace a worker whose own memory (USS) is larger; 0: never", low=0, unit="bytes"
    )
    max_lifetime: float = setting(0.0, float, "replace a worker after this time; 0: never", low=0.0, unit="seconds")
    max_surge: int = setting(
        1, int, "extra workers that a reload or a replacement may start at a time", low=1, high=MAX_WORKERS
    )
    block_on_close: bool = setting(
        True, bool, "server_close() waits until all requests are finished; False: it returns at once", flag=False
    )
    unix_mode: int | None = setting(
        None,
        int,
        "permissions of the file of a Unix socket, in octal; default: 0600, with unix_group 0660",
        low=0,
        high=0o777,
        none=True,
        octal=True,
    )
    unix_group: str = setting(
        "", str, "group of the file of a Unix socket, by name or number; default: the group of the process"
    )
    control: str = setting(
        "",
        str,
        "path of the control socket, by which `prefork status` and its like reach the pool; none: no control socket; "
        "default: a file in $RUNTIME_DIRECTORY or $XDG_RUNTIME_DIR/prefork",
    )


def declared() -> Iterator[Setting]:
    """Every setting, in order."""
    for value in vars(Settings).values():
        if isinstance(value, Setting):
            yield value


def with_whole_paths(values: Mapping[str, object], absolute: Callable[[str], str]) -> dict[str, object]:
    """The same settings, with absolute paths: the program may change its directory."""
    paths = {name: values.get(name) for name in ("access_log", "control")}
    relative = {name: path for name, path in paths.items() if isinstance(path, str) and path not in _NO_PATHS}
    return {**values, **{name: absolute(path) for name, path in relative.items()}}


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
                raise OptionError(f"{name}: there is no setting of this name")
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
