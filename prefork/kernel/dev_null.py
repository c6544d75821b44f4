"""A descriptor that leads nowhere, to be put in the place of another."""

import os


def open_null() -> int:
    """Open /dev/null or, where that is missing, the reading end of a pipe that nobody writes to."""
    try:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        reader, writer = os.pipe()
        os.close(writer)
        return reader
