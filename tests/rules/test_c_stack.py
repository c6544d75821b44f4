"""The C stack in the report of a crash: what stays of real ones, of Python 3.14 and 3.15 on Debian, and of odd ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.rules.c_stack import HEADER, SHORT_HEADER, without_interpreter

PYTHON_STACK = """\
Fatal Python error: Aborted

Current thread 0x00007f6660ce7200 [prefork: worker] (most recent call first):
  File "/srv/app.py", line 5 in handle
  File "<frozen runpy>", line 201 in _run_module_as_main
"""
EXTENSIONS = """
Extension modules: setproctitle._setproctitle (total: 1)"""

# time.sleep(). The file of the interpreter has the name that its first argument has: that of the process title.
SLEEP = """
Current thread's C stack trace (most recent call first):
  Binary file "prefork: worker 0 tcp://127.0.0.1:7777 generation 1 ready", at _Py_DumpStack+0x4a [0x4a12b9]
  Binary file "prefork: worker 0 tcp://127.0.0.1:7777 generation 1 ready" [0x564ea1]
  Binary file "/usr/lib/x86_64-linux-gnu/libc.so.6", at +0x406b0 [0x7f925a81a6b0]
  Binary file "/usr/lib/x86_64-linux-gnu/libc.so.6", at +0x91a02 [0x7f925a86ba02]
  Binary file "/usr/lib/x86_64-linux-gnu/libc.so.6", at clock_nanosleep+0x2a [0x7f925a8b7e6a]
  Binary file "prefork: worker 0 tcp://127.0.0.1:7777 generation 1 ready" [0x7c58e8]
  Binary file "prefork: worker 0 tcp://127.0.0.1:7777 generation 1 ready", at Py_BytesMain+0x2d [0x739eed]
  Binary file "/usr/lib/x86_64-linux-gnu/libc.so.6", at +0x29fba [0x7f925a803fba]
  Binary file "/usr/lib/x86_64-linux-gnu/libc.so.6", at __libc_start_main+0x87 [0x7f925a8040d7]
  Binary file "prefork: worker 0 tcp://127.0.0.1:7777 generation 1 ready", at _start+0x21 [0x735e51]
"""

# A loop in an extension that is built into the interpreter: nothing was left to unwind beyond the kernel's page.
CLOCK = """
Current thread's C stack trace (most recent call first):
  Binary file "prefork: worker 0 tcp://127.0.0.1:7777 generation 1 ready", at _Py_DumpStack+0x4a [0x4a12b9]
  Binary file "prefork: worker 0 tcp://127.0.0.1:7777 generation 1 ready" [0x564ea1]
  Binary file "/usr/lib/x86_64-linux-gnu/libc.so.6", at +0x406b0 [0x7fe131f116b0]
  Binary file "linux-vdso.so.1", at +0x133d [0x7fe13233533d]
"""

# hashlib.sha256() of much.
HASH = """
Current thread's C stack trace (most recent call first):
  Binary file "python3.14", at _Py_DumpStack+0x4a [0x49b2f9]
  Binary file "python3.14" [0x53d28e]
  Binary file "/usr/lib/x86_64-linux-gnu/libc.so.6", at +0x406b0 [0x7f6660d286b0]
  Binary file "/usr/lib/x86_64-linux-gnu/libcrypto.so.3", at +0x3a69e6 [0x7f66605a69e6]
  Binary file "/usr/lib/x86_64-linux-gnu/libcrypto.so.3", at SHA256_Update+0x1c5 [0x7f66605aa045]
  Binary file "/usr/lib/python3.14/lib-dynload/_hashlib.cpython-314-x86_64-linux-gnu.so", at +0x6f94 [0x7f6660a13f94]
  Binary file "python3.14" [0x4472e7]
  Binary file "python3.14", at PyEval_EvalCode+0x9d [0x592ead]
  Binary file "python3.14", at Py_BytesMain+0x2b [0x6dfc1b]
  Binary file "/usr/lib/x86_64-linux-gnu/libc.so.6", at +0x29fba [0x7f6660d11fba]
  Binary file "/usr/lib/x86_64-linux-gnu/libc.so.6", at __libc_start_main+0x87 [0x7f6660d120d7]
  Binary file "python3.14", at _start+0x21 [0x6dc4e1]
"""
HASH_TRIMMED = """
Current thread's C stack trace (most recent call first, without the interpreter):
  Binary file "/usr/lib/x86_64-linux-gnu/libcrypto.so.3", at +0x3a69e6
  Binary file "/usr/lib/x86_64-linux-gnu/libcrypto.so.3", at SHA256_Update+0x1c5
  Binary file "/usr/lib/python3.14/lib-dynload/_hashlib.cpython-314-x86_64-linux-gnu.so", at +0x6f94
