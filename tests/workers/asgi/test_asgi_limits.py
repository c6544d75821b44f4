"""The limits and settings of the class `asgi`, and what it refuses."""

import contextlib
import re
import signal
import socket
import socketserver
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

import prefork
import prefork.workers
from support import dial, elapse, state, switches, until
from support.asgi import TCP, Client, HTTPLoad, get, pid_of, serve
from support.scripts import Notes, Start, noted

pytestmark = pytest.mark.timeout(60)


def test_max_connections(start: Start, notes: Notes) -> None:
    """At the limit a worker accepts nobody: who comes then waits, and is served once there is room."""
    program = serve(start, "-w", 1, "--max-connections", 2)
    with ExitStack() as stack:
        one, two, three = (stack.enter_context(contextlib.closing(Client(program.address))) for _ in range(3))
        one.get()
        two.request("GET", "/gate/go")
        noted(notes, "begun")
        three.request("GET", "/three")
        three.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            three.sock.recv(1, socket.MSG_PEEK)
        three.sock.settimeout(5)
        one.close()
        assert three.getresponse().read().endswith(b":three")
        program.write("go", "")
        assert two.getresponse().status == 200
    program.finish()


def test_a_websocket_at_max_connections(start: Start, notes: Notes) -> None:
    """A connection that becomes a WebSocket makes no room for another one."""
    program = serve(start, "-w", 1, "--max-connections", 2)
    with ExitStack() as stack:
        one = stack.enter_context(dial(program.address))
        two, three = (stack.enter_context(contextlib.closing(Client(program.address))) for _ in range(2))
        two.get()
        ws = stack.enter_context(connect(f"ws://127.0.0.1:{program.address.port}/chat", sock=one))
        three.request("GET", "/three")
        three.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            three.sock.recv(1, socket.MSG_PEEK)
        three.sock.settimeout(5)
        ws.send("one")
        assert str(ws.recv(5)).endswith(":one")
        ws.close()
        assert three.getresponse().read().endswith(b":three")
    program.finish()


@pytest.mark.parametrize("kind", ["asgi", "app:Plain"])
def test_a_burst_within_max_connections(start: Start, notes: Notes, kind: str) -> None:
    """Those who come at once are all accepted up to the limit, and none of them counts twice while he is."""
    program = serve(start, "-w", 1, "--max-connections", 24, kind=kind)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        program.send(signal.SIGSTOP, worker)
        clients = [stack.enter_context(contextlib.closing(Client(program.address))) for _ in range(20)]
        for client in clients:
            client.request("GET", "/gate/go")
        program.send(signal.SIGCONT, worker)
        noted(notes, "begun", 20)
        program.write("go", "")
        assert {client.getresponse().status for client in clients} == {200}
    program.finish()


def test_one_connection_at_once(start: Start, load: Callable[..., HTTPLoad]) -> None:
    """With room for one, many clients are served one after the other, also by a pool that stops."""
    program = serve(start, "-w", 1, "--max-connections", 1)
    clients = load(program.address, clients=6, keep=False)
    clients.more(200)
    assert program.stop().code == 0
    assert not clients.stop().lost
    program.finish()


@pytest.mark.parametrize("kind", ["asgi", "app:Plain"])
def test_room_for_one_at_two_listeners(start: Start, load: Callable[..., HTTPLoad], kind: str) -> None:
    """A worker that is full and has room again, all the time and at once for two listeners, serves the clients of
    both."""
    program = serve(start, "-b", TCP, "-b", "unix:{run}/s", "-w", 1, "--max-connections", 2, kind=kind)
    loads = [load(address, clients=4, keep=False) for address in program.addresses]
    for clients in loads:
        clients.more(200)
    assert program.stop().code == 0
    for clients in loads:
        assert not clients.stop().lost
    program.finish()


def test_a_loop_that_hesitates(start: Start, notes: Notes) -> None:
    """A loop may wait for what it likes until a connection is one; one that does not become one gives its place
    back."""
    program = serve(start, "-w", 1, "--max-connections", 2, kind="app:Hesitant")
    assert get(program, "/version") == "one"
    program.write("gone", "")
    for _ in range(5):
        with dial(program.address) as gone:
            assert gone.recv(1) == b""
    (program.work / "gone").unlink()
    assert get(program, "/version") == "one"
    program.finish()


