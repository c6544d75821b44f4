"""Requests within requests: a handler that uses `with worker.serving()` for a part of its work, in every worker class.

What it does is what the client orders. The answer is what the slot of the scoreboard says then.
"""

import signal
import socket
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest

from support import Address, Program, dial, patterns
from support.scripts import Notes, Start, launch, noted

pytestmark = pytest.mark.timeout(60)

BODY = """
import contextlib

import prefork.link.scoreboard as scoreboard

def job(worker, name, begun=None):
    ready = threading.Event()
    def run():
        one = worker.serving("job", 0).begin() if begun is None else begun
        ready.set()
        pass_gate(name)
        note(f"ended {name}")
        one.end()
    threading.Thread(target=run, name=name).start()
    ready.wait()

def nest(worker, depth):
    with worker.serving(("192.0.2.1", depth), 9):
        if depth > 1:
            nest(worker, depth - 1)
        worker.extend_deadline(5)

def published(worker):
    floats, ints = worker._board.floats, worker._board.ints
    deadline = floats[scoreboard.DEADLINE]
    due = round(deadline - time.monotonic()) if deadline else 0
    busy = floats[scoreboard.BUSY_SINCE] > 0
    return f"{os.getpid()} {busy:d} {due} {ints[scoreboard.REQUESTS]} {ints[scoreboard.PEER_PORT]}"

def play(worker, orders):
    for order in orders.split("/"):
        word, _, argument = order.partition("=")
        match word:
            case "part":
                with worker.serving("part", float(argument) if argument else None):
                    pass
            case "nest":
                nest(worker, int(argument))
            case "fail":
                try:
                    with worker.serving("part"):
                        raise ValueError("ordered trouble")
                except ValueError:
                    pass
            case "late":  # what is within is late, what is around it is not
                worker.extend_deadline(20)
                try:
                    with worker.serving("part", 0.01):
                        linger(8)
                except prefork.RequestTimeout:
                    note("late part")
            case "hung":
                with worker.serving("part", 0):
                    linger(8)
            case "job":
                job(worker, argument)
            case "hand":  # begun here, ended there
                job(worker, argument, worker.serving("job", 0).begin())
            case "wait":  # begun when nothing else is in progress
                def run(name):
                    pass_gate(name)
                    job(worker, name + "-over")
                    note("begun job")
                threading.Thread(target=run, args=(argument,)).start()
            case "due":  # as `hand`, with a deadline
                job(worker, argument, worker.serving("job").begin())
            case "over":  # those that were answered before may end a little later
                while worker._board.ints[scoreboard.REQUESTS] < int(argument):
                    time.sleep(0.001)
            case "serve":  # as nobody should, but may
                ours, theirs = socket.socketpair()
                ours.sendall(b"inner pass\\n")
                worker.serve_request(worker.server, theirs, "pair")
                while ours.recv(1000):  # perhaps from another thread
                    pass
                ours.close()
            case "fork":
                pid = os.fork()
                if not pid:
                    with worker.serving("child"):
                        pass
                    if argument == "exit":
                        os._exit(0)
                    return "child"
                os.waitpid(pid, 0)
                note(f"parent {published(worker)}")
            case "extend":
                worker.extend_deadline(float(argument))
            case "linger":
                linger(float(argument))
    return published(worker)

class Ordered(Handler):
    def answer(self, orders):
        return play(self.server.worker, orders)

def application(environ, start_response):
    text = play(environ["prefork.worker"], environ["PATH_INFO"][1:])
    start_response("200 OK", [("Content-Length", str(len(text)))])
    return [text.encode()]

class Own(prefork.Worker):
    def run(self):
        while (taken := self.accept()) is not None:
            server, request, peer = taken
            try:
                with self.serving(peer):
                    server.finish_request(request, peer)
            except Exception:
                server.handle_error(request, peer)
            server.shutdown_request(request)
        self.finish()

class Threading(socketserver.ThreadingMixIn, prefork.PreforkTCPServer):
    pass

KINDS = {
    "sync": ({}, Ordered),
    "own": ({"worker_class": Own}, Ordered),
    "several": ({}, Ordered),
    "thread": ({"worker_class": "thread", "threads": 2}, Ordered),
    "threading": ({}, Ordered),
    "wsgi": ({"worker_class": "wsgi"}, application),
    "wsgi-threads": ({"worker_class": "wsgi", "threads": 2}, application),
}
kind = %KIND
settings, handler = KINDS[kind]
base = Threading if kind == "threading" else prefork.PreforkTCPServer
Pool = type("Pool", (base,), {"workers": 1, "request_timeout": %TIMEOUT, **settings, **%SETTINGS})
with contextlib.ExitStack() as stack:
    number = 2 if kind == "several" else 1
    prefork.serve(*[stack.enter_context(Pool(("127.0.0.1", 0), handler)) for _ in range(number)])
"""

