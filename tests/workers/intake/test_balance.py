"""Connections that are kept are shared out: none of the workers idles while another has them all."""

import asyncio
import os
import select
import socket
import socketserver
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import prefork.link.scoreboard as scoreboard
import prefork.workers.eventloop.listener_gate as listener_gate
import prefork.workers.intake.connection_batch as connection_batch
from prefork.link.scoreboard import Scoreboard, Slot
from prefork.rules.states import Phase
from prefork.workers.intake.acceptor import Acceptor
from prefork.workers.intake.balance import YIELD_FOR, Advice, ConnectionBalancer, YieldWindow
from support import Address, dial, elapse
from support.scripts import Start, path_of_modules
from support.web import Web

pytestmark = pytest.mark.timeout(60)

BINDS = {"tcp": "tcp://127.0.0.1:0", "unix": "unix:{run}/socket"}
CLIENTS = 8
APP = """
import os

def wsgi(environ, start_response):
    body = str(os.getpid()).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]

async def asgi(scope, receive, send):
    assert scope["type"] == "http"
    body = str(os.getpid()).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""
HANDLER = """
import os
import prefork

class Echo(prefork.AsyncStreamRequestHandler):
    async def handle(self):
        while await self.reader.readline():
            self.writer.write(f"{os.getpid()}\\n".encode())
