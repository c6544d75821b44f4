"""The worker for coroutines: many requests in hand, on asyncio's own loop and on uvloop."""

import functools
import importlib.util
import os
import resource
import signal
import socketserver
import ssl
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

import prefork
from support import Ledger, Load, Program, ask, dial, elapse, patterns, pids_serving, stop_and_start, switches, until
from support.scripts import Notes, Start, hold, launch, noted, path_of_modules, rest

Run = Callable[..., Load]

pytestmark = pytest.mark.timeout(60)

LOOPS = ["asyncio"] + (["uvloop"] if importlib.util.find_spec("uvloop") else [])
both_loops = pytest.mark.parametrize("loop", LOOPS)

PROGRAM = """
import asyncio
import work

class Own(prefork.AsyncioWorker):
    def new_loop(self):
        return asyncio.SelectorEventLoop() if LOOP == "asyncio" else super().new_loop()

async def perform(handler, order):
    word, _, rest = order.partition(" ")
    worker = handler.server.worker
    match word:
        case "loop":
            return type(asyncio.get_running_loop()).__module__
        case "gate":
            note(f"begun {rest}")
            while not (HOME / rest).exists():
                await asyncio.sleep(0.005)
        case "hang":
            note(f"begun {os.getpid()}")
            await asyncio.get_running_loop().create_future()
        case "block":
            note(f"begun {os.getpid()}")
            threading.Event().wait()
        case "spin":
            note(f"begun {os.getpid()}")
            while True:
                pass
        case "stubborn":
            note(f"begun {os.getpid()}")
            while not (HOME / rest).exists():
                try:
                    await asyncio.sleep(0.01)
                except asyncio.CancelledError:
                    note("cancelled")
        case "extend":
            worker.extend_deadline(float(rest.split()[0]))
            return await perform(handler, rest.partition(" ")[2])
        case "leaving":
            note("begun")
            await worker.leaving.wait()
            return str(worker.draining)
        case "sleep":
            await asyncio.sleep(float(rest))
        case "raise":
            raise ValueError("ordered trouble")
        case "leave":
            sys.exit(int(rest))
        case "cancel":
            raise asyncio.CancelledError
    return "done"

class Coroutine:
    async def answer(self, line):
        identity, _, order = line.decode().strip().partition(" ")
        if not identity:
            return b""
        if "PREFORK_LEDGER" in os.environ:
            os.write(work._ledger(), f"{os.getpid()} {identity}\\n".encode())
            await asyncio.sleep(0.002)
            return f"{os.getpid()}:{identity}\\n".encode()
        try:
            result = await perform(self, order)
        finally:
            if order.partition(" ")[0] in ("hang", "extend"):
                note("finally")
                await asyncio.sleep(0.01)
                note("cleaned")
        return f"{os.getpid()}:{identity}:{result}\\n".encode()

class Stream(Coroutine, prefork.AsyncStreamRequestHandler):
    async def handle(self):
        self.writer.write(await self.answer(await self.reader.readline()))

class Datagram(Coroutine, prefork.AsyncDatagramRequestHandler):
    async def handle(self):
        await self.reply(await self.answer(self.packet))

class Noting:
    def handle_error(self, request, client_address):
        note(f"error {sys.exc_info()[0].__name__}")

SERVERS = {
    "tcp": (prefork.PreforkTCPServer, Stream, ("127.0.0.1", 0)),
    "udp": (prefork.PreforkUDPServer, Datagram, ("127.0.0.1", 0)),
    "unix": (prefork.PreforkUnixStreamServer, Stream, str(RUN / "socket")),
    "unixgram": (prefork.PreforkUnixDatagramServer, Datagram, str(RUN / "socket")),
}

def make(kind, port=0, **settings):
    server, handler, address = SERVERS[kind]
    address = ("127.0.0.1", port) if port else address
    settings = {"workers": 2, "worker_class": Own, **settings}
    return type("Pool", (Noting, server), settings)(address, handler)
"""

SERVE = """
with make(KIND, **SETTINGS) as server:
    server.serve_forever()
"""


def begin(start: Start, loop: str = "asyncio", kind: str = "tcp", serve: str = SERVE, **settings: object) -> Program:
    options: dict[str, Any] = {
        name: settings.pop(name) for name in ("allow", "env", "directory", "limits") if name in settings
    }
    head = f"LOOP, KIND, SETTINGS = {loop!r}, {kind!r}, {settings!r}\n"
    return launch(start, head + PROGRAM + serve, **options).ready()


