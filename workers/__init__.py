"""What runs in a child. Imported as `prefork.workers`, never as `workers`: that name belongs to applications.

The public classes are names of this package, too. A class is imported when it is asked for: what it stands on costs up
to 50 ms, and memory.
"""

from typing import Any

if __name__ != "prefork.workers":
    raise ImportError("import prefork.workers; the name 'workers' is not prefork's")

MODULES = {
    "ASGIWorker": "prefork.workers.asgi.worker",
    "AsyncDatagramRequestHandler": "prefork.workers.eventloop.handlers",
    "AsyncStreamRequestHandler": "prefork.workers.eventloop.handlers",
    "AsyncioWorker": "prefork.workers.eventloop.asyncio_worker",
    "SyncWorker": "prefork.workers.handlers.sync",
    "ThreadWorker": "prefork.workers.handlers.threaded",
    "WSGIWorker": "prefork.workers.wsgi.worker",
    "Worker": "prefork.workers.worker",
}


def __getattr__(name: str) -> Any:
    import prefork.kernel.import_path as import_path  # after the name was refused

    return import_path.attribute(globals(), MODULES, name)
