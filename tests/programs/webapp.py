"""The WSGI application of the tests: what it does is the path."""

import hashlib
import io
import json
import os
import select
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

from work import note

PLAIN = [("Content-Type", "text/plain")]


class Closing:
    """An iterable whose close() is noted."""

    def __init__(self, *parts: bytes, fail: bool = False) -> None:
        self.parts, self.fail = parts, fail

    def __iter__(self) -> Iterator[bytes]:
        yield from self.parts
        if self.fail:
            raise ValueError("ordered trouble")

    def close(self) -> None:
        note("PREFORK_NOTES", "closed")


def echo(environ: dict[str, Any]) -> bytes:
    """Everything that is to be the same however a request arrives."""
    body = b"".join(iter(lambda: environ["wsgi.input"].read(1 << 16), b""))
    strings = {key: value for key, value in environ.items() if isinstance(value, str) and key != "REMOTE_PORT"}
    return json.dumps({"environ": strings, "body": body.decode("latin-1")}, sort_keys=True).encode()


def pass_gate(name: str) -> None:
    note("PREFORK_NOTES", f"begun {name}")
    while not Path(name).exists():
        select.select([], [], [], 0.005)


def upload(environ: dict[str, Any]) -> bytes:
    digest, size = hashlib.sha256(), 0
    while part := environ["wsgi.input"].read(1 << 16):
        digest.update(part)
        size += len(part)
    return json.dumps([size, digest.hexdigest(), os.getpid()]).encode()


def lines(environ: dict[str, Any]) -> bytes:
    body = environ["wsgi.input"]
    found = [body.readline(), body.readline(3), *body.readlines(1)]
    found += list(body)
    return json.dumps([line.decode() for line in [*found, body.read(5)]]).encode()


def download(size: int) -> Iterator[bytes]:
    block = b"0123456789abcdef" * 4096
    while size > 0:
        yield block[:size]
        size -= len(block)


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    word, _, argument = environ["PATH_INFO"].strip("/").partition("/")
    status, headers = "200 OK", list(PLAIN)
    match word:
        case "" | "pid":
            start_response(status, headers)
            return [f"{os.getpid()}\n".encode()]
        case "echo":
            body = echo(environ)
        case "upload":
            if argument:
                pass_gate(argument)
            body = upload(environ)
        case "lines":
            body = lines(environ)
        case "ignore":
            body = b"ignored"
        case "parts":
            start_response(status, headers)
            return Closing(b"one", b"", b"two", b"three")
        case "list":
            start_response(status, headers)
            return [b"one", b"", b"two"]
        case "empty":
            start_response(status, headers)
            return Closing() if argument else []
        case "write":
            write = start_response(status, headers)
            write(b"written ")
            write(b"")
            write(b"twice ")
            return [b"and returned"]
        case "status":
            start_response(f"{argument} As Ordered", headers)
            return [b"body"]
        case "length":  # said / given
            said, _, given = argument.partition("/")
            start_response(status, [*headers, ("Content-Length", said)])
            return Closing(*[b"x"] * int(given))
        case "again":
            start_response("500 First", [*headers, ("X-First", "1")])
            try:
                raise ValueError("ordered trouble")
            except ValueError:
                start_response("200 Second", headers, sys.exc_info())
            return [b"second"]
        case "late":

            def late() -> Iterator[bytes]:
                yield b"sent"
                try:
                    raise ValueError("ordered trouble")
                except ValueError:
                    start_response("500 Late", headers, sys.exc_info())
                yield b"never"

            start_response(status, headers)
            return late()
        case "twice":
            start_response(status, headers)
            start_response(status, headers)
        case "never":
            return Closing(b"no status") if argument else [b"no status"]
        case "shut":
            with environ["wsgi.input"] as given:
                body = given.read()
            headers = [["Content-Type", "text/plain"]]  # type: ignore[list-item]  # lists, where tuples are asked for
        case "raise":
            raise ValueError("ordered trouble")
        case "halfway":
            start_response(status, headers)
            return Closing(b"half", fail=True)
        case "text":
            start_response(status, headers)
            return ["text"]  # type: ignore[list-item]
        case "header":
            name, _, value = argument.partition("=")
            start_response(status, [(name, value)])
            return [b"sent"]
        case "split":
            start_response(status, [("X-Split", "a\r\nSet-Cookie: b")])
            return [b"sent"]
        case "badstatus":
            start_response(argument, headers)
            return [b"sent"]
        case "file":
            size, _, seek = argument.partition("/")
            Path("file").write_bytes(b"".join(download(int(size))))
            file = open("file", "rb")  # noqa: SIM115  # it is the server that closes it
            file.seek(int(seek or 0))
            start_response(status, headers)
            wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](file)
            return wrapped
        case "nofile":
            start_response(status, headers)
            wrapped = environ["wsgi.file_wrapper"](io.BytesIO(b"in memory" * 1000), 100)
            return wrapped
        case "download":
            start_response(status, headers)
            return download(int(argument))
        case "whole":
            body = b"".join(download(int(argument)))
        case "gate":
            pass_gate(argument)
            body = b"through"
        case "hang":
            while True:
                select.select([], [], [], 0.01)
        case "extend":
            seconds, sleep = map(float, argument.split(","))
            environ["prefork.worker"].extend_deadline(seconds)
            time.sleep(sleep)
            body = b"in the end"
        case "sleep":
            time.sleep(float(argument))
            body = b"slept"
        case "fork":
            pid = os.fork()
            if not pid:
                while not Path(argument).exists():
                    select.select([], [], [], 0.005)
                os._exit(0)
            body = b"%d" % pid
        case "reap":
            os.waitpid(int(argument), 0)
            body = b"reaped"
        case "leave":
            if argument:
                start_response(status, headers)(b"half")
            sys.exit(3)
        case _:
            status, body = "404 Not Found", b"no such word"
    start_response(status, [*headers, ("Content-Length", str(len(body)))])
    return [body]


valid = validator(app)
