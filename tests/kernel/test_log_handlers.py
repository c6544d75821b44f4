"""No handler, filter or formatter that a program gives to logging makes its pool's master wait, or harms it."""

import contextlib
import logging
import os
import re
import signal
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import prefork
import prefork.kernel.log_thread as log_thread
import prefork.kernel.logs as logs
from support import Address, Program, ask, patterns, until, within
from support.pipes import drained, fill, pipe
from support.scripts import Start, launch, path_of_modules

pytestmark = pytest.mark.timeout(60)

BUFFERED = {"PYTHONUNBUFFERED": ""}  # as programs are run: sys.stderr has a lock, which a write holds

SERVER = """
class Server(prefork.PreforkTCPServer):
    workers = 2

Path("pid").write_text(str(os.getpid()))
with Server({address}, Handler) as server:
    server.serve_forever()
"""


def script(start: Start, configure: str, port: int, **options: Any) -> tuple[Program, Address]:
    """A pool of two workers in a program that configures logging."""
    body = "logging.root.handlers.clear()  # of the kit\n" + textwrap.dedent(configure) + SERVER
    program = launch(start, body.replace("{address}", f'("127.0.0.1", {port})'), env=BUFFERED, **options)
    program.wait_ready(2, timeout=10)
    return program, Address("tcp", "127.0.0.1", port)


def check_goes_on(program: Program, address: Address) -> None:
    """It serves, replaces who is killed, obeys TERM within a second, and ends well."""
    assert ask(address).result == "done"
    for _ in range(2):
        victims = program.wait_ready(2)
        program.kill_workers(*victims)
        program.wait_ready(2, without=victims)
        assert ask(address).result == "done"
    program.send(signal.SIGTTIN)
    program.wait_ready(3)
    program.send(signal.SIGUSR1)
    program.send(signal.SIGTERM)
    within(program.wait_exit().seconds, 1.0)
    program.finish()


STANDARD = {
    "stderr": "logging.basicConfig(level=logging.INFO)",
    "stdout": "logging.basicConfig(level=logging.INFO, stream=sys.stdout)",
    "format": """
        class Form(logging.Formatter):
            pass

        logging.basicConfig(level=logging.INFO)
        logging.root.handlers[0].setFormatter(Form())
        """,
}


@pytest.mark.parametrize("configure", STANDARD)
def test_full_standard_stream(start: Start, port: int, configure: str) -> None:
    """Where the log goes to a full pipe that nobody reads the pool serves on and obeys, and the program's own lines do
    not hold its workers; what was dropped is said once there is room."""
    body = """
    class Handler(Handler):
        def answer(self, order):
            logging.getLogger("own").warning("a line of the program's own")
            return super().answer(order)
    """
    with pipe() as (reader, end):
        fill(end)
        streams = {"stdout" if configure == "stdout" else "stderr": end}
        program, address = script(start, textwrap.dedent(STANDARD[configure]) + textwrap.dedent(body), port, **streams)
        assert ask(address).result == "done"
        drained(reader)
        victims = program.wait_ready(2)
        program.kill_workers(victims[0])
        program.wait_ready(2, without=victims[:1])
        text = bytearray()

        def said() -> bool:
            text.extend(drained(reader))
            return b" exited: " in text

        until(said)
        assert re.search(
            rb"prefork\[\d+\]: \d+ messages were dropped because standard (error|output) was full \[PF0501\]\n", text
        )
        fill(end)
        check_goes_on(program, address)


WAITING = {
    "sleeps": """
        class Waits(logging.Handler):
            def emit(self, record):
                time.sleep(3600)
        """,
    "formats": """
        class Form(logging.Formatter):
            def format(self, record):
                time.sleep(3600)

        class Waits(logging.StreamHandler):
            def __init__(self):
                super().__init__()
                self.setFormatter(Form())
        """,
    "fifo": """
        os.mkfifo("fifo")
        reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
        filler = os.open("fifo", os.O_WRONLY | os.O_NONBLOCK)
        try:
            while True:
                os.write(filler, b"." * 4096)
        except BlockingIOError:
            os.close(filler)

        class Waits(logging.FileHandler):
            def __init__(self):
                super().__init__("fifo")
        """,
    "filters": """
        class Waits(logging.NullHandler):
            def __init__(self):
                super().__init__()
                logging.getLogger("prefork").addFilter(lambda record: time.sleep(3600))
        """,
}


