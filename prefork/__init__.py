"""prefork: any `socketserver` handler, served from a supervised pool of processes."""

import prefork.kernel.import_path as import_path

# isort: split
from typing import TYPE_CHECKING, Any

# The command has no use for the face: what of it a program asks for is imported then. A command for a running pool
# (`prefork status`) never imports the rest of prefork.
if TYPE_CHECKING or not import_path.is_command:
    from socketserver import BaseRequestHandler, DatagramRequestHandler, StreamRequestHandler

    from prefork.errors import BootError, OptionError, PreforkError, ProgramError, RequestTimeout
    from prefork.rules.worker_exit import Reason, WorkerExit
    from prefork.servers.mixin import (
        PreforkMixIn,
        PreforkTCPServer,
        PreforkUDPServer,
        PreforkUnixDatagramServer,
        PreforkUnixStreamServer,
    )
    from prefork.servers.runner import serve
    from prefork.workers.handlers.sync import SyncWorker
    from prefork.workers.worker import Worker

if TYPE_CHECKING:
    from prefork.servers.http import BufferedHTTPMixIn, PreforkHTTPServer
    from prefork.workers.asgi.worker import ASGIWorker
    from prefork.workers.eventloop.asyncio_worker import AsyncioWorker
    from prefork.workers.eventloop.handlers import AsyncDatagramRequestHandler, AsyncStreamRequestHandler
    from prefork.workers.handlers.threaded import ThreadWorker
    from prefork.workers.wsgi.worker import WSGIWorker

__version__ = "0.1.0"

__all__ = [
    "ASGIWorker",
    "AsyncDatagramRequestHandler",
    "AsyncStreamRequestHandler",
    "AsyncioWorker",
    "BaseRequestHandler",
    "BootError",
    "BufferedHTTPMixIn",
    "DatagramRequestHandler",
    "OptionError",
    "PreforkError",
    "PreforkHTTPServer",
    "PreforkMixIn",
    "PreforkTCPServer",
    "PreforkUDPServer",
    "PreforkUnixDatagramServer",
    "PreforkUnixStreamServer",
    "ProgramError",
    "Reason",
    "RequestTimeout",
    "StreamRequestHandler",
    "SyncWorker",
    "ThreadWorker",
    "WSGIWorker",
    "Worker",
    "WorkerExit",
    "serve",
]

# Imported when they are asked for: what they stand on costs up to 50 ms, and memory.
_MODULES = {
    **dict.fromkeys(("BaseRequestHandler", "DatagramRequestHandler", "StreamRequestHandler"), "socketserver"),
    **dict.fromkeys(("BootError", "OptionError", "PreforkError", "ProgramError", "RequestTimeout"), "prefork.errors"),
    **dict.fromkeys(("Reason", "WorkerExit"), "prefork.rules.worker_exit"),
    **dict.fromkeys(("PreforkMixIn", "PreforkTCPServer", "PreforkUDPServer"), "prefork.servers.mixin"),
    **dict.fromkeys(("PreforkUnixDatagramServer", "PreforkUnixStreamServer"), "prefork.servers.mixin"),
    **dict.fromkeys(("BufferedHTTPMixIn", "PreforkHTTPServer"), "prefork.servers.http"),
    "serve": "prefork.servers.runner",
    **dict.fromkeys((name for name in __all__ if name.endswith("Worker")), "prefork.workers"),
    **dict.fromkeys(("AsyncDatagramRequestHandler", "AsyncStreamRequestHandler"), "prefork.workers"),
}


def __getattr__(name: str) -> Any:
    return import_path.attribute(globals(), _MODULES, name)
