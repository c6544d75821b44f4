"""Pools of workers with threads, whose reports of dead workers are notes."""

from typing import Any

from . import Program
from .scripts import Start, launch

# The reports of dead workers are notes. `BASES` and `SETTINGS` are those of the pool's class.
POOL = """
import json
import re
from prefork.workers.handlers.threaded import ThreadWorker

def hang(order):
    word, _, rest = order.partition(" ")
    if word == "hang":
        note(f"begun {os.getpid()}")
        threading.Event().wait()
    if word == "regex":  # in C, with the interpreter's lock
        note(f"begun {os.getpid()}")
        re.match("(a+)+b", "a" * 64)
    return perform(order)

class Hangs(Handler):
    def answer(self, order):
        if order.startswith("extend "):
            self.server.worker.extend_deadline(30)
            return perform(order.partition(" ")[2])
        return hang(order)

class Reporting(prefork.PreforkMixIn):
    workers = 1

    def worker_exited(self, report):
        fields = {name: getattr(report, name) for name in report.__slots__}
        note("exit " + json.dumps({**fields, "reason": report.reason.name, "line": str(report)}))

class Pool(BASES):
    SETTINGS

with Pool(("127.0.0.1", 0), Hangs) as server:
    server.serve_forever()
"""
STOCK = "Reporting, socketserver.TCPServer"


def pool(start: Start, *settings: str, bases: str = STOCK, before: str = "", **options: Any) -> Program:
    chosen = ["worker_class = 'thread'" if bases == STOCK else "daemon_threads = False", *settings]
    body = (
        POOL.replace("BASES", bases)
        .replace("SETTINGS", "\n    ".join(chosen))
        .replace("class Pool", f"{before}\nclass Pool")
    )
    return launch(start, body, **options).ready()
