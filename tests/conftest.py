"""Fixtures of the integration tests: programs and loads that are checked, shown on failure, and never left behind."""

import ctypes  # noqa: F401  # libffi keeps its own file open from then on, which is no leak of a test
import gc
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support import Ledger, Load, Program

# Not seeded: two runs of the tests at the same time must not choose the same ports.
DICE = random.SystemRandom()
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# aiosmtpd imports typing.ByteString, of which Python 3.15 warns. Its other modules may not warn of anything.
WARNINGS = {"smtp_intake": "default,ignore::DeprecationWarning:aiosmtpd.proxy_protocol"}

STARTED = pytest.StashKey[list[Program]]()
FAILED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: long; run by `make soak` (-m soak), left out otherwise")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without -m, a soak test is deselected."""
    if config.option.markexpr:
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    if soak:
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]


def pytest_collection_finish() -> None:
    """A full garbage collection of all that was collected to be tested takes 0.17 s. For so long all clients that are
    threads of this process say nothing, and servers close kept connections on which they had been about to ask."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows the log of each program it started, and keeps their directories."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
        for program in item.stash.get(STARTED, []):
            if not program.finished:
                report.sections.append((f"server {program.name}", program.autopsy()))
    return report


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[Callable[..., Program]]:
    """`start(program, *arguments, **options)`: a `Program`; what the test does not finish is finished after it."""
    started: list[Program] = []
    request.node.stash[STARTED] = started

    def begin(*argv: object, **options: Any) -> Program:
        program = Program(*argv, **options)
        started.append(program)
        return program

    try:
        yield begin
        if not request.node.stash.get(FAILED, False):
            for program in started:
                if not program.finished:
                    program.finish()
    finally:
        for program in started:
            program.kill()
    if not request.node.stash.get(FAILED, False):
        for program in started:
            program.forget()


@pytest.fixture
def load() -> Iterator[Callable[..., Load]]:
    """`load(address, clients=16, ...)`: a `Load` that runs; stopped at the end of the test if it was not."""
    begun: list[Load] = []

    def begin(*arguments: Any, **options: Any) -> Load:
        one = Load(*arguments, **options)
        begun.append(one)
        return one

    try:
        yield begin
    finally:
        for one in begun:
            one.close()


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """The book of the servers that this test starts."""
    path = tmp_path / "ledger"
    monkeypatch.setenv("PREFORK_LEDGER", str(path))
    return Ledger(path)


@pytest.fixture
def trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writing `raise`, `hang`, ... to this file is what happens to each worker that boots while it exists."""
    path = tmp_path / "trouble"
    monkeypatch.setenv("PREFORK_TROUBLE", str(path))
    return path


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """What the processes noted, by its first word."""
    path = tmp_path / "notes"
    monkeypatch.setenv("PREFORK_NOTES", str(path))

    def read(word: str) -> list[str]:
        rows = path.read_text().splitlines() if path.exists() else []
        return [row.partition(" ")[2] for row in rows if row.split(" ")[0] == word]

    return read


def free_port() -> int:
    """A port that is free for TCP and UDP, below those that the kernel gives to clients by itself."""

    def free(number: int) -> bool:
        with ExitStack() as stack:
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                probe = stack.enter_context(socket.socket(socket.AF_INET, kind))
                try:
                    probe.bind(("127.0.0.1", number))
                except OSError:
                    return False
        return True

    return next(number for number in iter(lambda: DICE.randrange(20000, 30000), 0) if free(number))


@pytest.fixture
def port() -> int:
    """A port that is free for TCP and UDP."""
    return free_port()


@pytest.fixture
def free_ports() -> list[str]:
    """Three such ports, as text."""
    return [str(free_port()) for _ in range(3)]


@pytest.fixture
def example(start: Callable[..., Program]) -> Callable[..., Program]:
    """`example("echo", port)`: the example, with all its workers ready."""

    def begin(
        name: str, *arguments: object, workers: int = 4, env: dict[str, str] | None = None, **options: object
    ) -> Program:
        env = {"PYTHONWARNINGS": WARNINGS.get(name, "default"), **(env or {})}
        program = start(EXAMPLES / f"{name}.py", *arguments, env=env, **options)
        program.wait_ready(workers, timeout=10)
        return program

    return begin


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and localhost that signs itself, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command to make a certificate")
    made, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", key, "-out", made],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    return made, key