# -- serving ---------------------------------------------------------------------------------------


@both_loops
@pytest.mark.parametrize("kind", ["tcp", "udp", "unix", "unixgram"])
def test_every_kind_of_server(start: Start, notes: Notes, loop: str, kind: str) -> None:
    """Streams and datagrams of both families are answered, on the loop that was asked for, by every worker."""
    program = begin(start, loop, kind)
    assert pids_serving(program.address, 2) == set(program.wait_ready(2))
    assert ask(program.address, "loop").result.startswith(loop)
    program.finish()


@both_loops
def test_many_at_once(start: Start, notes: Notes, loop: str) -> None:
    """One worker has 200 requests in hand, answers others meanwhile, and a stop waits for all of them."""
    program = begin(start, loop, workers=1)
    with ExitStack() as stack:
        held = [hold(program.address, stack, "gate go", f"held-{number}") for number in range(200)]
        noted(notes, "begun", 200)
        assert ask(program.address).result == "done"
        program.begin_stop()
        program.write("go", "")
        for number, sock in enumerate(held):
            assert rest(sock).endswith(f":held-{number}:done\n".encode())
    assert program.wait_exit().code == 0
    program.finish()


def test_several_servers(start: Start, notes: Notes) -> None:
    """One pool of workers serves a stream and a datagram server, through a reload and a stop."""
    serve = """
    with make("tcp") as one, make("udp") as other:
        prefork.serve(one, other)
    """
    program = begin(start, LOOPS[-1], serve=textwrap.dedent(serve))
    for _ in range(2):
        for address in program.addresses[:2]:
            pids_serving(address, 2)
        program.reload()
    program.finish()


def test_errors_go_to_handle_error(start: Start, notes: Notes) -> None:
    """handle_error() gets what a handler raises, also a cancellation of its own; the worker lives."""
    program = begin(start, workers=1)
    (worker,) = program.wait_ready(1)
    for number, order in enumerate(("raise", "cancel"), 1):
        with ExitStack() as stack:
            assert rest(hold(program.address, stack, order)) == b""
        noted(notes, "error", number)
    assert notes("error") == ["ValueError", "CancelledError"]
    assert ask(program.address).pid == worker
    program.finish()


def test_verify_request(start: Start, notes: Notes) -> None:
    """A request that verify_request() does not like is closed unserved."""
    serve = SERVE.replace("**SETTINGS", "verify_request=lambda self, request, peer: (HOME / 'open').exists()")
    program = begin(start, serve=serve)
    with dial(program.address) as sock:
        assert rest(sock) == b""
    program.write("open", "")
    assert ask(program.address).result == "done"
    program.finish()


def test_a_system_exit_costs_one_worker(start: Start, notes: Notes) -> None:
    """sys.exit() in a handler ends its worker, which is replaced, and what its neighbours have open is cleaned up."""
    program = begin(start, workers=1)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        hold(program.address, stack, "hang")
        noted(notes, "begun")
        assert rest(hold(program.address, stack, "leave 3")) == b""
        noted(notes, "cleaned")
    program.wait_ready(1, without=[worker])
    ask(program.address)
    assert "exit code 3" in program.log
    program.finish()


def test_setup_and_finish(start: Start, notes: Notes) -> None:
    """setup() and finish() of a handler may be coroutines or not; finish() runs after an exception."""
    serve = """
    class Both(Stream):
        def setup(self):
            note("setup")

        async def finish(self):
            await asyncio.sleep(0)
            note("finish")

    class Awaited(Stream):
        async def setup(self):
            await asyncio.sleep(0)
            note("setup")

        def finish(self):
            note("finish")

    SERVERS["tcp"] = (prefork.PreforkTCPServer, functools.partial(CLASS), ("127.0.0.1", 0))
    """
    for kind in ("Both", "Awaited"):
        before = len(notes("finish"))
        text = "import functools\n" + textwrap.dedent(serve).replace("CLASS", kind) + SERVE
        program = begin(start, serve=text)
        ask(program.address)
        with ExitStack() as stack:
            assert rest(hold(program.address, stack, "raise")) == b""
        noted(notes, "finish", before + 2)
        assert len(notes("setup")) == before + 2
        program.finish()