@pytest.mark.parametrize("handler", WAITING)
def test_handler_that_never_returns(start: Start, port: int, handler: str) -> None:
    """A handler, formatter or filter of the program's that waits for ever holds up neither master nor end; what it does
    not take is on standard error."""
    program, address = script(
        start, textwrap.dedent(WAITING[handler]) + "logging.basicConfig(level=logging.INFO, handlers=[Waits()])\n", port
    )
    program.kill_workers(program.wait_ready(2)[0])
    program.wait_ready(2)
    check_goes_on(program, address)
    assert program.found(patterns.LEFT)


def test_handler_that_waits_for_standard_error(start: Start, port: int) -> None:
    """The same where it prints to a full standard error: the interpreter ends as it should, though the lock of the
    stream is never given back."""
    with pipe() as (_, end):
        fill(end)
        program, address = script(
            start,
            """
            class Prints(logging.Handler):
                def emit(self, record):
                    print("a line of more than a page" * 1000, file=sys.stderr)

            logging.basicConfig(level=logging.INFO, handlers=[Prints()])
            """,
            port,
            stderr=end,
        )
        check_goes_on(program, address)


RAISING = {
    "handler": """
        class Raises(logging.Handler):
            def handle(self, record):
                raise RuntimeError("ordered trouble")

        logging.basicConfig(level=logging.INFO, handlers=[Raises()])
        """,
    "emit": """
        class Raises(logging.Handler):
            def emit(self, record):
                raise RuntimeError("ordered trouble")

        logging.basicConfig(level=logging.INFO, handlers=[Raises()])
        """,
    "handleError": """
        logging.raiseExceptions = False
        logging.basicConfig(level=logging.INFO, handlers=[logging.FileHandler("/dev/full")])
        """,
    "filter": """
        logging.basicConfig(level=logging.INFO, handlers=[logging.FileHandler("own.log")])
        logging.root.handlers[0].addFilter(lambda record: 1 / 0)
        """,
    "filter of the logger": """
        logging.getLogger("prefork").addFilter(lambda record: 1 / 0)
        """,
    "format": """
        logging.basicConfig(level=logging.INFO, format="%(nothing)s")
        """,
    "factory": """
        def make(*arguments, **named):
            raise RuntimeError("ordered trouble")

        logging.setLogRecordFactory(make)
        """,
    "no handler at all": """
        logging.root.handlers.append(None)
        """,
}


@pytest.mark.parametrize("raising", RAISING)
def test_handler_that_raises(start: Start, port: int, raising: str) -> None:
    """What raises in logging does not harm the pool; deaths of workers are said nevertheless, and the failure once."""
    program, address = script(start, RAISING[raising], port)
    check_goes_on(program, address)
    assert len(program.found(patterns.LEFT)) >= 4
    assert len(program.found(re.compile(r": logging: .* of the program failed: "))) == 1


def test_others_have_what_one_fails_to_take(start: Start, port: int) -> None:
    """A handler that raises deprives no other of a record, and then standard error has only its failure."""
    program, address = script(
        start,
        """
        class Raises(logging.Handler):
            def emit(self, record):
                raise RuntimeError("ordered trouble")

        logging.basicConfig(level=logging.INFO, handlers=[Raises(), logging.FileHandler("own.log")])
        """,
        port,
    )
    check_goes_on(program, address)
    own = (program.work / "own.log").read_text()
    assert own.count(" exited: ") >= 4 and own.endswith("stopped\n")
    assert len(program.log.splitlines()) == 1 and "RuntimeError('ordered trouble')" in program.log


