"""`prefork.testing`: pools for the test suites of programs. What it promises to find, it must find."""

import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import prefork
from prefork import testing
from support import processes, session, until

pytestmark = pytest.mark.timeout(60)
HERE = Path(__file__).resolve().parent


class Echo(socketserver.StreamRequestHandler):
    """Answers a line by the worker's pid and the line, or does what the line says."""

    def handle(self) -> None:
        line = self.rfile.readline().decode().strip()
        match line:
            case "raise":
                raise ValueError("ordered trouble")
            case "exit":
                os._exit(7)
            case "child":
                pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
                self.wfile.write(f"{pid} child\n".encode())
                return
        self.wfile.write(f"{os.getpid()} {line}\n".encode())


class Greeter(Echo):
    """The same, whose client knows that it has begun."""

    def handle(self) -> None:
        self.wfile.write(b"hello\n")
        super().handle()


class Datagrams(socketserver.DatagramRequestHandler):
    def handle(self) -> None:
        self.wfile.write(f"{os.getpid()} {self.rfile.read().decode().strip()}".encode())


class Server(prefork.PreforkTCPServer):
    workers = 2


def ask(pool: testing.Pool, line: str = "hello") -> int:
    """The pid that answers; whoever answers is a worker."""
    with pool.connect() as client:
        client.sendall(f"{line}\n".encode())
        pid, _, text = client.recv(1000).decode().strip().partition(" ")
        assert text == line
        return int(pid)


def left(pool: testing.Pool) -> list[processes.Process]:
    """The living processes of a pool's session."""
    return [one for one in session(pool.pid) if not one.is_zombie]


# -- a pool for a block ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "handler"),
    [
        (prefork.PreforkTCPServer, Echo),
        (prefork.PreforkUDPServer, Datagrams),
        (prefork.PreforkUnixStreamServer, Echo),
        (prefork.PreforkUnixDatagramServer, Datagrams),
        (type("Six", (prefork.PreforkTCPServer,), {"address_family": socket.AF_INET6}), Echo),
        (socketserver.TCPServer, Echo),
    ],
)
def test_server_classes(kind: Any, handler: Any) -> None:
    """Any kind of server serves on a free address, on loopback or a path of its own; in the end nothing is left."""
    with testing.pool(kind, handler, workers=2) as pool:
        assert ask(pool) in pool.workers and len(pool.workers) == 2
        if kind.address_family == socket.AF_UNIX:
            path = Path(pool.address)
            assert path.is_socket()
        else:
            assert pool.address[0] in ("127.0.0.1", "::1") and pool.address[1]
    assert pool.exit_code == 0 and not left(pool)
    assert kind.address_family != socket.AF_UNIX or not path.parent.exists()


def test_factories() -> None:
    """A callable may make the server, or several, at the address it is given or where it likes."""
    with testing.pool(lambda address: Server(address, Echo), workers=1) as pool:
        assert ask(pool) and len(pool.workers) == 1
    with testing.pool(lambda: [Server(("127.0.0.1", 0), Echo), Server(("127.0.0.1", 0), Echo)]) as pool:
        assert ask(pool) in pool.workers
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()
    with testing.pool(Server, Echo, free) as pool:
        assert pool.address == free and ask(pool)


def test_the_pool_is_another_process() -> None:
    """The test's process keeps its session, its signal handlers and its descriptors, and has no child afterwards."""
    before = os.getsid(0), signal.getsignal(signal.SIGTERM), processes.descriptors(os.getpid())
    with testing.pool(Server, Echo) as pool:
        assert pool.pid != os.getpid() and os.getsid(pool.pid) == pool.pid
    assert (os.getsid(0), signal.getsignal(signal.SIGTERM), processes.descriptors(os.getpid())) == before
    assert not processes.children(os.getpid())


