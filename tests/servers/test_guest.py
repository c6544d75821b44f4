"""A pool is a guest in somebody else's process: children, signals, threads, timeouts and addresses stay theirs."""

import signal
import socketserver

import pytest

import prefork
from support import Address, ask, elapse, patterns, pids_serving, title
from support.contract import KINDS, simple
from support.scripts import Notes, Start, launch, noted

pytestmark = pytest.mark.timeout(60)


def test_children_of_others(start: Start, notes: Notes) -> None:
    """A subprocess of the program's own keeps its exit status, in the master and in a handler."""
    program = launch(
        start,
        """
        def strangers():
            for code in range(1, 21):
                child = subprocess.Popen(["/bin/sh", "-c", f"exit {code}"])
                note(f"stranger {code} {child.wait()}")

        when("go", strangers)
        with prefork.PreforkTCPServer(("127.0.0.1", 0), Handler) as server:
            server.serve_forever()
        """,
    ).ready()
    program.write("go", "")
    for code in range(1, 8):
        assert ask(program.address, f"run {code}").result == str(code)
        workers = [pid for pid in program.children() if patterns.TITLE_READY.search(title(pid))]
        program.kill_workers(*workers[:1])  # and no stranger
    noted(notes, "done")
    assert notes("stranger") == [f"{code} {code}" for code in range(1, 21)]
    program.finish(allow=[r".*DeprecationWarning: This process .* is multi-threaded.*", r"  .*"])


def test_signals_are_given_back(start: Start, notes: Notes) -> None:
    """After serve_forever() the program's own handlers and its set_wakeup_fd are in force again."""
    program = launch(
        start,
        """
        heard = []
        numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGTTIN, signal.SIGINT]
        for number in numbers:
            signal.signal(number, lambda number, frame: heard.append(number))
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)
        every = {one: signal.getsignal(one) for one in signal.valid_signals()}
        mine, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno())
        with prefork.PreforkTCPServer(("127.0.0.1", 0), Handler) as server:
            server.serve_forever()
        assert {one: signal.getsignal(one) for one in signal.valid_signals()} == every
        assert signal.set_wakeup_fd(-1) == theirs.fileno()
        assert heard == []
        for number in numbers:
            os.kill(os.getpid(), number)
        note(f"heard {heard == numbers}")
        mine.close()
        theirs.close()
        """,
    ).ready()
    ask(program.address)
    assert program.stop().code == 0
    assert notes("heard") == ["True"]
    program.finish()


def test_program_with_other_threads(start: Start) -> None:
    """A program whose other threads hold locks all the time, logging's among them, is served by workers that do not
    hang."""
    program = launch(
        start,
        """
        def chatter():
            while True:
                logging.getLogger("other").info("%s", "x" * 100)
                select.select([], [], [], 0.0005)

        for _ in range(3):
            threading.Thread(target=chatter, daemon=True).start()

        class Chatty(Handler):
            def answer(self, order):
                logging.getLogger("worker").info("answering")
                print("also answering", flush=True)
                return str(threading.active_count())

        class Server(prefork.PreforkTCPServer):
            workers = 3

        with Server(("127.0.0.1", 0), Chatty) as server:
            server.serve_forever()
        """,
    ).ready()
    for _ in range(10):
        workers = program.wait_ready(3)
        assert ask(program.address).result == "1"
        program.kill_workers(*workers[:2])
    pids_serving(program.address, 3)
    program.finish()


@pytest.mark.parametrize("kind", ["tcp", "udp", "unix"])
def test_default_timeout(start: Start, kind: str) -> None:
    """socket.setdefaulttimeout() of the program reaches the handlers' sockets, and does not disturb the pool."""
    base, handler, address, _ = KINDS[kind]
    program = launch(
        start,
        f"""
        socket.setdefaulttimeout(0.4)

        class Asks({handler}):
            def answer(self, order):
                return str(self.request.gettimeout() if hasattr(self.request, "gettimeout") else "")

        class Server(prefork.{base}):
            workers = 2

        with Server({address}, Asks) as server:
            server.serve_forever()
        """,
    ).ready()
    workers = program.wait_ready(2)
    elapse(0.6)
    assert ask(program.address).result == ("" if kind == "udp" else "0.4")
    assert program.wait_ready(2) == workers
    assert not program.found(patterns.LEFT)
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOADED)
    ask(program.address)
    program.finish()


def test_address_is_free_after_the_stop(start: Start) -> None:
    """After a stop the port can be bound at once, although clients have just been served on it."""
    program = launch(start, simple()).ready()
    address: Address = program.address
    for _ in range(5):
        ask(address)
    program.finish()
    with prefork.PreforkTCPServer((address.where, address.port), socketserver.BaseRequestHandler):
        pass
