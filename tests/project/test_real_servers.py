"""Servers of the world on the pool: DNS, syslog, SMTP and gevent, asked by dig, logger and swaks.

Each is started as its first lines say, and reloaded or stopped while its client is at work: nothing may be lost.
"""

import os
import re
import signal
import smtplib
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import PROGRAMS, Address, Ledger, Load, account, dial, until
from support.examples import EXAMPLES, Busy, Start, reload, run, tcp

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
    """A stop waits for the request in progress."""
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
