"""The end of a process in which the program lives, as Python ends one: `atexit` functions run, once, and threads that
are no daemons are waited for; nothing that belongs to another process is ended with it."""

import re
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support import Program, ask, children, elapse, patterns, title, until
from support.scripts import Notes, Start, hold, launch, noted, path_of_modules, rest

pytestmark = pytest.mark.timeout(60)

TCP = "tcp://127.0.0.1:0"

APP = """
import atexit, shutil, tempfile, weakref
from kit import *

PROBE = Path("/proc/self/cmdline").read_text().startswith("prefork: probe")
FOLDER = tempfile.mkdtemp(dir=HOME, prefix="temporary-")
weakref.finalize(Handler, shutil.rmtree, FOLDER)
atexit.register(note, f"end {os.getpid()} first")
atexit.register(note, f"end {os.getpid()} second")

class Awaiting(prefork.AsyncStreamRequestHandler):
    async def handle(self): ...

def application(environ, start_response):
    start_response("200 OK", [])
    return [b""]

async def asgi(scope, receive, send):
    assert scope["type"] == "http"

"""


def command(start: Start, *arguments: object, app: str = APP, **options: Any) -> Program:
    return start("prefork", *arguments, "-b", TCP, files={"app.py": app}, env=path_of_modules(), **options)


def temporary(program: Program) -> list[Path]:
    return list(program.work.glob("temporary-*"))


def ends(notes: Notes, pid: int) -> list[str]:
    """What a process has noted at its end, in its order."""
    return [row.split()[1] for row in notes("end") if row.split()[0] == str(pid)]


KINDS = {"sync": "Handler", "thread": "Handler", "asyncio": "Awaiting", "wsgi": "application", "asgi": "asgi"}


@pytest.mark.parametrize("kind", KINDS)
def test_each_process_of_the_command_ends_in_order(start: Start, notes: Notes, kind: str) -> None:
    """What the program registers runs in the child that tries it and in each worker, once and the last first, and
    temporary folders do not pile up with the generations."""
    program = command(start, f"app:{KINDS[kind]}", "-w", 2, "--worker-class", kind).ready()
    workers = program.wait_ready(2)
    assert len(temporary(program)) == 2
    program.reload()
    workers += program.wait_ready(2, without=workers)
    assert len(temporary(program)) == 2
    program.finish()
    assert not temporary(program)
    for pid in workers:
        assert ends(notes, pid) == ["second", "first"]
    assert len(notes("end")) == 2 * (4 + 2)  # two children have tried it


def test_a_worker_of_a_script_ends_what_it_began_itself(start: Start, notes: Notes) -> None:
    """What the master of a script has registered runs in the master alone; what a worker registers, in that worker. The
    end of a worker removes no folder, and ends no process, of the master's."""
    program = launch(
        start,
        """
        import atexit, multiprocessing, tempfile, weakref

        def born(word):
            atexit.register(lambda: note(f"{word} {os.getpid()}"))
            kept.append(tempfile.mkdtemp(dir=HOME))
            weakref.finalize(Handler, lambda path: note(f"finalized {os.getpid()} {os.rmdir(path)}"), kept[-1])

        class Worker(prefork.SyncWorker):
            def setup(self):
                born("worker")

        class Server(prefork.PreforkTCPServer):
            workers = 2
            worker_class = Worker

        kept = []
        born("master")
        child = multiprocessing.get_context("fork").Process(target=pass_gate, args=("go",), daemon=True)
        child.start()
        with Server(("127.0.0.1", 0), Handler) as server:
            server.serve_forever()
        note(f"left {list(map(str, HOME.glob('tmp*'))) == kept}")
        (HOME / "go").touch()
        child.join()
        note(f"child {child.exitcode}")
        """,
    ).ready()
    until(lambda: len(list(program.work.glob("tmp*"))) == 3, 5, "both workers have a folder")
    workers = {str(pid) for pid in program.children()}
    program.finish()
    assert (notes("left"), notes("child")) == (["True"], ["0"])
    assert notes("master") == [str(program.pid)]
    assert len(notes("worker")) == 2 and set(notes("worker")) < workers
    assert sorted(notes("finalized")) == sorted(f"{pid} None" for pid in notes("worker") + notes("master"))
    assert not list(program.work.glob("tmp*"))


