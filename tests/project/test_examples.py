"""The examples and the README, used as a reader would: started by one command, asked by an ordinary client, stopped."""

import ast
import http.client
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import xmlrpc.client
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

import prefork.errors
import prefork.master.loop
from support import Address, Program, dial, patterns, until

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
README = ROOT / "README.md"
SIGNALS = ROOT / "docs/reference/signals.md"

# http.server's own access log.
ACCESS = r"127\.0\.0\.1 - - \[[^]]+\] .*"

Start = Callable[..., Program]


def converse(address: Address, request: bytes) -> bytes:
    """Send a request, say that it was all, and read to the end."""
    with dial(address, 10) as sock:
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def tcp(port: int) -> Address:
    return Address("tcp", "127.0.0.1", port)


def processors() -> int:
    return len(os.sched_getaffinity(0))


# -- the examples ------------------------------------------------------------------------------------


def test_echo(example: Start, port: int) -> None:
    """What is sent comes back, to many clients at once."""
    program = example("echo", port)
    with ExitStack() as stack:
        clients = [stack.enter_context(dial(tcp(port))) for _ in range(20)]
        for number, client in enumerate(clients):
            client.sendall(b"hello %d" % number)
        assert [client.recv(100) for client in clients] == [b"hello %d" % number for number in range(20)]
    program.finish()
    assert program.log == ""


def test_primes(example: Start, port: int) -> None:
    """The counts are right, and a request that is no number gets an error and a worker that goes on."""
    program = example("primes", port, workers=processors()).ready()
    pids = set(program.children())
    told = re.compile(rb"(\d+) primes below (-?\d+), counted by pid (\d+)\n")
    for request, count in ((b"2", 0), (b"3", 1), (b"100", 25), (b"-5", 0), (b"20000", 2262)):
        answer = told.fullmatch(converse(tcp(port), request + b"\n"))
        assert answer and (int(answer[1]), answer[2]) == (count, request)
        assert int(answer[3]) in pids
    for wrong in (b"", b"many\n", b"1e3\n"):
        assert converse(tcp(port), wrong).startswith(b"error: ")
    assert set(program.children()) == pids
    program.finish()


def test_primes_of_the_command(start: Start, port: int) -> None:
    """The command serves an example's handler from within its folder."""
    files = {"primes.py": (EXAMPLES / "primes.py").read_text(encoding="utf-8")}
    bind = f"tcp://127.0.0.1:{port}"
    program = start("prefork", "primes:Primes", "-b", bind, "-w", 4, files=files).ready()
    program.wait_ready(4)
    assert converse(tcp(port), b"100\n").startswith(b"25 primes below 100, ")
    program.finish()


def test_primes_interrupted(start: Start, port: int) -> None:
    """A request that takes too long is answered with an error by a worker that lives on."""
    files = {"primes.py": (EXAMPLES / "primes.py").read_text(encoding="utf-8")}
    words = ("prefork", "primes:Primes", "-b", f"tcp://127.0.0.1:{port}", "-w", 1, "--request-timeout", 0.3)
    program = start(*words, files=files).ready()
    pids = program.children()
    assert converse(tcp(port), b"100000000\n") == b"error: the request took longer than 0.3 s\n"
    assert converse(tcp(port), b"100\n").startswith(b"25 primes ")
    assert program.children() == pids
    program.finish()


def test_upper_udp(example: Start, port: int) -> None:
    """Each datagram is answered in upper case, up to the largest there can be."""
    program = example("upper_udp", port, workers=2)
    with dial(Address("udp", "127.0.0.1", port)) as sock:
        for text in (b"hello", b"", b"x" * 65507):
            sock.send(text)
            assert sock.recv(65536) == text.upper()
    program.finish()
    assert program.log == ""


def test_unix_echo(example: Start) -> None:
    """Lines come back over a socket that only its owner may use, and which is gone in the end."""
    program = example("unix_echo", "{run}/echo.sock")
    path = program.run / "echo.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    assert converse(Address("unix", str(path)), b"one\ntwo\nno end") == b"one\ntwo\nno end"
    program.finish()
    assert program.log == ""