# -- nothing is lost -------------------------------------------------------------------------------


@pytest.mark.parametrize(("loop", "kind"), [("asyncio", "tcp"), (LOOPS[-1], "tcp"), ("asyncio", "udp")])
def test_replacements_lose_nothing(start: Start, ledger: Ledger, load: Run, loop: str, kind: str) -> None:
    """Reloads, retirements and recycling under 16 clients: every request is answered, once."""
    program = begin(start, loop, kind, max_requests=200)
    with program.flat():
        clients = load(program.address, clients=16)
        for _ in range(5):
            clients.more(100)
            program.reload()
        for _ in range(8):
            clients.more(30)
            victim = program.wait_ready(2, 10)[0]
            program.send(signal.SIGTERM, victim)
            program.wait_children(2, 10, without=[victim])
        clients.more(1200)
        clients.check_nothing_lost(ledger)
        program.wait_ready(2)
    assert any("recycled" in match[4] for match in program.found(patterns.LEFT))
    program.finish()


@pytest.mark.parametrize(("loop", "kind"), [("asyncio", "tcp"), (LOOPS[-1], "tcp"), (LOOPS[-1], "unix")])
def test_stops_lose_nothing(start: Start, ledger: Ledger, load: Run, loop: str, kind: str) -> None:
    """A pool that is stopped and started on one address under 16 clients answers whoever it has accepted."""
    program = begin(start, loop, kind)
    address = program.address
    clients = load(address, clients=16)
    again = functools.partial(begin, start, loop, kind, directory=program.directory, port=address.port)
    stop_and_start(program, again, [clients], 5)
    clients.check_nothing_lost(ledger, stopped=True)


@both_loops
def test_a_stop_takes_the_queue(start: Start, notes: Notes, loop: str) -> None:
    """Clients that wait in the backlog of workers at their limit are served before the pool is gone."""
    program = begin(start, loop, workers=2, max_connections=2)
    with ExitStack() as stack:
        held = [hold(program.address, stack, "gate go", f"held-{number}") for number in range(12)]
        noted(notes, "begun", 4)
        program.begin_stop()
        program.write("go", "")
        for number, sock in enumerate(held):
            assert rest(sock).endswith(f":held-{number}:done\n".encode())
    assert program.wait_exit().code == 0
    program.finish()


# -- who gets what ---------------------------------------------------------------------------------


@both_loops
def test_each_worker_has_its_turn(start: Start, notes: Notes, loop: str) -> None:
    """One client at a time is spread evenly over 8 workers, and wakes about one of them."""
    program = begin(start, loop, workers=8)
    pids = program.wait_ready(8, 10)
    pids_serving(program.address, 8)
    before = sum(map(switches, pids))
    number = 400
    served = Counter(ask(program.address).pid for _ in range(number))
    jain = number**2 / (8 * sum(count**2 for count in served.values()))
    assert jain > 0.95, served
    assert (sum(map(switches, pids)) - before) / number < 4  # the herd: 8
    program.finish()


@both_loops
def test_max_connections(start: Start, notes: Notes, loop: str) -> None:
    """A worker at its limit accepts nobody; those who come then wait, and are served when others are done."""
    program = begin(start, loop, workers=1, max_connections=3)
    with ExitStack() as stack:
        held = [hold(program.address, stack, f"gate go-{number}") for number in range(5)]
        noted(notes, "begun", 3)
        elapse(0.1)
        assert len(notes("begun")) == 3
        for number in range(5):
            program.write(f"go-{number}", "")
            assert rest(held[number]).endswith(b":held:done\n")
            noted(notes, "begun", min(5, 4 + number))
    assert ask(program.address).result == "done"
    program.finish()


@both_loops
def test_a_full_file_table(start: Start, notes: Notes, loop: str) -> None:
    """A worker without a descriptor left pauses, says so, uses no processor, and goes on when there is one."""
    program = begin(start, loop, workers=1)
    (worker,) = program.wait_ready(1)
    ask(program.address)
    soft, hard = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir(f"/proc/{worker}/fd"))
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (highest + 1, hard))
    with ExitStack() as stack:
        held = [hold(program.address, stack, "sleep 1", str(number)) for number in range(8)]
        program.wait_for("worker 0 cannot accept")
        before = processor(worker)
        elapse(0.5)
        assert processor(worker) - before < 0.25
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (soft, hard))
        for number, sock in enumerate(held):
            assert rest(sock).endswith(f":{number}:done\n".encode())
    program.finish()


