"""How many processors this process may use: those that it may run on, as far as the quota of its control group goes.

A container that may use one processor of sixty-four sees all of them, and may run on all. The limit is the time that
its group gets in each period (cgroups(7)): `cpu.max` in version 2, `cpu.cfs_quota_us` in version 1, of the group itself
or of a group above it. A quota that cannot be read, or understood, limits nothing.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

Read = Callable[[str], str]


def usable_cpus() -> int:
    """The number of processors, at least 1. A part of a processor counts as one. Raises nothing.

    From Python 3.13 on PYTHON_CPU_COUNT and `-X cpu_count` count instead of the processors that there are.
    """
    allowed = _allowed()
    quota = quota_of(read)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _allowed() -> int:
    try:
        return max(1, os.process_cpu_count() or 1)  # type: ignore[attr-defined,unused-ignore]  # Python 3.13
    except AttributeError:
        pass
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def read(path: str) -> str:
    """A file's text; "" where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except (OSError, ValueError):
        return ""


class Group(NamedTuple):
    """A control group: its directory, and the one at which its hierarchy is mounted."""

    version: int
    directory: PurePosixPath
    top: PurePosixPath


def quota_of(read: Read) -> float | None:
    """The smallest quota of this process's groups and those above them, in processors; None: there is none."""
    quotas = []
    for group in groups(read("/proc/self/cgroup"), read("/proc/self/mountinfo")):
        for directory in (group.directory, *group.directory.parents):
            if directory.is_relative_to(group.top):
                quotas.append(_quota(read, group.version, directory))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(read: Read, version: int, directory: PurePosixPath) -> float | None:
    if version == 2:
        return quota(read(f"{directory}/cpu.max"))
    return quota(read(f"{directory}/cpu.cfs_quota_us") + " " + read(f"{directory}/cpu.cfs_period_us"))


def quota(text: str) -> float | None:
    """Processors, from the microseconds of a quota and of its period; None: without a limit, or no such text."""
    match text.split():
        case [time, period] if time.isdecimal() and period.isdecimal():
            try:
                return int(time) / int(period) or None
            except (ValueError, ArithmeticError):  # too long for a number, or divided by 0
                return None
    return None


def groups(memberships: str, mounts: str) -> Iterator[Group]:
    """The groups that may have a quota, from the texts of /proc/self/cgroup and /proc/self/mountinfo."""
    paths: dict[int, str] = {}
    for line in memberships.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[2] = path
        elif "cpu" in controllers.split(","):
            paths[1] = path
    for line in mounts.splitlines():
        fields, _, kind = line.partition(" - ")
        match fields.split(" "), kind.split(" "):
            case [_, _, _, root, top, *_], ["cgroup2", *_]:
                version = 2
            case [_, _, _, root, top, *_], ["cgroup", _, options] if "cpu" in options.split(","):
                version = 1
            case _:
                continue
        if version in paths:
            mounted = PurePosixPath(_unescaped(top))
            yield Group(version, mounted / _below(paths[version], _unescaped(root)), mounted)


def _below(path: str, root: str) -> str:
    """The part of a group's path below the directory that is mounted.

    "", which is the top itself, for a path outside of that directory, as in a container that sees its host's paths.
    """
    here = PurePosixPath(path)
    if ".." in here.parts or not here.is_relative_to(root):
        return ""
    return str(here.relative_to(root))


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), text)
