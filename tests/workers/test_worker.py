"""A worker's life: the surface that worker classes build on, limits, deadlines, boots, and what is said of its
death."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from support import Ledger, Load, account, ask, dial, elapse, patterns, pids_serving, switches, title, until
from support.scripts import Notes, Start, hold, launch, noted, rest

Run = Callable[..., Load]

pytestmark = pytest.mark.timeout(60)

# A server whose reports of dead workers are notes.
REPORTING = """
import json

class Reporting(prefork.PreforkTCPServer):
    workers = 1

    def worker_exited(self, report):
        fields = {name: getattr(report, name) for name in report.__slots__}
        note("exit " + json.dumps({**fields, "reason": report.reason.name, "line": str(report)}))
"""


def reports(notes: Notes, number: int = 1, timeout: float = 10.0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in noted(notes, "exit", number, timeout)]


# -- a class of one's own --------------------------------------------------------------------------

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


# -- limits ----------------------------------------------------------------------------------------

LIMITED = """
    from work import Work

    class Greedy(Work):
        kept = []

        def finish(self):
            super().finish()
            self.kept.append(b"x" * {bytes})

    class Pool(prefork.PreforkTCPServer):
        workers = 3
        {setting}

    with Pool(("127.0.0.1", 0), Greedy) as server:
        server.serve_forever()
"""


@pytest.mark.parametrize(
    ("setting", "size"),
    [
        ("max_requests, max_requests_jitter = 40, 30", 0),
        ("max_memory = 48 << 20", 1 << 20),
        ("max_lifetime = 0.4", 0),
    ],
    ids=["requests", "memory", "lifetime"],
)
def test_recycling_loses_no_request(start: Start, ledger: Ledger, load: Run, setting: str, size: int) -> None:
    """Workers that reach a limit are replaced under load, and every request is answered."""
    program = launch(start, LIMITED.format(setting=setting, bytes=size)).ready()
    clients = load(program.address, clients=8, pause=0.002)
    program.wait_for(patterns.LEFT, 20, number=8)
    tally = clients.stop()
    assert not account(tally, ledger)
    assert (tally.lost, tally.refused) == (0, 0)
    limit = setting.split()[0].strip(",")
    assert all(match[4].startswith(f"it was recycled ({limit}: ") for match in program.found(patterns.LEFT))
    if "requests" in setting:
        assert all(number >= 10 for pid, number in ledger.read().by_pid.items() if pid not in program.children())
        assert max(ledger.by_pid.values()) >= 20
    program.finish()


def test_max_requests_without_jitter(start: Start, ledger: Ledger) -> None:
    """Without jitter a worker is replaced after exactly max_requests, if it has nothing more to do meanwhile."""
    body = LIMITED.format(setting="max_requests, max_requests_jitter, workers = 5, 0, 1", bytes=0)
    program = launch(start, body).ready()
    for number in (1, 2, 3):
        (worker,) = program.wait_ready(1)
        assert {ask(program.address).pid for _ in range(5)} == {worker}
        program.wait_for(patterns.LEFT, number=number)
    assert sorted(ledger.read().by_pid.values()) == [5, 5, 5]
    program.finish()


# -- deadlines -------------------------------------------------------------------------------------

SLOW = (
    REPORTING
    + """
class Slow(Handler):
    def answer(self, order):
        try:
            return super().answer(order)
        except BaseException as error:
            note(f"handler {type(error).__name__} {os.getpid()}")
            raise
        finally:
            note("finally")

class Pool(Reporting):
    request_timeout = 0.4

    def handle_error(self, request, client_address):
        note(f"handle_error {sys.exc_info()[0].__name__}")

class Two(prefork.SyncWorker):
    def setup(self):
        threading.Thread(target=self.stand_beside, daemon=True).start()
        if (HOME / "trouble").exists():
            self.hang_in_setup()

    def stand_beside(self):
        threading.Event().wait()

    def hang_in_setup(self):
        sum(range(10**13))

Pool.worker_class = Two
with Pool(("127.0.0.1", 0), Slow) as server:
    server.serve_forever()
