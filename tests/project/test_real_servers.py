"""Servers of the world on the pool, asked by clients that nobody here wrote: dig, redis-cli, curl, wrk, logger, swaks.

Each is started as its first lines say, and reloaded or stopped while its client is at work: nothing may be lost.
"""

import io
import json
import os
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from support import PROGRAMS, Address, Ledger, Load, Program, account, dial, patterns, until

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Start = Callable[..., Program]

PACKAGES = {
    "curl": "curl",
    "dig": "bind9-dnsutils",
    "logger": "bsdutils",
    "nc": "netcat-openbsd",
    "redis-benchmark": "redis-tools",
    "redis-cli": "redis-tools",
    "redis-server": "redis-server",
    "swaks": "swaks",
    "wrk": "wrk",
}


def tool(name: str) -> str:
    """The tool's path. CI has installed it; elsewhere its absence is a reason to skip."""
    found = shutil.which(name)
    if found is None:
        why = f"{name} is not installed (Debian's package {PACKAGES[name]})"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    return found


def run(*words: object, stdin: bytes = b"", code: int | None = 0, timeout: float = 30) -> str:
    """What a tool prints."""
    command = [tool(str(words[0])), *map(str, words[1:])]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=timeout, check=False)
    assert code is None or done.returncode == code, (command, done)
    return done.stdout.decode(errors="replace")


def curl(port: int, path: str, *words: object, stdin: bytes = b"") -> tuple[int, bytes]:
    """Status and body."""
    url = f"http://127.0.0.1:{port}/{path}"
    command = [tool("curl"), "-sS", "--noproxy", "*", "-w", "%{stderr}%{http_code}", *map(str, words), url]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=30, check=True)
    return int(done.stderr), done.stdout