def test_prefork_is_imported_first(start: Start, port: int) -> None:
    """A program that configures logging after it has imported prefork hears of the deaths of its workers, in its own
    handlers if it has some; of warnings and errors on standard error if it has none."""
    program, address = script(start, 'import logging.config\nlogging.config.dictConfig({"version": 1})\n', port)
    check_goes_on(program, address)
    assert len(program.found(patterns.LEFT)) >= 4
    assert not program.found(patterns.STOPPED)  # which is no warning
    program, address = script(
        start,
        """
        import logging.config
        logging.config.dictConfig({
            "version": 1,
            "handlers": {"own": {"class": "logging.FileHandler", "filename": "own.log"}},
            "root": {"handlers": ["own"], "level": "INFO"},
        })
        """,
        port,
    )
    check_goes_on(program, address)
    assert program.log == ""
    own = (program.work / "own.log").read_text()
    assert own.startswith("listening on tcp:") and own.count(" exited: ") >= 4 and own.endswith("stopped\n")


@pytest.mark.parametrize("order", ["logging.disable(logging.CRITICAL)", 'logging.getLogger("prefork").setLevel(60)'])
def test_program_that_wants_silence(start: Start, port: int, order: str) -> None:
    """In a program of its own an order to log nothing is obeyed."""
    program, address = script(start, order + "\n", port)
    check_goes_on(program, address)
    assert program.log == ""


FIRST = """
import logging

class Logger(logging.Logger):
    def makeRecord(self, *arguments, **named):
        record = super().makeRecord(*arguments, **named)
        record.own = "added"
        return record

def seen(self, record):
    with open("seen", "a") as file:
        file.write(record.getMessage() + "\\n")
    return call(self, record)

call = logging.Logger.callHandlers
logging.Logger.callHandlers = seen
logging.setLoggerClass(Logger)
logging.basicConfig(level=logging.INFO, format="own %(own)s %(message)s", filename="own.log")
from kit import *
"""


def test_program_with_a_class_of_loggers(start: Start, port: int) -> None:
    """What a program's own class of loggers adds to records is there, and whoever wants to see each record on its way,
    as services that collect errors do, sees it."""
    text = FIRST + SERVER.replace("{address}", f'("127.0.0.1", {port})')
    program = start("{work}/app.py", files={"app.py": text}, env=path_of_modules())
    program.wait_ready(2, timeout=10)
    check_goes_on(program, Address("tcp", "127.0.0.1", port))
    assert " exited: " in (program.work / "seen").read_text()
    assert re.search("^own added worker .* exited: ", (program.work / "own.log").read_text(), re.MULTILINE)


def test_threads_of_ours_are_nobody(start: Start, port: int) -> None:
    """The thread for the program's handlers is none that workers miss: pipes that were opened meanwhile are theirs."""
    program, address = script(
        start,
        """
        logging.basicConfig(level=logging.DEBUG, filename="own.log")

        class Handler(Handler):
            def answer(self, order):
                return f"{threading.active_count()} {sum(map(is_pipe, os.listdir('/proc/self/fd')))}"

        def is_pipe(fd):
            try:
                return os.readlink(f"/proc/self/fd/{fd}") == name
            except OSError:
                return False

        def worker_exited(self, report):
            global name
            reader, _ = os.pipe()
            name = os.readlink(f"/proc/self/fd/{reader}")

        prefork.PreforkTCPServer.worker_exited = worker_exited
        name = ""
        """,
        port,
    )
    victims = program.wait_ready(2)
    program.kill_workers(*victims)
    program.wait_ready(2, without=victims)
    assert ask(address).result == "1 2"
    assert "without these threads" not in (program.work / "own.log").read_text()
    program.finish()


