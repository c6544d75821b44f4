"""The command over a WSGI application, with the class `wsgi`."""

from collections.abc import Callable
from typing import Any

from . import Program, patterns
from .scripts import Start, path_of_modules
from .web import Web

TCP = "tcp://127.0.0.1:0"
APP = "webapp:app"
TRACE = [patterns.TRACEBACK, r"ValueError: .*", r"prefork\.errors\..*"]


def serve(start: Start, *flags: object, app: str = APP, bind: str = TCP, **options: Any) -> Program:
    """The command over an application, with one worker if no flag says otherwise."""
    env = {**path_of_modules(), **options.pop("env", {})}
    worker = [] if "--worker-class" in flags else ["--worker-class", "wsgi"]
    number = [] if "-w" in flags else ["-w", 1]
    program: Program = start("prefork", app, "-b", bind, *worker, *number, *flags, env=env, **options)
    return program.ready()


Dial = Callable[..., Web]
HOST = b"Host: test\r\n"
POST = b"POST /echo HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
VALID = {
    "get": b"GET /echo?a=b&c HTTP/1.1\r\n" + HOST + b"\r\n",
    "http 1.0": b"GET /echo HTTP/1.0\r\n\r\n",
    "http 1.0, kept": b"GET /echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    "http 1.0, kept for a proxy": b"GET /echo HTTP/1.0\r\nProxy-Connection: keep-alive\r\n\r\n",
    "close": b"GET /echo HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n",
    "blank lines first": b"\r\n\r\nGET /echo HTTP/1.1\r\n" + HOST + b"\r\n",
    "escapes": b"GET /echo/%41%e2%82%ac%2F?%41 HTTP/1.1\r\n" + HOST + b"\r\n",
    "whole url": b"GET http://other:81/echo?q HTTP/1.1\r\n" + HOST + b"\r\n",
    "headers": b"GET /echo HTTP/1.1\r\n"
    + HOST
    + b"X-One: 1\r\nx-one: 2\r\nCookie: a\r\nCookie: b\r\nX_Under: 3\r\n\r\n",
    "odd values": b"GET /echo HTTP/1.1\r\n" + HOST + b"X-Empty:\r\nX-Space: \t a b \t\r\nX-High: \xe4\r\n\r\n",
    "length": POST + b"Content-Type: text/x\r\nContent-Length: 5\r\n\r\nhello",
    "no body": POST + b"Content-Length: 0\r\n\r\n",
    "chunks": CHUNKED + b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n",
    "trailers": CHUNKED + b"a\r\n0123456789\r\n0\r\nX-Trailer: 1\r\n\r\n",
    "upgrade": b"GET /echo HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    "upgrade with a body": POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 5\r\n\r\nhello",
    "upgrade with chunks": POST
    + b"Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
}
GET = b"GET / HTTP/1.1\r\n" + HOST
