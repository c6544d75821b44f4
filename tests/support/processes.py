"""What /proc says about the processes of a test. Read-only, and without psutil, which the program itself uses."""

import os
import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """One line of /proc/PID/stat."""

    pid: int
    name: str
    state: str
    parent: int
    session: int

    @property
    def is_zombie(self) -> bool:
        return self.state in "ZXx"


def read(pid: int) -> Process | None:
    """The process `pid`, or None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            head, _, tail = file.read().rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = tail.split()
    return Process(pid, head.partition("(")[2], fields[0], int(fields[1]), int(fields[3]))


def state(pid: int) -> str:
    """One letter, as ps prints it; '' if there is no such process."""
    process = read(pid)
    return process.state if process else ""


def threads_of(pid: int) -> int:
    """How many threads a process has."""
    return len(os.listdir(f"/proc/{pid}/task"))


def switches(pid: int) -> int:
    """How often the threads of a process went to sleep by themselves so far."""
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/status", encoding="utf-8") as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith("voluntary_ctxt_switches"))
    return total


def alive(pid: int) -> bool:
    """Whether `pid` runs; a zombie does not."""
    process = read(pid)
    return process is not None and not process.is_zombie


def session(sid: int) -> list[Process]:
    """Every process of a session, zombies too."""
    found = (read(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [process for process in found if process is not None and process.session == sid]


def children(pid: int) -> list[int]:
    """The living children of `pid`, those of all its threads; a zombie is no child here."""
    pids: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                pids += map(int, file.read().split())
    except (FileNotFoundError, ProcessLookupError):
        pass
    return sorted(child for child in pids if alive(child))


def descriptors(pid: int) -> Counter[str]:
    """The open descriptors of `pid` by kind: numbers of inodes are left out, so that two moments can be compared."""
    kinds: Counter[str] = Counter()
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except (FileNotFoundError, ProcessLookupError):
        return kinds
    for name in names:
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
        kinds[re.sub(r":\[\d+\]", "", target)] += 1
    return kinds


def private_memory(pid: int) -> int:
    """Anonymous resident memory of `pid` in bytes."""
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise AssertionError(f"no RssAnon for {pid}")


def title(pid: int) -> str:
    """The command line of `pid`, which a worker rewrites."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def blocked_in(pid: int) -> str:
    """Where in the kernel `pid` waits."""
    try:
        with open(f"/proc/{pid}/wchan", encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""