THREAD = """
def work(name):
    pass_gate(name)
    note(f"worked {os.getpid()}")

class Beginning(Handler):
    def answer(self, order):
        threading.Thread(target=work, args=(order,), name="the-slow-one").start()
        return "done"
"""


def test_a_thread_is_waited_for(start: Start, notes: Notes) -> None:
    """A worker that leaves waits for a thread that is no daemon, and then runs what is registered."""
    program = command(start, "app:Beginning", "-w", 1, app=APP + THREAD).ready()
    worker = ask(program.address, "go").pid
    program.begin_stop()
    program.wait_for(r"SIGTERM")
    until(lambda: title(worker).endswith("leaving"), 5, "the worker has served everybody")
    assert not ends(notes, worker)
    program.write("go", "")
    assert program.wait_exit().code == 0
    assert notes("worked") == [str(worker)] and ends(notes, worker) == ["second", "first"]
    program.finish()


def test_a_thread_that_does_not_end_is_named(start: Start) -> None:
    """At the end of graceful_timeout a worker that waits for a thread is killed; the report names the thread and shows
    where it is."""
    program = command(
        start, "app:Beginning", "-w", 1, "--graceful-timeout", 1.3, app=APP + THREAD, allow=[patterns.ANYTHING]
    ).ready()
    ask(program.address, "never")
    assert program.stop().code == 0
    assert "it did not finish within graceful_timeout" in program.log
    assert "at its end it waits for these threads: the-slow-one\n" in program.log and "in pass_gate" in program.log
    program.finish()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])  # the default is fork; from Python 3.14 on forkserver
def test_what_the_program_has_left_running_is_ended(start: Start, notes: Notes, method: str) -> None:
    """Idle threads and processes of executors, and pools of processes, end with the worker, as fast as ever; what
    logging still keeps is written."""
    app = (
        APP
        + """
import concurrent.futures, logging.handlers, multiprocessing

FILE = logging.FileHandler("own.log")
logging.getLogger("own").addHandler(logging.handlers.MemoryHandler(100, target=FILE))
logging.getLogger("own").propagate = False

class Busy(Handler):
    def answer(self, order):
        with_threads = concurrent.futures.ThreadPoolExecutor(2)
        context = multiprocessing.get_context("METHOD")
        with_processes = concurrent.futures.ProcessPoolExecutor(1, context)
        kept.append((with_threads, with_processes, pool := context.Pool(1)))
        logging.getLogger("own").warning("by %d", os.getpid())
        results = with_threads.submit(abs, -1).result(), with_processes.submit(abs, -2).result(), pool.apply(abs, (-3,))
        return "%d%d%d" % results

kept = []
"""
    )
    program = command(start, "app:Busy", "-w", 1, app=app.replace("METHOD", method)).ready()
    reply = ask(program.address, "all", timeout=20)
    assert reply.result == "123" and len(children(reply.pid)) >= 2
    assert program.stop().code == 0
    assert ends(notes, reply.pid) == ["second", "first"]
    assert (program.work / "own.log").read_text() == f"by {reply.pid}\n"
    program.finish()


def test_one_that_raises_does_not_keep_the_others(start: Start, notes: Notes) -> None:
    """A function that raises at the end is shown; the others run, and the worker's code is what it was."""
    program = command(start, "app:Handler", "-w", 1, app=APP + "atexit.register(lambda: 1 / 0)\n").ready()
    (worker,) = program.wait_ready(1)
    program.stop()
    assert ends(notes, worker) == ["second", "first"]
    assert "ZeroDivisionError" in program.log and "exit code" not in program.log
    program.finish(allow=[patterns.TRACEBACK, "Exception ignored in atexit callback.*"])


