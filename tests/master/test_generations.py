"""Settings belong to a generation: what a reload brings, what the old workers keep, what a mistake does."""

import signal
from contextlib import ExitStack

import pytest

from support import ask, patterns, until
from support.scripts import Notes, Start, hold, launch, noted, path_of_modules, rest

pytestmark = pytest.mark.timeout(60)

SERVER = """
class Server(prefork.PreforkTCPServer):
    workers = 2

def change():
    {change}

when("change", change)
with Server(("127.0.0.1", 0), Handler) as server:
    server.serve_forever()
"""


def test_a_reload_reads_the_settings_of_a_script_anew(start: Start, notes: Notes) -> None:
    """Number, class and deadlines of the new workers are those of the server at the reload; a worker of the old
    generation that is still busy has no deadline of the new one."""
    # With a surge of two, all new workers start although the busy one does not leave.
    change = "Server.workers, Server.worker_class, Server.request_timeout, Server.max_surge = 3, 'thread', 0.3, 2"
    program = launch(start, SERVER.format(change=change), allow=[patterns.ANYTHING]).ready()
    before = set(program.wait_ready(2))
    assert ask(program.address, "thread").result == "MainThread"
    with ExitStack() as stack:
        old = hold(program.address, stack, "gate open")
        noted(notes, "begun")
        program.write("change", "")
        noted(notes, "done")
        program.send(signal.SIGHUP)
        program.wait_for(patterns.RELOAD_BEGINS)
        until(lambda: len(before & set(program.children())) == 1, 10, "only the busy one of the old generation is left")
        program.wait_ready(4)
        late = hold(program.address, stack, "gate never")
        noted(notes, "begun", 2)
        assert rest(late) == b"", "the new generation has a deadline"
        program.write("open", "")
        assert rest(old).endswith(b":done\n"), "the old one has none"
    program.wait_for(patterns.RELOADED)
    program.wait_ready(3)
    assert ask(program.address, "thread").result != "MainThread"
    program.finish()


def test_a_mistake_in_the_settings_fails_the_reload(start: Start, notes: Notes) -> None:
    """A setting that is out of range fails the reload in one line; the old generation serves on with its own."""
    program = launch(start, SERVER.format(change="Server.request_timeout = -1")).ready()
    workers = program.wait_ready(2)
    program.write("change", "")
    noted(notes, "done")
    program.send(signal.SIGHUP)
    program.wait_for(
        r"reload failed: generation 1 serves on: request_timeout: must be a number of seconds, .* \[PF0102\]\n"
    )
    assert program.wait_ready(2) == workers
    ask(program.address)
    program.finish()


APP = """
from kit import *

class Server(prefork.PreforkTCPServer):
    {settings}

    def __init__(self, address, handler=Handler):
        super().__init__(address, handler)
"""


def test_a_reload_reads_the_settings_of_the_program_anew(start: Start, notes: Notes) -> None:
    """The command applies what a new release of its program sets: number, class, deadlines; a flag counts more."""
    flags = ("app:Server", "-b", "tcp://127.0.0.1:0", "--max-requests", 1000)
    old, new = "workers = 2", "workers, worker_class, request_timeout, max_requests = 3, 'thread', 0.3, 1"
    app = APP.format(settings=old)
    program = start("prefork", *flags, files={"app.py": app}, env=path_of_modules(), allow=[patterns.ANYTHING]).ready()
    program.wait_ready(2)
    program.write("app.py", APP.format(settings=new))
    program.reload()
    workers = program.wait_ready(3)
    assert ask(program.address, "thread").result != "MainThread"
    with ExitStack() as stack:
        assert rest(hold(program.address, stack, "gate never")) == b"", "it has a deadline now"
    program.wait_ready(3)
    program.write("app.py", APP.format(settings="workers = 0"))
    program.send(signal.SIGHUP)
    program.wait_for(r"reload failed: generation 2 serves on: workers: must be a whole number from 1 to 2048, not 0")
    assert len(set(program.wait_ready(3)) & set(workers)) >= 2, "only the one that hung was replaced"
    assert "max_requests" not in program.log
    program.finish()


def test_an_order_of_the_operator_outlives_reloads(start: Start) -> None:
    """How many workers TTIN and TTOU have left counts more than what the program says at a reload."""
    files = {"app.py": APP.format(settings="workers = 2")}
    program = start("prefork", "app:Server", "-b", "tcp://127.0.0.1:0", files=files, env=path_of_modules()).ready()
    program.wait_ready(2)
    program.send(signal.SIGTTOU)
    program.wait_ready(1)
    program.write("app.py", APP.format(settings="workers = 3"))
    program.reload()
    program.wait_ready(1)
    program.finish()
