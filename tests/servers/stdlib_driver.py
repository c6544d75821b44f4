"""Run CPython's own installed test.test_socketserver or test.test_httpservers with a mix-in in place of ForkingMixIn.

    python tests/servers/stdlib_driver.py --mixin prefork --module test_httpservers --json out.json

Nothing of CPython is copied: the classes are replaced at run time, `install` and `substitute` say which. The tests run
in a process of their own, which leads a session, one after the other, each with a deadline. A test that outlives it, or
whose process dies, costs only itself: the rest is run by a new process. What is alive in the session when its leader
has gone was left behind.

The mix-ins: `forking` is the baseline, `prefork` is ours; `broken`, `stuck`, `leaky` and `crashing` are ForkingMixIn
with a fault each, to show that the harness notices.
"""

import argparse
import faulthandler
import importlib
import importlib.util
import json
import os
import selectors
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

sys.path[:1] = [str(Path(__file__).resolve().parents[1])]

from support import Process, session, until  # noqa: E402  # a script, of which the folder above is not on the path

ENOUGH = 12  # tests that hung or died: there is no point in waiting for the rest
ORPHANS = 2.0  # the pool's promise: this long after its master nothing of it is left
NOBODY = 65534
PLAIN = ("TCPServer", "UDPServer", "UnixStreamServer", "UnixDatagramServer")
SETTINGS = {
    # The least pool in which one worker can be wrong about another. More would only make 60 pools slower to start.
    "workers": 2,
    # Some tests stop the server with a kept-alive connection open. The default waits for it for half a minute.
    "graceful_timeout": 2.0,
}


def forking() -> type:
    return socketserver.ForkingMixIn


def prefork() -> type:
    mixin: type = importlib.import_module("prefork").PreforkMixIn
    return type("PreforkMixIn", (mixin,), dict(SETTINGS))


def broken() -> type:
    """Drops every third request."""

    class Broken(socketserver.ForkingMixIn):
        requests = 0

        def verify_request(self, request: Any, client_address: Any) -> bool:
            self.requests += 1
            return self.requests % 3 != 0

    return Broken


def stuck() -> type:
    """Never stops."""

    class Stuck(socketserver.ForkingMixIn):
        def shutdown(self) -> None:
            threading.Event().wait()

    return Stuck


def leaky() -> type:
    """Leaves a process behind."""

    class Leaky(socketserver.ForkingMixIn):
        def server_close(self) -> None:
            super().server_close()
            if os.fork() == 0:
                signal.pause()
                os._exit(0)

    return Leaky


def crashing() -> type:
    """Takes its process down when it is closed."""

    class Crashing(socketserver.ForkingMixIn):
        def server_close(self) -> None:
            os._exit(9)

    return Crashing


MIXINS: dict[str, Callable[[], type]] = {
    one.__name__: one for one in (forking, prefork, broken, stuck, leaky, crashing)
}
MODULES = ("test_socketserver", "test_httpservers")


def counted(mixin: type, served: list[str], set_up: threading.Event) -> type:
    """`mixin`, noting in `served` each server that is told to serve: a test that served nothing proves nothing.

    It begins to serve when the test is `set_up`. test_httpservers starts its server in a thread first, then changes
    directory: ForkingMixIn forks for each request, which comes later, but workers are forked as soon as a pool serves.
    """
    made: Any

    def serve_forever(self: Any, poll_interval: float = 0.5) -> None:
        set_up.wait()
        served.append(type(self).__name__)
        super(made, self).serve_forever(poll_interval)

    def handle_request(self: Any) -> None:
        served.append(type(self).__name__)
        super(made, self).handle_request()

    made = type(mixin.__name__, (mixin,), {"serve_forever": serve_forever, "handle_request": handle_request})
    made.__module__ = "socketserver"  # test_all looks there
    result: type = made
    return result


def front(mixin: type, plain: type) -> type:
    """The server class `plain` with the mix-in in front."""
    return type(plain.__name__, (mixin, plain), {"__module__": plain.__module__})