"""


def ask(kind: str, client: Web) -> bytes:
    """Who has this connection."""
    if kind != "asyncio":
        return client.get().body
    client.send(b"\n")
    return client.sock.recv(100)


def burst(kind: str, address: Address) -> Counter[bytes]:
    """Who has how many of connections that are opened before the first of them says anything. They are closed then."""
    with ExitStack() as stack:
        clients = [stack.enter_context(Web(address)) for _ in range(CLIENTS)]
        who = Counter(ask(kind, client) for client in clients)
        for client in clients:
            client.sock.shutdown(socket.SHUT_WR)
        for client in clients:
            assert client.sock.recv(1) == b""
    elapse(0.01)  # a worker forgets a connection a moment after it has closed it
    return who


@pytest.mark.parametrize("bind", BINDS)
@pytest.mark.parametrize("kind", ["wsgi", "asgi", "asyncio"])
def test_kept_connections_are_shared_out(start: Start, bind: str, kind: str) -> None:
    """Of bursts of eight connections each of two workers gets a good part, not what the other has left by chance."""
    name = "work:Echo" if kind == "asyncio" else f"work:{kind}"
    flags = ("-b", BINDS[bind], "-w", 2, "--worker-class", kind)
    files = {"work.py": HANDLER if kind == "asyncio" else APP}
    program = start("prefork", name, *flags, files=files, env=path_of_modules()).ready()
    program.wait_ready(2)
    least = 0
    for _ in range(10):
        who = burst(kind, program.address)
        assert who.total() == CLIENTS
        least += min(who.values()) if len(who) == 2 else 0
    assert least >= 20, f"of 40 the worker that got less got {least}"
    program.finish()


# -- who has his share -----------------------------------------------------------------------------


def pool(*held: int) -> tuple[Scoreboard, list[Slot]]:
    """Workers that idle and hold so many connections each."""
    board = Scoreboard()
    slots = [board.slot(number) for number in range(len(held))]
    for slot, number in zip(slots, held, strict=True):
        slot.set_phase(Phase.SERVING)
        slot.ints[scoreboard.HELD] = number
    return board, slots


@pytest.mark.parametrize(
    ("held", "queued", "has"),
    [
        ((1, 0), 1, True),  # one each
        ((0, 0), 1, False),
        ((1, 0), 2, False),  # the second would be a half of three
        ((2, 0), 2, True),
        ((3, 3), 1, False),  # whoever comes first
        ((3, 2), 1, True),
        ((3, 4), 1, False),
        ((1, 0, 0, 0), 3, True),
        ((1, 0, 0, 0), 4, False),
        ((1,), 1, False),  # there is nobody else
    ],
    ids=str,
)
def test_a_share(held: tuple[int, ...], queued: int, has: bool) -> None:
    """A worker has its share when it holds its part of all that is held and queued."""
    _, slots = pool(*held)
    assert slots[0].has_share(held[0], queued, single=True) is has


def test_who_has_no_share() -> None:
    """Nothing is left to a sibling that is busy, boots or leaves, or to one that is gone."""
    board, (mine, other) = pool(1, 0)
    assert mine.has_share(1, 1, single=True)
    other.floats[scoreboard.BUSY_SINCE] = 1.0
    assert mine.has_share(1, 1, single=False)
    assert not mine.has_share(1, 1, single=True)
    other.floats[scoreboard.BUSY_SINCE] = 0.0
    for phase in set(Phase) - {Phase.SERVING}:
        other.set_phase(phase)
        assert not mine.has_share(1, 1, single=True)
    other.set_phase(Phase.SERVING)
    assert mine.has_share(1, 1, single=True)
    board.clear(1)
    assert not mine.has_share(1, 1, single=True)
    assert not Slot.detached().has_share(1, 1, single=True)


# -- how long the queue is -------------------------------------------------------------------------


@dataclass
class SlotOwner:
    """What a balancer asks of its worker."""

    board: Slot


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_queue_is_left_to_siblings_for_a_moment(kind: str, tmp_path: Path) -> None:
    """Who has his share leaves the queue alone, and takes it when that was in vain; of TCP its length is known."""
    server: Any
    if kind == "tcp":
        server = socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        address = Address("tcp", *server.server_address)
    else:
        server = socketserver.UnixStreamServer(str(tmp_path / "socket"), socketserver.BaseRequestHandler)
        address = Address("unix", str(tmp_path / "socket"))
    _, (mine, other) = pool(0, 0)
    with ExitStack() as stack:
        stack.callback(server.server_close)
        fd = server.fileno()
        balancer = ConnectionBalancer([fd], [server], SlotOwner(mine))
        assert balancer.queued(fd) == 0 and balancer.advice(fd, 2, single=True) is Advice.EMPTY
        for _ in range(3):
            stack.enter_context(dial(address))
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(1000)
        assert balancer.queued(fd) == (3 if kind == "tcp" else 1)
        stack.enter_context(server.get_request()[0])
        assert balancer.queued(fd) == (2 if kind == "tcp" else 1)
        for _ in range(3):
            assert balancer.advice(fd, 2, single=True) is Advice.YIELD
        assert mine.ints[scoreboard.HELD] == 2
        balancer._windows[fd]._opened_at -= YIELD_FOR
        assert balancer.advice(fd, 2, single=True) is Advice.TAKE
        balancer._windows[fd]._opened_at -= YIELD_FOR
        assert balancer.advice(fd, 2, single=True) is Advice.YIELD
        other.floats[scoreboard.BUSY_SINCE] = 1.0
        assert balancer.advice(fd, 2, single=True) is Advice.TAKE
        for _ in range(2):
            stack.enter_context(server.get_request()[0])
        assert balancer.advice(fd, 2, single=True) is Advice.EMPTY


def test_for_how_long_a_queue_is_left() -> None:
    """It is left for a time, not left for as long, and then left again; at once where it was empty meanwhile."""
    window, step = YieldWindow(), YIELD_FOR / 10
    assert window.is_open(100.0)
    left = [window.is_open(100.0 + (number + 0.5) * step) for number in range(30)]
    assert left == [True] * 10 + [False] * 10 + [True] * 10
    assert not window.is_open(100.0 + 31 * step)
    window.end()
    assert window.is_open(100.0 + 31 * step)


def test_each_queue_is_left_for_itself() -> None:
    """What is found at another listener does not prolong the time for which a queue is left to siblings."""
    _, (mine, _) = pool(0, 0)
    with ExitStack() as stack:
        servers = {}
        for _ in range(2):
            server = socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler)
            stack.callback(server.server_close)
            servers[server.fileno()] = server
        balancer = ConnectionBalancer([*servers], [*servers.values()], SlotOwner(mine))
        one, other = servers
        for _ in range(2):
            stack.enter_context(dial(Address("tcp", *servers[one].server_address)))
        assert balancer.advice(one, 2, single=False) is Advice.YIELD
        balancer._windows[one]._opened_at -= YIELD_FOR
        assert balancer.advice(other, 2, single=False) is Advice.EMPTY
        assert balancer.advice(one, 2, single=False) is Advice.TAKE


# -- in an event loop ------------------------------------------------------------------------------


class Taker:
    """What an acceptor wants of its worker."""

    slot, log_name, draining, pool_drains = 0, "worker 1", False, False


LIMIT = 12


class Loop:
    """A gate in the loop that runs, of a worker that has a sibling, where both keep some; and how much it took."""

    def __init__(self, stack: ExitStack, kept: int) -> None:
        server = socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        stack.callback(server.server_close)
        server.socket.listen(16)
        self.address = Address("tcp", *server.server_address)
        self.stack, self.batches, self.held = stack, [0], kept
        _, (mine, _) = pool(kept, kept)
        self.cells = mine.ints
        self.acceptor = Acceptor(Taker(), [server], mine)
        stack.callback(os.close, self.acceptor._null)
        balancer = ConnectionBalancer(self.acceptor.fds, [server], SlotOwner(mine))
        loop = asyncio.get_running_loop()
        self.gate = listener_gate.ListenerGate(loop, self.acceptor, balancer, self._take, lambda: self.held, LIMIT)
        stack.callback(self.gate.discard)

    def dial(self, number: int) -> None:
        for _ in range(number):
            self.stack.enter_context(dial(self.address))

    def _take(self, fd: int) -> bool:
        got = self.acceptor.try_take(fd)
        if got is None:
            return False
        self.stack.enter_context(got[1])
        self.held += 1
        self.batches[-1] += 1
        return True

    def end(self, number: int) -> None:
        for _ in range(number):
            self.held -= 1
            self.gate.freed()

    async def taken(self, turns: int = 1000) -> int:
        """How many the next batch takes, 0 if there is none in so many turns of the loop."""
        self.batches.append(0)
        while not self.batches[-1] and (turns := turns - 1):
            await asyncio.sleep(0)
        assert self.cells[scoreboard.HELD] == self.held
        return self.batches[-1]


def in_loop(main: Callable[[Loop], Coroutine[Any, Any, None]], kept: int = 0) -> None:
    async def run() -> None:
        with ExitStack() as stack:
            await main(Loop(stack, kept))

    asyncio.run(run())


@pytest.mark.parametrize("kept", [0, 3])
def test_who_has_fewer_comes_back_at_once(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """A worker that left a queue to its siblings takes from it as soon as it has ended what it took, before it looks;
    also if it has others that stay."""
    monkeypatch.setattr(listener_gate, "ASIDE", 60.0)

    async def main(it: Loop) -> None:
        it.dial(2)
        it.gate.watch()
        assert await it.taken() == 1
        assert await it.taken() == 0
        it.end(1)
        assert await it.taken() == 1

    in_loop(main, kept)


@pytest.mark.parametrize("kept", [0, 3])
def test_short_connections_are_taken_together(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """Where as many have ended as were taken, the next batch shares nothing out, whatever else stays; but if that was
    long ago."""
    monkeypatch.setattr(listener_gate, "ASIDE", 0.0)
    monkeypatch.setattr(connection_batch, "RECENT", 60.0)

    async def main(it: Loop) -> None:
        it.dial(2)
        it.gate.watch()
        assert await it.taken() == 1
        it.end(1)
        assert await it.taken() == 1
        it.end(1)
        it.dial(6)
        assert await it.taken() == 6, "as those before were short"
        it.end(5)
        it.dial(2)
        assert await it.taken() == 2, "more than the batch before the last had taken have ended"
        it.dial(7)
        assert await it.taken() < 7, "none has"
        it.end(it.held - kept)
        while await it.taken():
            it.end(it.held - kept)
        monkeypatch.setattr(connection_batch, "RECENT", 0.0)
        it.dial(2)
        assert await it.taken() == 1, "it is long since the last"

    in_loop(main, kept)


def test_siblings_know_what_a_worker_at_its_limit_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last connection that there was room for is told as those before."""
    monkeypatch.setattr(listener_gate, "ASIDE", 0.0)

    async def main(it: Loop) -> None:
        it.gate.watch()
        it.dial(LIMIT + 1)
        tries = 1000
        while it.held < LIMIT and (tries := tries - 1):
            await it.taken()
        assert it.held == LIMIT

    in_loop(main)