"""
)


def test_a_late_request_is_interrupted(start: Start, notes: Notes) -> None:
    """RequestTimeout reaches the handler: its `finally` and handle_error run, the client is closed, the worker
    lives."""
    program = launch(start, SLOW).ready()
    (worker,) = program.wait_ready(1)
    for number in (1, 2, 3):
        with dial(program.address) as sock:
            sock.sendall(b"x hang\n")
            assert rest(sock) == b""
        assert noted(notes, "handle_error", number)[-1] == "RequestTimeout"
        assert notes("handler")[-1] == f"RequestTimeout {worker}"
        assert ask(program.address).pid == worker
    assert len(notes("finally")) == 6
    assert not notes("exit")
    program.finish()


def test_a_deaf_request_is_killed_and_explained(start: Start, notes: Notes) -> None:
    """A worker deep in C is killed; its report says what it was serving and where each of its threads stood."""
    program = launch(start, SLOW, allow=[patterns.FAULT]).ready()
    report: dict[str, Any] = {"status": None}
    number = 0
    # On a machine so busy that the worker does not run within the time for its stacks, it is killed without them.
    while report["status"] != -signal.SIGABRT:
        number += 1
        assert number <= 4, report
        (worker,) = program.wait_ready(1)
        with dial(program.address) as sock:
            port = sock.getsockname()[1]
            sock.sendall(b"x deaf\n")
            assert sock.recv(10) == b""
        report = reports(notes, number)[-1]
        assert (report["pid"], report["reason"], report["requests"]) == (worker, "REQUEST_TIMEOUT", 0)
        assert report["status"] in (-signal.SIGKILL, -signal.SIGABRT)
        assert report["serving"] == f"127.0.0.1:{port}"
        assert 0.4 <= report["busy_for"] < 5
    for name in ("in perform", "in answer", "in stand_beside"):
        assert name in report["detail"], report["detail"]
    program.wait_ready(1, without=[worker])
    ask(program.address)
    program.finish()


def test_a_hang_in_setup_is_explained(start: Start, notes: Notes) -> None:
    """A worker that is not ready within boot_timeout is killed, and its report shows where it stood."""
    body = SLOW.replace("request_timeout = 0.4", "boot_timeout = 0.5")
    program = launch(start, body, allow=[patterns.FAULT]).ready()
    (worker,) = program.wait_ready(1)
    program.write("trouble", "")
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOAD_FAILED)
    (report,) = reports(notes)
    assert (report["generation"], report["reason"], report["serving"]) == (2, "BOOT_TIMEOUT", None)
    if report["status"] != -signal.SIGKILL:  # too busy a machine for its stacks
        assert "in hang_in_setup" in report["detail"] and "in stand_beside" in report["detail"]
    assert ask(program.address).pid == worker
    program.finish()


# -- boots -----------------------------------------------------------------------------------------

BOOTING = """
    class Booting(prefork.SyncWorker):
        def setup(self):
            {trouble}

    class Pool(prefork.PreforkTCPServer):
        workers = 2
        boot_timeout = 1.0
        worker_class = Booting

    note(f"begin {{os.getpid()}}")
    try:
        with Pool(("127.0.0.1", 0), Handler) as server:
            server.serve_forever()
    except prefork.BootError as error:
        note(f"text {{error!r}}")
        sys.exit(error.exit_code)
    finally:
        note(f"finally {{os.getpid()}}")
"""


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("raise ValueError('ordered trouble')", ["ValueError: ordered trouble", "in setup"]),
        ("sys.exit(3)", ["exit code 3"]),
        ("sys.exit()", ["failed before it was ready"]),
        ("os._exit(4)", ["exit code 4"]),
        ("os.kill(os.getpid(), signal.SIGSEGV)", ["in setup"]),
        ("threading.Event().wait()", ["in setup"]),
        ("self.options.nothing", ["AttributeError"]),
    ],
)
def test_boot_failure(start: Start, notes: Notes, trouble: str, says: list[str]) -> None:
    """If no worker of the first generation boots, serve_forever() raises BootError, which says why; nothing is left."""
    program = launch(start, BOOTING.format(trouble=trouble), allow=[patterns.ANYTHING])
    assert program.wait_exit(10).code == 3
    (text,) = notes("text")
    for one in says:
        # On a machine too busy for its stacks a hang is killed without them.
        assert one in text or "boot_timeout, SIGKILL" in text, text
    assert notes("finally") == [str(program.pid)]
    program.finish(code=3)


@pytest.mark.parametrize("trouble", ["return", "raise ValueError('ordered trouble')", "sys.exit(0)", "os._exit(3)"])
def test_death_right_after_ready_does_not_spin(start: Start, notes: Notes, trouble: str) -> None:
    """A worker that ends in run() at once, however politely, is respawned at the pace of a crash loop."""
    program = launch(
        start,
        f"""
        class Brief(prefork.SyncWorker):
            def setup(self):
                note(f"boot {{self.slot}}")

            def run(self):
                {trouble}

        class Pool(prefork.PreforkTCPServer):
            workers = 2
            worker_class = Brief

        with Pool(("127.0.0.1", 0), Handler) as server:
            server.serve_forever()
        """,
        allow=[patterns.TRACEBACK],
    )
    noted(notes, "boot", 2)
    elapse(2.5)
    number = len(notes("boot"))
    assert 4 <= number <= 12, number
    assert program.running
    program.finish()


# -- what is seen from outside ---------------------------------------------------------------------


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