def test_it_dies_with_the_test(tmp_path: Path) -> None:
    """A test's process that is killed takes its pool with it."""
    code = """
    import os, signal
    from prefork import testing
    from test_testing import Echo, Server
    with testing.pool(Server, Echo) as pool:
        print(pool.pid, *pool.workers, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [HERE, HERE.parent]))},
        stdout=subprocess.PIPE,
        text=True,
        timeout=20,
        check=False,
    )
    pids = [int(word) for word in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and len(pids) == 3
    until(lambda: not any(map(processes.alive, pids)), 2)


# -- faults ----------------------------------------------------------------------------------------


def test_a_killed_worker() -> None:
    """A worker that is killed is dead at once and replaced, and its line in the log is no surprise."""
    with testing.pool(Server, Echo) as pool:
        first = pool.wait_ready(2)
        victim = pool.kill_worker()
        assert victim in first and not processes.alive(victim)
        again = pool.wait_ready(2, without=[victim])
        assert pool.kill_worker(again[1]) == again[1]
        with pytest.raises(AssertionError, match="no worker"):
            pool.kill_worker(victim)
        pool.wait_ready(2, without=[again[1]])
        assert len(re.findall(r"exited: .*SIGKILL", pool.log)) == 2


def test_a_hung_worker() -> None:
    """A worker that hangs serves nobody until it is resumed; one that hangs in a request is replaced."""
    with testing.pool(Server, Echo, workers=1) as pool:
        (pid,) = pool.wait_ready(1)
        assert pool.hang_worker() == pid
        with pool.connect(timeout=0.2) as client, pytest.raises(TimeoutError):
            client.sendall(b"hello\n")
            client.recv(100)
        pool.resume_worker(pid)
        assert ask(pool) == pid
    with testing.pool(Server, Greeter, workers=1, request_timeout=0.3) as pool, pool.connect() as client:
        (pid,) = pool.wait_ready(1)
        assert client.recv(100) == b"hello\n"
        pool.hang_worker()
        pool.wait_ready(1, without=[pid])
        with pool.connect() as another:
            assert another.recv(100) == b"hello\n"
    with testing.pool(Server, Echo) as pool:
        pool.hang_worker()  # and the end of the block lets it go
    assert pool.exit_code == 0


def test_refused_forks() -> None:
    """While forks are refused nobody is replaced, the others serve, and the pool is whole afterwards."""
    with testing.pool(Server, Echo) as pool:
        first = pool.wait_ready(2)
        with pool.refuse_forks():
            victim = pool.kill_worker()
            pool.wait_for("no worker can be started: Resource temporarily unavailable")
            (left,) = {*first} - {victim}
            assert {ask(pool) for _ in range(4)} == {left} == {*pool.workers}
        pool.wait_ready(2)


def test_reload() -> None:
    """A reload returns when the new generation serves; a failed one is a failure of the test."""
    boots = []

    class Picky(prefork.SyncWorker):
        def setup(self) -> None:
            if self.generation > 2:
                raise RuntimeError("not again")

    with testing.pool(Server, Echo, worker_class=Picky, allow=["not again", "reload failed"]) as pool:
        boots.append(pool.wait_ready(2))
        pool.reload()
        boots.append(pool.wait_ready(2, without=boots[0]))
        with pytest.raises(AssertionError, match="reload failed: no worker of generation 3 became ready"):
            pool.reload()
        assert pool.wait_ready(2) == boots[1]


# -- what it finds ---------------------------------------------------------------------------------


def test_errors_are_found() -> None:
    """An error in the log, and a traceback of a handler, fail the test, unless they are allowed; the log is shown."""
    for line, wanted in (("raise", "ordered trouble"), ("exit", "exit code 7")):
        with pytest.raises(AssertionError, match=wanted) as caught, testing.pool(Server, Echo, workers=1) as pool:
            with pool.connect() as client:
                client.sendall(f"{line}\n".encode())
                client.recv(100)
            pool.wait_ready(1)
            pool.wait_for(wanted)
        assert "pool ready" in "".join(caught.value.__notes__)
        with testing.pool(Server, Echo, workers=1, allow=[wanted]) as pool, pool.connect() as client:
            client.sendall(f"{line}\n".encode())
            client.recv(100)
            pool.wait_for(wanted)


def test_what_is_left_is_found() -> None:
    """A process that outlives the pool fails the test, and is ended."""
    pid = 0
    with pytest.raises(AssertionError, match="no process of the pool is left"):  # noqa: SIM117  # its end raises
        with testing.pool(Server, Echo, timeout=3.0) as pool:
            with pool.connect() as client:
                client.sendall(b"child\n")
                pid = int(client.recv(100).split()[0])
    until(lambda: not processes.alive(pid))
    assert not left(pool)


def test_a_bad_end_is_found() -> None:
    """A pool that ends by itself, or with another code than 0, fails the test, and so does one that cannot begin."""
    with pytest.raises(AssertionError, match="exited with -9"), testing.pool(Server, Echo) as pool:
        os.kill(pool.pid, signal.SIGKILL)
        pool.wait_ready(3)
    with pytest.raises(AssertionError, match="exited with -9"), testing.pool(Server, Echo) as pool:
        os.kill(pool.pid, signal.SIGKILL)
    with pytest.raises(AssertionError, match="exited with 2") as caught, testing.pool(Server, Echo, workers=0):
        pass
    assert "workers: must be" in "".join(caught.value.__notes__)

    def broken() -> Server:
        raise ZeroDivisionError

    with pytest.raises(AssertionError, match="could not be made") as caught, testing.pool(broken):
        pass
    assert "ZeroDivisionError" in "".join(caught.value.__notes__)


def test_a_failing_block_is_shown_with_the_log() -> None:
    """What the block raises goes on, with the pool's log, and nothing is left."""
    with pytest.raises(ZeroDivisionError) as caught, testing.pool(Server, Echo) as pool:
        raise ZeroDivisionError
    assert "pool ready" in "".join(caught.value.__notes__)
    assert not left(pool)


