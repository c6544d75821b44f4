"""ASGI requests that are late are cancelled, and a worker that does not hear is killed."""

import contextlib
import http.client
from contextlib import ExitStack

import pytest

from support import elapse, patterns, until
from support.asgi import TROUBLE, Client, get, pid_of, serve
from support.scripts import Notes, Start, noted

pytestmark = pytest.mark.timeout(60)


def test_a_late_request_is_cancelled(start: Start, notes: Notes) -> None:
    """Past request_timeout a request is cancelled: its `finally` runs, the client gets a 500 or, in the middle of an
    answer, the end; neighbours and the worker live."""
    program = serve(start, "-w", 1, "--request-timeout", 0.4, allow=TROUBLE)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        late, begun, near = (stack.enter_context(contextlib.closing(Client(program.address))) for _ in range(3))
        late.request("GET", "/late")
        begun.request("GET", "/late/begun")
        assert near.get("/version") == "one"
        assert late.getresponse().status == 500
        with pytest.raises(http.client.IncompleteRead):
            begun.getresponse().read()
        assert near.get() == f"{worker}:x"
    assert len(notes("finally")) == 2
    assert "RequestTimeout: the request took longer than 0.4 s" in program.log
    elapse(1.2)  # the master's look at the deadline it knows
    assert pid_of(program) == worker
    program.finish()


@pytest.mark.parametrize(("limit", "moved", "sleeps", "status"), [(0.5, 20, 1.0, 200), (20, 0.1, 15, 500)])
def test_a_deadline_that_the_application_moves(
    start: Start, notes: Notes, limit: float, moved: float, sleeps: float, status: int
) -> None:
    """An application finds its worker in the state of the scope, and gives its request another deadline: a later one,
    or an earlier one, past which it is cancelled as well."""
    program = serve(start, "-w", 1, "--request-timeout", limit, allow=TROUBLE)
    (worker,) = program.wait_ready(1)
    with contextlib.closing(Client(program.address)) as client:
        client.request("GET", f"/extend/{moved},{sleeps}")
        assert client.getresponse().status == status
    assert ("RequestTimeout" in program.log and "await asyncio.sleep(sleep)" in program.log) is (status == 500)
    assert pid_of(program) == worker
    program.finish()


def test_what_comes_after_the_answer_has_the_same_deadline(start: Start, notes: Notes) -> None:
    """What an application does after its answer is cancelled at the request's deadline, and the connection, on which
    the next request may run, is spared."""
    program = serve(start, "-w", 1, "--request-timeout", 1.5, allow=TROUBLE)
    with contextlib.closing(Client(program.address)) as client:
        assert client.get("/after/never") == "answered"
        sock = client.sock
        elapse(1.0)
        client.request("GET", "/gate/go")
        program.wait_for("a background task exceeded request_timeout")
        program.write("go", "")
        assert client.getresponse().read().endswith(b":go")
        assert client.sock is sock
    program.finish()


def test_a_request_that_blocks_the_loop_is_killed(start: Start, notes: Notes) -> None:
    """A loop that does not turn is found by the master: the worker is killed and replaced, and its report shows where
    it stood."""
    program = serve(start, "-w", 1, "--request-timeout", 0.3, allow=TROUBLE)
    (worker,) = program.wait_ready(1)
    with contextlib.closing(Client(program.address)) as client:
        client.request("GET", "/block")
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            client.getresponse()
    program.wait_ready(1, without=[worker])
    left = program.wait_for(patterns.LEFT)
    assert "request_timeout" in left[4] or "deadline" in left[4], left[4]
    assert "in app" in program.log or "SIGKILL" in left[4], "where it stood"
    assert get(program, "/version") == "one"
    program.finish()


def test_a_request_that_does_not_mind(start: Start, notes: Notes) -> None:
    """One that goes on in spite of its cancellation is cancelled again; its worker is replaced, and serves it out."""
    program = serve(start, "-w", 1, "--request-timeout", 0.2, allow=TROUBLE)
    (worker,) = program.wait_ready(1)
    with contextlib.closing(Client(program.address)) as client:
        client.request("GET", "/deaf/go")
        noted(notes, "cancelled", 2)
        until(lambda: pid_of(program) != worker, 10)
        program.write("go", "")
        assert client.getresponse().read() == b"at last"
    program.wait_for(patterns.LEFT)
    program.finish()


def test_an_exception(start: Start) -> None:
    """An exception of the application is a 500 with a traceback on standard error, and costs nothing else."""
    program = serve(start, "-w", 1, allow=TROUBLE)
    with contextlib.closing(Client(program.address)) as client:
        answer = client.ask("/raise")
        assert (answer.status, answer.read()) == (500, b"Internal Server Error")
    assert "ValueError: ordered trouble" in program.log
    assert get(program, "/version") == "one"
    program.finish()
