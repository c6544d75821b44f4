"""A running pool is seen and steered: by the command, as an operator does it, and by bytes on its control socket."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import Program
from .commands import APP, TCP, command
from .scripts import Start

CONTROL = "{run}/control"


def pool(start: Start, *arguments: object, app: str = APP, workers: int = 2, **options: Any) -> Program:
    """The command over a program, with a control socket."""
    words = ["app:Versioned", "-b", TCP, "-w", workers, "--control", CONTROL, *arguments]
    return command(start, *words, app=app, **options).ready()


def control_of(program: Program) -> Path:
    return program.run / "control"


def steer(
    *words: object, env: Mapping[str, str] | None = None, timeout: float = 30.0
) -> subprocess.CompletedProcess[str]:
    """Run `prefork WORDS`."""
    return subprocess.run(
        [sys.executable, "-m", "prefork", *map(str, words)],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def done(*words: object, env: Mapping[str, str] | None = None) -> str:
    """Run `prefork WORDS`, which must succeed and complain of nothing. Returns what it prints."""
    result = steer(*words, env=env)
    assert (result.returncode, result.stderr) == (0, ""), (result.returncode, result.stdout, result.stderr)
    return result.stdout


def on(program: Program, word: str, *rest: object) -> tuple[object, ...]:
    """The words of a command for the pool of a program that `pool()` has started."""
    return (word, *rest, "--control", control_of(program))


def connect(path: Path, timeout: float = 5.0) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))  # it waits for room in the queue, which it does not do where there is a timeout
    sock.settimeout(timeout)
    return sock


def read_all(sock: socket.socket) -> bytes:
    """All that comes until the pool closes the connection; it may do so with bytes of ours unread."""
    data = b""
    try:
        while part := sock.recv(1 << 16):
            data += part
    except ConnectionResetError:
        pass
    return data


def said(path: Path, data: bytes) -> Any:
    """What the pool answers to these bytes."""
    with connect(path) as sock:
        sock.sendall(data)
        return json.loads(read_all(sock))


def asked(path: Path, do: str, **members: object) -> Any:
    """The answer to a request that the pool must accept."""
    value = said(path, json.dumps({"prefork": 1, "do": do, **members}).encode() + b"\n")
    assert value["ok"] is True, value
    return value["answer"]


def refused(path: Path, data: bytes) -> str:
    """The kind of the error with which the pool refuses these bytes."""
    value = said(path, data)
    assert value["ok"] is False and value["text"], value
    kind: str = value["error"]
    return kind
