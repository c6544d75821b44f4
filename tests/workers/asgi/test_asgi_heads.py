"""The head of an ASGI answer leaves with the start of its body, and nothing overtakes it."""

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from prefork.workers.asgi.transport import HeadBufferingTransport
from support.asgi import Client, serve
from support.scripts import Start

pytestmark = pytest.mark.timeout(60)


def segments(sock: socket.socket) -> int:
    """With data, that have come in: tcpi_data_segs_in."""
    return int(struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160), 152)[0])


@pytest.mark.skipif(sys.platform != "linux", reason="segments are counted by Linux")
@pytest.mark.parametrize("kind", ["asgi", "app:Plain"])
def test_an_answer_is_one_segment(start: Start, kind: str) -> None:
    """Head and body come together, if the application has both; if not, the head does not wait for the body."""
    program = serve(start, "-w", 1, kind=kind)
    with contextlib.closing(Client(program.address)) as client:
        for number in (1, 2, 3):
            client.get()
            assert segments(client.sock) == number
        assert client.ask("/echo", b"x" * 100_000).read() == b"x" * 100_000
        before = segments(client.sock)
        answer = client.ask("/head/go")
        assert (answer.status, segments(client.sock)) == (200, before + 1)
        program.write("go", "")
        assert (answer.read(), segments(client.sock)) == (b"late", before + 2)
    program.finish()


class Recorder(asyncio.Transport):
    """A transport that notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[object] = []
        self.closing = False

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: object) -> None:
        self.told.append(bytes(data))  # type: ignore[call-overload]

    def writelines(self, parts: Iterable[object]) -> None:
        self.told.append(parts)

    def write_eof(self) -> None:
        self.told.append("eof")

    def close(self) -> None:
        self.told.append("close")
        self.closing = True

    def pause_reading(self) -> None:
        self.told.append("pause")


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
LARGE = b"x" * (HeadBufferingTransport.LARGE + 1)


@pytest.mark.parametrize(
    ("orders", "told"),
    [
        ([("write", HEAD), ("write", b"body"), ("write", b"more")], [HEAD + b"body", b"more"]),
        ([("write", HEAD), ("write", b""), ("close",)], [HEAD, "close"]),
        ([("write", HEAD), ("write", memoryview(b"body"))], [HEAD + b"body"]),
        ([("write", bytearray(HEAD)), ("write", bytearray(b"body"))], [HEAD, b"body"]),
        ([("write", HEAD), ("write", LARGE)], [HEAD, LARGE]),
        ([("write", HEAD), ("write", HEAD), ("write", HEAD)], [HEAD + HEAD, HEAD]),
        ([("write", HEAD), ("close",)], [HEAD, "close"]),
        ([("write", HEAD), ("write_eof",)], [HEAD, "eof"]),
        ([("write", HEAD), ("writelines", [b"body"])], [HEAD, [b"body"]]),
        ([("write", HEAD), ("pause_reading",)], ["pause", HEAD]),
        ([("close",), ("write", HEAD)], ["close"]),
    ],
)
def test_a_head_is_kept_and_nothing_overtakes_it(orders: list[tuple[Any, ...]], told: list[object]) -> None:
    """A head leaves with what is written next, or before whatever else is sent, or with the turn of the loop."""

    async def go() -> Recorder:
        recorder = Recorder()
        transport = HeadBufferingTransport(asyncio.get_running_loop(), recorder, [])
        for name, *arguments in orders:
            getattr(transport, name)(*arguments)
        await asyncio.sleep(0)
        return recorder

    assert asyncio.run(go()).told == told


def test_heads_of_several_leave_with_the_turn() -> None:
    """All heads that were written in a turn are sent at its end, and in the next turns as well."""

    async def go() -> list[Recorder]:
        kept: list[HeadBufferingTransport] = []
        recorders = [Recorder() for _ in range(3)]
        one, two, three = (HeadBufferingTransport(asyncio.get_running_loop(), recorder, kept) for recorder in recorders)
        for _ in range(2):
            one.write(HEAD)
            one.write(b"body")
            two.write(HEAD)
            three.write(HEAD)
            three.close()
            await asyncio.sleep(0)
            assert not kept
        return recorders

    one, two, three = asyncio.run(go())
    assert one.told == [HEAD + b"body"] * 2
    assert two.told == [HEAD] * 2
    assert three.told == [HEAD, "close", "close"]


def test_a_head_outlives_a_body_that_is_none() -> None:
    """What is no bytes is refused, and the head that came before it is sent."""

    async def go() -> Recorder:
        recorder = Recorder()
        transport = HeadBufferingTransport(asyncio.get_running_loop(), recorder, [])
        transport.write(HEAD)
        with pytest.raises(TypeError):
            transport.write("text")
        transport.close()
        return recorder

    assert asyncio.run(go()).told == [HEAD, "close"]