def processor(pid: int) -> float:
    """Seconds of processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@both_loops
def test_slow_clients(start: Start, loop: str) -> None:
    """1,000 clients that send a byte a second cost 2 workers nothing that fast clients would notice."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2500:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(2500, hard), hard))
    program = begin(start, loop, request_timeout=20.0)
    with ExitStack() as stack:
        slow = [stack.enter_context(dial(program.address)) for _ in range(1000)]
        begun, sent, times = time.monotonic(), 0, []
        for number, sock in enumerate(slow):
            sock.sendall(f"{number} ".encode())
        while (now := time.monotonic()) < begun + 2:
            while sent < (now - begun) * 1000:
                slow[sent % 1000].sendall(b"x")
                sent += 1
            times.append(ask(program.address).seconds)
        times.sort()
        for sock in slow:
            sock.sendall(b"\n")
        for number, sock in enumerate(slow):
            assert rest(sock).endswith(f":{number}:done\n".encode())
    assert sent >= 1000 and len(times) > 50
    p99 = times[int(len(times) * 0.99)]
    print(f"{loop}: {len(times)} fast requests, median {times[len(times) // 2] * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms")
    assert p99 < 0.25
    program.finish()


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
    assert int(match[2]) == victim and "request_timeout" in match[4]
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
    assert int(match[2]) == worker and "recycled" in match[4]
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
    """Shortly before graceful_timeout what is still in hand is cancelled, and its `finally` blocks run to their end."""
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
    assert "requests in hand at the end of graceful_timeout" in program.log
    program.finish()


def test_a_queue_that_nobody_can_take(start: Start, notes: Notes) -> None:
    """A stop of workers at their limit cancels what is in hand in time, though others still wait in the queue."""
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


# -- TLS and datagrams -----------------------------------------------------------------------------


@both_loops
def test_tls(start: Start, notes: Notes, certificate: tuple[Path, Path], loop: str) -> None:
    """A listener wrapped in TLS serves; silent and foreign clients hold nobody; a stop loses nobody."""
    cert, key = certificate
    serve = f"""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain({str(cert)!r}, {str(key)!r})
    with make(KIND, **SETTINGS) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.serve_forever()
    """
    text = textwrap.dedent(serve)
    program = begin(start, loop, serve=text, workers=1, request_timeout=2.0)
    context = ssl.create_default_context(cafile=str(cert))

    def secure(stack: ExitStack) -> ssl.SSLSocket:
        sock = stack.enter_context(dial(program.address))
        return stack.enter_context(context.wrap_socket(sock, server_hostname="127.0.0.1"))

    with ExitStack() as stack:
        silent = stack.enter_context(dial(program.address))
        for _ in range(4):
            with dial(program.address) as garbage:
                garbage.sendall(b"this is no TLS at all, but it is long enough\n")
                with suppress(ConnectionError):
                    rest(garbage)
            sock = secure(stack)
            sock.sendall(b"x\n")
            assert rest(sock).endswith(b":x:done\n")
        assert rest(silent) == b""
        assert noted(notes, "error") == ["RequestTimeout"]
        held = secure(stack)
        held.sendall(b"x extend 20 gate go\n")
        noted(notes, "begun")
        program.begin_stop()
        program.write("go", "")
        assert rest(held).endswith(b":x:done\n")
    assert program.wait_exit().code == 0
    program.finish()


@both_loops
@pytest.mark.parametrize("kind", ["udp", "unixgram"])
def test_datagrams_at_once(start: Start, notes: Notes, loop: str, kind: str) -> None:
    """Datagrams are served beside each other up to max_connections; those that are queued at a stop are answered."""
    program = begin(start, loop, kind, workers=1, max_connections=3)
    address = program.address
    with address.socket() as sock:
        sock.settimeout(5)
        sock.connect(address.target)
        for number in range(8):
            sock.send(f"{number} gate go".encode())
        noted(notes, "begun", 3)
        elapse(0.1)
        assert len(notes("begun")) == 3
        program.begin_stop()
        program.write("go", "")
        answers = {sock.recv(100).split(b":", 1)[1] for _ in range(8)}
    assert answers == {f"{number}:done\n".encode() for number in range(8)}
    assert program.wait_exit().code == 0
    program.finish()


