"""`run_pool()`: what its docstring says of states and failures."""

import signal

import pytest

from support import Program, ask, dial, until
from support.processes import alive
from support.scripts import Notes, Start, launch, noted

pytestmark = pytest.mark.timeout(60)

PROGRAM = """
from prefork.errors import BootError
from prefork.servers import runner, server_checks, worker_class
from prefork.workers import lifecycle

server = prefork.PreforkTCPServer(("127.0.0.1", 0), Handler)
server.workers = 2
options = server_checks.prepare([server], mend="")

def start(context, unblock):
    return lifecycle.main(context, lambda context: worker_class.make_worker(KIND, [server], context), unblock)

def began(master):
    note(f"state began {len(master.pids)}")
    when("stop", lambda: master.stop(detach=DETACH))
    BEGAN

def ends(master):
    note(f"state ends {len(master.pids)}")

def drains(master, finish):
    note(f"state drains {len(master.pids)}")
    master.stop()
    finish()

def serve(**hooks):
    listeners = [server_checks.listener_of(server)]
    runner.run_pool(listeners, options, start, runner.ServerHooks([server]), began=began, ends=ends, **hooks)
    note("state over")

KIND, DETACH = 0, 0
try:
    USE
except BaseException as error:
    note(f"state raised {type(error).__name__}")
finally:
    server.server_close()
"""


def run(
    start: Start, use: str, *, began: str = "pass", detach: bool = False, kind: str = "prefork.SyncWorker"
) -> Program:
    text = PROGRAM.replace("USE", use).replace("BEGAN", began)
    return launch(start, text.replace("KIND, DETACH = 0, 0", f"KIND, DETACH = {kind}, {detach}"))


def test_a_pool_from_begin_to_end(start: Start, notes: Notes) -> None:
    """began() comes before the first fork, ends() after the last exit, and then run_pool() returns."""
    program = run(start, "serve()").ready()
    assert ask(program.address).pid in program.wait_ready(2)
    program.finish()
    assert notes("state") == ["began 0", "ends 0", "over"]


def test_workers_that_are_left(start: Start, notes: Notes) -> None:
    """With `detach` workers may be left: drains() gets them, and the pool is over when it has called finish()."""
    program = run(start, "serve(drains=drains)", detach=True).ready()
    with dial(program.address) as busy:
        busy.sendall(b"busy gate go\n")
        noted(notes, "begun")
        program.write("stop", "")
        until(lambda: "drains 1" in notes("state") or "drains 2" in notes("state"), 5, "the drain was handed over")
        assert "ends 0" not in notes("state")
        program.write("go", "")
        assert busy.recv(100).endswith(b":busy:done\n")
    assert program.wait_exit().code == 0
    assert notes("state")[2:] == ["ends 0", "over"]
    program.finish()


def test_workers_that_nobody_takes(start: Start, notes: Notes) -> None:
    """Without drains() run_pool() itself waits for the workers that a stop with `detach` leaves."""
    program = run(start, "serve()", detach=True).ready()
    program.wait_ready(2)
    program.write("stop", "")
    assert program.wait_exit().code == 0
    assert notes("state") == ["began 0", "ends 0", "over"]
    program.finish()


def test_no_worker_becomes_ready(start: Start, notes: Notes) -> None:
    """It raises BootError, after ends(), and no worker is left."""
    program = run(start, "serve()", kind="type('Broken', (prefork.SyncWorker,), {'setup': 1 / 2})")
    program.wait_exit()
    assert notes("state") == ["began 0", "ends 0", "raised BootError"]
    program.finish(check_log=False)


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "SystemExit"])
def test_an_error_in_the_loop(start: Start, notes: Notes, error: str) -> None:
    """Whatever is raised in the master's thread, the workers are killed and collected before it is raised again."""
    use = f"signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw({error})); serve()"
    program = run(start, use).ready()
    workers = program.wait_ready(2)
    program.send(signal.SIGALRM)
    program.wait_exit()
    assert notes("state") == ["began 0", "ends 0", f"raised {error}"] and not any(map(alive, workers))
    program.finish(check_log=False)


def test_an_error_before_the_loop(start: Start, notes: Notes) -> None:
    """What began() raises ends the pool before it has a worker."""
    program = run(start, "serve()", began="1 / 0")
    program.wait_exit()
    assert notes("state") == ["began 0", "ends 0", "raised ZeroDivisionError"]
    program.finish(check_log=False)


def test_a_listener_that_cannot_be_opened(start: Start, notes: Notes) -> None:
    """It raises the listener's error, and there was no master."""
    use = "server_checks.Listener.open = lambda *_, **__: os.listdir('/no/such/place')\n    serve()"
    program = run(start, use)
    program.wait_exit()
    assert notes("state") == ["raised FileNotFoundError"]
    program.finish(check_log=False)
