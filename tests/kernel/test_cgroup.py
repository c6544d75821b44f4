"""How many workers there are by default: as many as the processors that the process, and its control group, may use."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prefork.kernel.cgroup as cpus
from prefork.kernel.cgroup import quota, quota_of, usable_cpus
from support import Program, patterns, until
from support.scripts import Start, launch

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("text", "processors"),
    [
        ("max 100000\n", None),
        ("100000 100000\n", 1.0),
        ("150000 100000\n", 1.5),
        ("1000 1000000", 0.001),
        ("-1\n 100000\n", None),
        ("50000\n 100000\n", 0.5),
        ("", None),
        (" ", None),
        ("100000", None),
        ("0 100000", None),
        ("100000 0", None),
        ("a b", None),
        ("1.5 1", None),
        ("1 2 3", None),
        ("9" * 5000 + " 1", None),
        ("9" * 400 + " 1", None),
    ],
)
def test_quota(text: str, processors: float | None) -> None:
    """A quota is its time in a period; what is no limit, or no such text, is None."""
    assert quota(text) == processors


V2 = "25 30 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "33 30 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
)
HIGH = "cpu.cfs_quota_us", "cpu.cfs_period_us"


def tree(cgroup: str, mounts: str, **files: str) -> float | None:
    """The quota where these files are; `_` in a name is the path of a directory, under /sys/fs/cgroup."""
    there = {"/proc/self/cgroup": cgroup, "/proc/self/mountinfo": mounts}
    there |= {f"/sys/fs/cgroup/{name}": text for name, text in files.items()}
    return quota_of(lambda path: there.get(path, ""))


def v2(path: str, *, mounts: str = V2, **quotas: str) -> float | None:
    return tree(f"0::{path}\n", mounts, **{f"{at}cpu.max": text for at, text in quotas.items()})


def test_version_2() -> None:
    """The smallest quota of the group and of those above it counts, up to where the hierarchy is mounted."""
    assert v2("/") is None
    assert v2("/a/b") is None
    assert v2("/a/b", **{"a/b/": "200000 100000"}) == 2.0
    assert v2("/a/b", **{"a/b/": "200000 100000", "a/": "150000 100000"}) == 1.5
    assert v2("/a/b", **{"a/b/": "max 100000", "a/": "150000 100000"}) == 1.5
    assert v2("/a/b", **{"a/": "max 100000", "": "50000 100000"}) == 0.5, "a container's own top has one"
    assert v2("/a/b", **{"a/c/": "50000 100000", "c/": "50000 100000"}) is None, "those are others"


def test_version_1() -> None:
    """So it is in version 1, in the hierarchy that has `cpu` among its controllers, and in no other."""
    cgroup = "12:cpuset:/a\n4:cpu,cpuacct:/a/b\n3:memory:/m\n1:name=systemd:/s\n0::/u\n"

    def v1(**quotas: str) -> float | None:
        files: dict[str, str] = {}
        for at, text in quotas.items():
            files |= {f"{at}{name}": part for name, part in zip(HIGH, text.split(), strict=True)}
        return tree(cgroup, V1, **files)

    assert v1() is None
    assert v1(**{"cpu,cpuacct/a/b/": "-1 100000"}) is None
    assert v1(**{"cpu,cpuacct/a/b/": "-1 100000", "cpu,cpuacct/a/": "70000 50000"}) == 1.4
    assert v1(**{"memory/m/": "1 2", "cpuset/a/": "1 2"}) is None


@pytest.mark.parametrize(
    ("path", "root", "directory"),
    [
        ("/docker/1", "/docker/1", ""),  # version 1 in a container: the host's path, and of it what is mounted
        ("/docker/1/a", "/docker/1", "a/"),
        ("/host/1", "/docker/1", ""),
        ("/docker/12", "/docker/1", ""),
        ("/../1", "/", ""),  # a namespace that was left
        ("/..", "/", ""),
    ],
)
def test_what_is_mounted(path: str, root: str, directory: str) -> None:
    """Only a part of the hierarchy may be mounted; where the group is outside of it, its top is asked."""
    mounts = V2.replace(" / /sys", f" {root} /sys")
    assert v2(path, mounts=mounts, **{directory: "100000 100000"}) == 1.0
    spaced = "25 30 0:22 / /my\\040groups rw - cgroup2 cgroup2 rw\n"
    there = {"/proc/self/cgroup": "0::/a", "/proc/self/mountinfo": spaced, "/my groups/a/cpu.max": "1 2"}
    assert quota_of(lambda name: there.get(name, "")) == 0.5


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_is_read(data: st.DataObject) -> None:
    """No text of the kernel's, or of anybody's, is an error."""
    word = st.sampled_from(
        ["0", "4", "::", ":cpu:", "/", "/a/b", "..", " - ", "cgroup2", "cgroup", "cpu", "rw", "\n", " "]
    )
    texts = st.lists(word | st.text(max_size=3), max_size=30).map("".join)
    processors = quota_of(lambda path: data.draw(texts))
    assert processors is None or processors > 0


@pytest.mark.parametrize(
    ("quota", "allowed", "usable"), [(None, 3, 3), (0.01, 3, 1), (1.0, 3, 1), (1.1, 3, 2), (9, 3, 3)]
)
def test_usable(monkeypatch: pytest.MonkeyPatch, quota: float | None, allowed: int, usable: int) -> None:
    """A part of a processor counts as one, and there is at least one; a quota beyond what is there is none."""
    monkeypatch.setattr(cpus, "quota_of", lambda read: quota)
    monkeypatch.setattr(cpus, "_allowed", lambda: allowed)
    assert usable_cpus() == usable


def test_affinity() -> None:
    """A process that may run on one processor has one."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_the_command_says_the_number(start: Start) -> None:
    """On one processor the first line of the log and `--help` say one worker, and there is one."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})  # inherited by what is started here
        words = ("prefork", "http.server:SimpleHTTPRequestHandler", "-b", "127.0.0.1:0")
        program, told = start(*words), start("prefork", "--help")
    finally:
        os.sched_setaffinity(0, before)
    assert ready(program) == "1" and ", 1 worker; open http://" in program.log
    told.wait_exit(20)
    assert "(here: 1)" in " ".join(told.out_path.read_text().split())
    for each in (program, told):
        each.finish()


@pytest.mark.skipif(sys.version_info < (3, 13), reason="PYTHON_CPU_COUNT is Python 3.13's")
def test_the_number_that_python_is_told() -> None:
    """PYTHON_CPU_COUNT counts instead of the processors that there are."""
    told = [sys.executable, "-c", "import prefork.kernel.cgroup; print(prefork.kernel.cgroup.usable_cpus())"]
    run = subprocess.run(told, env={**os.environ, "PYTHON_CPU_COUNT": "1"}, capture_output=True, text=True, check=True)
    assert run.stdout == "1\n"


def test_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc, or with directories and binary files in the place of files, there is no quota."""
    (tmp_path / "binary").write_bytes(b"\xff\0\n" * 100)
    assert [cpus.read(str(tmp_path / name)) for name in ("", "nothing", "binary\0")] == ["", "", ""]
    assert quota_of(lambda path: cpus.read(str(tmp_path / "binary"))) is None
    monkeypatch.setattr(cpus, "read", lambda path: "")
    assert usable_cpus() == cpus._allowed()


