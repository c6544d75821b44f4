"""The worker class `wsgi`, in whose hands a connection is: threads that are all busy, the last answer, forked children,
and accounts of the application's own."""

import hashlib
import json
import os
import signal
import socketserver
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from prefork.link.scoreboard import Scoreboard
from prefork.link.worker_context import WorkerContext
from prefork.settings.settings import Options
from prefork.workers.wsgi.worker import WSGIWorker
from support import Program, elapse, patterns
from support.scripts import Notes, Start, launch, noted, path_of_modules
from support.web import Unanswered, Web

pytestmark = pytest.mark.timeout(60)

GET = b"GET /pid HTTP/1.1\r\nHost: test\r\n\r\n"


def serve(start: Start, *flags: object, app: str = "webapp:app", kind: str = "wsgi", **options: Any) -> Program:
    """The command over an application, with one worker."""
    argv = ["prefork", app, "-b", "tcp://127.0.0.1:0", "--worker-class", kind, "-w", 1, *flags]
    program: Program = start(*argv, env=path_of_modules(), **options)
    return program.ready()


# -- threads that are all busy -----------------------------------------------------------------------------------------

# Who idles is out of time as soon as there is a file `over`, and is noted once it was looked at.
HASTY = """
from kit import *
import prefork.workers.wsgi.worker as worker
from prefork.workers.intake.waiting import IDLE
from prefork.workers.wsgi.polling import PollingLoop

class HastyLoop(PollingLoop):
    def look(self):
        if (HOME / "over").exists():
            for one in self.connections.waiting():
                if one.phase == IDLE and one.served:
                    one.deadline = 0.0
        super().look()

    def _expire(self, connection):
        super()._expire(connection)
        note("expired")

worker.PollingLoop = HastyLoop

class Hasty(worker.WSGIWorker):
    TICK = 0.02
"""


