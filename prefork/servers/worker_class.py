"""Which class of workers serves, and how a worker of it is made.

The setting `worker_class` is a class, a short name of ours, a name that an installed package registers in the entry
points `prefork.workers`, or `MODULE:NAME`. A class is imported only where it is used.
"""

import importlib
from collections.abc import Sequence
from typing import Any, TypeVar

import prefork.kernel.import_path as import_path
import prefork.kernel.logs as logs
from prefork.errors import OptionError
from prefork.link.worker_context import WorkerContext
from prefork.workers.worker import Worker

W = TypeVar("W", bound=Worker)

CLASSES = {
    "sync": "prefork.workers:SyncWorker",
    "thread": "prefork.workers:ThreadWorker",
    "asyncio": "prefork.workers:AsyncioWorker",
    "wsgi": "prefork.workers:WSGIWorker",
    "asgi": "prefork.workers:ASGIWorker",
}
ENTRY_POINTS = "prefork.workers"  # the group in which other distributions register classes under short names


def resolve(setting: object) -> type[Worker]:
    """The class that the setting `worker_class` stands for. Raises OptionError, in one line, where there is none."""
    kind = setting
    if isinstance(setting, str):
        module_name, colon, name = reference(setting).partition(":")
        if not (colon and module_name and name) or module_name.startswith("."):
            known = ", ".join(CLASSES)
            hint = f"did you mean {setting.lower()!r}? " if setting.lower() in CLASSES else ""
            raise OptionError(
                f"worker_class: there is no {setting!r}; {hint}use {known}, MODULE:NAME, or a name that an installed "
                f"package registers in the entry points {ENTRY_POINTS}",
                code="PF0109",
            )
        try:
            kind = importlib.import_module(module_name)
            for part in name.split("."):
                kind = getattr(kind, part)
        except OptionError:
            raise  # a class that says by itself what it needs
        except Exception as error:  # a stranger's module may raise anything
            expected = isinstance(error, ImportError | AttributeError)
            why = error if expected else " ".join(f"{type(error).__name__}: {error}".split())
            raise OptionError(f"worker_class: {setting!r} cannot be imported: {why}", code="PF0109") from error
    if not (isinstance(kind, type) and issubclass(kind, Worker)):
        raise OptionError(f"worker_class: {setting!r} is not a subclass of prefork.Worker", code="PF0109")
    return kind


def reference(name: str) -> str:
    """The `MODULE:NAME` of a short name, be it ours or an entry point's; any other name is returned as it is."""
    if ":" in name or name in CLASSES:
        return CLASSES.get(name, name)
    with import_path.OwnImports():
        from importlib.metadata import entry_points  # 20 ms, which only a foreign short name costs

    return next((point.value for point in entry_points(group=ENTRY_POINTS, name=name)), name)


def name_of(kind: type[Worker]) -> str:
    """The name of a class in a line of the log: our short one, or `MODULE:NAME`."""
    own = kind.__module__.startswith("prefork.workers.")
    short = (name for name, whole in CLASSES.items() if own and whole.endswith(f":{kind.__name__}"))
    return next(short, f"{kind.__module__}:{kind.__qualname__}")


def protocol(kind: type[Worker]) -> str:
    """What a class serves that is one of ours for applications, or a subclass: "wsgi" or "asgi"; "": another class."""
    rooms = ("wsgi", "asgi")
    modules = [base.__module__ for base in kind.__mro__]
    return next((room for room in rooms if any(name.startswith(f"prefork.workers.{room}.") for name in modules)), "")


def make_worker(kind: type[W], servers: Sequence[Any], context: WorkerContext) -> W:
    """In the child: a worker around its own copy of the servers."""
    logs.enter_child()  # again: a program may have closed some when it was imported
    worker = kind(servers, context)
    for server in servers:
        server.worker, server._pool = worker, None
    return worker