def install(mixin: type) -> None:
    """Put `mixin` in the place of socketserver's ForkingMixIn, also in the classes that are made of it."""
    for name in PLAIN:
        if hasattr(socketserver, "Forking" + name):
            made = front(mixin, getattr(socketserver, name))
            made.__name__ = made.__qualname__ = "Forking" + name
            setattr(socketserver, "Forking" + name, made)
    vars(socketserver)["ForkingMixIn"] = mixin


def substitute(module: types.ModuleType, mixin: type) -> None:
    """Let the tests of `module` that are not about forking use servers with `mixin` in front too.

    test_socketserver names its servers `socketserver.TCPServer`; it is given a socketserver of its own, after it made
    its classes. test_httpservers takes HTTPServer (3.14: and HTTPSServer) into its own names.
    """
    if module.__name__ == "test.test_socketserver":
        own = types.ModuleType("socketserver")
        vars(own).update(vars(socketserver))
        for name in PLAIN + tuple("Threading" + name for name in PLAIN):
            if hasattr(own, name):
                setattr(own, name, front(mixin, getattr(socketserver, name)))
        vars(module)["socketserver"] = own
    for name, value in list(vars(module).items()):
        if isinstance(value, type) and issubclass(value, socketserver.BaseServer) and value.__module__ == "http.server":
            setattr(module, name, front(mixin, value))


def flat(suite: unittest.TestSuite) -> list[unittest.TestCase]:
    found: list[unittest.TestCase] = []
    for one in suite:
        found += flat(one) if isinstance(one, unittest.TestSuite) else [one]
    return found


class Told(unittest.TestResult):
    """A result that tells the other end of a pipe what happens, as it happens."""

    def __init__(
        self, pipe: BinaryIO, support: Any, served: list[str], set_up: threading.Event, deadline: float
    ) -> None:
        super().__init__()
        self.pipe, self.support, self.served, self.set_up, self.deadline = pipe, support, served, set_up, deadline
        self.outcome, self.detail, self.since = "passed", "", 0.0

    def tell(self, **event: object) -> None:
        self.pipe.write(json.dumps(event).encode() + b"\n")
        self.pipe.flush()

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.served.clear()
        self.set_up.clear()
        vars(test)["setUp"] = self.telling(test.setUp)
        self.support.environment_altered = False  # regrtest fails a test file that sets it
        self.outcome, self.detail, self.since = "passed", "", time.monotonic()
        faulthandler.dump_traceback_later(self.deadline + 10.0, exit=True)  # should nobody be there to end us
        self.tell(started=test.id())

    def telling(self, inner: Callable[[], None]) -> Callable[[], None]:
        def setUp() -> None:
            try:
                inner()
            finally:
                self.set_up.set()

        return setUp

    def stopTest(self, test: unittest.TestCase) -> None:
        self.support.reap_children()  # a zombie is an alteration too
        if self.support.environment_altered and self.outcome == "passed":
            self.outcome = "altered"
        self.tell(finished=test.id(), result=self.result(bool(self.served)))
        if self.outcome not in ("passed", "skipped"):
            self.stop()  # it may not have cleaned up; the next test gets a new process
        super().stopTest(test)

    def result(self, served: bool) -> dict[str, object]:
        seconds = round(time.monotonic() - self.since, 3)
        return {"outcome": self.outcome, "served": served, "seconds": seconds, "detail": self.detail}

    def note(self, test: unittest.TestCase, outcome: str, detail: str) -> None:
        self.outcome, self.detail = outcome, (self.detail + "\n" + detail).strip()
        if not isinstance(test, unittest.TestCase):  # setUpClass or setUpModule: there is no stopTest
            self.since = time.monotonic()
            self.tell(finished=getattr(test, "description", repr(test)), result=self.result(False))

    def addError(self, test: Any, err: Any) -> None:
        self.note(test, "error", "".join(traceback.format_exception(*err)))

    def addFailure(self, test: Any, err: Any) -> None:
        self.note(test, "failed", "".join(traceback.format_exception(*err)))

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self.note(test, "failed", f"{subtest}\n" + "".join(traceback.format_exception(*err)))

    def addSkip(self, test: Any, reason: str) -> None:
        self.note(test, "skipped", reason)

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        self.note(test, "expected failure", "")

    def addUnexpectedSuccess(self, test: Any) -> None:
        self.note(test, "unexpected success", "")


