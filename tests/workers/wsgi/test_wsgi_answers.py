"""The worker class `wsgi` sends what an application answers, in HTTP/1.1, and outlives its faults."""

import time
from email.utils import parsedate_to_datetime

import pytest

from support.scripts import Notes, Start, noted
from support.web import Unanswered
from support.wsgi import HOST, POST, TRACE, Dial, serve

pytestmark = pytest.mark.timeout(60)


def test_answers(start: Start, web: Dial, notes: Notes) -> None:
    """A body of known length says it, one of unknown length comes in chunks; an iterable is closed."""
    program = serve(start)
    client = web(program)
    answer = client.get("/pid")
    assert (answer.headers["content-length"], answer.headers["content-type"]) == (str(len(answer.body)), "text/plain")
    assert answer.headers["server"] == "prefork"
    assert abs(parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()) < 5
    assert (client.get("/parts").body, client.get("/parts").chunked) == (b"onetwothree", True)
    noted(notes, "closed", 2)
    answer = client.get("/list")
    assert (answer.body, answer.headers["content-length"]) == (b"onetwo", "6")
    assert client.get("/write").body == b"written twice and returned"
    for path in ("/empty", "/empty/closing"):
        assert client.get(path).headers["content-length"] == "0"
    assert (client.get("/again").reason, client.get("/again").body) == ("Second", b"second")
    assert client.get("/download/300000").body == client.get("/whole/300000").body
    assert client.get("/header/Server=other").headers["server"] == "other"
    assert client.get("/header/Date=then").headers["date"] == "then"
    program.finish()


def test_answers_to_http_1_0(start: Start, web: Dial) -> None:
    """HTTP/1.0 gets no chunks: the body ends with the connection; a kept one says so."""
    program = serve(start)
    client = web(program).send(b"GET /parts HTTP/1.0\r\n\r\n")
    answer = client.answer()
    assert (answer.body, answer.closes, answer.chunked) == (b"onetwothree", True, False)
    kept = web(program)
    for _ in range(2):
        answer = kept.send(b"GET /pid HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").answer()
        assert answer.headers["connection"] == "keep-alive"
    assert kept.send(b"GET /parts HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").answer().closes
    assert kept.is_over()
    program.finish()


def test_answers_without_a_body(start: Start, web: Dial) -> None:
    """HEAD, 204 and 304 have no body, whatever the application gave, and the connection goes on."""
    program = serve(start)
    client = web(program)
    whole = client.get("/list")
    head = client.get("/list", method="HEAD")
    assert {**head.headers, "date": ""} == {**whole.headers, "date": ""}
    for path in ("/parts", "/write", "/file/1000", "/empty"):
        assert client.get(path, method="HEAD").status == 200
    for status in ("204", "304"):
        answer = client.get(f"/status/{status}")
        assert (answer.status, answer.headers.get("content-length"), answer.chunked) == (int(status), None, False)
    assert client.get("/status/404").body == b"body"
    assert client.get("/pid").status == 200
    program.finish()


def test_answers_of_a_wrong_length(start: Start, web: Dial) -> None:
    """More than the Content-Length is left out; less ends the connection, so the client can tell. Both are logged."""
    program = serve(start)
    client = web(program)
    assert client.get("/length/3/5").body == b"xxx"
    assert client.get("/length/3/3").body == b"xxx"
    client.send(b"GET /length/5/3 HTTP/1.1\r\n" + HOST + b"\r\n")
    with pytest.raises(Unanswered):
        client.answer()
    assert program.log.count("more than its Content-Length") == 1
    assert program.log.count("sent 3 bytes of a body of 5") == 1
    program.finish()


def test_headers_by_the_thousand(start: Start, web: Dial) -> None:
    """Any number of different headers go out as the application gave them, and what is wrong in one of them is found
    however often others of its name were right."""
    program = serve(start, allow=TRACE)
    client = web(program)
    for number in range(1500):
        answer = client.get(f"/header/X-{number % 1100}={number}")
        assert (answer.status, answer.headers[f"x-{number % 1100}"]) == (200, str(number))
    assert client.get("/header/X-Split=well").status == 200
    assert client.get("/split").status == 500
    program.finish()


FAULTS = (
    *("/raise", "/twice", "/never", "/text", "/split", "/badstatus/OK", "/badstatus/2000 Long", "/badstatus/100 Wait"),
    "/never/iterated",
    *("/header/Connection=close", "/header/transfer-encoding=chunked", "/header/Keep-Alive=1", "/header/Up grade=1"),
    *("/header/X:y=1", "/header/=1", "/header/Content-Length=-1", "/header/Content-Length=x", "/header/Upgrade=h2c"),
)


def test_faults_of_the_application(start: Start, web: Dial) -> None:
    """An application that raises, or breaks PEP 3333, is answered for with 500, and logged with its traceback."""
    program = serve(start, allow=[*TRACE, r"AssertionError: .*", r"TypeError: .*"])
    (worker,) = program.wait_ready(1)
    for path in FAULTS:
        client = web(program)
        answer = client.get(path.replace(" ", "%20"))
        assert (path, answer.status, answer.closes, "Set-Cookie" in str(answer)) == (path, 500, True, False)
        assert client.is_over()
        assert f"the application raised at GET {path.replace(' ', '%20')}" in program.log
    assert web(program).get("/pid").body == b"%d\n" % worker
    program.finish()


def test_fault_halfway(start: Start, web: Dial, notes: Notes) -> None:
    """Where the answer has begun its connection is reset, so that no client takes the half for the whole."""
    program = serve(start, allow=TRACE)
    for path in ("/halfway", "/late"):
        for version in ("1.0", "1.1"):
            client = web(program).send(f"GET {path} HTTP/{version}\r\n".encode() + HOST + b"\r\n")
            with pytest.raises(ConnectionResetError):
                client.answer()
    noted(notes, "closed", 2)
    assert web(program).get("/pid").status == 200
    program.finish()


def test_exit_in_an_application(start: Start, web: Dial) -> None:
    """A SystemExit ends its worker, after a 500, or a reset where an answer has begun, and the worker is replaced."""
    program = serve(start)
    (worker,) = program.wait_ready(1)
    assert web(program).get("/leave").status == 500
    (worker,) = program.wait_ready(1, without=[worker])
    client = web(program).send(b"GET /leave/halfway HTTP/1.0\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        client.rest()
    program.wait_ready(1, without=[worker])
    program.finish()


def test_client_that_leaves(start: Start, web: Dial, notes: Notes) -> None:
    """A client that goes away in the middle of its request or its answer is no error of anybody; close() is called."""
    program = serve(start)
    for raw in (
        POST + b"Content-Length: 9\r\n\r\nhalf",
        POST + b"Content-Length: 100000\r\n\r\nhalf",
        b"GET /down",
        b"",
    ):
        web(program).send(raw).sock.close()
    gone = web(program).send(b"GET /download/50000000 HTTP/1.1\r\n" + HOST + b"\r\n")
    gone.sock.recv(1000)
    gone.sock.close()
    assert web(program).get("/pid").status == 200
    program.finish()
