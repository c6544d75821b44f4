"""The system refuses a call of the master once, for a while or for good: the pool serves on, and obeys."""

import os
import signal
import socket
import time
from contextlib import ExitStack
from typing import Any

import pytest

import prefork.master.loop as loop
from prefork.kernel.listener import Listener
from prefork.rules.pool import Spawn
from prefork.rules.stop_sequence import LAST_CALLS, Stage
from prefork.settings.settings import Options
from support import ask, patterns, processes, state, until
from support.faulty_server import begin, check_alive, soon
from support.scripts import Notes, Start, hold, launch, noted, rest

pytestmark = pytest.mark.timeout(60)

# -- waiting ---------------------------------------------------------------------------------------


def check_deaths_are_noticed(start: Start, before: str) -> None:
    """With what `before` refuses, workers that die are replaced, and the pool obeys."""
    program = begin(start, before)
    workers = program.wait_ready(2)
    program.write("refuse", "")
    program.kill_workers(*workers)
    program.wait_ready(2, without=workers)
    check_alive(program)
    program.finish()


@pytest.mark.parametrize("times", [1, 3, None])
def test_the_wait_of_the_loop_fails(start: Start, times: int | None) -> None:
    """Where the epoll refuses to wait, three times or for good, deaths and signals are noticed in another way."""
    before = f"""
selectors.EpollSelector.select = refusing(selectors.EpollSelector.select, errno.EINVAL, times={times})
"""
    check_deaths_are_noticed(start, before)


def test_every_way_to_wait_fails(start: Start) -> None:
    """Where the system refuses every kind of waiting for a while, the pool is looked after all the same."""
    before = """
selectors.EpollSelector.select = refusing(selectors.EpollSelector.select, errno.ENOMEM)
import prefork.kernel.signal_inbox

class Poll:
    def __init__(self):
        self.real = select.poll()
        self.register = self.real.register
        self.poll = refusing(self.real.poll, errno.ENOMEM)

class Select:
    poll = Poll
    POLLIN = select.POLLIN

prefork.kernel.signal_inbox.select = Select
"""
    check_deaths_are_noticed(start, before)


def test_the_epoll_does_not_take_new_workers(start: Start) -> None:
    """A worker that cannot be watched by the epoll is not killed for it, is heard, and is watched when that works."""
    before = """
register = selectors.EpollSelector.register
selectors.EpollSelector.register = refusing(register, errno.ENOSPC)
"""
    program = begin(start, before)
    workers = program.wait_ready(2)
    with program.flat():
        program.write("refuse", "")
        program.kill_workers(*workers)
        later = program.wait_ready(2, without=workers)
        program.kill_workers(*later)
        program.wait_ready(2, without=later)
        (program.work / "refuse").unlink()
        ask(program.address)
    check_alive(program)
    program.finish()


def test_a_wake_up_that_is_not_written(start: Start) -> None:
    """A signal is acted on at once where the interpreter cannot tell the loop of it."""
    before = """
signal.set_wakeup_fd = lambda fd, **named: -1
"""
    program = begin(start, before)
    for number in (3, 4):
        program.send(signal.SIGTTIN)
        with soon(0.5):
            program.wait_ready(number)
    with soon(0.5):
        assert program.stop().code == 0
    program.finish()


# -- failures within the loop ----------------------------------------------------------------------


def test_a_failure_changes_no_deadline(start: Start, notes: Notes) -> None:
    """A turn of the loop that failed while a worker was missing is no reason to put off requests' deadlines."""
    before = """
import prefork.master.reaper
prefork.master.reaper.log_exit = refusing(prefork.master.reaper.log_exit, errno.EIO, times=1)
"""
    program = begin(start, before, timeout=0.5, allow=[patterns.TRACEBACK, patterns.FAULT])
    workers = program.wait_ready(2)
    program.write("refuse", "")
    program.kill_workers(workers[0])
    program.wait_ready(2, without=workers[:1])
    with ExitStack() as stack, soon(3.0):
        assert rest(hold(program.address, stack, "deaf")) == b""
    assert "did not run for" not in program.log
    assert program.log.count("cannot be collected") == 1
    check_alive(program)
    program.finish()


def test_a_step_that_always_fails(start: Start) -> None:
    """What fails in each turn keeps nothing else from being done, and is not said more than once a second."""
    before = """
import prefork.master.late_requests
prefork.master.late_requests.Judge.judge = refusing(prefork.master.late_requests.Judge.judge, errno.EIO)
"""
    program = begin(start, before, allow=[patterns.TRACEBACK])
    program.write("refuse", "")
    begun = time.monotonic()
    check_alive(program)
    assert 1 <= program.log.count("the master failed at ") <= 2 + time.monotonic() - begun
    program.finish()


def test_a_death_that_cannot_be_collected(start: Start) -> None:
    """Where wait4 is refused for good, deaths are collected by waitid."""
    program = begin(start, "os.wait4 = refusing(os.wait4, errno.ENOSYS)\n")
    program.write("refuse", "")
    with program.flat():
        for _ in range(3):
            workers = program.wait_ready(2)
            program.kill_workers(*workers)
            program.wait_ready(2, without=workers)
    assert program.log.count("a signal killed it, SIGKILL") == 6
    check_alive(program)
    program.finish()


