"""Servers of the world on the pool: one that speaks Redis's protocol, and a chat over Redis itself."""

import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import dial, patterns, until
from support.examples import EXAMPLES, Start, reload, run, tcp, tool

# -- the protocol of Redis ---------------------------------------------------------------------------------------------


def test_redis_calculator(example: Start, port: int) -> None:
    """redis-cli reads numbers, long numbers and errors."""
    program = example("redis_calculator", port)
    cli = ("redis-cli", "-p", port)
    assert run(*cli, "FACT", 20) == "2432902008176640000\n"
    assert run(*cli, "FACT", 25) == "15511210043330985984000000\n"
    assert run(*cli, "ADD", 1, -2, 3) == "2\n"
    assert run(*cli, "PING") == "PONG\n"
    assert run(*cli, "MUL", "x").startswith("ERR invalid literal")
    assert run(*cli, "FLUSHALL").startswith("ERR unknown command 'FLUSHALL'")
    assert run(*cli, "-r", 3, "MUL", 6, 7) == "42\n" * 3
    program.finish()
    assert program.log == ""


def test_redis_benchmark(example: Start, port: int) -> None:
    """redis-benchmark gets all its answers, on 40 connections at once, one by one and in pipelines of 16."""
    program = example("redis_calculator", port)
    bench = ("redis-benchmark", "-p", port, "--csv", "-c", 40, "-n", 5000)
    named = {row.split(",")[0]: row for row in run(*bench, "-t", "ping").splitlines()}
    assert {'"PING_INLINE"', '"PING_MBULK"'} <= named.keys()
    assert '"ADD 40 2"' in run(*bench, "-P", 16, "ADD", 40, 2)
    program.finish()
    assert program.log == ""


def test_redis_pipeline(example: Start, port: int) -> None:
    """Commands cut at any place are answered in order; what is no command ends the connection, with a reason."""
    program = example("redis_calculator", port)
    asked = b"ADD 1 2\r\n\r\n*2\r\n$4\r\nFACT\r\n$2\r\n25\r\nMUL 6 7\n*1\r\n$4\r\nPING\r\nNO\r\n"
    told = b":3\r\n$26\r\n15511210043330985984000000\r\n:42\r\n$4\r\nPONG\r\n-ERR unknown command 'NO'\r\n"
    for cut in range(0, len(asked), 7):
        with dial(tcp(port)) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(asked[:cut])
            sock.sendall(asked[cut:])
            sock.shutdown(socket.SHUT_WR)
            assert b"".join(iter(lambda: sock.recv(65536), b"")) == told
    for wrong in (b"*1\r\nPING\r\n", b"*9999\r\n", b"*1\r\n$99999\r\n", b"*x\r\n", b"y" * 20000):
        with dial(tcp(port)) as sock:
            sock.sendall(wrong)
            assert b"".join(iter(lambda: sock.recv(65536), b"")).startswith(b"-ERR ")
    program.finish()
    assert program.log == ""


def test_redis_clients_that_stay(example: Start, port: int) -> None:
    """Idle clients hold neither a reload nor a stop; one that is connected and has not asked yet is still answered."""
    program = example("redis_calculator", port)

    def connected() -> socket.socket:
        client = stack.enter_context(dial(tcp(port)))
        client.sendall(b"PING\r\n")
        assert client.recv(100) == b"$4\r\nPONG\r\n"
        return client

    with ExitStack() as stack:
        idle = [connected() for _ in range(8)]
        reload(program, 4)
        assert [client.recv(100) for client in idle] == [b""] * 8
        idle = [connected() for _ in range(8)]
        new = stack.enter_context(dial(tcp(port)))
        program.send(signal.SIGTERM)
        assert [client.recv(100) for client in idle] == [b""] * 8
        assert program.running
        new.sendall(b"ADD 1 1\r\n")
        assert new.recv(100) == b":2\r\n" and new.recv(100) == b""
    program.wait_exit(5)
    program.finish()
    assert program.log == ""


