"""Kills and reloads while operators, honest and hostile, are at the control socket (`make soak`)."""

import contextlib
import json
import os
import random
import threading
from collections import Counter
from collections.abc import Callable

import pytest

from support import Ledger, Load, Program, account, patterns, private_memory, until
from support.operations import CONTROL, asked, connect, control_of, read_all, said

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

BLOWS = int(os.environ.get("PREFORK_CONTROL_BLOWS", "1000"))
WORKERS = 4
STATUS = b'{"prefork": 1, "do": "status"}\n'


class Operators(threading.Thread):
    """Ask without a pause, as somebody who attaches a display would, and misbehave now and then."""

    def __init__(self, program: Program, seed: int) -> None:
        super().__init__(name="operators")
        self.path, self.dice = control_of(program), random.Random(seed)
        self.ends = threading.Event()
        self.answers: Counter[str] = Counter()

    def run(self) -> None:
        while not self.ends.is_set():
            data = self.dice.choice(
                [STATUS, STATUS, b'{"prefork": 1, "do": "explain"}\n', b"\n", b"x" * 5000, b"", STATUS[:9]]
            )
            with contextlib.suppress(BrokenPipeError, ConnectionResetError), connect(self.path) as sock:
                sock.sendall(data)
                if data.endswith(b"\n") or len(data) > 4096:
                    value = json.loads(read_all(sock))
                    self.answers["good" if value["ok"] else value["error"]] += 1


def test_kills_and_reloads(start: Callable[..., Program], load: Callable[..., Load], ledger: Ledger) -> None:
    """1,000 kills, reloads and resizes by the control socket while others ask lose nobody but by a kill, and no
    descriptor; memory stays within 1 MiB."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    dice = random.Random(seed)
    words = ["pool.py", "tcp://127.0.0.1:0", "--workers", WORKERS, "--control", CONTROL]
    program = start(*words, allow=[patterns.ANYTHING]).ready()
    path = control_of(program)
    program.wait_ready(WORKERS)
    asked(path, "explain")
    before, killed, done = private_memory(program.pid), [], Counter[str]()
    operators = [Operators(program, seed + number) for number in range(2)]
    with program.flat(timeout=10):
        clients = load(program.address, clients=8, seconds=600)
        for operator in operators:
            operator.start()
        try:
            for _ in range(BLOWS):
                blow = dice.choice(["kill", "reload", "scale", "recycle"])
                done[blow] += 1
                if blow == "kill":
                    if pids := program.children():
                        with contextlib.suppress(ProcessLookupError):
                            pid = dice.choice(pids)
                            program.kill_workers(pid)
                            killed.append(pid)
                else:
                    member = {"scale": {"workers": dice.randint(2, 6)}, "recycle": {"slot": dice.randrange(4)}}.get(
                        blow, {}
                    )
                    said(path, json.dumps({"prefork": 1, "do": blow, **member}).encode() + b"\n")
                assert program.running
        finally:
            for operator in operators:
                operator.ends.set()
            for operator in operators:
                operator.join(20)
        asked(path, "scale", workers=WORKERS)
        until(lambda: not asked(path, "status")["reloading"], 30, "no reload is under way")
        program.wait_ready(WORKERS, 20)
        tally = clients.stop()
    grown = private_memory(program.pid) - before
    answers = sum((operator.answers for operator in operators), Counter[str]())
    print(tally, dict(done), dict(answers), f"killed {len(killed)}, memory {grown:+}")
    assert not account(tally, ledger, killed)
    assert tally.refused == 0 and tally.lost <= len(killed)
    assert answers["good"] > BLOWS / 10
    assert grown < 1 << 20
    program.finish()