def inside(arguments: argparse.Namespace, done: frozenset[str], pipe: BinaryIO) -> None:
    """Run the tests that are not `done`, here, and tell."""
    faulthandler.enable()  # SIGABRT, sent when a test is late, shows where it is
    support = importlib.import_module("test.support")
    vars(support)["use_resources"] = ["network"]  # as regrtest -u network does
    served: list[str] = []
    set_up = threading.Event()
    chosen = counted(MIXINS[arguments.mixin](), served, set_up)
    install(chosen)
    tests = importlib.import_module("test." + arguments.module)
    substitute(tests, chosen)
    cases = flat(unittest.defaultTestLoader.loadTestsFromModule(tests))
    told = Told(pipe, support, served, set_up, arguments.deadline)
    unittest.TestSuite(case for case in cases if arguments.match in case.id() and case.id() not in done).run(told)
    told.tell(end=not told.shouldStop)


class Run:
    """All tests of one module with one mix-in: as many processes as it takes."""

    def __init__(self, mixin: str, module: str, match: str, deadline: float) -> None:
        self.mixin, self.module, self.match, self.deadline = mixin, module, match, deadline
        self.caller = [sys.executable]
        self.user = os.geteuid()
        self.results: dict[str, dict[str, Any]] = {}
        self.done: set[str] = set()
        self.left: list[str] = []
        self.error = ""

    def all(self, times: int) -> None:
        """Run every test so often, as long as it passes; those that were skipped once more without being root."""
        for self.caller, self.user in callers():
            wanted = "skipped"
            others = {name for name, result in self.results.items() if result["outcome"] != wanted}
            for _ in range(times):
                self.done = others | {name for name, result in self.results.items() if result["outcome"] != wanted}
                while not self.error and not self.some():
                    pass
                wanted = "passed"
            if not any(result["outcome"] == "skipped" for result in self.results.values()):
                break

    def some(self) -> bool:
        """Start one process and follow it to its end; whether that was the end of the tests too."""
        with tempfile.TemporaryDirectory(prefix="stdlib-") as work, tempfile.TemporaryFile() as err:
            os.chown(work, self.user, -1)
            reader, writer = os.pipe()
            options = ["--mixin", self.mixin, "--module", self.module, "--match", self.match]
            options += ["--deadline", str(self.deadline), "--inside", str(writer)]
            process = subprocess.Popen(
                [*self.caller, os.path.abspath(__file__), *options],
                cwd=work,  # test_socketserver writes where it is
                env={**os.environ, "TMPDIR": work},
                pass_fds=[writer],
                stdin=subprocess.PIPE,
                stdout=err,
                stderr=err,
                start_new_session=True,
            )
            os.close(writer)
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(sorted(self.done)).encode())
                process.stdin.close()
                with open(reader, "rb", buffering=0) as pipe:
                    return self.follow(process, pipe, err)
            finally:
                self.sweep(process)

    def follow(self, process: "subprocess.Popen[bytes]", pipe: BinaryIO, err: BinaryIO) -> bool:
        """Take in what the process tells; whether those were all tests."""
        running, mark, rest = "", 0, b""
        late = time.monotonic() + self.deadline
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while True:
                # Workers hold the pipe too, so it may stay open without the process: look at that as well.
                data = b""
                if selector.select(min(0.25, max(0.0, late - time.monotonic()))):
                    data = pipe.read(65536)
                    if not data:
                        process.wait()
                if not data:
                    if process.poll() is not None:
                        return self.ended(running, "died", f"exit status {process.returncode}", process, err, mark)
                    if time.monotonic() >= late:
                        return self.ended(running, "hung", f"not done in {self.deadline:g} s", process, err, mark)
                    continue
                rest += data
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    late = time.monotonic() + self.deadline
                    if "started" in event:
                        running, mark = event["started"], err.seek(0, os.SEEK_END)
                    elif "finished" in event:
                        running = ""
                        self.done.add(event["finished"])
                        self.results[event["finished"]] = event["result"]
                        if event["result"]["outcome"] != "passed":
                            event["result"]["stderr"] = tail(err, mark)
                    elif "end" in event:
                        # The pools are closed. What the process does at its exit must not take long either.
                        try:
                            process.wait(self.deadline)
                        except subprocess.TimeoutExpired:
                            self.ended("(exit)", "hung", "the process did not leave", process, err, mark)
                        return bool(event["end"])

    def ended(
        self, test: str, how: str, why: str, process: "subprocess.Popen[bytes]", err: BinaryIO, mark: int
    ) -> bool:
        """Note that `test` ended its process, or is ended with it; without a test it is an error of the whole run."""
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)
            try:
                process.wait(ORPHANS)
            except subprocess.TimeoutExpired:
                process.kill()
        text = tail(err, mark)
        if test:
            self.done.add(test)
            self.results[test] = {"outcome": how, "served": True, "seconds": 0.0, "detail": why, "stderr": text}
        else:
            self.error = f"{how} outside of a test: {why}\n{text}"
        lost = [name for name, result in self.results.items() if result["outcome"] in ("hung", "died")]
        if len(lost) >= ENOUGH:
            self.error = f"{len(lost)} tests hung or died; the rest was not run: {' '.join(lost)}\n{text}"
        return False

    def sweep(self, process: "subprocess.Popen[bytes]") -> None:
        """End what is left of the session, and say what it was."""
        if process.poll() is None:
            process.kill()
        process.wait()
        try:
            until(lambda: not alive(process.pid), ORPHANS, "the session is empty", every=0.02)
        except AssertionError:
            for one in alive(process.pid):
                self.left.append(f"{one.pid} {one.name} ({one.state}), child of {one.parent}")
                os.kill(one.pid, signal.SIGKILL)

    def report(self) -> dict[str, object]:
        return {
            "mixin": self.mixin,
            "module": self.module,
            "python": ".".join(map(str, sys.version_info[:3])),
            "error": self.error,
            "left": self.left,
            "results": self.results,
        }


