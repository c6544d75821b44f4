"""The commands that see and steer a running pool, as an operator types them."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import Program, ask, patterns, until
from support.commands import APP, TCP, command
from support.operations import asked, control_of, done, on, pool, steer
from support.scripts import Start, hold, rest

pytestmark = pytest.mark.timeout(60)

DIES = APP + "\nimport threading\nthreading.Timer(1.0, os._exit, [3]).start()\n"


def test_status(start: Start) -> None:
    """status shows the pool and a line per worker, within 80 columns; with --json the pool's answer."""
    program = pool(start)
    workers = program.wait_ready(2)
    lines = done(*on(program, "status")).splitlines()
    assert lines[0] == f"app:Versioned on {program.address}"
    assert lines[1].startswith("serving: 2 of 2 workers ready, generation 1, up ")
    assert sorted(int(line.split()[1]) for line in lines[4:]) == workers
    assert max(map(len, lines)) <= 80
    assert json.loads(done(*on(program, "status", "--json")))["ready"] == 2
    program.finish()


def test_reload(start: Start) -> None:
    """reload returns at once, reload --wait when the new generation serves."""
    program = pool(start)
    program.write("app.py", APP.replace('"one"', '"two"'))
    assert done(*on(program, "reload", "--wait")) == "generation 2 serves\n"
    assert ask(program.address, "version").result == "two"
    mark = program.mark
    assert done(*on(program, "reload")) == ""
    program.wait_for(patterns.RELOADED, 10, since=mark)
    program.finish()


def fails(program: Program) -> str:
    """`reload --wait`, which must fail. Returns what it says."""
    result = steer(*on(program, "reload", "--wait"))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("reload failed: ")
    return result.stderr


def test_reload_of_a_syntax_error(start: Start) -> None:
    """reload --wait of a program that cannot be imported ends with 1 and its traceback, which explain keeps."""
    program = pool(start, allow=[patterns.ANYTHING])
    program.write("app.py", "def broken(:\n")
    assert "SyntaxError: invalid syntax" in fails(program)
    explained = done(*on(program, "explain"))
    assert "The last reload that failed" in explained and "SyntaxError: invalid syntax" in explained
    assert "the last reload failed" in done(*on(program, "status"))
    program.write("app.py", APP)
    done(*on(program, "reload", "--wait"))
    assert "the last reload failed" not in done(*on(program, "status"))
    program.finish()


def test_reload_of_a_program_that_hangs(start: Start) -> None:
    """reload --wait of a program whose import hangs ends with 1 after boot_timeout."""
    program = pool(start, "--boot-timeout", 1, allow=[patterns.ANYTHING])
    program.write("app.py", "import threading\nthreading.Event().wait()\n")
    begun = time.monotonic()
    assert "boot_timeout" in fails(program)
    assert 0.9 < time.monotonic() - begun < 10
    assert asked(control_of(program), "status")["ready"] == 2
    program.finish()


def test_reload_of_a_worker_that_does_not_boot(start: Start) -> None:
    """reload --wait ends with 1 and the traceback where the program can be tried, but its worker does not boot."""
    app = APP + "\nif (HOME / 'bad').exists() and 'worker' in open('/proc/self/cmdline').read():\n    1 / 0\n"
    program = pool(start, app=app, allow=[patterns.ANYTHING])
    program.write("bad", "")
    text = fails(program)
    assert "it failed before it was ready" in text and "ZeroDivisionError" in text
    assert asked(control_of(program), "status")["generation"] == 1
    program.finish()


def test_reload_of_workers_that_die_after_a_second(start: Start) -> None:
    """reload --wait ends with 1 and the exit of the worker where the new workers serve, and die after a second."""
    program = pool(start, allow=[patterns.ANYTHING])
    program.write("app.py", DIES)
    text = fails(program)
    assert "a worker of generation 2 has failed" in text and "exit code 3" in text
    program.finish(code=None)


def test_reloads_that_wait(start: Start) -> None:
    """Three reloads at once, each waited for, all end with 0."""
    program = pool(start)
    words = [sys.executable, "-m", "prefork", *map(str, on(program, "reload", "--wait"))]
    clients = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ends = [(*client.communicate(timeout=30), client.returncode) for client in clients]
    assert [(errors, code) for _, errors, code in ends] == [("", 0)] * 3
    assert all(output.startswith("generation ") for output, _, _ in ends)
    program.finish()


def test_reload_while_the_pool_is_stopped(start: Start) -> None:
    """reload --wait ends with 1 where the pool is told to stop before the reload is over."""
    program = pool(start, "--boot-timeout", 20)
    program.write("app.py", "import threading\nthreading.Event().wait()\n")
    words = [sys.executable, "-m", "prefork", *map(str, on(program, "reload", "--wait"))]
    with ExitStack() as stack, subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as client:
        held = hold(program.address, stack, "gate go")
        program.wait_for("control: reload")
        assert any("a child tries the program" in line for line in _words(program))
        program.begin_stop()
        assert any("the pool stops" in line for line in _words(program))
        _, errors = client.communicate(timeout=20)
        assert client.returncode == 1 and "told to stop" in errors
        program.write("go", "")
        rest(held)
    program.wait_exit()
    program.finish()