def all_busy(start: Start, notes: Notes, stack: ExitStack) -> tuple[Program, Web]:
    """A worker whose two threads are at requests until there is a file `go`, and a connection to it that idles."""
    program = serve(start, "--threads", 2, kind="hasty:Hasty", files={"hasty.py": HASTY})
    kept, *others = [stack.enter_context(Web(program.address)) for _ in range(3)]
    assert kept.get().status == 200
    for client in others:
        client.send(b"GET /gate/go HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
    noted(notes, "begun", 2)
    return program, kept


def expire(program: Program, notes: Notes) -> None:
    """Have the time of who idles be over, and all threads free again."""
    program.write("over", "")
    noted(notes, "expired")
    (program.work / "over").unlink()
    program.write("go", "")


def turn(program: Program) -> None:
    """The main thread has looked at whatever was there before this."""
    with Web(program.address) as other:
        assert other.get("/pid", "Connection: close").status == 200


def test_a_request_is_executed_once(start: Start, notes: Notes) -> None:
    """A request that is found as its connection's time is over, while all threads are busy, is executed once, though
    the next one has come by then."""
    with ExitStack() as stack:
        program, kept = all_busy(start, notes, stack)
        kept.send(b"POST /gate/second HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n")
        expire(program, notes)
        noted(notes, "begun", 3)
        kept.send(GET)
        turn(program)
        program.write("second", "")
        assert [kept.answer().body for _ in range(2)] == [b"through", b"%d\n" % program.children()[0]]
        assert notes("begun") == ["go", "go", "second"]
    program.finish()


def test_an_upload_is_whole(start: Start, notes: Notes) -> None:
    """A long body, whose head is found as its connection's time is over, while all threads are busy, is read by nobody
    but the application."""
    body = os.urandom(1_000_000)
    with ExitStack() as stack:
        program, kept = all_busy(start, notes, stack)
        kept.send(b"POST /upload/second HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % len(body))
        expire(program, notes)
        noted(notes, "begun", 3)
        kept.send(body[:50_000])
        turn(program)
        program.write("second", "")
        answer = kept.send(body[50_000:]).answer()
        assert json.loads(answer.body)[:2] == [len(body), hashlib.sha256(body).hexdigest()]
        assert notes("begun") == ["go", "go", "second"]
    program.finish()


# A worker that says when it is told to leave, and gives its clients time.
LATE = """
from kit import *
import prefork.workers.wsgi.worker as worker
from prefork.workers.wsgi.polling import PollingLoop

class Late(worker.WSGIWorker):
    LAST_WORD = 10.0

    def drain(self):
        super().drain()
        note("draining")
"""

# The moment between an answer and the end of its connection lasts until there is a file `let-go`.
LATE_END = (
    LATE
    + """
class LateLoop(PollingLoop):
    def _linger(self, connection):
        note("answered")
        pass_gate("let-go")
        super()._linger(connection)

worker.PollingLoop = LateLoop
"""
)


def test_the_last_answer_arrives(start: Start, notes: Notes) -> None:
    """A worker that leaves ends no connection under the hands of a thread: where the next request has come already, a
    client that was answered sees the end of the stream, and no reset."""
    program = serve(start, "--threads", 2, kind="late:Late", files={"late.py": LATE_END})
    with Web(program.address) as client:
        client.send(b"GET /gate/go HTTP/1.1\r\nHost: test\r\n\r\n")
        noted(notes, "begun")
        program.send(signal.SIGTERM)
        noted(notes, "draining")
        client.send(GET)
        program.write("go", "")
        noted(notes, "answered")
        elapse(0.3)
        assert not program.found(patterns.LEFT)
        program.write("let-go", "")
        answer = client.answer()
        assert (answer.body, answer.closes, client.rest()) == (b"through", True, b"")
    program.wait_exit()
    program.finish()


# The moment between a first answer and the wait for a second request lasts until there is a file `let-go`.
LATE_RETURN = (
    LATE
    + """
class LateLoop(PollingLoop):
    def settle(self, connection, phase):
        if connection.served == 1:
            note("answered")
            pass_gate("let-go")
        super().settle(connection, phase)

worker.PollingLoop = LateLoop
"""
)


def test_the_next_answer_arrives(start: Start, notes: Notes) -> None:
    """A worker that leaves, and is given a connection back only after all its requests were over, answers the next one
    of that client, however long it takes."""
    program = serve(start, "--threads", 2, kind="late:Late", files={"late.py": LATE_RETURN})
    with Web(program.address) as client:
        assert client.get().status == 200
        noted(notes, "answered")
        program.send(signal.SIGTERM)
        noted(notes, "draining")
        client.send(b"GET /gate/go HTTP/1.1\r\nHost: test\r\n\r\n")
        program.write("let-go", "")
        noted(notes, "begun")
        elapse(0.3)
        program.write("go", "")
        answer = client.answer()
        assert (answer.body, answer.closes, client.rest()) == (b"through", True, b"")
    program.wait_exit()
    program.finish()


class Melting:
    """A connection that waits; a thread closes another one at the moment at which it is looked at."""

    served = 0

    def __init__(self, members: dict[int, Any]) -> None:
        self.members = members

    def melt(self) -> None:
        if len(self.members) > 1:
            self.members.popitem()

    @property
    def in_service(self) -> bool:
        self.melt()
        return True

    @property
    def phase(self) -> int:
        self.melt()
        return -1


@pytest.fixture
def worker() -> Iterator[WSGIWorker]:
    """One with threads, in this process and in no pool; its threads do not run."""
    uplink = os.pipe()
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        options = Options({"workers": 1, "threads": 2})
        one = WSGIWorker(
            [server], WorkerContext(0, 1, options, Scoreboard().slot(0), -1, uplink[1], b"a token.", True, "", 1)
        )
        yield one
    for fd in (*uplink, one._loop._wake_read, one._loop._wake_write):
        os.close(fd)


@pytest.mark.parametrize("look", ["always", "at the end"])
def test_connections_close_while_they_are_looked_through(worker: WSGIWorker, look: str) -> None:
    """A thread may close a connection at any moment, also while the main thread goes through all that wait."""
    connections: Any = worker._loop.connections.by_fd
    connections.update((number, Melting(connections)) for number in range(10))
    (worker._loop.connections.waiting if look == "always" else worker._loop.see_out)()
    assert len(connections) == 1


# -- connections ---------------------------------------------------------------------------------------------------


TIMED = """
import socket, webapp

def app(*arguments):
    socket.setdefaulttimeout(20)
    return webapp.app(*arguments)
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("when", ["before", "while serving"])
def test_default_timeout(start: Start, threads: int, when: str) -> None:
    """In a program with socket.setdefaulttimeout() a silent client holds nobody either."""
    text = TIMED + ("\nsocket.setdefaulttimeout(20)\n" if when == "before" else "")
    program = serve(start, "--threads", threads, app="timed:app", files={"timed.py": text})
    with Web(program.address) as first:
        assert first.get().status == 200
    with Web(program.address) as silent, Web(program.address) as halting:
        halting.send(GET[:9])
        with Web(program.address, timeout=5) as other:
            assert other.get().status == 200
        assert [silent.get().status, halting.send(GET[9:]).answer().status] == [200, 200]
    program.finish()


def test_verify_request_raises(start: Start) -> None:
    """A verify_request() that raises turns that client away, is reported by handle_error(), and the worker lives."""
    program = launch(
        start,
        """
        from webapp import app

        class ApplicationServer(prefork.PreforkTCPServer):
            worker_class = "wsgi"
            workers = 1

            def verify_request(self, request, peer):
                if (HOME / "shut").exists():
                    raise ValueError("ordered trouble")
                return True

        with ApplicationServer(("127.0.0.1", 0), app) as server:
            server.serve_forever()
        """,
        allow=[patterns.HANDLER_ERROR],
    ).ready()
    workers = program.wait_ready(1)
    path = program.write("shut", "")
    for _ in range(3):
        with Web(program.address) as client, pytest.raises((Unanswered, ConnectionError)):
            client.get()
    path.unlink()
    with Web(program.address) as client:
        assert client.get().body == b"%d\n" % workers[0]
    assert program.log.count("ValueError: ordered trouble") == 3
    program.finish()


def test_an_address_of_ones_own(start: Start) -> None:
    """A get_request() may give whatever it likes as the client's address, also a tuple without a port."""
    program = launch(
        start,
        """
        from webapp import app

        class ApplicationServer(prefork.PreforkTCPServer):
            worker_class = "wsgi"
            workers = 1
            number = 0

            def get_request(self):
                self.number += 1
                return super().get_request()[0], [("somebody",), (), "name", None, ("somebody", 7)][self.number % 5]

        with ApplicationServer(("127.0.0.1", 0), app) as server:
            server.serve_forever()
        """,
    ).ready()
    workers = program.wait_ready(1)
    for _ in range(5):
        with Web(program.address) as client:
            assert client.get().body == b"%d\n" % workers[0]
    program.finish()


# -- forked children, and accounts of the application's own ------------------------------------------------------------

# What it does is the path. An answer is what the slot of the scoreboard says: whether its worker is busy and has a
# deadline, and how many requests are over.
OWN = """
from kit import *
import prefork.link.scoreboard as scoreboard

def start_job(worker, name):
    begun = threading.Event()
    def run():
        with worker.serving("job", 0):
            begun.set()
            pass_gate(name)
        note(f"ended {name}")
    threading.Thread(target=run, name=name).start()
    begun.wait()

def app(environ, start_response):
    worker, board = environ["prefork.worker"], environ["prefork.worker"]._board
    for order in environ["PATH_INFO"][1:].split("/"):
        word, _, argument = order.partition("=")
        match word:
            case "fork":
                if pid := os.fork():
                    note(f"child {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")
                elif argument == "exit":
                    sys.exit(3)
                elif argument == "raise":
                    raise ValueError("ordered trouble")
                else:
                    break
            case "part":
                with worker.serving("part", float(argument)):
                    pass
            case "job":
                start_job(worker, argument)
            case "extend":
                worker.extend_deadline(float(argument))
            case "linger":
                linger(float(argument))
    floats = board.floats
    text = repr([floats[scoreboard.BUSY_SINCE] > 0, floats[scoreboard.DEADLINE] > 0, board.ints[scoreboard.REQUESTS]])
    start_response("200 OK", [("Content-Length", str(len(text)))])
    return [text.encode()]
"""


def own(start: Start, *flags: object, **options: Any) -> Program:
    return serve(start, *flags, app="own:app", files={"own.py": OWN, **options.pop("files", {})}, **options)


def slot(over: int, deadline: bool = True) -> bytes:
    """An answer, of a worker that is busy."""
    return repr([True, deadline, over]).encode()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("how", ["exit", "raise", "return"])
def test_end_of_a_forked_child(start: Start, notes: Notes, threads: int, how: str) -> None:
    """A child that the application forks, and that leaves it as a script ends or as a handler does, ends; the request,
    its client and the accounts stay its parent's."""
    allow = [patterns.TRACEBACK, r".*DeprecationWarning: This process .* is multi-threaded.*", r"  .*"]
    program = own(start, "--threads", threads, "--request-timeout", 20, allow=allow)
    with Web(program.address) as client:
        client.send(f"GET /fork={how} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        assert noted(notes, "child") == [{"exit": "3", "raise": "1", "return": "0"}[how]]
        if how == "return":
            assert client.answer().status == 200  # as the application wanted it
        assert client.answer().body == slot(0)
        assert client.get().body == slot(1)
    with Web(program.address) as other:
        assert other.get("/part=5/fork=exit").body == slot(3)
    program.finish()


def test_deadline_after_a_fork(start: Start) -> None:
    """A request whose forked child has ended has its deadline still."""
    program = own(start, "--request-timeout", 0.3, allow=[patterns.TRACEBACK])
    with Web(program.address) as client:
        assert client.get("/fork=exit/linger=8").status == 503
    program.finish()


ACCOUNTS = ["part=0", "part=9", "part=0/part=0", "job=now"]


@pytest.mark.parametrize("first", ACCOUNTS)
def test_deadline_after_accounts_of_ones_own(start: Start, first: str) -> None:
    """A request has its deadline still, whatever accounts of the application's own began and ended meanwhile."""
    program = own(start, "--request-timeout", 0.3, allow=[patterns.TRACEBACK], files={"now": ""})
    workers = program.wait_ready(1)
    for _ in range(2):
        with Web(program.address) as client:
            assert client.get(f"/{first}/linger=8").status == 503
    with Web(program.address) as client:
        assert client.get().body == slot(2 * first.count("=") + 2)
    assert program.children() == workers
    program.finish()


@pytest.mark.parametrize(("threads", "first"), [*((1, first) for first in ACCOUNTS), (1, "job=go"), (2, "part=0")])
def test_extending_after_accounts_of_ones_own(start: Start, threads: int, first: str) -> None:
    """extend_deadline() is for the request that the calling thread has in progress, also where that has had others."""
    program = own(start, "--threads", threads, "--request-timeout", 0.3, files={"now": ""})
    with Web(program.address) as client:
        assert client.get(f"/{first}/extend=20/linger=0.5").status == 200
    program.write("go", "")
    program.finish()


def test_a_job_that_outlasts_its_request(start: Start, notes: Notes) -> None:
    """A request of a thread of the application is counted as it ends, beside all requests before and after it."""
    program = own(start, "--request-timeout", 20)
    with Web(program.address) as client:
        assert [client.get(path).body for path in ("/", "/job=go", "/", "/")] == [slot(n) for n in range(4)]
        program.write("go", "")
        noted(notes, "ended")
        assert [client.get().body for _ in range(2)] == [slot(5), slot(6)]
    program.finish()
