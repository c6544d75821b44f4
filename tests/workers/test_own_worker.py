"""The surface that worker classes build on, by a class of one's own."""

import signal
from contextlib import ExitStack
from typing import Any

import pytest

from support import ask, elapse, patterns, pids_serving
from support.reporting import REPORTING, reports
from support.scripts import Notes, Start, hold, launch, noted, rest

pytestmark = pytest.mark.timeout(60)
OWN = (
    REPORTING
    + """
class Own(prefork.Worker):
    def setup(self):
        self.server.socket.setblocking(False)
        self.reader, self.writer = os.pipe()
        note(f"setup {os.getpid()} {self.slot} {self.generation} {self.options.workers} {self.draining}")

    def run(self):
        note(f"run {os.getpid()}")
        poll = select.poll()
        poll.register(self.server.socket, select.POLLIN)
        poll.register(self.reader, select.POLLIN)
        while not self.draining:
            poll.poll()
            try:
                request, peer = self.server.socket.accept()
            except BlockingIOError:
                continue
            try:
                with self.serving(peer), request:
                    self.serve(request)
            except Exception as error:
                note(f"raised {type(error).__name__} {os.getpid()}")

    def serve(self, request):
        identity, _, order = request.recv(1000).decode().strip().partition(" ")
        if order == "recycle":
            self.recycle("as ordered")
        elif order.startswith("extend"):
            self.extend_deadline(20)
            perform(order.partition(" ")[2])
        else:
            perform(order)
        request.sendall(f"{os.getpid()}:{identity}:done\\n".encode())

    def drain(self):
        os.write(self.writer, b".")

    def teardown(self):
        os.close(self.reader)
        os.close(self.writer)
        note(f"teardown {os.getpid()} {self.draining}")

with type("Pool", (Reporting,), {SETTINGS})(("127.0.0.1", 0), Handler) as server:
    server.serve_forever()
"""
)


def own(start: Start, **settings: object) -> Any:
    text = ", ".join(f"'{name}': {value!r}" for name, value in settings.items())
    return launch(start, OWN.replace("SETTINGS", f"'worker_class': Own, {text}"), allow=[patterns.FAULT]).ready()


def test_own_loop(start: Start, notes: Notes) -> None:
    """A Worker with a loop of its own is set up, serves, drains and tears down like the shipped one, through reload
    and stop."""
    program = own(start, workers=2)
    first = program.wait_ready(2)
    assert pids_serving(program.address, 2) == set(first)
    assert sorted(row.split(" ", 1)[1] for row in notes("setup")) == ["0 1 2 False", "1 1 2 False"]
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOADED)
    second = program.wait_ready(2, without=first)
    assert {row.split()[2] for row in notes("setup")[2:]} == {"2"}
    program.send(signal.SIGTERM, second[0])
    program.wait_ready(2, without=second[:1])
    with ExitStack() as stack:
        held = hold(program.address, stack, "gate go")
        noted(notes, "begun")
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPING)
        program.write("go", "")
        assert rest(held).endswith(b":held:done\n")
    assert program.wait_exit().code == 0
    everybody = {row.split()[0] for row in notes("setup")}
    assert len(everybody) == 5
    assert sorted(notes("run")) == sorted(everybody)
    assert sorted(notes("teardown")) == sorted(f"{pid} True" for pid in everybody)
    found = reports(notes, 5)
    assert sum(report["requests"] for report in found) >= 3
    assert {report["reason"] for report in found} == {"RELOADED", "LEFT", "STOPPED"}
    program.finish()


def test_own_loop_has_deadlines(start: Start, notes: Notes) -> None:
    """`with self.serving(peer)` alone gives a loop of one's own its deadlines; extend_deadline() moves them."""
    program = own(start, request_timeout=0.5)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        late = hold(program.address, stack, "hang")
        assert rest(late) == b""
        assert noted(notes, "raised") == [f"RequestTimeout {worker}"]
        long = hold(program.address, stack, "extend gate go")
        noted(notes, "begun", 2)
        elapse(1.2)
        program.write("go", "")
        assert rest(long).endswith(b"done\n")
    assert [ask(program.address).pid] == [worker]
    program.finish()


def test_own_loop_asks_to_be_recycled(start: Start, notes: Notes) -> None:
    """recycle() has the worker replaced, the replacement first; its own request is answered."""
    program = own(start)
    (worker,) = program.wait_ready(1)
    assert ask(program.address, "recycle").pid == worker
    (other,) = program.wait_ready(1, without=[worker])
    assert ask(program.address).pid == other
    (report,) = reports(notes)
    assert (report["pid"], report["reason"], report["status"], report["requests"]) == (worker, "RECYCLED", 0, 1)
    assert report["slot"] != int(noted(notes, "setup", 2)[1].split()[1]), "old and new were never there at once"
    program.finish()


@pytest.mark.parametrize("where", ["drain", "teardown"])
def test_own_hooks_that_raise(start: Start, notes: Notes, where: str) -> None:
    """A drain() or teardown() that raises is shown, and the worker leaves all the same."""
    program = launch(
        start,
        f"""
        class Broken(prefork.SyncWorker):
            def {where}(self):
                super().{where}()
                raise ValueError("ordered trouble")

        class Pool(prefork.PreforkTCPServer):
            workers = 2
            worker_class = Broken

        with Pool(("127.0.0.1", 0), Handler) as server:
            server.serve_forever()
        """,
        allow=[patterns.TRACEBACK],
    ).ready()
    workers = program.wait_ready(2)
    program.send(signal.SIGTERM, workers[0])
    program.wait_ready(2, without=workers[:1])
    ask(program.address)
    assert program.stop().seconds < 5
    assert program.log.count("ValueError: ordered trouble") >= 3
    program.finish()