MAIN = ["sync", "own", "several", "wsgi"]  # those whose main thread serves, where a late request can be interrupted
KINDS = [*MAIN, "thread", "threading", "wsgi-threads"]
each = pytest.mark.parametrize("kind", KINDS)
each_main = pytest.mark.parametrize("kind", MAIN)


class Told(NamedTuple):
    """An answer: of which worker, whether it is busy, the seconds to its deadline (0: none), how many requests are
    over, the port of the client that is shown; and that of the client that asks."""

    pid: int
    busy: int
    due: int
    over: int
    published: int
    mine: int


def pool(start: Start, kind: str, timeout: float | None = 20, allow: Iterable[str] = (), **settings: Any) -> Program:
    body = BODY.replace("%KIND", repr(kind)).replace("%TIMEOUT", repr(timeout)).replace("%SETTINGS", repr(settings))
    program = launch(start, body, allow=[patterns.FAULT, *allow]).ready()
    program.wait_ready(1)
    return program


def send(address: Address, kind: str, orders: str, stack: ExitStack) -> socket.socket:
    sock = stack.enter_context(dial(address, 10.0))
    if kind.startswith("wsgi"):
        sock.sendall(f"GET /{orders} HTTP/1.0\r\nHost: test\r\n\r\n".encode())
    else:
        sock.sendall(f"one {orders}\n".encode())
    return sock


def answer(sock: socket.socket) -> bytes:
    """The last line of what comes."""
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts).strip().rpartition(b"\n")[2].rpartition(b":")[2]


def tell(program: Program, kind: str, orders: str, over: int = 0) -> Any:
    """What a worker has `Told`; None where it was interrupted. It first waits until so many are over."""
    orders = f"{orders}/over={over}"
    with ExitStack() as stack:
        sock = send(program.address, kind, orders, stack)
        said = answer(sock).split()
        if len(said) != 5 or not said[0].isdigit():
            return None
        pid, busy, due, over, peer_port = map(int, said)
        return Told(pid, busy, due, over, peer_port, sock.getsockname()[1])


@each
def test_what_is_around_stays(start: Start, kind: str) -> None:
    """After requests within it, one after the other, nested three deep or failing, a request is shown as before, with
    its client and its deadline; all are counted."""
    program, over = pool(start, kind), 0
    for orders, within in [
        ("part", 1),
        ("part=0/part=9", 2),
        ("nest=3", 3),
        ("fail", 1),
        ("pass", 0),
        ("part/nest=3", 4),
    ]:
        told = tell(program, kind, orders, over + within)
        assert told == (told.pid, 1, 20, over + within, told.mine, told.mine), orders
        over += within + 1
    program.finish()


@each
def test_without_a_deadline(start: Start, kind: str) -> None:
    """A request without a deadline has none after others within it, and is counted as they are."""
    program = pool(start, kind, timeout=None)
    for over in (1, 3, 5):
        told = tell(program, kind, "part", over)
        assert told == (told.pid, 1, 0, over, told.mine, told.mine)
    program.finish()


@each
def test_extending_what_is_around(start: Start, kind: str) -> None:
    """extend_deadline() is for what is around, once what was within is over."""
    program, over = pool(start, kind), 0
    ways = [("part", 1), ("part=0", 1), ("nest=3", 3), ("fail", 1), ("serve", 1), ("hand=go", 0)]
    for within, number in ways:
        if within == "serve" and kind.startswith("wsgi"):
            continue  # an application has no chain
        over += number
        told = tell(program, kind, f"{within}/over={over}/extend=100")
        assert (told.busy, told.due, told.published) == (1, 100, told.mine), within
        over += 1
    program.write("go", "")
    program.finish()


