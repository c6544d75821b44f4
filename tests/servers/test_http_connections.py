"""`http.server` on the pool: connections that are kept, and how those end."""

import signal
import socket
import threading
import time
from contextlib import ExitStack

import pytest

from support import elapse, patterns, until
from support.http_pages import Client, serve
from support.scripts import Notes, Start, noted

pytestmark = pytest.mark.timeout(60)


def test_an_idle_connection_ends(start: Start) -> None:
    """After `keepalive_timeout` without a word; with 0 after each reply, which says so."""
    program = serve(start, keepalive_timeout=0.3)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.ask("done")
        begun = time.monotonic()
        assert client.ended()
        assert 0.2 < time.monotonic() - begun < 10
        Client(program, stack).ask("done")
    program.finish()
    program = serve(start, keepalive_timeout=0)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.send("done")
        assert client.hear()[1]["Connection"] == "close" and client.ended()
    program.finish()


@pytest.mark.parametrize("whole", [False, True])
def test_a_worker_that_leaves_ends_its_idle_connections(start: Start, whole: bool) -> None:
    """Neither the stop of the pool nor that of one worker waits for a connection on which nothing is asked."""
    program = serve(start, workers=2)
    with ExitStack() as stack:
        clients = [Client(program, stack) for _ in range(2)]
        for client in clients:
            client.ask("done")
        if whole:
            assert program.stop().seconds < 5.0
        else:
            before = program.wait_ready(2)
            program.send(signal.SIGHUP)
            program.wait_for(patterns.RELOADED)
            program.wait_ready(2, without=before)
        assert all(client.ended() for client in clients)
    program.finish()


def test_a_reply_tells_that_the_worker_leaves(start: Start, notes: Notes) -> None:
    """A request in progress is answered, and its client told that nothing more is: it cannot lose a request."""
    program = serve(start)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.ask("done")
        client.send("leaving")
        noted(notes, "begun")
        program.send(signal.SIGTERM)
        status, headers, _ = client.hear()
        assert (status, headers["Connection"]) == (200, "close") and client.ended()
    assert program.wait_exit().code == 0
    program.finish()


def test_a_connection_that_has_not_asked_yet(start: Start) -> None:
    """One that was accepted, and says what it wants only after the worker was told to leave, is answered."""
    program = serve(start)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.sock.sendall(b"GET /done ")
        elapse(0.1)
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPING)
        elapse(0.2)
        client.sock.sendall(b"HTTP/1.1\r\n\r\n")
        status, headers, _ = client.hear()
        assert (status, headers["Connection"]) == (200, "close")
    assert program.wait_exit().code == 0
    program.finish()


def test_nothing_is_lost_by_reloads(start: Start) -> None:
    """Clients that keep their connections, more of them than workers, lose no request in ten reloads and a resize."""
    program = serve(start, workers=2, max_surge=2)
    stop, lost, done = threading.Event(), list[str](), [0] * 5

    def run(number: int) -> None:
        while not stop.is_set():
            with ExitStack() as stack:
                client = Client(program, stack)
                while not stop.is_set():
                    try:
                        client.send("done")
                        _, headers, body = client.hear()
                    except (OSError, EOFError) as error:
                        lost.append(f"{number}: {error!r} after {done[number]}")
                        break
                    assert body.endswith(b" done")
                    done[number] += 1
                    if headers["Connection"] == "close":
                        break

    threads = [threading.Thread(target=run, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    try:
        for round_ in range(10):
            program.send(signal.SIGHUP)
            program.wait_for(patterns.RELOADED, 20, number=round_ + 1)
        program.send(signal.SIGTTIN)
        program.wait_ready(3, 10)
        before = list(done)
        until(lambda: all(now > then + 20 for now, then in zip(done, before, strict=True)), 20, "everybody has turns")
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert not lost
    program.finish()


def test_a_connection_has_its_number_of_requests(start: Start) -> None:
    """After so many requests a connection ends, by a reply that says so."""
    program = serve(start, handler="most_requests = 3")
    with ExitStack() as stack:
        client = Client(program, stack)
        for told in (None, None, "close"):
            client.send("done")
            assert client.hear()[1]["Connection"] == told
        assert client.ended()
    program.finish()


def test_others_have_their_turn(start: Start) -> None:
    """Where the only worker has a connection, another client waits for a turn and not for `keepalive_timeout`: when the
    first is idle, and when it is busy."""
    program = serve(start)
    with ExitStack() as stack:
        idle = Client(program, stack)
        idle.ask("done")
        begun = time.monotonic()
        busy = Client(program, stack)
        assert busy.ask("done") == "done"
        assert idle.ended()
        other = Client(program, stack)
        other.send("done")
        told = None
        while told is None:
            busy.send("done")
            told = busy.hear()[1]["Connection"]
        assert told == "close" and busy.ended()
        assert other.hear()[0] == 200
        assert time.monotonic() - begun < 15
    program.finish()


def test_each_request_has_its_deadline(start: Start) -> None:
    """`request_timeout` counts from a request's first byte, not from the connection's, and still interrupts one."""
    program = serve(start, request_timeout=1.0, allow=(patterns.HANDLER_ERROR, patterns.TRACEBACK))
    with ExitStack() as stack:
        client = Client(program, stack)
        for _ in range(3):
            client.ask("done")
            elapse(0.4)
        elapse(0.8)
        assert client.ask("done") == "done"
        begun = time.monotonic()
        client.send("hang")
        assert client.ended()
        assert time.monotonic() - begun < 10
    program.wait_for("RequestTimeout")
    program.finish()


def test_a_client_that_goes_is_no_error(start: Start) -> None:
    """A kept connection that is reset between two requests is not worth a line."""
    program = serve(start)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.ask("done")
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.file.close()
        client.sock.close()
        Client(program, stack).ask("done")
    program.finish()