"""

# ctypes.string_at(0), in a deep stack. The first frame of the C library is where it crashed, and stays.
CRASH = """
Current thread's C stack trace (most recent call first):
  Binary file "prefork: worker 0 tcp://127.0.0.1:7777 generation 1 ready", at _Py_DumpStack+0x4a [0x4a12b9]
  Binary file "prefork: worker 0 tcp://127.0.0.1:7777 generation 1 ready" [0x564ea1]
  Binary file "/usr/lib/x86_64-linux-gnu/libc.so.6", at +0x406b0 [0x7f1feaa9f6b0]
  Binary file "/usr/lib/x86_64-linux-gnu/libc.so.6", at +0x17a718 [0x7f1feabd9718]
  Binary file "/usr/lib/python3.15/lib-dynload/_ctypes.cpython-315-x86_64-linux-gnu.so", at +0xe6bb [0x7f1fea0836bb]
  Binary file "/usr/lib/x86_64-linux-gnu/libffi.so.8", at ffi_call+0x155 [0x7f1fea06cfe5]
  Binary file "/usr/lib/python3.15/lib-dynload/_ctypes.cpython-315-x86_64-linux-gnu.so", at +0x17df7 [0x7f1fea08cdf7]
  Binary file "prefork: worker 0 tcp://127.0.0.1:7777 generation 1 ready" [0x44ac15]
  Binary file "/usr/lib/x86_64-linux-gnu/libc.so.6", at __libc_start_main+0x87 [0x7f1feaa890d7]
  <truncated rest of calls>
"""
CRASH_TRIMMED = """
Current thread's C stack trace (most recent call first, without the interpreter):
  Binary file "/usr/lib/x86_64-linux-gnu/libc.so.6", at +0x17a718
  Binary file "/usr/lib/python3.15/lib-dynload/_ctypes.cpython-315-x86_64-linux-gnu.so", at +0xe6bb
  Binary file "/usr/lib/x86_64-linux-gnu/libffi.so.8", at ffi_call+0x155
  Binary file "/usr/lib/python3.15/lib-dynload/_ctypes.cpython-315-x86_64-linux-gnu.so", at +0x17df7
"""

# An interpreter that is itself a shared object, and the system's libraries under other names (shortened by hand).
SHARED = """
Current thread's C stack trace (most recent call first):
  Binary file "/opt/python/lib/libpython3.14.so.1.0", at _Py_DumpStack+0x4a [0x7f0000000001]
  Binary file "/lib64/libpthread-2.31.so", at +0x12730 [0x7f0000000002]
  Binary file "/opt/app/lib/libpq.so.5.16", at PQexec+0x12 [0x7f0000000003]
  Binary file "/opt/python/lib/libpython3.14.so.1.0", at _PyEval_EvalFrameDefault+0x6c3e [0x7f0000000004]
  Binary file "/lib/ld-musl-x86_64.so.1", at +0x1c0 [0x7f0000000005]
"""
SHARED_TRIMMED = """
Current thread's C stack trace (most recent call first, without the interpreter):
  Binary file "/opt/app/lib/libpq.so.5.16", at PQexec+0x12
"""
NO_UNWINDER = """
Current thread's C stack trace (most recent call first):
  <cannot get C stack on this system>
"""


@pytest.mark.parametrize(
    ("stack", "trimmed"),
    [
        (SLEEP, ""),
        (CLOCK, ""),
        (HASH, HASH_TRIMMED),
        (CRASH, CRASH_TRIMMED),
        (SHARED, SHARED_TRIMMED),
        (NO_UNWINDER, ""),
        ("", ""),
        (HASH + CRASH, HASH_TRIMMED + CRASH_TRIMMED),
    ],
    ids=["sleep", "clock", "hash", "crash", "shared", "no-unwinder", "none", "two"],
)
def test_what_stays_of_a_stack(stack: str, trimmed: str) -> None:
    """Shared objects of the program stay, without addresses; the rest of the report stays as it is."""
    assert without_interpreter(PYTHON_STACK + stack + EXTENSIONS) == PYTHON_STACK + trimmed + EXTENSIONS


def test_a_report_that_ends_early() -> None:
    """The uplink is bounded, so a report may end anywhere: what begins as a frame and is none stays."""
    text = PYTHON_STACK + CRASH
    for length in range(len(PYTHON_STACK), len(text)):
        assert without_interpreter(text[:length]).startswith(PYTHON_STACK.rstrip("\n"))


LINES = st.sampled_from([*CRASH.split("\n"), *PYTHON_STACK.split("\n"), SHORT_HEADER, '  Binary file "', "  <>"])


@given(st.lists(LINES | st.text(max_size=20), max_size=50))
def test_any_text_at_all(lines: list[str]) -> None:
    """A worker may send anything: no line is invented but the header, no whole stack is left, and twice is once."""
    text = "\n".join(lines)
    result = without_interpreter(text)
    assert HEADER not in result.split("\n")
    assert all(line == SHORT_HEADER or line in text for line in result.split("\n"))
    assert without_interpreter(result) == result
