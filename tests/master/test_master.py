"""The master where the system is against it: no pidfds, no room for a fork or a descriptor, hooks that raise,
thieves of children."""

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from support import Ledger, Load, Program, account, ask, elapse, patterns, pids_serving, title, until
from support.scripts import Notes, Start, hold, launch, noted, rest

Run = Callable[..., Load]

pytestmark = pytest.mark.timeout(60)

SERVER = """
import json

class Server(prefork.PreforkTCPServer):
    workers = 3
    {extra}

    def worker_exited(self, report):
        fields = {{name: getattr(report, name) for name in report.__slots__}}
        note("exit " + json.dumps({{**fields, "reason": report.reason.name, "line": str(report)}}))

with Server(("127.0.0.1", 0), {handler}) as server:
    server.serve_forever()
"""

NO_PIDFD = {
    # The kernel, or Python, has none.
    "absent": "import os, signal\ndel os.pidfd_open\ndel signal.pidfd_send_signal\n\nimport prefork.servers.mixin\n",
    # There are none left.
    "refused": "def refuse(*arguments):\n    raise OSError(24, 'Too many open files')\n\nos.pidfd_open = refuse\n",
    # As the parameter of Master says.
    "unwanted": (
        "import functools\nimport prefork.master.loop as master\n"
        "master.Master = functools.partial(master.Master, use_pidfd=False)\n"
    ),
    "there": "",
}


def begin(start: Start, before: str = "", extra: str = "pass", handler: str = "Handler", **options: Any) -> Program:
    return launch(start, before + SERVER.format(extra=extra, handler=handler), **options).ready()


def reports(notes: Notes, number: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in noted(notes, "exit", number)]


# -- without pidfds --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", NO_PIDFD)
def test_deaths_are_noticed(start: Start, notes: Notes, how: str) -> None:
    """With pidfds or without, a killed worker is collected and replaced at once; nothing grows by it."""
    program = begin(start, NO_PIDFD[how])
    killed: list[int] = []
    with program.flat():
        for number in range(10):
            workers = program.wait_ready(3)
            victims = workers if number % 2 else workers[:1]
            program.kill_workers(*victims)
            killed += victims
            program.wait_ready(3, timeout=1.0, without=killed)
            ask(program.address)
        program.wait_ready(3)
    found = reports(notes, len(killed))
    assert sorted(report["pid"] for report in found) == sorted(killed)
    assert {(report["reason"], report["status"]) for report in found} == {("KILLED", -9)}
    program.finish()


@pytest.mark.parametrize("how", NO_PIDFD)
def test_reload_resize_and_stop_under_load(start: Start, ledger: Ledger, load: Run, how: str) -> None:
    """With pidfds or without, reloads, resizes and the stop lose no request."""
    before = NO_PIDFD[how] + "\nfrom work import Work\n"
    program = begin(start, before, handler="Work")
    clients = load(program.address, clients=8)
    for _ in range(3):
        clients.more(100)
        mark = program.mark
        program.send(signal.SIGHUP)
        program.wait_for(patterns.RELOADED, 10, since=mark)
    program.send(signal.SIGTTIN)
    program.wait_ready(4)
    program.send(signal.SIGTTOU)
    program.wait_ready(3)
    program.send(signal.SIGTERM, program.children()[0])
    clients.more(100)
    end = program.stop()
    tally = clients.stop()
    assert (end.code, tally.lost) == (0, 0)
    assert not account(tally, ledger)
    program.finish()


@pytest.mark.parametrize("how", ["absent", "there"])
def test_deadlines_without_pidfds(start: Start, notes: Notes, how: str) -> None:
    """With pidfds or without, a deaf worker is killed at its deadline, and a fast stop ends a busy pool."""
    program = begin(start, NO_PIDFD[how], "request_timeout = 0.4", allow=[patterns.FAULT])
    with ExitStack() as stack:
        hold(program.address, stack, "deaf")
        (report,) = reports(notes, 1)
        assert report["reason"] == "REQUEST_TIMEOUT"
        assert report["status"] == -signal.SIGKILL or "in perform" in report["detail"]
        program.wait_ready(3)
        hold(program.address, stack, "gate never")
        noted(notes, "begun", 2)
        assert program.stop(signal.SIGINT).seconds < 3
    program.finish()


