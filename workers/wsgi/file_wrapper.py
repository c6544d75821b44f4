"""`wsgi.file_wrapper`, and which of the files in it the kernel may send by itself."""

import io
import os
import stat
from collections.abc import Iterator
from typing import Any

_NAMED = {"name"}  # attributes of a file that change nothing in what its methods do


class FileWrapper:
    """`wsgi.file_wrapper`: a file that the kernel sends by itself where it can."""

    def __init__(self, filelike: Any, block_size: int = 65536) -> None:
        self.filelike, self.block_size = filelike, block_size
        if hasattr(filelike, "close"):
            self.close = filelike.close

    def __iter__(self) -> Iterator[bytes]:
        return iter(lambda: self.filelike.read(self.block_size), b"")


def plain_file(file: Any) -> tuple[int, int, int] | None:
    """Descriptor, position and bytes to its end, of a file whose `read()` gives what the kernel would send.

    None of other objects that have a `fileno()`: that of a gzip.GzipFile is the compressed file's, a subclass or an
    instance may have a `read()` of its own, and a file of /proc or /sys has no blocks and not the length that it says.
    """
    kind = type(file)
    raw = file if kind is io.FileIO else file.raw if kind in (io.BufferedReader, io.BufferedRandom) else None
    if type(raw) is not io.FileIO or not {*vars(file), *vars(raw)} <= _NAMED:
        return None
    if kind is io.BufferedRandom:
        file.flush()
    fd = raw.fileno()
    info = os.fstat(fd)
    if not (stat.S_ISREG(info.st_mode) and info.st_blocks and raw.readable()):
        return None
    offset = file.tell()
    return fd, offset, max(0, info.st_size - offset)
