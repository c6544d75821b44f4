"""The worker class `wsgi`: what `wsgi.file_wrapper` sends is what `read()` of its file gives."""

from pathlib import Path
from typing import Any

import pytest

from support import Program, patterns
from support.faults import failing
from support.scripts import Start, path_of_modules
from support.web import Web

pytestmark = pytest.mark.timeout(60)

APP = '''
import bz2, gzip, io, itertools, tempfile
from kit import *

TEXT = b"".join(b"%07d\\n" % number for number in range(40_000))
(HOME / "text").write_bytes(TEXT)
with gzip.open("text.gz", "wb") as made:
    made.write(TEXT)
with bz2.open("text.bz2", "wb") as made:
    made.write(TEXT)

class Upper(io.FileIO):
    """A file that gives something else than what the kernel has."""

    def readinto(self, buffer):
        data = super().read(len(buffer))
        buffer[:len(data)] = data.replace(b"0", b"o")
        return len(data)

    def read(self, size=-1):
        return super().read(size).replace(b"0", b"o")

class Raw(io.RawIOBase):
    """Bytes of its own, and the descriptor of another file."""

    def __init__(self):
        self.file, self.bytes = open("text", "rb"), io.BytesIO(b"its own")
        self.fileno = self.file.fileno

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.bytes.readinto(buffer)

    def close(self):
        self.file.close()
        super().close()

def own_read():
    file = open("text", "rb")
    file.read = io.BytesIO(b"its own").read
    return file

def own_raw_read():
    file = open("text", "rb")
    file.raw.readinto = io.BytesIO(b"its own").readinto
    return file

def begun():
    file = open("text", "rb")
    file.read(100)
    return file

def rolled():
    file = tempfile.SpooledTemporaryFile(max_size=1)
    file.write(TEXT)
    file.seek(8)
    return file

def in_memory():
    file = tempfile.SpooledTemporaryFile()
    file.write(TEXT)
    file.seek(8)
    return file

def named():
    file = tempfile.NamedTemporaryFile()
    file.write(TEXT)
    file.seek(8)
    return file

def unflushed():
    file = tempfile.TemporaryFile()
    file.write(TEXT)
    file.flush()
    file.seek(16)
    file.write(b"changed")
    return file

def piped():
    receiver, sender = os.pipe()
    with open(sender, "wb") as file:
        file.write(b"piped")
    return open(receiver, "rb")

def large():
    file = open("large", "wb+")
    file.write(TEXT * 20)
    file.seek(0)
    return file

FILES = {
    "large": large,
    "plain": lambda: open("text", "rb"),
    "unbuffered": lambda: open("text", "rb", 0),
    "begun": begun,
    "at its end": lambda: open("text", "ab+"),
    "unflushed": unflushed,
    "gzip": lambda: gzip.open("text.gz"),
    "bz2": lambda: bz2.open("text.bz2"),
    "subclass": lambda: Upper("text"),
    "subclass, buffered": lambda: io.BufferedReader(Upper("text")),
    "another raw": lambda: io.BufferedReader(Raw()),
    "own read": own_read,
    "own raw read": own_raw_read,
    "in memory": in_memory,
    "rolled over": rolled,
    "named": named,
    "pipe": piped,
    "proc": lambda: open("/proc/sys/kernel/ostype", "rb"),
    "sys": lambda: open("/sys/kernel/mm/transparent_hugepage/enabled", "rb"),
    "text mode": lambda: open("text"),
    "write only": lambda: open("other", "wb"),
}

def app(environ, start_response):
    word, _, name = environ["PATH_INFO"][1:].partition("/")
    if word == "read":
        with FILES[name]() as file:
            body = b"".join(iter(lambda: file.read(1000), b""))
        start_response("200 OK", [])
        return [body]
    headers = [] if word == "file" else [("Content-Length", word)]
    start_response("200 OK", headers)
    return environ["wsgi.file_wrapper"](FILES[name](), 1000)
'''
SENT = ("plain", "unbuffered", "begun", "at its end", "unflushed")  # by the kernel, with their length
READ = (
    *("gzip", "bz2", "subclass", "subclass, buffered", "another raw", "own read", "own raw read", "in memory"),
    *("rolled over", "named", "pipe", "proc", "sys"),
)
BROKEN = ("text mode", "write only")


def serve(start: Start, **options: Any) -> Program:
    argv = ["app:app", "-b", "tcp://127.0.0.1:0", "--worker-class", "wsgi", "-w", 1]
    program: Program = start("prefork", *argv, files={"app.py": APP}, env=path_of_modules(), **options)
    return program.ready()


def test_a_file_is_what_it_reads(start: Start) -> None:
    """Whatever an application wraps, its client gets what `read()` gives; a plain file is sent by the kernel."""
    program = serve(start)
    with Web(program.address) as client:
        for name in (*SENT, *READ):
            path = name.replace(" ", "%20")
            if name == "sys" and not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
                continue
            read, sent = client.get(f"/read/{path}"), client.get(f"/file/{path}")
            assert sent.body == read.body, name
            assert sent.body or name == "at its end", name
            assert sent.chunked == (name in READ), name
    program.finish()


def test_a_file_that_cannot_be_read(start: Start) -> None:
    """A file that gives no bytes is the application's fault: 500."""
    program = serve(start, allow=[patterns.TRACEBACK, r"io\.UnsupportedOperation: .*"])
    for name in BROKEN:
        with Web(program.address) as client:
            assert client.get(f"/file/{name}".replace(" ", "%20")).status == 500, name
    program.finish()


@pytest.mark.parametrize("when", ["1+", "2+"])
def test_a_file_that_the_kernel_cannot_send(start: Start, when: str) -> None:
    """Where sendfile(2) fails, at once or in the middle, the rest of the file is read."""
    program = serve(start)
    (worker,) = program.wait_ready(1)
    with Web(program.address, window=16384) as client:
        whole = client.get("/read/large").body
        for path, size in (("/file/large", len(whole)), ("/6000000/large", 6_000_000)):
            with failing(worker, "sendfile", "EINVAL", when):
                answer = client.get(path)
            assert (answer.body, answer.headers["content-length"]) == (whole[:size], str(size))
    program.finish()
