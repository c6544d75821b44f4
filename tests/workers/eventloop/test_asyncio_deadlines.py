"""The worker for coroutines: late requests are cancelled, and handlers are told when the worker leaves."""

import textwrap
import time
from contextlib import ExitStack, suppress

import pytest

from support import ask, elapse, patterns, until
from support.coroutines import LOOPS, PROGRAM, begin, both_loops
from support.scripts import Notes, Start, hold, launch, noted, rest

pytestmark = pytest.mark.timeout(60)


# -- deadlines -------------------------------------------------------------------------------------


@both_loops
def test_a_late_request_is_cancelled(start: Start, notes: Notes, loop: str) -> None:
    """Past its deadline a handler is cancelled, with its `finally` blocks; handle_error() sees RequestTimeout, and its
    neighbours see nothing."""
    program = begin(start, loop, workers=1, request_timeout=0.4)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        neighbour = hold(program.address, stack, "extend 20 gate go")
        noted(notes, "begun")
        begun = time.monotonic()
        late = [hold(program.address, stack, "hang") for _ in range(3)]
        for sock in late:
            assert rest(sock) == b""
        assert 0.4 <= time.monotonic() - begun < 5
        assert noted(notes, "error", 3) == ["RequestTimeout"] * 3
        assert len(notes("cleaned")) == 3
        elapse(1.5)  # the master would have found it by now
        program.write("go", "")
        assert rest(neighbour).endswith(b":held:done\n")
    assert ask(program.address).pid == worker
    assert not program.found(patterns.LEFT)
    program.finish()


@both_loops
def test_a_deadline_can_be_moved(start: Start, notes: Notes, loop: str) -> None:
    """extend_deadline() gives a request more time, or less, and another one beside it neither."""
    program = begin(start, loop, workers=1, request_timeout=1.0)
    with ExitStack() as stack:
        begun = time.monotonic()
        more, less, same = (hold(program.address, stack, f"{order}hang") for order in ("extend 2 ", "extend 0.2 ", ""))
        ends = []
        for sock in (less, same, more):
            assert rest(sock) == b""
            ends.append(time.monotonic() - begun)
    assert 0.2 <= ends[0] < 1.0 <= ends[1] < 2.0 <= ends[2] < 5
    assert noted(notes, "error", 3) == ["RequestTimeout"] * 3
    assert not program.found(patterns.LEFT)
    program.finish()


@pytest.mark.parametrize(("loop", "order"), [("asyncio", "block"), ("asyncio", "spin"), (LOOPS[-1], "block")])
def test_a_loop_that_does_not_turn(start: Start, notes: Notes, loop: str, order: str) -> None:
    """A coroutine that blocks its loop past the deadline is found by the master, shown, and its worker replaced."""
    program = begin(start, loop, workers=2, request_timeout=0.3, allow=[patterns.FAULT])
    workers = program.wait_ready(2)
    with ExitStack() as stack:
        sock = hold(program.address, stack, order)
        (victim,) = map(int, noted(notes, "begun"))
        with suppress(ConnectionError):
            assert rest(sock) == b""
    program.wait_ready(2, without=[victim])
    match = program.wait_for(patterns.LEFT)
    assert int(match[1]) == victim and "request_timeout" in match[4]
    assert "in perform" in program.log or "SIGKILL" in match[4]  # a machine too busy for its stacks
    (other,) = set(workers) - {victim}
    assert other in program.children()
    program.finish()


@both_loops
def test_a_handler_that_does_not_end(start: Start, notes: Notes, loop: str) -> None:
    """A coroutine that goes on after its cancellation has its worker replaced; its neighbours are served."""
    program = begin(start, loop, workers=1, request_timeout=0.3)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        neighbour = hold(program.address, stack, "extend 20 gate go")
        stubborn = hold(program.address, stack, "stubborn stop")
        noted(notes, "begun", 2)
        program.wait_for("goes on after its RequestTimeout", 10)
        noted(notes, "cancelled", 2)  # and it was tried again
        until(lambda: ask(program.address).pid != worker, 10)
        program.write("go", "")
        assert rest(neighbour) == f"{worker}:held:done\n".encode()
        program.write("stop", "")
        assert rest(stubborn) == f"{worker}:held:done\n".encode()
    match = program.wait_for(patterns.LEFT)
    assert int(match[1]) == worker and "recycled" in match[4]
    program.finish()


