"""The C stack in the report of a crash or a hang, cut down to what says something about the program.

From Python 3.14 on, faulthandler writes the C stack of the thread that died after its Python stack. Most of its lines
are of the interpreter, of the fault handler itself and of the C library that started both. They are the same in every
report. What a person looks for is which library the program was in, and where in it.
"""

import re

HEADER = "Current thread's C stack trace (most recent call first):"
SHORT_HEADER = "Current thread's C stack trace (most recent call first, without the interpreter):"

_LINE = re.compile(r'  Binary file "(.*)"(.*)|  <[^<>]*>')
_ADDRESS = re.compile(r" \[0x[0-9a-f]+\]$")  # a sum of the offset, which stays, and of where the file was mapped
# The file of the interpreter is its first argument, which a process title overwrites: it is known by having no suffix.
_SHARED_OBJECT = re.compile(r"(?!libpython).*\.(so[.0-9]*|dylib)")
_SYSTEM = re.compile(r"(lib(c|pthread|dyld|system_\w+)(-[0-9.]+)?|ld-[\w-]+|linux-vdso)\.(so[.0-9]*|dylib)")


def without_interpreter(text: str) -> str:
    """The text of a report, with its C stacks trimmed to shared objects other than libpython.

    Left out are also the frames of faulthandler and of the signal, and the C library where the thread started. A stack
    that has no frame beyond the interpreter and the C library is left out as a whole: there the Python stack says more.
    """
    if HEADER not in text:
        return text
    trimmed: list[str] = []
    lines = iter(text.split("\n"))
    line = next(lines, None)
    while line is not None:
        if line != HEADER:
            trimmed.append(line)
            line = next(lines, None)
            continue
        frames: list[tuple[str, str]] = []  # the name of the file, and the line
        while (line := next(lines, None)) is not None and (match := _LINE.fullmatch(line)):
            frames.append(((match[1] or "").rpartition("/")[2], line))
        if kept := _of_the_program(frames):
            trimmed += [SHORT_HEADER, *kept]
        elif trimmed and not trimmed[-1]:
            trimmed.pop()
    return "\n".join(trimmed)


def _of_the_program(frames: list[tuple[str, str]]) -> list[str]:
    """The lines of the frames that are neither of the interpreter, nor of faulthandler, nor of a thread's start."""
    shared = [_SHARED_OBJECT.fullmatch(name) is not None for name, _ in frames]
    first = shared.index(True) if True in shared else 0
    first += first > 0  # the handler of the signal was called by the C library
    kept = [frame for frame, is_shared in zip(frames[first:], shared[first:], strict=True) if is_shared]
    while kept and _SYSTEM.fullmatch(kept[-1][0]):
        kept.pop()
    return [_ADDRESS.sub("", line) for _, line in kept]