def test_http_files(example: Start, port: int, tmp_path: Path) -> None:
    """curl gets a file byte by byte, the list of the files, and 404 for what is not there."""
    content = random.randbytes(300_000)
    (tmp_path / "data.bin").write_bytes(content)
    program = example("http_files", port, tmp_path, allow=[ACCESS])
    assert fetch(port, "data.bin") == (200, content)
    for path, status, wanted in (("", 200, b'href="data.bin"'), ("none", 404, b"not found")):
        got, body = fetch(port, path)
        assert got == status and wanted in body
    program.finish()


def fetch(port: int, path: str) -> tuple[int, bytes]:
    """Status and body, by curl where there is one."""
    if shutil.which("curl"):
        command = ["curl", "-sS", "--noproxy", "*", "-w", "%{stderr}%{http_code}", f"http://127.0.0.1:{port}/{path}"]
        done = subprocess.run(command, capture_output=True, timeout=20, check=True)
        return int(done.stderr), done.stdout
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", f"/{path}")
    answer = connection.getresponse()
    try:
        return answer.status, answer.read()
    finally:
        connection.close()


def test_xmlrpc_compute(example: Start, port: int) -> None:
    """Calls are answered by several workers; a wrong one is a fault, and the pool serves on."""
    program = example("xmlrpc_compute", port, workers=processors())
    pids = set(program.children())
    with xmlrpc.client.ServerProxy(f"http://127.0.0.1:{port}") as proxy:
        methods = proxy.system.listMethods()
        assert isinstance(methods, list) and {"longest", "pid"} <= set(methods)
        assert proxy.longest(1000) == [871, 178]
        with pytest.raises(xmlrpc.client.Fault, match="must be an integer"):
            proxy.longest("many")
        seen = set[object]()

        def answered_all() -> bool:
            seen.add(proxy.pid())
            return seen == pids

        until(answered_all, 10, "every worker has answered", every=0)
    program.finish()
    assert program.log == ""


def test_custom_worker(example: Start, port: int, tmp_path: Path) -> None:
    """Each worker opens and closes its own connection; no visit is lost, nor by a reload; the database is removed."""
    program = example("custom_worker", port, env={"TMPDIR": str(tmp_path)}).ready()
    assert len(list(tmp_path.iterdir())) == 1
    answer = re.compile(rb"Ada: visit (\d+), counted by worker (\d)\n")
    slots, numbers = set[int](), []

    def visit() -> None:
        match = answer.fullmatch(converse(tcp(port), b"Ada\n"))
        assert match
        numbers.append(int(match[1]))
        slots.add(int(match[2]))

    def visited_all() -> bool:
        visit()
        return len(slots) == 4

    until(visited_all, 10, "every worker was visited", every=0)
    old = program.children()
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOADED, 10)
    program.wait_ready(4, without=old)
    visit()
    assert numbers == list(range(1, len(numbers) + 1))
    program.finish()
    opened = re.compile(r"visits\[(\d+)\] INFO: worker \d+: opened")
    closed = re.compile(r"visits\[(\d+)\] INFO: worker \d+: closed")
    pids = [match[1] for match in program.found(opened)]
    assert len(pids) == 8 and len(set(pids)) == 8
    assert sorted(match[1] for match in program.found(closed)) == sorted(pids)
    assert list(tmp_path.iterdir()) == []


def test_signals(start: Start, port: int) -> None:
    """The walk comes to its end, and every request in it had its answer."""
    program = start(EXAMPLES / "signals.py", port)
    program.wait_exit(30)
    program.finish()
    steps = program.out_path.read_text(encoding="utf-8").splitlines()
    begun = ("two workers", "TTIN", "scale(5)", "TTOU", "HUP", "reload()", "kill -9", "TERM")
    assert [step for step, word in zip(steps, begun, strict=False) if not step.startswith(word)] == []
    count = re.fullmatch(r"(\d+) requests, (\d+) answers", steps[len(begun)])
    assert count and count[1] == count[2]
    assert len(program.found(patterns.RELOADED)) == 2
    assert len(steps) == len(begun) + 1


def test_signals_stopped_half_way(start: Start, port: int) -> None:
    """A TERM from outside in the middle of the walk ends it like any other server."""
    program = start(EXAMPLES / "signals.py", port)
    program.wait_for(patterns.RELOAD_BEGINS)
    program.finish()


