"""Which calls fail how: the errors of their manual pages that a healthy program can meet.

An error that says something of the world which is not so (ESRCH while the process lives) is a lie, no fault of the
system: it is left out. So is what no program has an answer to: see `LEFT_OUT`.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

# Which occurrences of the call in a phase fail.
WHENS = ("first", "middle", "last", "three", "always")

ERRORS = {
    # processes
    "clone": "EAGAIN ENOMEM",
    "clone3": "EAGAIN ENOMEM",
    "fork": "EAGAIN ENOMEM",
    "vfork": "EAGAIN ENOMEM",
    "wait4": "EINTR ECHILD EINVAL",
    "waitid": "EINTR ECHILD EINVAL",
    "pidfd_open": "EMFILE ENFILE ENOMEM ENOSYS EPERM",
    "pidfd_send_signal": "ENOSYS EPERM",
    "kill": "EPERM",
    "prctl": "EINVAL EPERM",
    "sched_getaffinity": "ENOSYS EPERM",
    "getrandom": "EAGAIN ENOSYS",
    "sigaltstack": "ENOMEM EPERM",
    # descriptors
    "pipe2": "EMFILE ENFILE",
    "dup": "EMFILE",
    "dup2": "EBUSY",
    "dup3": "EMFILE EBUSY",
    "fcntl": "EMFILE EPERM",
    "ioctl": "EPERM",
    "close": "EINTR EIO",
    "poll": "EINTR ENOMEM EINVAL",
    "ppoll": "EINTR ENOMEM EINVAL",
    "epoll_create1": "EMFILE ENFILE ENOMEM",
    "epoll_ctl": "ENOMEM ENOSPC EPERM",
    "epoll_wait": "EINTR EBADF EINVAL",
    "epoll_pwait": "EINTR EBADF EINVAL",
    # streams
    "read": "EINTR EAGAIN EIO",
    "pread64": "EINTR EIO",
    "write": "EINTR EAGAIN ENOSPC EPIPE EIO",
    "writev": "EINTR EAGAIN ENOSPC EPIPE EIO",
    "lseek": "EINVAL",
    # sockets
    "socket": "EMFILE ENFILE ENOBUFS EAFNOSUPPORT",
    "socketpair": "EMFILE ENFILE ENOMEM",
    "bind": "EADDRINUSE EACCES",
    "listen": "EADDRINUSE",
    "connect": "EAGAIN EACCES",
    "accept4": "EMFILE ECONNABORTED",
    "shutdown": "ENOTCONN ENOBUFS",
    "getsockname": "ENOBUFS",
    "getsockopt": "ENOBUFS ENOPROTOOPT",
    "setsockopt": "ENOMEM EPERM ENOPROTOOPT",
    "recvfrom": "EINTR EAGAIN ENOMEM",
    "recvmsg": "EINTR EAGAIN ENOMEM",
    "sendto": "EINTR ENOBUFS EPERM",
    "sendmsg": "EINTR ENOBUFS",
    # files
    "openat": "EMFILE ENFILE EACCES",
    "newfstatat": "EACCES ENOMEM",
    "fstat": "ENOMEM",
    "stat": "EACCES ENOMEM",
    "lstat": "EACCES ENOMEM",
    "statx": "EACCES ENOMEM",
    "access": "EACCES",
    "readlink": "EACCES",
    "readlinkat": "EACCES",
    "getdents64": "ENOENT EIO",
    "getcwd": "ENOENT",
    "chdir": "ENOENT",
    "unlink": "EACCES EROFS",
    "unlinkat": "EACCES EROFS",
    "flock": "EINTR ENOLCK",
    "chmod": "EPERM",
    # memory
    "mmap": "ENOMEM",
    "mremap": "ENOMEM",
    "mprotect": "ENOMEM",
    "munmap": "ENOMEM",
}

LEFT_OUT = {
    "execve exit_group rt_sigreturn restart_syscall": "does not return, or never fails",
    "getpid gettid getppid getuid geteuid getgid getegid umask getpgrp": "never fails",
    "rt_sigprocmask rt_sigaction": "fails for wrong arguments only",
    "brk": "fails by returning the old end of the heap, not by an error: strace cannot say so, and glibc would crash",
    "futex set_robust_list rseq set_tid_address arch_prctl": "glibc ends the process, in any program",
    "clock_gettime gettimeofday clock_nanosleep nanosleep": "fails for wrong arguments only",
    "prlimit64 getrlimit sysinfo uname getrusage madvise": "asked for advice only, by the interpreter itself",
    "select pselect6": "the test's own: the program waits there until strace is attached",
}

if sys.version_info >= (3, 15):
    del ERRORS["munmap"]
    LEFT_OUT["munmap"] = "the interpreter ends the process where it cannot give memory back"

# Where only files are read, no read says "not now".
ERRORS_IN = {("start", "read"): "EINTR EIO"}

# Where the error is a state that passes by itself, it is never for good.
PASSING = {("read", "EAGAIN"), ("recvfrom", "EAGAIN"), ("recvmsg", "EAGAIN"), ("getrandom", "EAGAIN")}

# TERM is obeyed also under a fault for good, except where nothing else could do what the call does.
NO_OTHER_WAY = {"wait4": "no exit is known that was not collected"}

# What is not judged, since a call that strace makes fail is not carried out at all.
NOT_CLOSED = {"close", "munmap"}  # a real close() that fails has closed: descriptors are not compared
NOT_REMOVED = {"unlink", "unlinkat"}  # the file stays where it cannot be removed
# For good: nobody can tell any more whose the file is, so it stays; nor can a probe say what it has claimed, where it
# is killed before it has removed that itself.
NOT_KNOWN = {"newfstatat", "fstat", "lstat", "recvmsg"}
NOT_COLLECTED = {("wait4", "ECHILD"), ("waitid", "ECHILD")}  # nobody has collected it: it stays a zombie
NOT_SAID = {"write", "writev", "sendto", "sendmsg"}  # the log is not complete


@dataclass(frozen=True, order=True)
class Fault:
    """`call` fails with `error`, from its occurrence `first` to `last` (None: for good)."""

    call: str
    error: str
    when: str
    first: int
    last: int | None

    @property
    def expression(self) -> str:
        """As strace has it."""
        span = f"{self.first}+" if self.last is None else f"{self.first}..{self.last}"
        return f"inject={self.call}:error={self.error}:when={span}"

    def __str__(self) -> str:
        return f"{self.call} {self.error} {self.when}"


def left_out(call: str) -> str:
    """Why a call has no errors here; empty where it has some, or where nobody has thought of it."""
    return next((reason for calls, reason in LEFT_OUT.items() if call in calls.split()), "")


def of_call(phase: str, call: str, number: int) -> Iterator[Fault]:
    """The faults of a call that occurs `number` times in a phase."""
    middle = (number + 1) // 2
    spans: dict[str, tuple[int, int | None]] = {"first": (1, 1)}
    if middle not in (1, number):
        spans["middle"] = middle, middle
    if number > 1:
        spans["last"] = number, number
    spans["three"] = middle, middle + 2
    for error in ERRORS_IN.get((phase, call), ERRORS.get(call, "")).split():
        for when, (first, last) in spans.items():
            yield Fault(call, error, when, first, last)
        if error != "EINTR" and (call, error) not in PASSING:
            yield Fault(call, error, "always", 1, None)
