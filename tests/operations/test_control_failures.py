"""Failing system calls of the control socket: nobody is heard for a while, and the master is never troubled."""

import json
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

import prefork.operations.control as control_module
from prefork.master.loop import Master
from prefork.operations.control import Control
from prefork.operations.protocol import Request
from support import until
from support.operations import connect, read_all

STATUS = b'{"prefork": 1, "do": "status"}\n'


class Loop:
    """The part of a master that a control socket calls: it is watched, or not."""

    def __init__(self) -> None:
        self.watched = False

    def attach(self, control: Control) -> None:
        self.watched = True

    def silence(self, control: Control) -> None:
        self.watched = False

    def detach(self) -> None:
        self.watched = False


class Answers:
    """Answers that are made from nothing, or cannot be made."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self.pieces = pieces

    def answer(self, request: Request) -> Iterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    monkeypatch.setattr(control_module, "REST", 0.05)
    made = Control(str(tmp_path / "control"))
    made.join(cast(Master, Loop()), {})
    made._answers = cast(Any, Answers(b'{"answer": ', b"1}\n"))
    yield made
    made.close()
    assert os.listdir(tmp_path) == []


def turn(control: Control) -> None:
    """What the master's loop does of it."""
    watched = cast(Loop, control._master).watched
    if (watched and select.select([control.fd], [], [], 0.01)[0]) or (control.due or time.time()) <= time.monotonic():
        control.serve()


def after_turn(control: Control, ask: Callable[[], bool]) -> bool:
    turn(control)
    return ask()


def is_idle(control: Control) -> bool:
    """It listens, and nobody is connected."""
    return control._rests_until is None and not control._clients


def answer(control: Control, data: bytes = STATUS) -> bytes:
    """What a client is told, while the loop turns."""
    with connect(Path(control.path)) as sock:
        sock.sendall(data)
        sock.setblocking(False)

        def ended() -> bool:
            turn(control)
            return bool(select.select([sock], [], [], 0)[0]) and not control._clients

        until(ended, 5, "the client was answered")
        sock.settimeout(1)
        return read_all(sock)


class Failing:
    """An epoll or a listener of which one call fails."""

    def __init__(self, real: Any, name: str, error: Exception) -> None:
        self._real, self._name, self._error, self.failures = real, name, error, 0

    def failures_seen(self) -> bool:
        return self.failures > 0

    def __getattr__(self, name: str) -> Any:
        if name != self._name:
            return getattr(self._real, name)
        self.failures += 1
        raise self._error


@pytest.mark.parametrize(
    ("owner", "call"),
    [*(("_epoll", call) for call in ("poll", "register", "modify", "unregister")), ("_listener", "accept")],
)
@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), OSError(12, "Cannot allocate memory")])
def test_a_call_that_fails(control: Control, owner: str, call: str, error: OSError) -> None:
    """Whatever call fails, for as long as it fails, the control socket raises nothing, and is there again after it."""
    real = getattr(control, owner)
    assert answer(control) == b'{"answer": 1}\n'
    failing = Failing(real, call, error)
    setattr(control, owner, failing)
    with ExitStack() as stack:
        for _ in range(3):
            sock = stack.enter_context(connect(Path(control.path)))
            sock.sendall(STATUS)
            until(lambda: after_turn(control, failing.failures_seen), 5, "it fails")
        setattr(control, owner, real)
        until(lambda: after_turn(control, lambda: is_idle(control)), 5, "it serves again")
    assert answer(control) == b'{"answer": 1}\n'


def test_an_answer_that_cannot_be_made(control: Control) -> None:
    """A failure before the first piece is told to the client; one between two pieces ends its connection."""
    control._answers = cast(Any, Broken())
    value = json.loads(answer(control))
    assert (value["ok"], value["error"]) == (False, "failed")
    control._answers = cast(Any, Answers(b'{"answer": ', ZeroDivisionError()))
    assert answer(control) == b'{"answer": '
    control._answers = cast(Any, Answers(b"1\n"))
    assert answer(control) == b"1\n"


class Broken:
    """Answers that fail at once."""

    def answer(self, request: Request) -> Iterator[bytes]:
        raise ZeroDivisionError


def test_nothing_is_left_of_one_that_cannot_be_made(tmp_path: Path) -> None:
    """A control socket that cannot be bound leaves no file and no descriptor."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="too long"):
        Control(str(tmp_path / ("x" * 100)))
    with pytest.raises(FileNotFoundError):
        Control(str(tmp_path / "none" / "control"))
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        with pytest.raises(OSError, match="another server"):
            Control(str(tmp_path / "other"))
    assert os.listdir(tmp_path) == ["other"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_page_names_everything() -> None:
    """The page for operators names every command, every request and every kind of error."""
    import prefork.operations.protocol as protocol
    from prefork.command.words import COMMANDS

    page = (Path(__file__).resolve().parents[2] / "docs/howto/operate.md").read_text(encoding="utf-8")
    assert not [word for word in COMMANDS if f"`prefork {word}" not in page]
    assert not [name for name in (*protocol.REQUESTS, *protocol.ERRORS) if f"`{name}`" not in page]
