"""Nothing is lost when an ASGI worker leaves, whatever is in progress, at rest, or on its way."""

import contextlib
import signal
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from support import dial, elapse, patterns
from support.asgi import TCP, TROUBLE, Client, HTTPLoad, serve
from support.scripts import Notes, Start, noted

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("bind", "keep", "kind"),
    [(TCP, True, "asgi"), (TCP, False, "asgi"), ("unix:{run}/s", True, "app:Plain"), (TCP, False, "app:Plain")],
    ids=["tcp-keep-alive", "tcp-close", "unix-keep-alive-plain", "tcp-close-plain"],
)
def test_no_request_is_lost(start: Start, load: Callable[..., HTTPLoad], bind: str, keep: bool, kind: str) -> None:
    """Retirements, reloads and a stop under load: every request on every connection is answered; on uvloop and
    httptools, and without them."""
    program = serve(start, "-w", 2, "-b", bind, kind=kind)
    clients = load(program.address, keep=keep)
    for _ in range(2):
        clients.more(50)
        workers = program.wait_ready(2)
        program.send(signal.SIGTERM, workers[0])
        program.wait_ready(2, without=workers[:1])
    for number in (1, 2):
        clients.more(50)
        program.send(signal.SIGHUP)
        program.wait_for(patterns.RELOADED, 10, number=number)
    clients.more(100)
    assert program.stop().code == 0
    assert not clients.stop().lost
    program.finish()


@pytest.mark.parametrize("keep", [True, False], ids=["keep-alive", "close"])
def test_recycling_loses_nothing(start: Start, load: Callable[..., HTTPLoad], keep: bool) -> None:
    """Workers that reach max_requests are replaced under load, and every request is answered."""
    program = serve(start, "-w", 2, "--max-requests", 100)
    clients = load(program.address, keep=keep)
    program.wait_for(patterns.LEFT, 20, number=4)
    tally = clients.stop()
    assert not tally.lost
    assert {match[4].split(" (")[0] for match in program.found(patterns.LEFT)} == {"it was recycled"}
    assert max(tally.ok.values()) >= 90
    program.finish()


def test_what_has_arrived_is_answered(start: Start) -> None:
    """A request that lies in the socket of a connection at rest is answered, though the order to leave comes first."""
    program = serve(start, "-w", 1)
    (worker,) = program.wait_ready(1)
    with contextlib.closing(Client(program.address)) as client, contextlib.closing(Client(program.address)) as half:
        assert client.get("/one") == f"{worker}:one"
        half.connect()
        half.sock.sendall(b"GET /half HTTP/1.1\r\nHo")
        elapse(1.3)  # longer than a worker that leaves waits for a silent one
        program.send(signal.SIGSTOP, worker)
        client.request("GET", "/two")
        program.send(signal.SIGTERM, worker)
        program.send(signal.SIGCONT, worker)
        assert client.getresponse().read().decode() == f"{worker}:two"
        last = client.ask("/three")
        assert (last.read().decode(), last.getheader("connection")) == (f"{worker}:three", "close")
        half.sock.sendall(b"st: x\r\n\r\n")
        assert f"{worker}:half".encode() in half.sock.makefile("rb").read()
    program.wait_for(patterns.LEFT)
    program.finish()


def test_an_answer_on_its_way_is_sent_to_its_end(start: Start, notes: Notes) -> None:
    """A client that is slow to read has its whole answer, though its worker was to leave long before."""
    program = serve(start, "-w", 1)
    with contextlib.closing(Client(program.address)) as client:
        client.request("GET", "/big")
        noted(notes, "begun")
        elapse(1.2)  # longer than a worker that leaves waits for a silent one
        program.begin_stop()
        elapse(0.3)
        assert client.getresponse().read() == b"x" * 20_000_000
    assert program.wait_exit().code == 0
    program.finish()


def test_the_queue_is_emptied(start: Start) -> None:
    """Clients that are connected and not accepted when the pool stops are answered."""
    program = serve(start, "-w", 2)
    workers = program.wait_ready(2)
    with ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(Client(program.address))) for _ in range(40)]
        for worker in workers:
            program.send(signal.SIGSTOP, worker)
        for client in clients:
            client.request("GET", "/queued")
        program.send(signal.SIGTERM)
        for worker in workers:
            program.send(signal.SIGCONT, worker)
        for client in clients:
            assert client.getresponse().read().endswith(b":queued")
    assert program.wait_exit().code == 0
    program.finish()


def test_a_stop_is_quick_where_nothing_is_on_its_way(start: Start) -> None:
    """Connections that have rested for long, or never spoke, do not hold up a stop."""
    program = serve(start, "-w", 2)
    with contextlib.closing(Client(program.address)) as client, dial(program.address) as silent:
        client.get()
        elapse(1.2)
        assert program.stop().seconds < 0.8
        assert client.sock.recv(1) == b"" == silent.recv(1)
    program.finish()


def test_a_fast_stop_waits_for_nobody(start: Start, notes: Notes) -> None:
    """QUIT ends workers with a connection at rest, a WebSocket or a request at once."""
    program = serve(start, "-w", 2)
    with contextlib.closing(Client(program.address)) as rests, contextlib.closing(Client(program.address)) as asks:
        rests.get()
        asks.request("GET", "/gate/never")
        noted(notes, "begun")
        assert program.stop(signal.SIGQUIT).seconds < 1.5
    program.finish()


def test_the_end_of_graceful_timeout(start: Start, notes: Notes) -> None:
    """What is still in progress shortly before is cancelled: its `finally` and the lifespan's end still run."""
    program = serve(start, "-w", 1, "--graceful-timeout", 1, allow=TROUBLE)
    with contextlib.closing(Client(program.address)) as client:
        client.request("GET", "/late")
        noted(notes, "begun")
        program.send(signal.SIGTERM, program.children()[0])
        assert client.getresponse().status == 500
    program.wait_for(patterns.LEFT)
    assert (notes("finally"), len(notes("shutdown"))) == ([""], 1)
    program.finish()