@pytest.mark.parametrize("seconds", [0, 0.3])
def test_keepalive_timeout(start: Start, seconds: float) -> None:
    """A connection at rest is closed after keepalive_timeout; 0: each reply says that it is the last."""
    program = serve(start, "-w", 1, "--keepalive-timeout", seconds)
    with contextlib.closing(Client(program.address)) as client:
        client.connect()
        sock = client.sock
        answer = client.ask()
        assert answer.getheader("connection") == (None if seconds else "close")
        answer.read()
        assert sock.recv(1) == b"" if seconds else client.sock is None
    program.finish()


def test_access_log(start: Start, tmp_path: Path) -> None:
    """access_log names a file, which USR1 opens again, or standard output; without it nothing is logged."""
    path = tmp_path / "accesses"
    program = serve(start, "-w", 1, "--access-log", path)
    get(program, "/version?a=b")
    assert re.search(r'127\.0\.0\.1:\d+ - "GET /version\?a=b HTTP/1\.1" 200', until(path.read_text))
    path.rename(tmp_path / "old")
    program.send(signal.SIGUSR1)
    until(path.exists)
    get(program)
    assert '"GET /x HTTP/1.1" 200' in until(path.read_text)
    program.finish()
    program = serve(start, "-w", 1, "--access-log", "-")
    get(program)
    assert '"GET /x HTTP/1.1" 200' in until(program.out_path.read_text)
    program.finish()


def test_everybody_has_a_share_and_nobody_wakes_up_for_nothing(start: Start) -> None:
    """Connections one after the other go round; idle workers sleep."""
    program = serve(start, "-w", 4)
    workers = program.wait_ready(4)
    shares = Counter[int]()
    for _ in range(120):
        # Who still runs would be faster than who is woken, on a machine whose processors others want.
        until(lambda: {state(worker) for worker in workers} == {"S"}, what="all workers sleep")
        shares[pid_of(program)] += 1
    assert set(shares) == set(workers)
    assert max(shares.values()) <= 45 and min(shares.values()) >= 15, shares

    elapse(0.3)
    before = sum(map(switches, workers))
    elapse(1.0)
    assert sum(map(switches, workers)) - before <= 1
    program.finish()


def test_a_class_of_ones_own(start: Start) -> None:
    """A subclass says what loop is used, and what uvicorn is told."""
    program = serve(start, "-w", 1, kind="app:Plain")
    with contextlib.closing(Client(program.address)) as client:
        answer = client.ask()
        assert (answer.getheader("x-own"), answer.getheader("server")) == ("yes", "uvicorn")
        assert answer.getheader("date")
    program.finish()


class Nothing(socketserver.BaseRequestHandler):
    pass


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    pass


def wsgi(environ: Any, start_response: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("kind", "app", "says"),
    [
        (prefork.PreforkUDPServer, asgi, "bind tcp:// or unix:"),
        (prefork.PreforkTCPServer, Nothing, "Nothing is a handler of socketserver"),
        (prefork.PreforkTCPServer, 7, "7 is not an ASGI application"),
        (prefork.PreforkTCPServer, wsgi, "takes worker_class wsgi"),
    ],
)
def test_check(kind: Any, app: Any, says: str) -> None:
    """What cannot be served is refused before anything is forked, in one line with the mend."""
    with kind(("127.0.0.1", 0), app) as server:
        server.worker_class = "asgi"
        with pytest.raises(prefork.OptionError, match=re.escape(says)) as refused:
            server.serve_forever()
        assert "\n" not in str(refused.value)


def test_without_uvicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without uvicorn the mend is named."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if name.startswith("prefork.workers.asgi.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(name)
    monkeypatch.delitem(vars(prefork.workers), "ASGIWorker", raising=False)
    with (
        prefork.PreforkTCPServer(("127.0.0.1", 0), asgi) as server,
        pytest.raises(prefork.OptionError, match=r"pip install 'prefork\[asgi\]'"),
    ):
        server.worker_class = "asgi"
        server.serve_forever()


def test_the_command_refuses_what_is_no_application(start: Start) -> None:
    """The command says in one line that NAME cannot be called."""
    program = start(
        "prefork", "app:number", "--worker-class", "asgi", "-b", TCP, files={"app.py": "number = 7"},
    )  # fmt: skip
    assert program.wait_exit(20).code == 4
    assert "app:number is 7: no application" in program.log
    program.finish(code=4, allow=["prefork: error: .*"])