# -- with pytest -----------------------------------------------------------------------------------

SUITE = """
import os
import socketserver
import prefork

pytest_plugins = ["prefork.testing"]

class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        line = self.rfile.readline()
        if line == b"raise\\n":
            raise ValueError("ordered trouble")
        self.wfile.write(line)

def ask(pool, line=b"hello\\n"):
    with pool.connect() as client:
        client.sendall(line)
        return client.recv(100)

def test_served(prefork_pool):
    pool = prefork_pool(prefork.PreforkTCPServer, Echo, workers=2)
    assert ask(pool) == b"hello\\n"
    pool.kill_worker()
    pool.wait_ready(2)
    assert ask(pool) == b"hello\\n"

def test_fails(prefork_pool):
    assert ask(prefork_pool(prefork.PreforkTCPServer, Echo)) == b"something else"

def test_raises(prefork_pool):
    assert ask(prefork_pool(prefork.PreforkTCPServer, Echo, workers=1), b"raise\\n") == b""
"""


def test_the_fixture(tmp_path: Path) -> None:
    """In a suite that names the plugin a pool ends with its test, errors are errors, and failures show the log."""
    (tmp_path / "test_suite.py").write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-W", "error", "-rA"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "2 passed, 1 failed, 1 error" in done.stdout or "1 failed, 2 passed, 1 error" in done.stdout, done.stdout
    assert re.search(r"ERROR test_suite.py::test_raises - AssertionError: the pool logged errors", done.stdout)
    assert re.search(r"-+ log of the pool \d+ -+\n.*\n.*pool ready", done.stdout)


def test_it_needs_no_pytest() -> None:
    """The module is of use without pytest, and does not import it."""
    code = "import sys; from prefork import testing; print('pytest' in sys.modules, hasattr(testing, 'prefork_pool'))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "False False", "")