# -- leaving ---------------------------------------------------------------------------------------


@both_loops
def test_handlers_are_told_of_a_stop(start: Start, notes: Notes, loop: str) -> None:
    """A handler that waits for an idle client can wait for `worker.leaving` as well, and end by itself."""
    program = begin(start, loop, workers=1)
    with ExitStack() as stack:
        held = hold(program.address, stack, "leaving")
        noted(notes, "begun")
        assert program.stop().seconds < 2
        assert rest(held).endswith(b":held:True\n")
    program.finish()


@both_loops
def test_what_is_left_is_cancelled(start: Start, notes: Notes, loop: str) -> None:
    """Shortly before graceful_timeout the requests left are cancelled, and their `finally` blocks run to their end."""
    program = begin(start, loop, workers=2, graceful_timeout=2.0)
    with ExitStack() as stack:
        held = [hold(program.address, stack, "hang") for _ in range(6)]
        noted(notes, "begun", 6)
        end = program.stop()
        assert 1.4 <= end.seconds < 4
        assert all(rest(sock) == b"" for sock in held)
    assert len(notes("cleaned")) == 6
    assert not notes("error")
    assert "SIGKILL" not in program.log
    assert "graceful_timeout is over; requests that are cancelled" in program.log
    program.finish()


def test_a_queue_that_nobody_can_take(start: Start, notes: Notes) -> None:
    """A stop of workers at their limit cancels what is in progress in time, though others still wait in the queue."""
    program = begin(start, workers=1, max_connections=1, graceful_timeout=1.0)
    with ExitStack() as stack:
        held = hold(program.address, stack, "hang")
        hold(program.address, stack, "")
        noted(notes, "begun")
        assert program.stop().seconds < 3
        assert rest(held) == b""
    assert notes("cleaned")
    program.finish()


@both_loops
def test_the_loop_is_there_in_setup(start: Start, notes: Notes, loop: str) -> None:
    """setup() and teardown() may run coroutines; a task of setup() runs while the worker serves."""
    serve = """
    class Busy(Own):
        def setup(self):
            self.loop.run_until_complete(self.open())
            self.ticking = self.loop.create_task(self.tick())

        async def open(self):
            await asyncio.sleep(0.01)
            note("opened")

        async def tick(self):
            try:
                self.left_open = self.generate()
                async for one in self.left_open:
                    note("tick")
                    await asyncio.sleep(0.01)
            finally:
                note("cancelled")

        async def generate(self):
            try:
                while True:
                    yield 1
            finally:
                note("generated")

        def teardown(self):
            self.loop.run_until_complete(self.close())
            super().teardown()
            note(f"closed {self.loop.is_closed()}")

        async def close(self):
            await asyncio.to_thread(note, "teardown")

    with make(KIND, worker_class=Busy, workers=1) as server:
        server.serve_forever()
    """
    program = begin(start, loop, serve=textwrap.dedent(serve))
    noted(notes, "tick", 3)
    ask(program.address)
    program.stop()
    for word in ("opened", "teardown", "cancelled", "generated"):
        assert len(notes(word)) == 1, word
    assert notes("closed") == ["True"]
    program.finish()


def test_a_setup_that_fails_is_a_boot_failure(start: Start, notes: Notes) -> None:
    """A pool of connections that cannot be opened on the loop fails the boot, with its traceback."""
    serve = """
    class Broken(Own):
        def setup(self):
            self.loop.run_until_complete(self.open())

        async def open(self):
            raise OSError("no database")

    with make(KIND, worker_class=Broken) as server:
        server.serve_forever()
    """
    head = "LOOP, KIND = 'asyncio', 'tcp'\n"
    program = launch(start, head + PROGRAM + textwrap.dedent(serve), allow=[patterns.ANYTHING])
    assert program.wait_exit(10).code == 1
    assert "BootError" in program.log and "OSError: no database" in program.log
    program.finish(code=1)