@pytest.mark.parametrize("how", ["absent", "there"])
def test_worker_with_a_child_of_its_own(start: Start, notes: Notes, how: str) -> None:
    """A worker killed while a child of its own holds its pipes open is noticed all the same, and the child left
    alone."""
    extra = "pass"
    before = (
        NO_PIDFD[how]
        + """
class Forks(Handler):
    def answer(self, order):
        if order == "fork":
            pid = os.fork()
            if pid == 0:
                pass_gate("end")
                os._exit(0)
            return str(pid)
        return super().answer(order)

"""
    )
    program = begin(start, before, extra, "Forks")
    reply = ask(program.address, "fork")
    program.kill_workers(reply.pid)
    program.wait_ready(3, timeout=3.0, without=[reply.pid])
    assert [report["pid"] for report in reports(notes, 1)] == [reply.pid]
    program.write("end", "")
    program.finish()


# -- no room ---------------------------------------------------------------------------------------

REFUSING = """
import errno

fork = os.fork

def refusing():
    if (HOME / "refuse").exists():
        note(f"refused {time.monotonic()}")
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return fork()

os.fork = refusing
"""


def test_fork_refused(start: Start, notes: Notes) -> None:
    """A refused fork is a back-off of the whole pool; who is there serves on, and the pool is whole when there is
    room."""
    program = begin(start, REFUSING)
    first = program.wait_ready(3)
    program.write("refuse", "")
    program.kill_workers(*first[:2])
    noted(notes, "refused", 3)
    for _ in range(5):
        assert ask(program.address).pid == first[2]
    elapse(1.5)
    assert len(notes("refused")) <= 2 * 8, "the master hammers on a system that is full"
    assert "no worker can be started" in program.log
    (program.work / "refuse").unlink()
    program.wait_ready(3, timeout=5)
    pids_serving(program.address, 3)
    program.finish()


def test_fork_refused_from_the_start(start: Start, notes: Notes) -> None:
    """Where the first forks are refused the master waits for room instead of giving up, and hears a stop meanwhile."""
    for action in ("recover", "stop"):
        body = "(HOME / 'refuse').touch()\n" + REFUSING + SERVER.format(extra="pass", handler="Handler")
        program = launch(start, body)
        program.wait_for("no worker can be started", 10)
        if action == "recover":
            (program.work / "refuse").unlink()
            program.wait_ready(3, timeout=5)
            ask(program.address)
        else:
            assert program.stop().seconds < 1
        program.finish()


def test_reload_while_forks_are_refused(start: Start, notes: Notes) -> None:
    """A reload that finds no room is finished when there is some; nobody is retired before."""
    program = begin(start, REFUSING)
    first = program.wait_ready(3)
    program.write("refuse", "")
    program.send(signal.SIGHUP)
    noted(notes, "refused")
    assert program.wait_ready(3) == first
    ask(program.address)
    (program.work / "refuse").unlink()
    program.wait_for(patterns.RELOADED, 10)
    program.wait_ready(3, without=first)
    program.finish()


@contextmanager
def full(program: Program, spare: int = 0) -> Iterator[None]:
    """The master has no more than `spare` descriptors left."""
    soft, hard = resource.prlimit(program.pid, resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir(f"/proc/{program.pid}/fd"))
    resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (highest + 1 + spare, hard))
    yield
    resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("spare", [0, 1, 2, 3, 4, 5])
