"""The life of a pool of one worker, whose calls fail; the master's do not."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from support import Address, dial, until
from support.processes import alive
from support.web import Unanswered, Web
from sweep.life import HANDLER, RECOVERY, Judged, Life, Outcome

CLASSES = ("sync", "thread", "wsgi", "asgi")
WORKER_PHASES = ("work", "leave")
WSGI = """
def Handler(environ, start_response):
    start_response("200 OK", [("Content-Length", "5")])
    return [b"hello"]
"""
ASGI = """
async def Handler(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})
"""


class WorkerLife(Life):
    """`work` is requests of all kinds, `leave` the end of a worker that a reload replaces."""

    workers = 1

    @property
    def served(self) -> str:
        return {"wsgi": WSGI, "asgi": ASGI}.get(self.cell.program, HANDLER)

    @property
    def http(self) -> bool:
        return self.cell.program in ("wsgi", "asgi")

    def arguments(self, port: int) -> list[object]:
        return [*super().arguments(port), "--worker-class", self.cell.program]

    @property
    def traced(self) -> int:
        return self.program.children()[0]

    def request(self, address: Address) -> None:
        if not self.http:
            super().request(address)
            return
        with Web(address, 3.0) as web:
            assert web.get().body == b"hello"

    # -- the phases

    def work(self) -> None:
        self.begin()
        worker, lost = self.traced, dict[str, str]()
        with self.fault():
            for client, act in self.clients():
                if client not in lost:
                    try:
                        act()
                    except (OSError, AssertionError, Unanswered) as error:
                        lost[client] = str(error)
        self.alive()
        self.goes_on()
        fault = self.cell.fault
        if fault and fault.last is not None:
            if not alive(worker):
                raise Judged(Outcome.GONE, "the worker ended")
            if len(lost) > len(self.injected):
                raise Judged(Outcome.LOST, f"{len(lost)} clients, for {len(self.injected)} calls: {lost}")
        self.ends()

    def leave(self) -> None:
        self.begin()
        before = self.program.children()
        if self.http:  # one that keeps its connection
            self.stack.enter_context(Web(self.addresses[0])).get()
        with self.fault():
            self.program.send(signal.SIGHUP)
            self.best(lambda: self.replaced(before))
        with self.otherwise(Outcome.DEAF):
            until(lambda: self.replaced(before), RECOVERY, "HUP: a new generation serves")
        self.goes_on()
        self.ends()

    # -- its parts

    def clients(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """What clients do, one after the other; a call that fails may harm one of them."""
        for number in range(4):
            yield f"{number}", partial(self.request, self.addresses[number % 2])
        yield "silent", lambda: dial(self.addresses[0]).close()
        if self.http:
            with self.kept() as webs:
                for _ in range(2):
                    for number, web in enumerate(webs):
                        yield f"kept {number}", web.get
                yield "kept 0", lambda: webs[0].send(b"GET / HT")
                yield "kept 1", webs[1].get
                yield "kept 0", lambda: webs[0].send(b"TP/1.1\r\nHost: test\r\n\r\n").answer()
        for number in range(4, 6):
            yield f"{number}", partial(self.request, self.addresses[number % 2])

    @contextmanager
    def kept(self) -> Iterator[list[Web]]:
        webs = [Web(self.addresses[number % 2], 3.0) for number in range(3)]
        try:
            yield webs
        finally:
            for web in webs:
                with suppress(OSError):
                    web.sock.close()

    def goes_on(self) -> None:
        """The pool has its worker, and it answers."""
        with self.otherwise(Outcome.SHORT):
            until(self.full, RECOVERY, "the worker is ready", every=0.01)
        for _ in range(3):
            self.answers()
