"""The probe: a child that tries the program, and hands an answer, and descriptors, up to the master.

A message is JSON behind its length, so that its end is known even while something that the program started still holds
the socket. The master takes it piece by piece and never waits for it. The last message is the answer; those before it
name the Unix paths that the child has claimed, so that they are removed however it ends.

After its answer the child ends by itself, as a Python process does, and has `END_TIMEOUT` seconds for that. Until it is
gone the master calls `collect()` from time to time. The child dies with the master (it has a lifeline).
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

import prefork.kernel.exit_handlers as exit_handlers
import prefork.kernel.logs as logs
import prefork.kernel.private_fds as private_fds
import prefork.kernel.processes as processes
import prefork.kernel.unix_path as unix_path
import prefork.link.lifeline as lifeline
import prefork.link.worker_pipes as worker_pipes
from prefork.errors import CodedOSError, OptionError, PreforkError, ProgramError, code_of
from prefork.kernel.own_process import set_title
from prefork.settings.settings import Options
from prefork.workers.lifecycle import ABANDONED, ToldToLeave, leave_if_told

Work = Callable[[], tuple[dict[str, Any], list[int]]]

_COMMAND = os.path.dirname(__file__)  # frames of modules in it are no part of a program's traceback
ANSWER_LIMIT = 1 << 20  # bytes of an answer
_LENGTH = struct.Struct("!I")
_FDS = socket.CMSG_SPACE(253 * 4)
END_TIMEOUT = 2.0  # seconds that a child has for its end after its answer
ABANDON_TIMEOUT = 0.3  # the same without an answer, after it was told to leave


class ProgramProbe:
    """The child, as the master sees it. It begins the work at once.

    Parameters
    ----------
    work
        Runs in the child: returns the answer, and descriptors to go with it.
    timeout
        Seconds it may take.
    make_options
        Makes the settings of a generation from the answer, for `result()`.
    """

    def __init__(self, work: Work, timeout: float, make_options: Callable[[dict[str, Any]], Options]) -> None:
        self.timeout = timeout
        self.deadline = time.monotonic() + timeout
        self._make_options = make_options
        self._data = bytearray()
        self._size = 0  # of all that has come
        self._fds: list[int] = []
        self._claims: list[tuple[str, int]] = []
        self._answer: dict[str, Any] | None = None
        self._closed = False
        self._end: float | None = None  # when a child that is to leave is killed
        lifeline.prepare()
        with private_fds.fork_lock():
            self._socket, theirs = socket.socketpair()
            ends = worker_pipes.WorkerPipes.open()
            private_fds.add([self._socket.fileno()])
        self.fd = self._socket.fileno()
        main_thread = threading.current_thread() is threading.main_thread()

        def main(unblock: Callable[[], None]) -> int:
            lifeline.arm(ends.lifeline_read, main_thread=main_thread)
            logs.enter_child()
            leave_if_told()
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            set_title("prefork: probe")
            with contextlib.suppress(ToldToLeave):
                unblock()
                _answer(work, theirs)
            for number in (signal.SIGTERM, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)
            exit_handlers.run(ABANDONED)
            return 0

        try:
            pid = processes.fork(main)
        except OSError:
            private_fds.close(ends.of_master())
            private_fds.forget([self.fd])
            self._socket.close()
            raise
        finally:
            private_fds.close([*ends.of_worker(), theirs.detach()])
        self._child = processes.Child(pid)
        self._ends: tuple[int, ...] = ends.of_master()

    def over(self) -> bool:
        """Take what has arrived, without waiting. Returns whether nothing more will come."""
        with contextlib.suppress(BlockingIOError):
            while not (self._closed or self._answer is not None or self._size >= ANSWER_LIMIT):
                data, ancillary, _, _ = self._socket.recvmsg(65536, _FDS, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
                for level, kind, content in ancillary:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        fds = array.array("i", content[: len(content) - len(content) % 4])
                        self._fds += fds
                self._take(data)
        return (
            self._closed or self._answer is not None or self._size >= ANSWER_LIMIT or time.monotonic() >= self.deadline
        )

    def _take(self, data: bytes) -> None:
        self._closed = not data
        self._size += len(data)
        self._data += data
        while len(self._data) >= 4 and len(self._data) - 4 >= (size := _LENGTH.unpack_from(self._data)[0]):
            message: dict[str, Any] = {"error": "program", "text": "its answer cannot be read"}
            with contextlib.suppress(ValueError):
                message = json.loads(self._data[4 : 4 + size])
            del self._data[: 4 + size]
            if "claim" in message:
                self._claims.append(tuple(message["claim"]))
            else:
                self._answer = message

    def finish(self) -> tuple[dict[str, Any], list[int]]:
        """The answer. From now on the child is to leave; until it is gone, `collect()`.

        Raises
        ------
        ProgramError, OptionError, OSError
            What the work raised, or that it did not end in time.
        """
        answer = self._answer
        if answer is None:
            self.abandon()
            if self._closed:
                raise ProgramError("its import ended the process", code="PF0126")
            raise ProgramError(
                f"it was not imported within {self.timeout:g} s (boot_timeout); a module that serves by itself does so "
                "under `if __name__ == '__main__':`",
                code="PF0125",
            )
        self._leave(END_TIMEOUT)
        if "error" in answer:
            raise _error(answer)
        self._claims.clear()  # they are the caller's now
        fds, self._fds = self._fds, []
        return answer, fds

    def result(self) -> Options | PreforkError | OSError:
        """The options of the new generation, or why there are none. The child is to leave, as after `finish()`."""
        try:
            answer, _ = self.finish()
            return self._make_options(answer)
        except (PreforkError, OSError) as error:
            return error

    def abandon(self) -> None:
        """Have the child leave soon, whatever it does. It may be over already."""
        if self._answer is None:
            with contextlib.suppress(OSError):
                self._child.send(signal.SIGTERM)
        self._leave(ABANDON_TIMEOUT)

    def _leave(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def leaves(self) -> bool:
        """Whether it was told so."""
        return self._end is not None

    def collect(self, now: float) -> bool:
        """Whether the child is gone. One whose time to leave is over is killed; no other is waited for."""
        if self._end is None:
            return False
        if self._child.reap() is None:
            if now < self._end:
                return False
            self._let_go()  # it dies of that where the signal is refused
            with contextlib.suppress(OSError):
                self._child.send(signal.SIGKILL)
            self._child.await_exit()
        self._let_go()
        if self._answer is None:
            with contextlib.suppress(OSError):  # messages that nobody has taken
                while not self._closed:
                    self._take(self._socket.recv(65536, socket.MSG_DONTWAIT))
        private_fds.close(self._fds)  # of an answer that nobody has used: with its lock a path would look alive
        self._fds = []
        for path, kind in self._claims:
            unix_path.clear(path, kind)
        self._child.release()
        private_fds.close([self._socket.detach()])
        return True

    def _let_go(self) -> None:
        """Of the child's lifeline and uplink."""
        private_fds.close(self._ends)
        self._ends = ()