def test_file_table_full(start: Start, notes: Notes, spare: int) -> None:
    """Growing a pool whose master has too few descriptors is a back-off, wherever it fails; with room again it
    grows."""
    program = begin(start)
    first = program.wait_ready(3)
    with full(program, spare):
        for number in (4, 5, 6):
            program.send(signal.SIGTTIN)
            program.wait_for(f"resize: the pool is to have {number} workers")
        program.wait_for("no worker can be started|cannot watch worker")
        for _ in range(5):
            ask(program.address)
        program.send(signal.SIGHUP)
        elapse(0.5)
        assert program.running
        until(lambda: ask(program.address).pid, 5)
    program.wait_for(patterns.RELOADED, 15)
    program.wait_ready(6, timeout=15, without=first)
    pids_serving(program.address, 6)
    program.finish()


def test_file_table_full_when_workers_die(start: Start, notes: Notes) -> None:
    """With a full file table dead workers are noticed, with their status, and replaced with what they gave back."""
    program = begin(start)
    killed = program.wait_ready(3)
    with full(program):
        program.kill_workers(*killed)
        # A birth takes one descriptor more than a life: there is room for two.
        program.wait_ready(2, timeout=10, without=killed)
        ask(program.address)
    assert {report["status"] for report in reports(notes, 3)} == {-9}
    assert "the master failed" not in program.log
    program.wait_ready(3, timeout=15, without=killed)
    program.finish()


# -- the program in the master's way ---------------------------------------------------------------


def test_hook_that_raises(start: Start) -> None:
    """A worker_exited() that raises is logged, each time, and the pool goes on."""
    body = """
    class Server(prefork.PreforkTCPServer):
        workers = 2

        def worker_exited(self, report):
            raise ValueError("ordered trouble")

    with Server(("127.0.0.1", 0), Handler) as server:
        server.serve_forever()
    """
    program = launch(start, body, allow=[patterns.TRACEBACK]).ready()
    for _ in range(3):
        workers = program.wait_ready(2)
        program.kill_workers(*workers)
        program.wait_ready(2, without=workers)
    ask(program.address)
    assert program.stop().code == 0
    assert program.log.count("worker_exited() raised") == 8
    program.finish()


def test_hook_that_leaves(start: Start, notes: Notes) -> None:
    """A service_actions() that raises SystemExit or KeyboardInterrupt ends the loop as it would socketserver's;
    nobody is left."""
    for error in ("SystemExit(5)", "KeyboardInterrupt"):
        body = f"""
        class Server(prefork.PreforkTCPServer):
            def service_actions(self):
                if (HOME / "go").exists():
                    raise {error}

        try:
            with Server(("127.0.0.1", 0), Handler) as server:
                server.serve_forever(0.05)
        except BaseException as error:
            note(f"left {{type(error).__name__}} {{signal.getsignal(signal.SIGTERM) is signal.SIG_DFL}}")
        """
        program = launch(start, body).ready()
        program.wait_ready(2)
        program.write("go", "")
        assert program.wait_exit().code == 0
        program.finish()
    assert notes("left") == ["SystemExit True", "KeyboardInterrupt True"]


@pytest.mark.parametrize("how", ["absent", "there"])
def test_ignored_sigchld(start: Start, notes: Notes, how: str) -> None:
    """Where SIGCHLD was inherited as ignored, exits are still collected with their status, and it is ignored again
    in the end."""
    body = (
        NO_PIDFD[how]
        + "\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        + SERVER.format(extra="pass", handler="Handler")
        + "note(f'after {signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN}')\n"
    )
    program = launch(start, body).ready()
    workers = program.wait_ready(3)
    program.kill_workers(*workers)
    program.wait_ready(3, without=workers)
    assert {report["status"] for report in reports(notes, 3)} == {-9}
    assert ask(program.address, "run 5").result == "5"
    assert program.stop().code == 0
    assert notes("after") == ["True"]
    program.finish()