# -- a real one ------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group whose quota may be set; it is removed after the test."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors, or a quota of one would limit nothing")
    for own in cpus.groups(cpus.read("/proc/self/cgroup"), cpus.read("/proc/self/mountinfo")):
        controllers = cpus.read(f"{own.directory}/cgroup.subtree_control").split()
        if own.version == 2 and "cpu" not in controllers:
            continue
        made = Path(own.directory) / f"prefork-test-{os.getpid()}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            yield made
        finally:
            for below in (*made.glob("*/"), made):
                remove(below)
        return
    pytest.skip("needs the right to make a control group with the controller cpu")


def remove(group: Path) -> None:
    """It goes when the last process is gone, and so does a kernel's own trace of it."""

    def gone() -> bool:
        with contextlib.suppress(OSError):
            group.rmdir()
        return not group.exists()

    until(gone, 10, f"{group} is removed")


def give(group: Path, microseconds: int) -> None:
    version2 = (group / "cpu.max").exists()
    name, text = ("cpu.max", f"{microseconds} 100000") if version2 else ("cpu.cfs_quota_us", str(microseconds))
    (group / name).write_text(text)


def join(group: Path) -> str:
    return f"Path({str(group)!r}).joinpath('cgroup.procs').write_text('0')\n"


@pytest.mark.parametrize("inner", [False, True])
def test_a_quota_of_one(group: Path, start: Start, inner: bool) -> None:
    """In a group that may use half a processor, or in one below it, there is one worker: in a script and with the
    command. With -w there are as many as that says."""
    give(group, 50_000)
    below = group / "inner" if inner else group
    below.mkdir(exist_ok=True)
    body = join(below) + 'with prefork.PreforkTCPServer(("127.0.0.1", 0), Handler) as server:\n'
    script = launch(start, body + "    server.serve_forever()\n")
    command = launch(start, join(below) + wrapped())
    asked = launch(start, join(below) + wrapped("-w", "2"))
    assert [ready(program) for program in (script, command, asked)] == ["1", "1", "2"]
    assert "worker class sync, 1 worker\n" in command.log and "worker class sync, 2 workers\n" in asked.log
    told = launch(start, join(below) + wrapped("--help"))
    told.wait_exit()
    assert "(here: 1)" in " ".join(told.out_path.read_text().split())
    told.finish()
    for program in (script, command, asked):
        program.finish()


def wrapped(*flags: str) -> str:
    """A script that becomes the command."""
    argv = ["prefork", "kit:Handler", "-b", "tcp://127.0.0.1:0", *flags]
    return f"os.execv(sys.executable, [sys.executable, '-m', *{argv!r}])\n"


def ready(program: Program) -> str:
    return program.wait_for(patterns.READY, 20)[1]
