"""A child that runs one function of the program and hands its answer, and descriptors, up.

The answer is JSON behind its length, so that its end is known even while something that the program started still
holds the socket. It is collected piece by piece and never waited for. The child dies with the master (it has a
lifeline) and at the end of its time.
"""

import array
import contextlib
import importlib
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import prefork.lifeline as lifeline
import prefork.logs as logs
import prefork.processes as processes
from prefork.errors import OptionError, PreforkError, ProgramError
from prefork.workers.child import set_title

Work = Callable[[], tuple[dict[str, Any], list[int]]]

_PROGRAM = os.path.join(os.path.dirname(__file__), "program.py")  # whose frames are no part of a program's traceback
LIMIT = 1 << 20  # bytes of an answer
_LENGTH = struct.Struct("!I")
_FDS = socket.CMSG_SPACE(253 * 4)


class Scout:
    """Begins the work at once.

    Parameters
    ----------
    work
        Runs in the child: returns the answer, and descriptors to go with it.
    timeout
        Seconds it may take.
    """

    def __init__(self, work: Work, timeout: float) -> None:
        self.timeout = timeout
        self.deadline = time.monotonic() + timeout
        self._data = bytearray()
        self._fds: list[int] = []
        self._closed = False
        with processes.undivided():
            self._socket, theirs = socket.socketpair()
            ends = lifeline.Ends.open()
            processes.private([self._socket.fileno()])
        self.fd = self._socket.fileno()
        main_thread = threading.current_thread() is threading.main_thread()
        lifeline.prepare()

        def main(unblock: Callable[[], None]) -> int:
            lifeline.arm(ends.lifeline_read, main_thread=main_thread)
            logs.enter_child()
            for one in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
                signal.signal(one, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            set_title("prefork: scout")
            unblock()
            return _answer(work, theirs)

        try:
            pid = processes.fork(main)
        except OSError:
            processes.close(ends.of_master())
            processes.forget([self.fd])
            self._socket.close()
            raise
        finally:
            processes.close(ends.of_worker())
            theirs.close()
        self._child = processes.Child(pid)
        self._ends = ends

    def over(self) -> bool:
        """Take what has arrived, without waiting. Whether that is all there will be."""
        with contextlib.suppress(BlockingIOError):
            while not self._closed and not self._complete() and len(self._data) < LIMIT:
                data, ancillary, _, _ = self._socket.recvmsg(65536, _FDS, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
                for level, kind, content in ancillary:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        fds = array.array("i", content[: len(content) - len(content) % 4])
                        self._fds += fds
                self._data += data
                self._closed = not data
        return self._closed or self._complete() or len(self._data) >= LIMIT or time.monotonic() >= self.deadline

    def _complete(self) -> bool:
        return len(self._data) >= 4 and len(self._data) - 4 >= _LENGTH.unpack_from(self._data)[0]

    def finish(self) -> tuple[dict[str, Any], list[int]]:
        """The answer. Reaps the child, which is killed if it is not over.

        Raises
        ------
        ProgramError, OptionError, OSError
            What the work raised, or that it did not end in time.
        """
        self.kill()
        if self._complete():
            answer: dict[str, Any] = {"error": "program", "text": "its answer cannot be read"}
            with contextlib.suppress(ValueError):
                answer = json.loads(self._data[4:])
            if "error" not in answer:
                return answer, self._fds
            raise _error(answer)  # an OptionError is a ValueError: nothing here may suppress those
        if self._closed:
            raise ProgramError("its import ended the process")
        raise ProgramError(f"it was not imported within {self.timeout:g} s (boot_timeout)")

    def result(self) -> str | None:
        """None if all was well, else what was wrong. Ends the child."""
        try:
            self.finish()
        except (PreforkError, OSError) as error:
            return str(error)
        return None

    def kill(self) -> None:
        """Kill and reap the child. It may be over already."""
        self._child.send(signal.SIGKILL)
        self._child.await_exit()
        self._child.release()
        processes.close(self._ends.of_master())
        processes.forget([self.fd])
        self._socket.close()


def _answer(work: Work, to: socket.socket) -> int:
    fds: list[int] = []
    try:
        answer, fds = work()
    except ProgramError as error:
        answer = {"error": "program", "text": str(error)}
    except PreforkError as error:
        answer = {"error": "options", "text": str(error)}
    except OSError as error:
        answer = {"error": "system", "errno": error.errno, "text": error.strerror or str(error), "file": error.filename}
        if error.errno is None or not _about_binding():
            answer = {"error": "program", "text": f"it raised\n{own_traceback()}"}
    except BaseException:
        answer = {"error": "program", "text": f"it raised\n{own_traceback()}"}
    data = json.dumps(answer).encode()
    data = _LENGTH.pack(len(data)) + data
    if fds:
        socket.send_fds(to, [data[:4]], fds)
        data = data[4:]
    to.sendall(data)
    return 0


def _about_binding() -> bool:
    """Whether the exception in hand came out of a bind or listen, and not out of the program's own files or sockets."""
    trace = sys.exc_info()[2]
    names = set()
    while trace is not None:
        names.add(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return bool(names & {"server_bind", "server_activate", "take"})


def _error(answer: dict[str, Any]) -> Exception:
    text = answer["text"]
    if answer["error"] == "program":
        return ProgramError(text)
    if answer["error"] == "options":
        return OptionError(text)
    return OSError(answer["errno"], text, answer.get("file"))


def own_traceback() -> str:
    """The traceback of the exception in hand from the program's first line on, without those of the import system."""
    kind, value, trace = sys.exc_info()
    while trace is not None and (
        trace.tb_frame.f_code.co_filename in (_PROGRAM, __file__, importlib.__file__)
        or trace.tb_frame.f_code.co_filename.startswith("<frozen importlib")
    ):
        trace = trace.tb_next
    return "".join(traceback.format_exception(kind, value, trace)).rstrip()