# -- their docstrings ----------------------------------------------------------------------------------


def clients(name: str) -> list[str]:
    """The commands in an example's docstring that talk to it."""
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_bytes())) or ""
    commands = re.findall(r"^    (.*)$|`([^`]+)`", text, re.MULTILINE)
    tools = re.compile(r"(?:\w+ \w+ \| )?(nc|curl|python -c|dig|redis-cli|logger|swaks) ")
    return [command for pair in commands for command in pair if tools.match(command)]


WORKERS = {"primes": processors(), "xmlrpc_compute": processors(), "json_compute": processors()}
WORKERS |= {"thumbnails": processors(), "upper_udp": 2, "syslog_server": 2, "smtp_intake": 2, "gevent_worker": 2}

SAID = {
    "echo": (9000, "hello"),
    "primes": (9999, "9592 primes below 100000, "),
    "upper_udp": (9001, r"b'A'|HELLO"),
    "unix_echo": (None, "hello"),
    "http_files": (9002, "echo.py"),
    "xmlrpc_compute": (9003, r"\[77031, 350\]"),
    "custom_worker": (9004, "Ada: visit 1, "),
    "dns_server": (9006, r"192\.0\.2\.80|10 mail\.example\.test|retrying in TCP"),
    "redis_calculator": (9007, r"2432902008176640000|ADD 40 2: \d+.* requests per second|:42"),
    "thumbnails": (9008, "^$"),
    "json_compute": (9009, r"71, 839, 1471, 6857|3\.14159265"),
    "syslog_server": (9010, "^$"),
    "werkzeug_flask": (9011, r'"hello":"Ada"|"lines":1'),
    "smtp_intake": (9013, "250 OK"),
    "gevent_worker": (9014, "hello"),
}


def test_docstrings_name_a_client() -> None:
    """Every example says in its docstring how to start it, and by which client to talk to it."""
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == SAID.keys() | {"signals", "chat"}
    for name in names:
        text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_bytes())) or ""
        assert f"python examples/{name}.py" in text
        assert clients(name)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    Image.new("RGB", (400, 300), "green").save(path)
    return path


@pytest.mark.parametrize("name", SAID)
def test_docstring_clients_work(example: Start, port: int, photo: Path, name: str) -> None:
    """The clients that a docstring names get the answer that it promises, where they are installed."""
    default, wanted = SAID[name]
    where = "{run}/echo.sock" if default is None else port
    more = {"http_files": str(EXAMPLES), "syslog_server": "{run}/log.sock"}
    arguments = [more[name]] if name in more else []
    program = example(name, where, *arguments, workers=WORKERS.get(name, 4), allow=[ACCESS])
    program.write("README.md", "one line\n")
    shutil.copy(photo, program.work / "photo.png")
    ran = 0
    for command in clients(name):
        tool = command.split(" | ")[-1].split()[0]
        if tool != "python" and not shutil.which(tool):
            continue
        command = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", command)
        command = re.sub(r"\b(echo|log)\.sock\b", lambda match: str(program.run / match[0]), command)
        if default is not None and "-u " not in command:
            assert str(default) in command
        command = command.replace(str(default), str(port))
        command = f"cd {shlex.quote(str(program.work))}; no_proxy='*'; export no_proxy; {command}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0 and re.search(wanted.replace("visit 1", r"visit \d"), done.stdout), (command, done)
        ran += 1
    program.finish()
    if not ran:
        pytest.skip(f"none of its clients is installed: {clients(name)}")


# -- the reference -------------------------------------------------------------------------------------


def test_examples_are_listed() -> None:
    """examples/README.md names each example, and no other file."""
    named = re.findall(
        r"^\| \[(\w+\.py)\]\(\1\) \|", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(named) == sorted(path.name for path in EXAMPLES.glob("*.py"))


def test_signals_are_documented() -> None:
    """docs/reference/signals.md has a row for every signal that the master takes over."""
    named = set(re.findall(r"^\| ([A-Z0-9, ]+) \|", SIGNALS.read_text(encoding="utf-8"), re.MULTILINE))
    names = {name for cell in named for name in cell.split(", ")}
    assert {one.name.removeprefix("SIG") for one in prefork.master.loop.SIGNALS} <= names