def test_what_is_cut_off_runs_nothing(start: Start, notes: Notes) -> None:
    """A worker that is killed, or told to leave at once in the middle of a request, runs nothing more; an idle one
    does, and one that the program ends by SystemExit."""
    program = command(start, "app:Handler", "-w", 1).ready()
    (killed,) = program.wait_ready(1)
    program.kill_workers(killed)
    (busy,) = program.wait_ready(1, without=[killed])
    with ExitStack() as stack:
        held = hold(program.address, stack, "gate go")
        noted(notes, "begun")
        program.send(signal.SIGQUIT, busy)
        assert rest(held) == b""
    (leaving,) = program.wait_ready(1, without=[killed, busy])
    with ExitStack() as stack:
        assert rest(hold(program.address, stack, "leave 3")) == b""
    (idle,) = program.wait_ready(1, without=[killed, busy, leaving])
    assert program.stop(signal.SIGINT).code == 0
    assert [ends(notes, pid) for pid in (killed, busy)] == [[], []]
    assert [ends(notes, pid) for pid in (leaving, idle)] == [["second", "first"]] * 2
    assert "exit code 3" in program.log
    program.finish()


def test_an_end_that_hangs_is_ended(start: Start) -> None:
    """A worker that ends by itself, and hangs in what is registered, is replaced at once and killed in the end."""
    app = APP + "atexit.register(lambda: (HOME / 'hang').exists() and pass_gate('never'))\n"
    program = command(
        start, "app:Handler", "-w", 1, "--graceful-timeout", 0.5, app=app, allow=[patterns.ANYTHING]
    ).ready()
    (worker,) = program.wait_ready(1)
    program.write("hang", "")
    with ExitStack() as stack:
        assert rest(hold(program.address, stack, "leave 3")) == b""
    until(lambda: ask(program.address).pid != worker, 5, "another one serves")
    program.wait_for(r"exited: it did not finish within graceful_timeout")
    (program.work / "hang").unlink()
    program.finish()


def test_an_end_has_no_deadline_of_a_request(start: Start, notes: Notes) -> None:
    """What is registered may take longer than request_timeout, also where a request has ended the worker."""
    app = APP + "atexit.register(lambda: (HOME / 'slow').exists() and pass_gate('go'))\n"
    program = command(start, "app:Handler", "-w", 1, "--request-timeout", 0.2, app=app).ready()
    (worker,) = program.wait_ready(1)
    program.write("slow", "")
    with ExitStack() as stack:
        assert rest(hold(program.address, stack, "leave 0")) == b""
    until(lambda: ask(program.address).pid != worker, 5, "another one serves")
    elapse(0.5)
    assert not ends(notes, worker)
    program.write("go", "")
    until(lambda: ends(notes, worker) == ["second", "first"], 5, "it has ended in order")
    program.finish()
    assert "deadline" not in program.log


# -- before it is ready ------------------------------------------------------------------------------------------------

WAITING = """
if (HOME / "slow").exists():
    note(f"boots {os.getpid()}")
    pass_gate("never")
"""
SWALLOWING = """
while (HOME / "slow").exists():
    try:
        note(f"boots {os.getpid()}")
        pass_gate("never")
    except BaseException:
        pass
"""
IN_SETUP = """
class Worker(prefork.SyncWorker):
    def setup(self):
        exec(WAITING)

class Handling(prefork.PreforkTCPServer):
    worker_class = Worker
    RequestHandlerClass = Handler
    def __init__(self, address, handler=Handler):
        super().__init__(address, handler)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["import", "setup"])
def test_told_to_leave_before_it_is_ready(start: Start, notes: Notes, where: str, number: signal.Signals) -> None:
    """A worker that is told to leave while it boots gives that up, and what it has begun is removed."""
    app = APP + (WAITING if where == "import" else f"WAITING = '''{WAITING}'''\n{IN_SETUP}")
    program = command(start, "app:" + ("Handler" if where == "import" else "Handling"), "-w", 1, app=app).ready()
    (first,) = program.wait_ready(1)
    program.write("slow", "")
    program.kill_workers(first)
    booting = int(noted(notes, "boots")[0])
    end = program.stop(number)
    assert (end.code, ends(notes, booting)) == (0, ["second", "first"])
    assert len(temporary(program)) == 1  # of the one that was killed
    program.finish()


IN_CALLBACK = """
if (HOME / "slow").exists():
    class Lock: ...
    text = "def cb(ref):\\n    note(f'boots {os.getpid()}')\\n    while not os.access('told', os.F_OK): pass"
    exec(compile(text, FILE, "exec"))
    lock = Lock()
    ref = weakref.ref(lock, cb)
    del lock
    pass_gate("never")
