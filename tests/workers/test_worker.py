"""A worker's life: boots, limits, deadlines, and what is said of its death."""

import _ctypes
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefork.rules.c_stack import SHORT_HEADER
from support import Ledger, Load, account, ask, dial, elapse, patterns
from support.reporting import REPORTING, reports
from support.scripts import Notes, Start, launch, noted, rest

Run = Callable[..., Load]
pytestmark = pytest.mark.timeout(60)


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


CRASHING = (
    REPORTING
    + """
class Crashing(Handler):
    def answer(self, order):
        import ctypes

        return str(ctypes.string_at(0))

with Reporting(("127.0.0.1", 0), Crashing) as server:
    server.serve_forever()
"""
)


def test_a_crash_in_a_library_is_explained(start: Start, notes: Notes) -> None:
    """The report of a crash has the Python stack, and of the C stack that newer Pythons add only what is not Python."""
    program = launch(start, CRASHING, allow=[patterns.FAULT]).ready()
    program.wait_ready(1)
    with dial(program.address) as sock:
        sock.sendall(b"x crash\n")
        assert rest(sock) == b""
    (report,) = reports(notes)
    text = report["detail"]
    assert (report["reason"], report["status"]) == ("KILLED", -signal.SIGSEGV)
    assert "in string_at" in text and "in answer" in text
    assert "prefork: worker 0" not in text and "_Py_DumpStack" not in text
    apart = getattr(_ctypes, "__file__", None)  # some builds have it in the interpreter
    if sys.version_info >= (3, 14) and apart and platform.libc_ver()[0] == "glibc":
        assert f"\n{SHORT_HEADER}\n" in text and Path(apart).name in text
    program.wait_ready(1, without=[report["pid"]])
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
    elapse(1.5)
    number = len(notes("boot"))
    assert 4 <= number <= 10, number
    assert program.running
    program.finish()