@both_loops
def test_a_client_that_does_not_read_its_datagrams(start: Start, notes: Notes, loop: str) -> None:
    """A Unix client whose queue is full waits for its answers, and nobody else waits with it."""
    program = begin(start, loop, "unixgram", workers=1)
    address = program.address
    with address.socket() as lazy:
        lazy.settimeout(5)
        lazy.connect(address.target)
        for number in range(60):
            lazy.send(f"{number}".encode())
        assert ask(address).result == "done"
        answers = {lazy.recv(100).split(b":", 1)[1] for _ in range(60)}
    assert answers == {f"{number}:done\n".encode() for number in range(60)}
    program.finish()


# -- what fits -------------------------------------------------------------------------------------


class Stream(prefork.AsyncStreamRequestHandler):
    async def handle(self) -> None:
        self.writer.write(await self.reader.readline())


class Datagram(prefork.AsyncDatagramRequestHandler):
    async def handle(self) -> None:
        await self.reply(self.packet)


class Threads(prefork.PreforkMixIn, socketserver.ThreadingMixIn, socketserver.TCPServer):
    pass


TCP, UDP = prefork.PreforkTCPServer, prefork.PreforkUDPServer


@pytest.mark.parametrize(
    ("server", "handler", "kind", "says"),
    [
        (TCP, Stream, prefork.AsyncioWorker, ""),
        (TCP, functools.partial(Stream), prefork.AsyncioWorker, ""),
        (UDP, Datagram, prefork.AsyncioWorker, ""),
        (TCP, Datagram, prefork.AsyncioWorker, "use AsyncStreamRequestHandler or bind a datagram address"),
        (UDP, Stream, prefork.AsyncioWorker, "use AsyncDatagramRequestHandler or bind a stream address"),
        (
            TCP,
            socketserver.StreamRequestHandler,
            prefork.AsyncioWorker,
            "subclass of prefork.AsyncStreamRequestHandler",
        ),
        (TCP, len, prefork.AsyncioWorker, "subclass of prefork.AsyncStreamRequestHandler"),
        (TCP, None, prefork.AsyncioWorker, "None is no handler of worker_class 'asyncio'"),
        (Threads, Stream, prefork.AsyncioWorker, "does not call Threads.process_request"),
        (TCP, Stream, prefork.SyncWorker, "use worker_class 'asyncio'"),
        (UDP, Datagram, prefork.SyncWorker, "use worker_class 'asyncio'"),
    ],
)
def test_what_fits(server: Any, handler: Any, kind: type[prefork.Worker], says: str) -> None:
    """What a class of workers cannot serve is refused before anything is forked, in one line with the mend."""
    with server(("127.0.0.1", 0), handler) as one:
        if not says:
            kind.check(one)
            return
        with pytest.raises(prefork.OptionError, match=says) as refused:
            kind.check(one)
        assert "\n" not in str(refused.value)


def test_a_single_request_is_no_coroutine() -> None:
    """handle_request(), which serves one request in a process of its own, refuses a handler that is a coroutine."""
    with TCP(("127.0.0.1", 0), Stream) as server, pytest.raises(prefork.OptionError, match="worker_class 'asyncio'"):
        server.handle_request()


def test_the_command(start: Start) -> None:
    """The command serves a coroutine by its name; without --worker-class it says what is missing."""
    files = {"app.py": "from kit import *\nLOOP = 'asyncio'\n" + PROGRAM}
    env = path_of_modules()
    words = ("prefork", "app:Stream", "-b", "tcp://127.0.0.1:0", "--workers", 2)
    program = start(*words, "--worker-class", "asyncio", files=files, env=env).ready()
    pids_serving(program.address, 2)
    program.finish()
    program = start(*words, files=files, env=env, allow=[patterns.ANYTHING])
    assert program.wait_exit(10).code == 2
    assert "use worker_class 'asyncio'" in program.log
    program.finish(code=2)


def test_asyncio_is_imported_when_it_is_used() -> None:
    """The names are there without an import of asyncio, which comes with the first use of one."""
    code = """
import sys, prefork
names = [name for name in prefork.__all__ if "Async" in name]
before = "asyncio" in sys.modules
found = [getattr(prefork, name).__name__ for name in names]
print(len(names), found == names, before, "asyncio" in sys.modules, hasattr(prefork, "Nothing"))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "True", "False", "True", "False"]