def _answer(work: Work, to: socket.socket) -> None:
    fds: list[int] = []
    unix_path.Claim.announce = lambda path, kind: _send(to, {"claim": [path, kind]})
    try:
        answer, fds = work()
    except ToldToLeave:
        raise
    except ProgramError as error:
        answer = {"error": "program", "text": str(error), "code": error.code}
    except PreforkError as error:
        answer = {"error": "options", "text": str(error), "code": error.code}
    except OSError as error:
        answer = _of_the_system(error)
        if error.errno is None or not _about_binding():
            answer = {"error": "program", "text": f"it raised\n{own_traceback()}"}
    except BaseException:
        answer = {"error": "program", "text": f"it raised\n{own_traceback()}"}
    try:
        _send(to, answer, fds)
    except OSError as error:  # a message this short is sent as a whole, or not at all
        _send(to, _of_the_system(error))
    for fd in fds:
        os.close(fd)  # they are the master's now: nobody else may keep them open


def _of_the_system(error: OSError) -> dict[str, Any]:
    text, code = error.strerror or str(error), code_of(error)
    return {"error": "system", "errno": error.errno, "text": text, "file": error.filename, "code": code}


def _send(to: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
    data = json.dumps(message).encode()
    data = _LENGTH.pack(len(data)) + data
    if fds:
        data = data[socket.send_fds(to, [data], fds) :]
    to.sendall(data)


def _about_binding() -> bool:
    """Whether the present exception came out of a bind or listen, and not out of the program's own files or sockets."""
    trace = sys.exc_info()[2]
    names = set()
    while trace is not None:
        names.add(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return bool(names & {"server_bind", "server_activate"})


def _error(answer: dict[str, Any]) -> PreforkError | OSError:
    text, code = answer["text"], answer.get("code", "")
    if answer["error"] == "program":
        return ProgramError(text, code=code)
    if answer["error"] == "options":
        return OptionError(text, code=code)
    return CodedOSError(answer["errno"], text, answer.get("file"), code=code)


def own_traceback() -> str:
    """The traceback of the present exception from the program's first line on, without those of the import system."""
    kind, value, trace = sys.exc_info()
    while trace is not None and (
        trace.tb_frame.f_code.co_filename == importlib.__file__
        or os.path.dirname(trace.tb_frame.f_code.co_filename) == _COMMAND
        or trace.tb_frame.f_code.co_filename.startswith("<frozen importlib")
    ):
        trace = trace.tb_next
    return "".join(traceback.format_exception(kind, value, trace)).rstrip()
