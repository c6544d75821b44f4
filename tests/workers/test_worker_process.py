"""A worker as a process seen from outside: title, memory, descriptors, and a stop at its very start."""

import os
import signal
from contextlib import ExitStack

import pytest

from support import ask, dial, elapse, patterns, switches, title, until
from support.reporting import REPORTING
from support.scripts import Notes, Start, hold, launch, noted, rest

pytestmark = pytest.mark.timeout(60)


def test_titles(start: Start, notes: Notes) -> None:
    """ps shows a worker's slot, address, generation and state; a replacement takes the slot over."""
    program = launch(
        start, REPORTING + "with Reporting(('127.0.0.1', 0), Handler) as server:\n    server.serve_forever()\n"
    ).ready()
    (worker,) = program.wait_ready(1)
    assert title(worker) == f"prefork: worker 0 {program.address} generation 1 ready"
    program.kill_workers(worker)
    (worker,) = program.wait_ready(1, without=[worker])
    assert title(worker) == f"prefork: worker 0 {program.address} generation 1 ready"
    program.send(signal.SIGHUP)
    (worker,) = program.wait_ready(1, without=[worker])
    assert title(worker) == f"prefork: worker 1 {program.address} generation 2 ready"
    with ExitStack() as stack:
        hold(program.address, stack, "gate go")
        noted(notes, "begun")
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPING)
        program.write("go", "")
        assert program.wait_exit().code == 0
    program.finish()


def test_heap_is_frozen(start: Start, notes: Notes) -> None:
    """What existed before the fork is out of a worker's collections, which are on; the master's own heap is as
    before."""
    program = launch(
        start,
        """
        import gc

        class Looks(Handler):
            def answer(self, order):
                return f"{gc.get_freeze_count() > 1000} {gc.isenabled()}"

        class Pool(prefork.PreforkTCPServer):
            def service_actions(self):
                note(f"master {gc.get_freeze_count()} {gc.isenabled()}")

        with Pool(("127.0.0.1", 0), Looks) as server:
            server.serve_forever(poll_interval=0.1)
        """,
    ).ready()
    assert ask(program.address).result == "True True"
    already = len(notes("master"))
    assert set(noted(notes, "master", already + 2)[already:]) == {"0 True"}
    program.finish()


def test_log_files_are_reopened(start: Start, notes: Notes) -> None:
    """USR1 has the master and its workers go on in a new file after the old one was moved away."""
    program = launch(
        start,
        """
        handler = logging.FileHandler(HOME / "log")
        handler.setFormatter(logging.Formatter("%(process)d %(message)s"))
        log = logging.getLogger("app")
        log.propagate = False
        log.addHandler(handler)
        log.setLevel(logging.INFO)

        class Logs(Handler):
            def answer(self, order):
                log.info("request %s", order)
                return "done"

        class Pool(prefork.PreforkTCPServer):
            workers = 1

            def service_actions(self):
                log.info("tick")

        with Pool(("127.0.0.1", 0), Logs) as server:
            server.serve_forever(poll_interval=0.05)
        handler.close()
        """,
    ).ready()
    (worker,) = program.wait_ready(1)
    path, old = program.work / "log", program.work / "log.1"
    ask(program.address, "one")
    assert f"{worker} request one" in path.read_text()
    path.rename(old)
    program.send(signal.SIGUSR1)
    until(lambda: path.exists() and f"{program.pid} tick" in path.read_text(), 5, "the master's new file")
    until(lambda: str(path) == os.readlink(_descriptor(worker, old, path)), 5, "the worker's new file")
    ask(program.address, "two")
    assert f"{worker} request two" in path.read_text()
    text = old.read_text()
    assert "request two" not in text
    elapse(0.2)
    assert old.read_text() == text
    program.finish()


def _descriptor(pid: int, *paths: object) -> str:
    """The descriptor of a process that is open on one of these paths."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{name}") in map(str, paths):
            return f"/proc/{pid}/fd/{name}"
    raise AssertionError(f"none of {paths} is open in {pid}")


CLOSES = """
    class Closes(Handler):
        def answer(self, order):
            if order == "everything":
                os.closerange(3, 1000)
            elif order == "uplink":
                os.close(self.server.worker._uplink.fd)
            elif order == "listener":
                self.server.socket.close()
            return "done"

    class Pool(prefork.PreforkTCPServer):
        workers = 1

    with Pool(("127.0.0.1", 0), Closes) as server:
        server.serve_forever()
"""


@pytest.mark.parametrize("order", ["everything", "listener"])
def test_worker_whose_descriptors_are_gone(start: Start, order: str) -> None:
    """A handler that closes what is not its own costs its worker, which is replaced."""
    program = launch(start, CLOSES, allow=[patterns.ANYTHING]).ready()
    for _ in range(3):
        (worker,) = program.wait_ready(1)
        with dial(program.address) as sock:
            sock.sendall(f"x {order}\n".encode())
            rest(sock)
        program.wait_ready(1, without=[worker])
    ask(program.address)
    program.finish()


def test_worker_whose_uplink_is_gone(start: Start) -> None:
    """A worker that cannot speak to its master any more is neither mourned nor spun upon, serves on, and stops as
    ordered."""
    program = launch(start, CLOSES, allow=[patterns.ANYTHING]).ready()
    (worker,) = program.wait_ready(1)
    assert ask(program.address, "uplink").pid == worker
    elapse(0.8)
    before = switches(program.pid)
    elapse(1.0)
    assert switches(program.pid) - before <= 20
    assert ask(program.address).pid == worker
    program.kill_workers(worker)
    program.wait_ready(1, without=[worker])
    (worker,) = program.wait_ready(1)
    assert ask(program.address, "uplink").pid == worker
    assert program.stop().seconds < 5
    program.finish()


@pytest.mark.parametrize(
    ("kind", "handler", "address"),
    [
        ("TCPServer", "Handler", '("127.0.0.1", 0)'),
        ("UDPServer", "Datagrams", '("127.0.0.1", 0)'),
        ("UnixStreamServer", "Handler", 'str(RUN / "s")'),
        ("UnixDatagramServer", "Datagrams", 'str(RUN / "s")'),
    ],
)
@pytest.mark.parametrize("timeout", [None, 20.0])
def test_stop_between_ready_and_the_loop(
    start: Start, kind: str, handler: str, address: str, timeout: float | None
) -> None:
    """A worker told to stop when it is ready, but not yet in its loop, leaves at once and holds nobody else up."""
    program = launch(
        start,
        f"""
        socket.setdefaulttimeout({timeout})

        class Slow(prefork.SyncWorker):
            def run(self):
                if self.slot == 0:
                    pass_gate("run")
                super().run()

        class Pool(prefork.Prefork{kind}):
            workers = 3
            worker_class = Slow

        with Pool({address}, {handler}) as server:
            server.serve_forever()
        """,
    ).ready()
    program.wait_ready(3)
    program.send(signal.SIGTERM)
    program.wait_for(patterns.STOPPING)
    program.wait_children(1)
    program.write("run", "")
    assert program.wait_exit(5).code == 0
    program.finish()