# -- signals to workers ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["ENOSYS", "EPERM"])
def test_signals_by_pidfd_are_refused(start: Start, error: str) -> None:
    """Where a container's filter refuses signals by pidfd, orders reach the workers by their pids."""
    program = begin(start, f"signal.pidfd_send_signal = refusing(signal.pidfd_send_signal, errno.{error})\n")
    program.write("refuse", "")
    program.send(signal.SIGTTIN)
    program.wait_ready(3)
    program.send(signal.SIGTTOU)
    program.wait_ready(2)
    with soon(1.0):
        check_alive(program)
    program.finish()


def test_a_kill_is_repeated_until_its_effect_is_seen(start: Start, notes: Notes) -> None:
    """A hung worker that could not be killed when it was due is killed when that is possible again."""
    before = """
signal.pidfd_send_signal = refusing(signal.pidfd_send_signal, errno.EPERM)
os.kill = refusing(os.kill, errno.EPERM)
"""
    program = begin(start, before, timeout=0.3, allow=[patterns.TRACEBACK, patterns.FAULT])
    program.write("refuse", "")
    with ExitStack() as stack:
        client = hold(program.address, stack, "deaf")
        (pid,) = map(int, noted(notes, "begun"))
        program.wait_for(r"worker \d+ \(slot \d+, generation 1\) cannot be signalled", number=2)
        assert processes.alive(pid)
        (program.work / "refuse").unlink()
        with soon(3.0):
            assert rest(client) == b""
    check_alive(program)
    program.finish()


def test_a_worker_that_is_traced(start: Start, notes: Notes) -> None:
    """A worker that stops under the tracing of its master has not ended: the pool still obeys, and ends it."""
    before = """
import ctypes

class Traced(Handler):
    def answer(self, order):
        if order == "trace":
            ctypes.CDLL(None).ptrace(0, 0, 0, 0)  # PTRACE_TRACEME: the master is the tracer
            note(f"begun {os.getpid()}")
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().answer(order)
"""
    program = begin(start, before, timeout=0.3, handler="Traced")
    with ExitStack() as stack:
        client = hold(program.address, stack, "trace")
        (pid,) = map(int, noted(notes, "begun"))
        until(lambda: state(pid) == "t", what="the worker is stopped under its tracer")
        workers = program.wait_ready(2)
        program.kill_workers(*(set(workers) - {pid}))
        with soon(5.0):
            assert rest(client) == b""
    program.wait_ready(2, without=[pid])
    check_alive(program)
    program.finish()


# -- a stop and a probe ----------------------------------------------------------------------------


class Probe:
    """A probe of the program that has just ended well."""

    deadline = float("inf")

    def __init__(self) -> None:
        self.fd, self.other_end = os.pipe()
        self.ended = False

    def over(self) -> bool:
        return True

    def result(self) -> Options:
        self.ended = True
        return Options({})


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.SERVING])
def test_a_probe_that_ends_during_a_stop_begins_no_reload(stage: Stage) -> None:
    """However far a stop has come, and in its first milliseconds too: the probe of a reload is dropped."""

    def never(*arguments: object) -> int:
        raise AssertionError("nothing is forked here")

    class Hooks:
        def service_actions(self) -> None: ...

        def worker_exited(self, report: object) -> None: ...

    made: list[Probe] = []

    def probe() -> Any:
        made.append(Probe())
        return made[0]

    running = loop.Master([], Options({"workers": 1}), never, Hooks(), probe=probe)
    running._reload.begin()
    running._stop.escalate(stage)
    assert running._reload.watch()
    assert made[0].ended and running.pool.candidate is None
    running._reload.begin()
    assert len(made) == 1 and running.pool.candidate is None
    for fd in (made[0].fd, made[0].other_end):
        os.close(fd)
    running.close()


def test_a_queue_that_no_worker_is_left_for_when_the_stop_begins() -> None:
    """Where the only worker is in back-off when a stop begins, and a client is queued, workers are forked for it."""

    def start(*arguments: object) -> int:
        os._exit(1)

    class Hooks:
        exits = 0

        def service_actions(self) -> None: ...

        def worker_exited(self, report: object) -> None:
            self.exits += 1

    hooks = Hooks()
    with socket.create_server(("127.0.0.1", 0)) as sock, socket.create_connection(sock.getsockname()):
        running = loop.Master([Listener(sock)], Options({"workers": 1}), start, hooks)
        now = time.monotonic()
        for pid in range(1, 9):  # until the back-off is longer than a busy machine takes for the stop
            running.pool.spawned(Spawn(0, 1), pid, now)
            running.pool.booted(pid, now)
            running.pool.exited(pid, now, status=1, served=False)
        assert (running.pool.next_deadline() or 0.0) > now + 5
        running.stop()
        running.run()
        running.close()
    assert hooks.exits == LAST_CALLS


def test_reasons_reach_the_log(start: Start) -> None:
    """A worker that asks to be recycled says why, and the log tells it."""
    program = launch(
        start,
        """
        class Server(prefork.PreforkTCPServer):
            workers = 1
            max_requests = 3
            max_requests_jitter = 0

        with Server(("127.0.0.1", 0), Handler) as server:
            server.serve_forever()
        """,
    ).ready()
    first = ask(program.address).pid
    for _ in range(2):
        ask(program.address)
    program.wait_for(rf"worker {first} \(slot 0, generation 1\) exited: it was recycled \(max_requests: 3 of 3\)")
    program.finish()
