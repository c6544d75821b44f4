"""Pools of workers for coroutines, on asyncio's own loop and on uvloop."""

import importlib.util
from typing import Any

import pytest

from . import Program
from .scripts import Start, launch

LOOPS = ["asyncio"] + (["uvloop"] if importlib.util.find_spec("uvloop") else [])
both_loops = pytest.mark.parametrize("loop", LOOPS)
PROGRAM = """
import asyncio
import work

class Own(prefork.AsyncioWorker):
    def new_loop(self):
        return asyncio.SelectorEventLoop() if LOOP == "asyncio" else super().new_loop()

async def perform(handler, order):
    word, _, rest = order.partition(" ")
    worker = handler.server.worker
    match word:
        case "loop":
            return type(asyncio.get_running_loop()).__module__
        case "gate":
            note(f"begun {rest}")
            while not (HOME / rest).exists():
                await asyncio.sleep(0.005)
        case "hang":
            note(f"begun {os.getpid()}")
            await asyncio.get_running_loop().create_future()
        case "block":
            note(f"begun {os.getpid()}")
            threading.Event().wait()
        case "spin":
            note(f"begun {os.getpid()}")
            while True:
                pass
        case "stubborn":
            note(f"begun {os.getpid()}")
            while not (HOME / rest).exists():
                try:
                    await asyncio.sleep(0.01)
                except asyncio.CancelledError:
                    note("cancelled")
        case "extend":
            worker.extend_deadline(float(rest.split()[0]))
            return await perform(handler, rest.partition(" ")[2])
        case "leaving":
            note("begun")
            await worker.leaving.wait()
            return str(worker.draining)
        case "sleep":
            await asyncio.sleep(float(rest))
        case "raise":
            raise ValueError("ordered trouble")
        case "leave":
            sys.exit(int(rest))
        case "cancel":
            raise asyncio.CancelledError
    return "done"

class Coroutine:
    async def answer(self, line):
        identity, _, order = line.decode().strip().partition(" ")
        if not identity:
            return b""
        if "PREFORK_LEDGER" in os.environ:
            os.write(work._ledger(), f"{os.getpid()} {identity}\\n".encode())
            await asyncio.sleep(0.002)
            return f"{os.getpid()}:{identity}\\n".encode()
        try:
            result = await perform(self, order)
        finally:
            if order.partition(" ")[0] in ("hang", "extend"):
                note("finally")
                await asyncio.sleep(0.01)
                note("cleaned")
        return f"{os.getpid()}:{identity}:{result}\\n".encode()

class Stream(Coroutine, prefork.AsyncStreamRequestHandler):
    async def handle(self):
        self.writer.write(await self.answer(await self.reader.readline()))

class Datagram(Coroutine, prefork.AsyncDatagramRequestHandler):
    async def handle(self):
        await self.reply(await self.answer(self.packet))

class Noting:
    def handle_error(self, request, client_address):
        note(f"error {sys.exc_info()[0].__name__}")

SERVERS = {
    "tcp": (prefork.PreforkTCPServer, Stream, ("127.0.0.1", 0)),
    "udp": (prefork.PreforkUDPServer, Datagram, ("127.0.0.1", 0)),
    "unix": (prefork.PreforkUnixStreamServer, Stream, str(RUN / "socket")),
    "unixgram": (prefork.PreforkUnixDatagramServer, Datagram, str(RUN / "socket")),
}

def make(kind, port=0, **settings):
    server, handler, address = SERVERS[kind]
    address = ("127.0.0.1", port) if port else address
    settings = {"workers": 2, "worker_class": Own, **settings}
    return type("Pool", (Noting, server), settings)(address, handler)
"""
SERVE = """
with make(KIND, **SETTINGS) as server:
    server.serve_forever()
"""


def begin(start: Start, loop: str = "asyncio", kind: str = "tcp", serve: str = SERVE, **settings: object) -> Program:
    options: dict[str, Any] = {
        name: settings.pop(name) for name in ("allow", "env", "directory", "limits") if name in settings
    }
    head = f"LOOP, KIND, SETTINGS = {loop!r}, {kind!r}, {settings!r}\n"
    return launch(start, head + PROGRAM + serve, **options).ready()