class Busy:
    """A tool at work in the background, until `result()`."""

    def __init__(self, *words: object) -> None:
        self.process = subprocess.Popen(
            [tool(str(words[0])), *map(str, words[1:])], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def result(self, timeout: float = 30) -> str:
        try:
            out, _ = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
            self.process.wait()
        assert self.process.returncode == 0, out
        return out


def reload(program: Program, workers: int) -> None:
    """A whole reload: every worker is another one afterwards."""
    old = program.children()
    program.send(signal.SIGHUP)
    program.wait_ready(workers, 15, without=old)


def processors() -> int:
    return len(os.sched_getaffinity(0))


def tcp(port: int) -> Address:
    return Address("tcp", "127.0.0.1", port)


def wrk_is_pleased(out: str) -> int:
    """wrk saw no error of any kind; how many requests it made."""
    assert "Socket errors" not in out and "Non-2xx" not in out, out
    match = re.search(r"(\d+) requests in", out)
    assert match, out
    return int(match[1])


# -- DNS ---------------------------------------------------------------------------------------------------------------


def dig(port: int, *words: object) -> str:
    return run("dig", "@127.0.0.1", "-p", port, "+tries=1", "+time=5", *words)


def test_dns(example: Start, port: int) -> None:
    """dig gets the zone over UDP and TCP, NXDOMAIN for what is not in it, and a long answer over TCP by itself."""
    program = example("dns_server", port)
    assert dig(port, "+short", "www.example.test") == "192.0.2.80\n"
    assert dig(port, "+short", "+tcp", "www.example.test", "AAAA") == "2001:db8::80\n"
    assert dig(port, "+short", "+tcp", "example.test", "MX") == "10 mail.example.test.\n"
    assert "status: NXDOMAIN" in dig(port, "none.example.test")
    assert "ANSWER: 0" in dig(port, "mail.example.test", "MX")
    long = dig(port, "long.example.test", "TXT")
    assert "Truncated, retrying in TCP mode" in long and long.count("x" * 200) == 8
    program.finish()


def test_dns_is_reloaded(example: Start, port: int, tmp_path: Path) -> None:
    """Of 600 queries over UDP and 600 over TCP, none is lost by three reloads meanwhile."""
    program = example("dns_server", port)
    names = tmp_path / "names"
    names.write_text("www.example.test\nexample.test MX\nwww.example.test AAAA\n" * 200)
    words = ("dig", "@127.0.0.1", "-p", port, "+tries=1", "+time=5", "+noall", "+answer", "-f", names)
    clients = [Busy(*words, "+notcp"), Busy(*words, "+tcp")]
    for _ in range(3):
        reload(program, 4)
    for client in clients:
        assert client.result().count("\tIN\t") == 600
    program.finish()


def test_dns_garbage(example: Start, port: int) -> None:
    """What is no query is logged, and a client that stops in the middle of one does not hold the stop."""
    program = example("dns_server", port)
    with dial(Address("udp", "127.0.0.1", port)) as sock:
        sock.send(b"garbage")
    with dial(tcp(port)) as half:
        half.sendall(b"\x00\xff")
        program.wait_for("Invalid Request", 5)
        assert dig(port, "+short", "www.example.test") == "192.0.2.80\n"
    program.finish()


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


# -- thumbnails --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photo.png, photo.jpg; half.png; two small files of too many pixels; big, 11 MB of nothing."""
    path = tmp_path_factory.mktemp("pictures")
    image = Image.effect_mandelbrot((1200, 800), (-2.0, -1.0, 1.0, 1.0), 20)
    image.save(path / "photo.png")
    image.save(path / "photo.jpg")
    Image.new("1", (7000, 7000)).save(path / "large.png")
    Image.new("1", (10000, 10000)).save(path / "bomb.png")
    whole = (path / "photo.png").read_bytes()
    (path / "half.png").write_bytes(whole[: len(whole) // 2])
    (path / "big").write_bytes(bytes(11_000_000))
    return path


def test_thumbnails(example: Start, port: int, pictures: Path) -> None:
    """curl gets a JPEG of the size it asked for; what is broken, too large, or a bomb is refused, and all live on."""
    program = example("thumbnails", port, workers=processors())
    pids = program.children()
    for name in ("photo.png", "photo.jpg"):
        status, body = curl(port, "200", "--data-binary", f"@{pictures / name}")
        with Image.open(io.BytesIO(body)) as small:
            assert (status, small.format, small.size) == (200, "JPEG", (200, 133))
    for path, name, wanted in (
        ("200", "large.png", 413),
        ("200", "bomb.png", 413),
        ("200", "big", 413),
        ("200", "half.png", 415),
        ("2000", "photo.png", 404),
        ("..", "photo.png", 404),
    ):
        assert curl(port, path, "--data-binary", f"@{pictures / name}")[0] == wanted, name
        assert curl(port, path, "-H", "Expect:", "--data-binary", f"@{pictures / name}")[0] == wanted, name
    assert (
        curl(port, "200", "-H", "Transfer-Encoding: chunked", "--data-binary", f"@{pictures / 'photo.jpg'}")[0] == 411
    )
    assert program.children() == pids
    program.finish()


def test_thumbnails_under_wrk(example: Start, port: int, pictures: Path, tmp_path: Path) -> None:
    """wrk, which posts a picture all the time, sees no error while the pool is reloaded."""
    program = example("thumbnails", port, workers=processors())
    script = tmp_path / "post.lua"
    script.write_text(
        f"wrk.method = 'POST'\nwrk.path = '/64'\nwrk.body = io.open('{pictures / 'photo.jpg'}', 'rb'):read('*a')\n"
    )
    wrk = Busy("wrk", "-t1", "-c8", "-d2", "-s", script, f"http://127.0.0.1:{port}/64")
    program.wait_for('"POST /64 HTTP/1.1" 200')
    reload(program, processors())
    assert wrk_is_pleased(wrk.result()) > 20
    program.finish()


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_json_compute(example: Start, port: int) -> None:
    """curl gets results and errors as JSON, with the status that fits."""
    program = example("json_compute", port, workers=processors())
    pids = program.children()

    def call(path: str, body: str) -> tuple[int, dict[str, object]]:
        status, answer = curl(port, path, "--data-binary", "@-", stdin=body.encode())
        found: dict[str, object] = json.loads(answer)
        return status, found

    assert call("factors", "[600851475143]") == (200, {"result": [71, 839, 1471, 6857]})
    assert call("factors", "[1024]") == (200, {"result": [2] * 10})
    assert call("pi", "[20]") == (200, {"result": "3.1415926535897932384"})
    pid = call("pid", "[]")[1]["result"]
    assert isinstance(pid, int) and pid in pids
    for path, body, status, says in (
        ("none", "[]", 404, "no such function"),
        ("pi", "[1", 400, "delimiter"),
        ("pi", "{}", 400, "must be a list"),
        ("pi", "[]", 400, "missing 1 required"),
        ("pi", '["x"]', 400, "from 1 to 4000"),
        ("factors", "[1e300]", 400, "a whole number"),
        ("pi", "[" * 4000, 400, ""),  # too deep for some versions, unfinished for others
        ("pi", "[" + " " * 5000 + "1]", 400, "at most 4096 bytes"),
    ):
        got, answer = call(path, body)
        assert got == status and says in str(answer["error"]), (path, body, answer)
    assert program.children() == pids
    program.finish()
    assert program.log == ""


def test_json_compute_in_time(start: Start, port: int) -> None:
    """What takes too long is answered 503, by a worker that lives on; the command serves the handler."""
    files = {"json_compute.py": (EXAMPLES / "json_compute.py").read_text(encoding="utf-8")}
    bind = f"tcp://127.0.0.1:{port}"
    program = start("prefork", "json_compute:Calls", "-b", bind, "-w", 1, "--request-timeout", 0.5, files=files)
    pids = program.wait_ready(1, 10)
    status, answer = curl(port, "factors", "-d", "[999999999999999989]")
    assert status == 503 and b"took longer than 0.5 s" in answer
    assert curl(port, "pi", "-d", "[3]") == (200, b'{"result": "3.14"}\n')
    assert program.children() == pids
    program.finish()


# -- syslog ------------------------------------------------------------------------------------------------------------


def test_syslog(example: Start, port: int, tmp_path: Path) -> None:
    """logger's messages are lines of the file, with their priority, over UDP (both formats) and the Unix socket."""
    book = tmp_path / "messages.log"
    program = example("syslog_server", port, "{run}/log.sock", book, workers=2)
    remote = ("logger", "--server", "127.0.0.1", "--port", port, "--udp")
    local = ("logger", "-u", program.run / "log.sock", "--socket-errors=on")
    run(*remote, "-p", "mail.warning", "-t", "post", "no room")
    run(*remote, "--rfc3164", "-p", "local7.debug", "-t", "post", "one \x1b[31m two")
    run(*local, "-p", "daemon.err", "-t", "backup", "the disk is full")
    run(*local, "h\u00e4llo")
    with dial(Address("udp", "127.0.0.1", port)) as sock:
        for raw in (b"no priority", b"<999>odd", b"<1", b"", b"<14>\xff\n\n"):
            sock.send(raw)
    until(lambda: book.exists() and book.read_text().count("\n") == 9, 5, "all is in the file")
    lines = [line.split(" ", 3)[1:] for line in book.read_text(encoding="utf-8").splitlines()]
    by_priority = {(sender, priority, text.split("] ")[-1].split("post: ")[-1]) for sender, priority, text in lines}
    assert by_priority >= {
        ("127.0.0.1", "mail.warning", "no room"),
        ("127.0.0.1", "local7.debug", r"one \x1b[31m two"),
        ("127.0.0.1", "user.notice", "no priority"),
        ("127.0.0.1", "user.notice", "<999>odd"),
        ("127.0.0.1", "user.info", r"\xff"),
    }
    assert any(row[:2] == ["local", "daemon.err"] and row[2].endswith("backup: the disk is full") for row in lines)
    assert any(row[:2] == ["local", "user.notice"] and row[2].endswith("h\u00e4llo") for row in lines)
    program.finish()
    assert program.log == ""


def test_syslog_loses_nothing(example: Start, port: int, tmp_path: Path) -> None:
    """All that logger could send is in the file, each line once and whole, through a reload and a stop at once."""
    book = tmp_path / "messages.log"
    program = example("syslog_server", port, "{run}/log.sock", book, workers=2)
    path = program.run / "log.sock"
    texts = [f"message {number} {'x' * 200}" for number in range(1000)]
    half = len(texts) // 2
    run("logger", "-u", path, "--socket-errors=on", stdin="\n".join(texts[:half]).encode())
    program.send(signal.SIGHUP)
    run("logger", "-u", path, "--socket-errors=on", stdin="\n".join(texts[half:]).encode())
    program.finish()
    found = [line[line.index("message ") :] for line in book.read_text().splitlines()]
    assert sorted(found) == sorted(texts)


# -- Flask -------------------------------------------------------------------------------------------------------------


def test_werkzeug_flask(example: Start, port: int, tmp_path: Path) -> None:
    """curl gets what the Flask application says, and an upload is counted."""
    program = example("werkzeug_flask", port)
    status, body = curl(port, "hello/Ada")
    told = json.loads(body)
    assert status == 200 and told["hello"] == "Ada" and told["several"] is True
    assert told["pid"] in program.children()
    (tmp_path / "file").write_bytes(b"one\ntwo\n" * 100_000)
    assert json.loads(curl(port, "count", "-F", f"file=@{tmp_path / 'file'}")[1]) == {"lines": 200000, "bytes": 800000}
    assert curl(port, "none")[0] == 404
    program.finish()
    assert program.log == ""


def test_werkzeug_flask_under_wrk(example: Start, port: int) -> None:
    """wrk sees no error while the pool is reloaded twice."""
    program = example("werkzeug_flask", port)
    wrk = Busy("wrk", "-t1", "-c16", "-d2", f"http://127.0.0.1:{port}/hello/wrk")
    reload(program, 4)
    reload(program, 4)
    assert wrk_is_pleased(wrk.result()) > 100
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


# -- SMTP --------------------------------------------------------------------------------------------------------------

FROM, TO = "ada@example.test", "bob@example.test"


def subjects(directory: Path) -> list[str]:
    """Of the mails that are in the Maildir."""
    texts = [path.read_text() for path in (directory / "new").iterdir()] if directory.exists() else []
    return sorted(re.findall(r"^Subject: (.*)$", "\n".join(texts), re.MULTILINE))


def test_smtp_intake(example: Start, port: int, tmp_path: Path) -> None:
    """swaks delivers a mail and an attachment; each is in the Maildir once."""
    program = example("smtp_intake", port, tmp_path / "mail", workers=2)
    swaks = ("swaks", "--server", "127.0.0.1", "--port", port, "--from", FROM, "--to", TO)
    assert "250 OK" in run(*swaks, "--header", "Subject: first")
    assert "250 OK" in run(*swaks, "--header", "Subject: second", "--attach", f"@{EXAMPLES / 'smtp_intake.py'}")
    assert subjects(tmp_path / "mail") == ["first", "second"]
    program.finish()


def test_smtp_too_large(example: Start, port: int, tmp_path: Path) -> None:
    """smtplib is told that a mail is too large, and the next one is taken."""
    program = example("smtp_intake", port, tmp_path / "mail", workers=2)
    with smtplib.SMTP("127.0.0.1", port, timeout=10) as client:
        with pytest.raises(smtplib.SMTPResponseException) as refused:
            client.sendmail(FROM, TO, "Subject: large\n\n" + ("x" * 70 + "\n") * 160_000)
        assert refused.value.smtp_code == 552
        client.sendmail(FROM, TO, "Subject: small\n\nhi\n")
    assert subjects(tmp_path / "mail") == ["small"]
    program.finish()


def deliver(port: int, text: str) -> int:
    """As a mail server does it: whoever is told to come back (4xx), or loses the connection, tries again."""
    for tries in range(1, 100):
        client = smtplib.SMTP(timeout=10)
        try:
            code, _ = client.connect("127.0.0.1", port)
            if code == 220:
                client.sendmail(FROM, TO, text)
                return tries
            assert code == 421
        except smtplib.SMTPResponseException as error:
            assert error.smtp_code == 421, error
        except smtplib.SMTPServerDisconnected:
            continue
        finally:
            client.close()
    raise AssertionError("never delivered")


def test_smtp_is_reloaded(example: Start, port: int, tmp_path: Path) -> None:
    """Mails that are delivered through three reloads arrive, each of them once."""
    program = example("smtp_intake", port, tmp_path / "mail", workers=2)
    tries: list[int] = []

    def send(name: str) -> None:
        for number in range(25):
            tries.append(deliver(port, f"Subject: {name}-{number}\n\nhi\n"))

    senders = [threading.Thread(target=send, args=(f"sender{index}",)) for index in range(3)]
    for sender in senders:
        sender.start()
    for _ in range(3):
        reload(program, 2)
    for sender in senders:
        sender.join(30)
    assert len(tries) == 75
    assert subjects(tmp_path / "mail") == sorted(f"sender{i}-{n}" for i in range(3) for n in range(25))
    program.finish()


def test_smtp_stop(example: Start, port: int, tmp_path: Path) -> None:
    """A stop takes the mail that is being sent, and tells an idle client 421."""
    program = example("smtp_intake", port, tmp_path / "mail", workers=2)
    with smtplib.SMTP("127.0.0.1", port, timeout=10) as busy, smtplib.SMTP("127.0.0.1", port, timeout=10) as idle:
        for client in (busy, idle):
            client.ehlo()
        assert busy.mail(FROM)[0] == busy.rcpt(TO)[0] == 250
        program.send(signal.SIGTERM)
        assert idle.getreply()[0] == 421
        idle.close()
        assert program.running
        assert busy.data("Subject: late\n\nhi\n")[0] == 250
        assert busy.getreply()[0] == 421
        busy.close()
        program.wait_exit(5)
    assert subjects(tmp_path / "mail") == ["late"]
    program.finish()


# -- gevent ------------------------------------------------------------------------------------------------------------


def test_gevent_worker(example: Start, port: int) -> None:
    """400 silent clients at once do not keep anybody from being answered, nor each other."""
    program = example("gevent_worker", port, workers=2)
    with ExitStack() as stack:
        slow = [stack.enter_context(dial(tcp(port), 10)) for _ in range(400)]
        assert run("nc", "-N", "127.0.0.1", port, stdin=b"hello\n") == "hello\n"
        for number, client in enumerate(slow):
            client.sendall(b"line %d\n" % number)
        for number, client in enumerate(slow):
            assert client.recv(100) == b"line %d\n" % number
    program.finish()
    assert program.log == ""


def test_gevent_worker_leaves(example: Start, port: int) -> None:
    """A stop waits for the request in hand."""
    program = example("gevent_worker", port, workers=2)
    with dial(tcp(port)) as client:
        client.sendall(b"one\n")
        assert client.recv(100) == b"one\n"
        program.send(signal.SIGTERM)
        until(lambda: refuses(port), 5, "nobody is served any more")
        client.sendall(b"two\n")
        assert client.recv(100) == b"two\n"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""
    program.wait_exit()
    program.finish()
    assert program.log == ""


def refuses(port: int) -> bool:
    try:
        with dial(tcp(port), 0.1):
            return False
    except OSError:
        return True


@pytest.mark.parametrize("kind", ["gevent_worker:GeventWorker"])
def test_own_worker_loses_nothing(
    start: Start, ledger: Ledger, load: Callable[..., Load], port: int, kind: str
) -> None:
    """Under load a worker of one's own loses no request by a reload, a retirement and the stop."""
    path = os.pathsep.join([str(PROGRAMS), str(EXAMPLES)])
    words = ("prefork", "work:Work", "-b", f"tcp://127.0.0.1:{port}", "-w", 2, "--worker-class", kind)
    program = start(*words, env={"PYTHONPATH": path})
    program.wait_ready(2, 10)
    clients = load(tcp(port), clients=6)
    clients.more(200)
    reload(program, 2)
    clients.more(100)
    old = program.children()
    os.kill(old[0], signal.SIGTERM)
    program.wait_ready(2, 10, without=old[:1])
    clients.more(100)
    program.stop()
    tally = clients.stop()
    assert account(tally, ledger) == []
    assert tally.lost == 0
    program.finish()