def test_stop(start: Start) -> None:
    """stop drains the pool; stop --wait returns when the master is gone and the last request was answered."""
    program = pool(start)
    with ExitStack() as stack:
        held = hold(program.address, stack, "gate go")
        until(lambda: "busy" in done(*on(program, "status")))
        words = [sys.executable, "-m", "prefork", *map(str, on(program, "stop", "--wait"))]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
            program.wait_for(patterns.STOPPING)
            assert client.poll() is None
            program.write("go", "")
            assert rest(held).endswith(b"done\n")
            assert client.communicate(timeout=20) == (b"", b"")
            assert client.returncode == 0
    assert not Path(f"/proc/{program.pid}").exists() or program.process.poll() is not None
    program.wait_exit(1.0)
    program.finish()


def test_scale_and_recycle(start: Start) -> None:
    """scale changes the number of workers, recycle replaces the worker of one slot; explain says why it left."""
    program = pool(start)
    before = program.wait_ready(2)
    done(*on(program, "scale", 3))
    program.wait_ready(3)
    slots = {worker["slot"]: worker["pid"] for worker in asked(control_of(program), "status")["workers"]}
    done(*on(program, "recycle", 1))
    program.wait_ready(3, without=[slots[1]])
    assert slots[1] in before
    text = " ".join(done(*on(program, "explain")).split())
    assert f"worker {slots[1]} (slot 1, generation 1) exited: it was recycled (an operator asked for it)" in text
    program.finish()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("scale", 0), 1, "workers: must be a whole number from 1 to 2048"),
        (("scale", "many"), 2, "invalid int value"),
        (("scale",), 2, "required"),
        (("recycle", 99), 1, "no worker serves in slot 99"),
        (("status", "--color"), 2, "unrecognized"),
    ],
)
def test_refused(start: Start, words: tuple[object, ...], code: int, says: str) -> None:
    """What the pool refuses ends with 1 and its reason, what is no command line with 2."""
    program = pool(start)
    result = steer(*on(program, str(words[0]), *words[1:]))
    assert (result.returncode, result.stdout) == (code, "") and says in result.stderr
    program.finish()


def test_explain_of_a_crash_loop(start: Start, trouble: Path) -> None:
    """explain names the slot in back-off, how often it failed, the last line of its traceback, and the next try."""
    app = APP + "\nif (HOME / 'bad').exists():\n    import no_such_module\n"
    program = pool(start, app=app, allow=[patterns.ANYTHING])
    workers = program.wait_ready(2)
    program.write("bad", "")
    program.kill_workers(workers[0])
    found = until(lambda: [line for line in _words(program) if "failed 4 times in a row" in line], 20)
    assert "ModuleNotFoundError: No module named 'no_such_module'" in found[0]
    assert "next try in " in found[0]
    os.unlink(program.work / "bad")
    program.wait_ready(2, timeout=20)
    program.finish()


def _words(program: Program) -> list[str]:
    """The sentences of explain, each on one line."""
    text = done(*on(program, "explain")).replace("\n      ", " ")
    return text.splitlines()


def test_a_worker_that_starts(start: Start, notes: object) -> None:
    """explain says until when a worker that starts must be ready."""
    app = APP + "\nif (HOME / 'slow').exists():\n    pass_gate('go')\n"
    program = pool(start, app=app)
    workers = program.wait_ready(2)
    program.write("slow", "")
    program.kill_workers(workers[0])
    until(lambda: any("starts; it is killed in 2" in line for line in _words(program)), 10)
    program.write("go", "")
    program.wait_ready(2)
    program.finish(allow=[patterns.ANYTHING])


def test_no_pool(tmp_path: Path) -> None:
    """Where no pool is, each command says so and ends with 1; ps prints nothing."""
    env = {"XDG_RUNTIME_DIR": str(tmp_path), "RUNTIME_DIRECTORY": str(tmp_path)}
    for words in (["status"], ["explain"], ["reload"], ["stop"], ["scale", "2"], ["recycle", "0"]):
        result = steer(*words, env=env)
        assert (result.returncode, result.stdout) == (1, "") and "no pool of this user was found" in result.stderr
        result = steer(*words, "--control", tmp_path / "none", env=env)
        assert result.returncode == 1 and f"{tmp_path / 'none'}: no pool is there" in result.stderr
    assert done("ps", env=env) == "" and json.loads(done("ps", "--json", env=env)) == []


def test_a_master_that_does_not_answer(start: Start) -> None:
    """Of a master that is stopped a command says after five seconds that it does not answer."""
    program = pool(start)
    program.send(signal.SIGSTOP)
    result = steer(*on(program, "status"))
    assert result.returncode == 1 and "no answer within 5 s" in result.stderr
    program.send(signal.SIGCONT)
    done(*on(program, "status"))
    program.finish(allow=[patterns.ANYTHING])


def test_a_program_with_the_name_of_a_command(start: Start) -> None:
    """A program that is called like a command is served by MODULE:NAME."""
    program = command(start, "status:Versioned", "-b", TCP, "-w", 1, files={"status.py": APP}).ready()
    ask(program.address)
    program.finish()


def test_the_client_is_light() -> None:
    """A command that asks a pool imports neither the master nor a worker."""
    words = [sys.executable, "-X", "importtime", "-m", "prefork", "ps"]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "prefork.operations.client" in imported
    assert not [name for name in imported if name.startswith(("prefork.master", "prefork.workers", "prefork.servers"))]


def test_a_reader_that_leaves(start: Start) -> None:
    """A command whose output nobody takes ends without a traceback."""
    program = pool(start)
    words = [sys.executable, "-m", "prefork", *map(str, on(program, "status"))]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert result.returncode == 1 and result.stderr == ""
    program.finish()