def callers() -> Iterator[tuple[list[str], int]]:
    """How to call this Python, and whom it is then: as we are, and, if that is root, as nobody: tests of CGI skip root.

    Nobody keeps the right to read everything (an interpreter below /root), where the system lets us give it.
    """
    yield [sys.executable], os.geteuid()
    if os.geteuid() == 0:
        capability = "+dac_read_search"
        other = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps", capability]
        other += ["--ambient-caps", capability, sys.executable]
        try:
            subprocess.run([*other, os.path.abspath(__file__), "--help"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return
        yield other, NOBODY


def alive(sid: int) -> list[Process]:
    """What runs in a session. Its leader has gone, so that a zombie in it waits for init only."""
    return [process for process in session(sid) if not process.is_zombie]


def tail(file: BinaryIO, mark: int, most: int = 6000) -> str:
    """The last of what was written after `mark`; read by offset, for the position is shared with the writers."""
    end = os.fstat(file.fileno()).st_size
    start = max(mark, end - most)
    return os.pread(file.fileno(), end - start, start).decode(errors="replace")


def absent(module: str) -> str:
    """Why `module` cannot be run by this interpreter; empty if it can."""
    try:
        for name in ("test.support", f"test.{module}"):
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(name)
    except ModuleNotFoundError as error:
        return f"this Python was installed without its tests ({error})"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mixin", choices=MIXINS, required=True)
    parser.add_argument("--module", choices=MODULES, required=True)
    parser.add_argument("--match", default="", help="only tests whose name has this in it")
    parser.add_argument("--deadline", type=float, default=15.0, help="seconds for one test")
    parser.add_argument("--times", type=int, default=1, help="how often; what failed is not run again")
    parser.add_argument("--json", type=Path, help="where the outcomes are written; default: standard output")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside is not None:
        done = frozenset(json.load(sys.stdin))
        with open(arguments.inside, "wb") as pipe:
            inside(arguments, done, pipe)
        return 0
    missing = absent(arguments.module)
    run = Run(arguments.mixin, arguments.module, arguments.match, arguments.deadline)
    if not missing:
        run.all(arguments.times)
    text = json.dumps({**run.report(), "missing": missing}, indent=1)
    if arguments.json:
        arguments.json.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
