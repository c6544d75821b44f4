"""The control socket of a pool that serves: whatever a client does there harms nobody."""

import contextlib
import json
import os
import signal
import socket
import time
from contextlib import ExitStack

import pytest

from support import Program, ask, elapse, patterns, processes, until
from support.operations import asked, connect, control_of, pool, read_all, refused, said
from support.scripts import Start, hold, rest

pytestmark = pytest.mark.timeout(60)

STATUS = b'{"prefork": 1, "do": "status"}\n'
CLIENTS = 8


def serves(program: Program) -> None:
    """The pool answers its clients and its operators."""
    ask(program.address)
    assert asked(control_of(program), "status")["ready"] == 2


def test_status(start: Start) -> None:
    """The answer tells of the pool and of each worker, and the file is its owner's alone."""
    program = pool(start)
    workers = program.wait_ready(2)
    answer = asked(control_of(program), "status")
    assert (answer["pid"], answer["size"], answer["ready"], answer["stage"]) == (program.pid, 2, 2, "serving")
    assert (answer["program"], answer["listeners"]) == ("app:Versioned", [str(program.address)])
    assert sorted(worker["pid"] for worker in answer["workers"]) == workers
    assert control_of(program).stat().st_mode & 0o777 == 0o600
    program.finish()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\n", "bad-request"),
        (b"GET / HTTP/1.1\r\n\r\n", "bad-request"),
        (bytes(range(256)) + b"\n", "bad-request"),
        (b"[" * 4000 + b"\n", "bad-request"),
        (b" " * 4097, "too-long"),
        (b'{"prefork": 9, "do": "status"}\n', "version"),
        (b'{"prefork": 1, "do": "exec"}\n', "unknown-request"),
        (b'{"prefork": 1, "do": "scale", "workers": 0}\n', "bad-argument"),
        (b'{"prefork": 1, "do": "recycle", "slot": 77}\n', "no-such-slot"),
        (b'{"prefork": 1, "do": "reload-result", "ticket": 77}\n', "no-such-ticket"),
    ],
)
def test_garbage(start: Start, data: bytes, kind: str) -> None:
    """What is no request is refused with a typed error, and changes nothing."""
    program = pool(start)
    with program.flat():
        assert refused(control_of(program), data) == kind
    serves(program)
    program.finish()


def test_silent_clients(start: Start) -> None:
    """Clients that send nothing, or half a line, have a second; meanwhile others are told that there are too many."""
    program = pool(start)
    path = control_of(program)
    serves(program)
    with program.flat(), ExitStack() as stack:
        begun = time.monotonic()
        silent = [stack.enter_context(connect(path)) for _ in range(CLIENTS)]
        silent[0].sendall(STATUS[:-1])
        assert refused(path, STATUS) == "busy"
        ask(program.address)
        errors = [json.loads(read_all(sock))["error"] for sock in silent]
        assert errors == ["too-slow"] * CLIENTS
        assert 0.9 < time.monotonic() - begun < 5
        serves(program)
    program.finish()


def test_clients_that_leave(start: Start) -> None:
    """Clients that go away, at once, in the middle of a line, or before the answer, leave nothing behind."""
    program = pool(start)
    with program.flat():
        for data in (b"", STATUS[:5], STATUS) * 10:
            with connect(control_of(program)) as sock:
                sock.sendall(data)
        serves(program)
    program.finish()


def test_a_hundred_connections(start: Start) -> None:
    """A hundred connections at once: each is served or told that there are too many, and none is kept."""
    program = pool(start)
    with program.flat(), ExitStack() as stack:
        socks = [stack.enter_context(connect(control_of(program))) for _ in range(100)]
        for sock in socks:
            _send(sock, STATUS)
        answers = [json.loads(read_all(sock)) for sock in socks]
        assert {answer.get("error", "none") for answer in answers} <= {"none", "busy", "too-slow"}
        assert any(answer["ok"] for answer in answers)
    serves(program)
    program.finish()


