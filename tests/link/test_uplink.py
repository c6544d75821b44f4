"""What the master makes of the bytes on a worker's uplink: messages with the worker's token, and text."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.link.uplink import EXITS, LEAVES, READY, RECYCLE, STOP, STUCK, TEXT_LIMIT, UplinkReader, UplinkWriter

TOKEN = b"8 bytes."
KINDS = (READY, LEAVES, RECYCLE, STOP, STUCK, EXITS)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    yield reader, writer
    for fd in (reader, writer):
        os.close(fd)


def written(*said: tuple[bytes, str] | str) -> bytes:
    """What a worker writes that says this: messages, and text."""
    reader, writer = os.pipe2(os.O_NONBLOCK)
    uplink = UplinkWriter(writer, TOKEN)
    data = b""
    for part in said:
        if isinstance(part, str):
            uplink.tell(part)
        else:
            uplink.say(*part)
        try:
            data += os.read(reader, 65536)
        except BlockingIOError:
            assert part == "", "nothing was written"
    for fd in (reader, writer):
        os.close(fd)
    return data


def heard(*pieces: bytes) -> tuple[dict[bytes, str], str]:
    link = UplinkReader(-1, TOKEN)
    messages: dict[bytes, str] = {}
    for piece in pieces:
        link.feed(piece, messages)
    return messages, link.text


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
SAID = st.lists(st.one_of(st.tuples(st.sampled_from(KINDS), TEXTS), TEXTS), max_size=8)


@given(SAID, st.data())
def test_messages_and_text_are_told_apart(said: list[tuple[bytes, str] | str], data: st.DataObject) -> None:
    """Whatever is said, in whatever pieces it arrives: each message is heard with its text, and the text is whole."""
    stream = written(*said)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    messages, text = heard(*pieces)
    assert messages == {kind: words for kind, words in (part for part in said if isinstance(part, tuple))}
    plain = "".join(part for part in said if isinstance(part, str))
    assert text == "".join(c if c.isprintable() or c in "\n\t" else "?" for c in plain).strip()


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_noise_is_no_message(pieces: list[bytes]) -> None:
    """Bytes without the token order nothing, and raise nothing."""
    messages, _ = heard(*pieces)
    assert not messages


@given(st.binary(max_size=64).filter(lambda noise: b"\0" not in noise), st.sampled_from(KINDS))
def test_a_message_in_noise_is_heard(noise: bytes, kind: bytes) -> None:
    """A message is heard beside whatever a program writes to the same pipe."""
    messages, _ = heard(noise + written((kind, "why")) + noise)
    assert messages == {kind: "why"}


def test_every_byte_alone() -> None:
    """No single byte is an order."""
    for value in range(256):
        assert heard(bytes((value,)) * 500)[0] == {}


def test_unknown_kinds_are_skipped() -> None:
    """A message of a kind that this master does not know is no text and no order."""
    stranger = b"\0" + TOKEN + b"\x7f" + b"\x03abc"
    assert heard(stranger + b"words") == ({}, "words")


def test_flood_is_bounded(pipe: tuple[int, int]) -> None:
    """A worker that writes without an end costs its master a bounded amount of memory, and of time a read."""
    reader, writer = pipe
    link = UplinkReader(reader, TOKEN)
    for _ in range(40):
        while True:
            try:
                os.write(writer, b"x" * 65536)
            except BlockingIOError:
                break
        assert link.read() == ({}, False)
    assert len(link.text) == TEXT_LIMIT


def test_a_full_pipe_drops(pipe: tuple[int, int]) -> None:
    """Where the pipe is full a message is dropped whole, and the worker goes on."""
    reader, writer = pipe
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    UplinkWriter(writer, TOKEN).say(RECYCLE, "why")
    link = UplinkReader(reader, TOKEN)
    assert link.read() == ({}, False)


def test_long_reasons_are_cut() -> None:
    """A reason is told in 255 bytes at most, and a broken character at its end harms nothing."""
    messages, _ = heard(written((RECYCLE, "ü" * 300)))
    assert messages == {RECYCLE: "ü" * 127 + "�"}


def test_a_read_that_is_refused_loses_nothing() -> None:
    """The error is the caller's; it is no end of the pipe."""
    with pytest.raises(OSError, match="Bad file"):
        UplinkReader(-1, TOKEN).read()
