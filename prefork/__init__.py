"""prefork: any `socketserver` handler, served from a supervised pool of processes."""

from socketserver import BaseRequestHandler, DatagramRequestHandler, StreamRequestHandler

from prefork.errors import BootError, OptionError, PreforkError, ProgramError, RequestTimeout
from prefork.reports import Reason, WorkerExit
from prefork.server import (
    PreforkMixIn,
    PreforkTCPServer,
    PreforkUDPServer,
    PreforkUnixDatagramServer,
    PreforkUnixStreamServer,
    serve,
)
from prefork.workers.base import Worker
from prefork.workers.sync import SyncWorker

__version__ = "0.1.0"

__all__ = [
    "BaseRequestHandler",
    "BootError",
    "DatagramRequestHandler",
    "OptionError",
    "PreforkError",
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
    "Worker",
    "WorkerExit",
    "serve",
]