def _send(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        return  # it was refused, and its answer can be read


def test_a_gigabyte(start: Start) -> None:
    """A client that sends 1 GB without an end of line is cut off after the first 4 KiB."""
    program = pool(start)
    serves(program)
    before = processes.private_memory(program.pid)
    chunk = b"x" * (1 << 20)
    with connect(control_of(program)) as sock:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(1024):
                sock.sendall(chunk)
        assert json.loads(read_all(sock))["error"] == "too-long"
    serves(program)
    assert processes.private_memory(program.pid) - before < 1 << 20
    program.finish()


def test_a_client_that_reads_nothing(start: Start) -> None:
    """A client that does not take its answer loses it after two seconds; nobody else waits for it."""
    program = pool(start, workers=40)
    program.wait_ready(40)
    path = control_of(program)
    with program.flat(), ExitStack() as stack:
        begun = time.monotonic()
        for _ in range(CLIENTS):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            sock.connect(str(path))
            sock.sendall(STATUS)
        ask(program.address)
        until(lambda: said(path, STATUS)["ok"], 10, "it answers again")
        assert time.monotonic() - begun < 6
    program.finish()


def test_many_workers(start: Start) -> None:
    """An answer that is made in pieces has every worker once, in order."""
    program = pool(start, workers=70)
    workers = program.wait_ready(70, timeout=30)
    answer = asked(control_of(program), "explain")
    assert [worker["slot"] for worker in answer["workers"]] == list(range(70))
    assert sorted(worker["pid"] for worker in answer["workers"]) == workers
    assert answer["exits"] == []
    program.finish()


def test_another_user(start: Start) -> None:
    """Another user cannot connect, and is refused by its uid where the permissions let it through."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    program = pool(start)
    path = control_of(program)
    program.directory.chmod(0o755)
    assert _as_nobody(path) == "PermissionError"
    path.chmod(0o666)
    assert _as_nobody(path) == "forbidden"
    serves(program)
    program.finish()


def _as_nobody(path: os.PathLike[str]) -> str:
    """What another user is told at a control socket."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "nothing"
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(os.fspath(path))
                sock.settimeout(5)
                text = json.loads(sock.recv(4096))["error"]
        except BaseException as error:
            text = type(error).__name__
        finally:
            os.write(writer, text.encode())
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    with open(reader, encoding="ascii") as file:
        return file.read()


def test_workers_do_not_keep_it(start: Start) -> None:
    """No worker has a descriptor of the control socket or of its clients, however it was forked."""
    program = pool(start)
    workers = program.wait_ready(2)
    before = sockets(program.pid)
    with connect(control_of(program)) as sock:
        sock.sendall(STATUS[:5])
        until(lambda: sockets(program.pid) - before, 5, "the client was accepted")
        program.reload()
        for worker in [*workers, *program.wait_ready(2, without=workers)]:
            assert len(sockets(worker) & sockets(program.pid)) <= 1, "the listener alone"
            kinds = processes.descriptors(worker)
            assert not [kind for kind in kinds if "eventpoll" in kind or "control" in kind]
    program.finish()


def sockets(pid: int) -> set[str]:
    """The sockets of a process, by their identity; none where it has ended."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return {target for target in found if target.startswith("socket:")}


def test_descriptors_flat_under_attached_clients(start: Start) -> None:
    """Reloads while clients are attached, and kills of workers, leave the master as many descriptors as before."""
    program = pool(start)
    path = control_of(program)
    serves(program)
    with program.flat(timeout=5):
        for _ in range(10):
            with ExitStack() as stack:
                for _ in range(3):
                    stack.enter_context(connect(path)).sendall(STATUS[:5])
                workers = program.wait_ready(2)
                program.kill_workers(workers[0])
                program.reload()
                assert asked(path, "status")["reloading"] is False
    program.finish()


def test_nobody_asks_nobody_wakes(start: Start) -> None:
    """A pool with a control socket does not wake up while nobody asks, also after somebody did."""
    program = pool(start)
    serves(program)
    with connect(control_of(program)) as sock:
        read_all(sock)  # until it is cut off
    everybody = [program.pid, *program.wait_ready(2)]
    elapse(0.5)
    before = [processes.switches(pid) for pid in everybody]
    elapse(1.5)
    assert [processes.switches(pid) for pid in everybody] == before
    program.finish()


def test_stopped_master(start: Start) -> None:
    """Requests that come while the master is stopped are answered when it goes on."""
    program = pool(start)
    serves(program)
    program.send(signal.SIGSTOP)
    with connect(control_of(program)) as sock:
        sock.sendall(STATUS)
        program.send(signal.SIGCONT)
        assert json.loads(read_all(sock))["ok"] is True
    program.finish(allow=[patterns.ANYTHING])


def test_orders_in_a_stop(start: Start) -> None:
    """While the pool stops it can be looked at, and refuses what it does not do any more."""
    program = pool(start)
    with ExitStack() as stack:
        held = hold(program.address, stack, "gate go")
        until(lambda: any(worker["busy_for"] for worker in asked(control_of(program), "status")["workers"]))
        program.begin_stop()
        until(lambda: asked(control_of(program), "status")["stage"] == "draining")
        for request in ('"reload"', '"scale", "workers": 3', '"recycle", "slot": 0'):
            assert refused(control_of(program), f'{{"prefork": 1, "do": {request}}}\n'.encode()) == "stopping"
        program.write("go", "")
        assert b"done" in rest(held)
    program.wait_exit()
    program.finish()