@each_main
def test_interrupting_what_is_around(start: Start, kind: str) -> None:
    """After others within it, or beside one that outlasts it, a request that is late is interrupted, and its worker
    lives."""
    program = pool(start, kind, timeout=0.2, allow=[patterns.HANDLER_ERROR])
    (worker,) = program.children()
    program.write("now", "")
    for within in ["pass", "part", "part=0", "nest=3", "fail", "job=now", "hand=now", "job=never", "hand=never"]:
        assert tell(program, kind, f"{within}/linger=8") is None, within
        assert tell(program, kind, "extend=20/linger=0.22").pid == worker, within
    program.write("never", "")
    program.finish()


@each_main
def test_interrupting_what_is_within(start: Start, notes: Notes, kind: str) -> None:
    """A request is interrupted, too, while another within it is in progress; and that alone, if only it is late."""
    program = pool(start, kind, timeout=0.3, allow=[patterns.HANDLER_ERROR])
    (worker,) = program.children()
    assert tell(program, kind, "hung") is None
    told = tell(program, kind, "late", 3)
    assert told == (worker, 1, 20, 3, told.mine, told.mine)
    assert noted(notes, "late") == ["part"]
    program.finish()


@each_main
def test_what_outlasts_a_request_is_late(start: Start, notes: Notes, kind: str) -> None:
    """What a handler has begun and another thread ends is late after its request: nothing is raised in what the main
    thread does then; the worker leaves, and says where its threads stand."""
    program = pool(start, kind, timeout=0.3)
    (worker,) = program.children()
    assert tell(program, kind, "due=never").pid == worker
    program.wait_ready(1, without=[worker])
    assert "linger" not in program.log and "RequestTimeout:" not in program.log  # which a traceback would end with
    program.write("never", "")
    program.finish()


@each
@pytest.mark.parametrize("order", ["job", "hand"])
def test_what_outlasts_the_request_around_it(start: Start, notes: Notes, kind: str, order: str) -> None:
    """What a handler has begun, or a thread of it, may end after it: requests before and after it are counted, and each
    has its deadline. A worker that leaves waits for it."""
    program = pool(start, kind)
    told = tell(program, kind, f"{order}=one")
    assert told[1:4] == (1, 20, 0)
    assert tell(program, kind, "part", 2)[1:4] == (1, 20, 2)
    program.write("one", "")
    noted(notes, "ended")
    told = tell(program, kind, "pass", 4)
    assert told[1:] == (1, 20, 4, told.mine, told.mine)
    tell(program, kind, f"{order}=two", 5)
    program.send(signal.SIGTERM)
    program.wait_for(patterns.STOPPING)
    program.write("two", "")
    assert program.wait_exit().code == 0
    assert notes("ended") == ["one", "two"]
    program.finish()


@each
def test_what_begins_while_nothing_is_in_hand(start: Start, notes: Notes, kind: str) -> None:
    """What a thread begins while its worker waits for clients is counted as it ends; those that come are served."""
    program = pool(start, kind)
    tell(program, kind, "wait=go")
    program.write("go", "")
    noted(notes, "begun")
    for over in (1, 2):
        assert tell(program, kind, "pass", over)[1:4] == (1, 20, over)
    program.write("go-over", "")
    noted(notes, "ended")
    told = tell(program, kind, "pass", 4)
    assert told[1:] == (1, 20, 4, told.mine, told.mine)
    program.finish()


@each
def test_counting_to_the_limit(start: Start, kind: str) -> None:
    """Requests within others count for max_requests."""
    program = pool(start, kind, max_requests=4, max_requests_jitter=0)
    (worker,) = program.children()
    assert tell(program, kind, "nest=3").pid == worker
    program.wait_ready(1, without=[worker])
    program.finish()


@pytest.mark.parametrize(
    ("kind", "how"), [*((one, "exit") for one in KINDS), ("sync", "return"), ("own", "return"), ("wsgi", "return")]
)
def test_a_forked_child(start: Start, notes: Notes, kind: str, how: str) -> None:
    """A child that the application forks changes nothing of its parent's accounts, however it ends."""
    program = pool(start, kind, allow=[patterns.HANDLER_ERROR, r".*DeprecationWarning: This process .*", r"  .*"])
    with ExitStack() as stack:
        sock = send(program.address, kind, f"fork={how}", stack)
        (worker,) = program.children()
        assert noted(notes, "parent") == [f"{worker} 1 20 0 {sock.getsockname()[1]}"]
    assert tell(program, kind, "part", 2).over == 2
    program.finish()