def test_no_worker_inherits_a_lock(start: Start, port: int) -> None:
    """A fork comes between two records: what the program's handler locks for each is free in every worker."""
    program, address = script(
        start,
        """
        class Locks(logging.Handler):
            own = threading.Lock()

            def emit(self, record):
                with self.own:
                    time.sleep(0.01)

        class Boots(prefork.SyncWorker):
            def setup(self):
                logging.getLogger("own").warning("boots")

        logging.basicConfig(level=logging.INFO, handlers=[Locks()])
        prefork.PreforkTCPServer.worker_class = Boots
        """,
        port,
    )
    for _ in range(5):
        victims = program.wait_ready(2)
        program.kill_workers(*victims)
        program.wait_ready(2, without=victims)
    assert ask(address).result == "done"
    program.finish()


# -- in this process ---------------------------------------------------------------------------------------------------


class Quick(prefork.BaseRequestHandler):
    """Serves nothing."""


@contextlib.contextmanager
def records() -> Iterator[list[str]]:
    """What a handler of this process is given."""
    given: list[str] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            given.append(record.getMessage())

    handler, logger = Keeps(), logging.getLogger("prefork")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield given
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


class Held(logging.Handler):
    """Takes nothing before it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.given = threading.Event(), list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.free.wait(20)
        self.given.append(record.getMessage())


def background() -> log_thread.Background:
    assert log_thread.current is not None
    return log_thread.current


@contextlib.contextmanager
def held() -> Iterator[tuple[logging.Logger, Held]]:
    """A logger of prefork's in a process in which a master runs, and a handler of it."""
    logger, handler = logs.get("prefork"), Held()
    logger.addHandler(handler)
    logs.begin()
    try:
        yield logger, handler
    finally:
        handler.free.set()
        logs.end()
        logger.removeHandler(handler)


def test_queue_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue for slow handlers is bounded; what was dropped is said with the next record that fits."""
    monkeypatch.setattr(log_thread, "QUEUE_LIMIT", 3)
    monkeypatch.setattr(log_thread, "STUCK_AFTER", 60.0)
    with held() as (logger, handler):
        logger.error("0")
        until(lambda: background()._since > 0.0)
        for number in range(1, 10):
            logger.error("%d", number)
        handler.free.set()
        until(lambda: handler.given == ["0", "1", "2", "3"])
        logger.error("10")
    assert handler.given[4:] == [
        "logging: 6 records were dropped because handlers of the program are too slow [PF0506]",
        "10",
    ]


def test_handler_that_returns_after_all(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A handler that returns late gets the records that come then; those in between were on standard error."""
    monkeypatch.setattr(log_thread, "STUCK_AFTER", 0.05)
    with held() as (logger, handler):
        logger.error("first")
        until(lambda: background().is_stuck)
        logger.error("second")
        logger.error("third")
        handler.free.set()
        until(lambda: handler.given == ["first"])
        until(lambda: background()._since == 0.0)
        logger.error("fourth")
    assert handler.given == ["first", "fourth"]
    note, second, third = capfd.readouterr().err.splitlines()
    assert "has not returned for 0.05 s" in note and second.endswith("second") and third.endswith("third")


@pytest.mark.parametrize("block", [True, False])
def test_records_are_there_when_it_returns(block: bool) -> None:
    """When serve_forever() returns, the handlers of the program have every record, in their order; those of a drain
    that goes on come when that ends. No thread and no descriptor is left."""
    with records() as given, prefork.PreforkTCPServer(("127.0.0.1", 0), Quick) as server:
        before = len(os.listdir("/proc/self/fd"))
        server.block_on_close = block

        def stop_when_ready() -> None:
            until(lambda: "pool ready" in str(given))
            server.shutdown()

        stop = threading.Thread(target=stop_when_ready)
        stop.start()
        server.serve_forever()
        assert given[0].startswith("listening on tcp:") and any(
            text.startswith("stopping gracefully") for text in given
        )
        if block:
            assert given[-1] == "stopped"
        stop.join()
        until(lambda: given[-1] == "stopped")
        until(lambda: threading.active_count() == 1, what="no thread is left")
        until(lambda: len(os.listdir("/proc/self/fd")) == before, what="no descriptor is left")