"""


@pytest.mark.parametrize("file", ["<frozen importlib._bootstrap>", "library.py"])
def test_told_to_leave_in_a_callback(start: Start, notes: Notes, file: str) -> None:
    """An order that comes in a callback, of the import system or of a library, which swallows an exception, is obeyed
    after it, and nothing is said of that exception."""
    app = APP + f"import weakref\nFILE = {file!r}\n" + IN_CALLBACK
    program = command(start, "app:Handler", "-w", 1, app=app).ready()
    (first,) = program.wait_ready(1)
    program.write("slow", "")
    program.kill_workers(first)
    booting = int(noted(notes, "boots")[0])
    program.send(signal.SIGTERM, booting)
    program.write("told", "")
    (program.work / "slow").unlink()
    program.wait_ready(1, without=[first, booting])
    assert ends(notes, booting) == ["second", "first"]
    program.finish()


def test_a_boot_that_does_not_give_up_is_killed(start: Start, notes: Notes) -> None:
    """One that hears nothing of the order to leave does not delay a stop."""
    program = command(start, "app:Handler", "-w", 1, app=APP + SWALLOWING).ready()
    (first,) = program.wait_ready(1)
    program.write("slow", "")
    program.kill_workers(first)
    noted(notes, "boots")
    assert program.stop().seconds < 2
    program.finish()


def test_a_signal_from_outside_while_it_boots(start: Start, notes: Notes) -> None:
    """A worker that somebody else tells to leave while it boots is replaced, and counts as no failed boot."""
    program = command(start, "app:Handler", "-w", 1, app=APP + WAITING).ready()
    (first,) = program.wait_ready(1)
    program.write("slow", "")
    program.kill_workers(first)
    booting = int(noted(notes, "boots")[0])
    (program.work / "slow").unlink()
    program.send(signal.SIGTERM, booting)
    program.wait_ready(1, without=[first, booting])
    left = [match[4] for match in program.found(patterns.LEFT) if int(match[1]) == booting]
    assert len(left) == 1 and left[0].startswith("a signal from outside told it to stop"), left
    assert ends(notes, booting) == ["second", "first"]
    program.finish()


# -- the child that tries a program ------------------------------------------------------------------------------------


def test_a_trial_keeps_nobody_waiting(start: Start, notes: Notes) -> None:
    """Neither a thread of the program that never ends, nor a slow end of the child that tries it, delays the start or a
    reload; the child is gone soon, and its folder removed."""
    app = (
        APP
        + """
if PROBE:
    threading.Thread(target=pass_gate, args=("never",)).start()
    atexit.register(pass_gate, "end")
"""
    )
    program = command(start, "app:Handler", "-w", 1, app=app).ready()
    (worker,) = program.wait_children(2) and [pid for pid in program.children() if "worker" in title(pid)]
    probe = next(pid for pid in program.children() if pid != worker)
    assert ask(program.address).pid == worker and title(probe) == "prefork: probe"
    program.write("end", "")
    program.wait_ready(1)
    assert ends(notes, probe) == ["second", "first"]
    assert len(temporary(program)) == 1
    program.reload()
    program.finish()


def test_a_trial_that_does_not_end_is_killed(start: Start) -> None:
    """The child that has tried the program has 2 s for its end; while the pool stops, hardly any."""
    app = APP + "if PROBE: atexit.register(pass_gate, 'never')\n"
    program = command(start, "app:Handler", "-w", 1, app=app).ready()
    program.wait_children(2)
    program.wait_ready(1)
    program.reload()
    program.wait_children(2)
    assert program.stop().seconds < 1
    program.finish()


def test_a_trial_that_is_given_up_removes_its_folder(start: Start, notes: Notes) -> None:
    """A probe that takes longer than boot_timeout ends in order, too, and the old generation serves on."""
    program = command(start, "app:Handler", "-w", 1, "--boot-timeout", 0.7, app=APP + WAITING).ready()
    workers = program.wait_ready(1)
    program.write("slow", "")
    program.send(signal.SIGHUP)
    probe = int(noted(notes, "boots")[0])
    program.wait_for(patterns.RELOAD_FAILED)
    assert program.wait_ready(1) == workers
    assert re.search("boot_timeout", program.log) and ends(notes, probe) == ["second", "first"]
    assert len(temporary(program)) == 1
    program.finish()
