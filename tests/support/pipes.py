"""Pipes, and what is in them."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Its two ends, closed with the block."""
    reader, end = os.pipe()
    try:
        yield reader, end
    finally:
        os.close(reader)
        os.close(end)


def fill(fd: int) -> None:
    """Write until there is no room for another byte."""
    os.set_blocking(fd, False)
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(fd, b"." * size)
    os.set_blocking(fd, True)


def drained(fd: int) -> bytes:
    """All that is there now."""
    os.set_blocking(fd, False)
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := os.read(fd, 65536):
            parts.append(part)
    return b"".join(parts)