@pytest.mark.parametrize("how", ["absent", "there"])
def test_ignored_sigchld_off_the_main_thread(start: Start, notes: Notes, how: str) -> None:
    """Off the main thread an ignored SIGCHLD stays, and exits without a status are still noticed."""
    text = SERVER.format(extra="pass", handler="Handler").replace(
        "    server.serve_forever()",
        "    thread = threading.Thread(target=server.serve_forever)\n    thread.start()\n"
        "    pass_gate('stop')\n    server.shutdown()\n    thread.join()",
    )
    body = NO_PIDFD[how] + "\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n" + text
    program = launch(start, body).ready()
    for number in (1, 2):
        workers = program.wait_ready(3)
        program.kill_workers(*workers)
        program.wait_ready(3, without=workers)
        assert {report["status"] for report in reports(notes, 3 * number)} == {None}
    program.write("stop", "")
    assert program.wait_exit().code == 0
    program.finish()


@pytest.mark.parametrize("how", ["absent", "there"])
def test_thief_of_children(start: Start, notes: Notes, how: str) -> None:
    """A host that calls os.wait() in a thread steals exits: the master notices each death all the same, and says so."""
    before = (
        NO_PIDFD[how]
        + """
def steal():
    while True:
        try:
            pid, status = os.wait()
            note(f"stolen {pid}")
        except ChildProcessError:
            select.select([], [], [], 0.001)

threading.Thread(target=steal, daemon=True).start()
"""
    )
    program = begin(start, before)
    killed: list[int] = []
    for _ in range(5):
        workers = program.wait_ready(3)
        program.kill_workers(*workers)
        killed += workers
        program.wait_ready(3, timeout=3, without=killed)
        ask(program.address)
    found = reports(notes, 15)
    assert sorted(report["pid"] for report in found) == sorted(killed)
    stolen = set(map(int, noted(notes, "stolen", 1)))
    for report in found:
        assert report["status"] == (None if report["pid"] in stolen else -9), report
        assert report["status"] is not None or "other code in the master collected it" in report["line"]
    assert program.stop().code == 0
    program.finish()


def test_handler_that_steals_children(start: Start, notes: Notes) -> None:
    """A host whose SIGCHLD handler collects every child, as old daemons do, loses no worker of the pool's number."""
    before = """
def collect(number, frame):
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return

signal.signal(signal.SIGCHLD, collect)
"""
    program = begin(start, before)
    for _ in range(5):
        workers = program.wait_ready(3)
        program.kill_workers(*workers)
        program.wait_ready(3, timeout=3, without=workers)
    ask(program.address)
    assert program.stop().code == 0
    program.finish()


def test_slots_are_stable(start: Start) -> None:
    """Whatever dies and grows, the slots of the workers are the lowest numbers, each once."""
    program = begin(start)

    def slots() -> list[int]:
        return sorted(int(title(pid).split()[2]) for pid in program.children())

    for number in (4, 5):
        program.send(signal.SIGTTIN)
        program.wait_ready(number)
    assert slots() == [0, 1, 2, 3, 4]
    victims = [pid for pid in program.children() if title(pid).split()[2] in ("1", "3")]
    program.kill_workers(*victims)
    program.wait_ready(5, without=victims)
    assert slots() == [0, 1, 2, 3, 4]
    for number in (4, 3, 2, 1):
        program.send(signal.SIGTTOU)
        program.wait_ready(number)
    program.send(signal.SIGTTOU)
    elapse(0.2)
    assert len(program.wait_ready(1)) == 1
    program.finish()


def test_stop_answers_while_a_worker_boots(start: Start, notes: Notes) -> None:
    """A stop that comes while a replacement is being born waits for nobody but the request in progress."""
    extra = "request_queue_size = 16"
    program = begin(start, extra=extra)
    with ExitStack() as stack:
        held = hold(program.address, stack, "gate go")
        noted(notes, "begun")
        idle = [pid for pid in program.wait_ready(3)]
        program.send(signal.SIGKILL, idle[-1])
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPING)
        program.write("go", "")
        rest(held)
        assert program.wait_exit().code == 0
    program.finish()