# -- a chat over Redis -------------------------------------------------------------------------------------------------


class RedisServer:
    """A Redis server on a Unix socket, which the test may stop and start again."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "redis.sock"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    def start(self) -> None:
        words = ["--port", "0", "--unixsocket", str(self.path), "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(
            [tool("redis-server"), *words], cwd=self.path.parent, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        until(lambda: run("redis-cli", "-s", self.path, "PING", code=None) == "PONG\n", 10, "Redis answers")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            self.process = None


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Netcat:
    """nc, spoken to through its pipes."""

    def __init__(self, port: int) -> None:
        words = [tool("nc"), "127.0.0.1", str(port)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.heard: list[str] = []
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.heard.append(line.decode().strip())

    def __enter__(self) -> "Netcat":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.thread.join(5)
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()

    def say(self, text: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def hears(self, text: str, timeout: float = 10) -> None:
        until(lambda: text in self.heard, timeout, f"{text!r} is heard among {self.heard}")

    def worker(self) -> str:
        until(lambda: self.welcome or not self.thread.is_alive(), 5, "the welcome")
        return self.welcome.rpartition(" ")[2]

    @property
    def name(self) -> str:
        return self.welcome.split(", ")[1]

    @property
    def welcome(self) -> str:
        return next((line for line in self.heard if line.startswith("welcome, ")), "")


def in_both_workers(port: int, stack: ExitStack) -> list[Netcat]:
    """Two members that different workers serve."""
    members: dict[str, Netcat] = {}

    def found() -> bool:
        member = stack.enter_context(Netcat(port))
        if slot := member.worker():
            members.setdefault(slot, member)
        return len(members) == 2

    until(found, 10, "members in two workers", every=0)
    return list(members.values())


def test_chat(example: Start, port: int, redis_server: RedisServer) -> None:
    """What one member says is heard in both workers, once; a reload says goodbye, and the chat goes on."""
    program = example("chat", port, redis_server.url, workers=2)
    with ExitStack() as stack:
        ada, bob = in_both_workers(port, stack)
        ada.say("/name Ada")
        ada.say("hello")
        bob.hears("Ada: hello")
        bob.say("/name Bob")
        bob.say("who is there?")
        ada.hears("Bob: who is there?")
        reload(program, 2)
        for member in (ada, bob):
            member.hears("goodbye, come back")
        assert ada.heard.count("Ada: hello") == bob.heard.count("Ada: hello") == 1
    with ExitStack() as stack:
        ada, bob = in_both_workers(port, stack)
        bob.say("/name Bob")
        bob.say("again")
        ada.hears("Bob: again")
        program.finish()


def test_chat_without_redis(example: Start, port: int, redis_server: RedisServer) -> None:
    """While Redis is away members are told so; when it is back, workers that have a connection take over."""
    program = example("chat", port, redis_server.url, workers=2)
    with Netcat(port) as ada:
        ada.worker()
        redis_server.stop()
        ada.say("hello?")
        ada.hears("not sent: Redis does not answer")
        redis_server.start()

    def is_heard() -> bool:
        """Members that a worker without a connection has had are told goodbye: ask again."""
        with ExitStack() as stack:
            ada, bob = in_both_workers(port, stack)
            try:
                ada.say("back again")
                bob.hears(f"{ada.name}: back again", 2)
            except (BrokenPipeError, AssertionError):
                return False
            return True

    until(is_heard, 20, "the chat is back")
    program.finish(allow=[patterns.ANYTHING])


def test_chat_needs_redis_to_boot(start: Start, port: int, tmp_path: Path) -> None:
    """Without Redis no worker gets ready, and the program ends with the reason."""
    program = start(EXAMPLES / "chat.py", port, f"unix://{tmp_path}/none.sock")
    program.wait_exit(10)
    assert "none.sock" in program.log and "BootError" in program.log
    program.finish(code=1, check_log=False)
