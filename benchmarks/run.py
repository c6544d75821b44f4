"""Measures prefork beside a C loop, a bare Python loop and the standard library's servers, and prints one table.

    python benchmarks/run.py [--quick] [--only NAME ...] [--reps N]

Goals stand beside the figures; a figure that misses its goal is marked, never an error: the exit status is always 0.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator

from figures import FIGURES
from measure import HERE, Tools, Wrong
from rows import Bench, Figure, Row

LAYOUT = "{:<58} {:>10} {:<4} {:>10} {:<5} {}"


def prefork_problem() -> str | None:
    """Why prefork's rows are missing, if they are; asked in a process of its own, as the servers are."""
    program = "from prefork import PreforkTCPServer, PreforkUDPServer, SyncWorker"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path[1:]])}
    tried = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    return tried.stderr.strip().splitlines()[-1] if tried.returncode else None


def number(value: float) -> str:
    if value >= 1000 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def line(row: Row) -> str:
    if not row.values:
        return LAYOUT.format("  " + row.name, "-", "", str(row.goal or ""), "", row.note or "not measured")
    verdict = "" if row.goal is None else "yes" if row.goal.met_by(row.value) else "NO"
    spread = f"{number(min(row.values))} .. {number(max(row.values))}" if len(row.values) > 1 else ""
    return LAYOUT.format("  " + row.name, number(row.value), row.unit, str(row.goal or ""), verdict, spread).rstrip()


def rows(figure: Figure, bench: Bench) -> Iterator[str]:
    """The lines of one figure; what goes wrong is a line too."""
    try:
        for row in figure(bench):
            yield line(row)
    except (Wrong, OSError, subprocess.SubprocessError, ValueError) as error:
        yield f"  failed: {type(error).__name__}: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: a look, not a figure")
    parser.add_argument("--only", action="append", choices=FIGURES, metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--reps", type=int, default=0, metavar="N", help="repetitions (5; 2 with --quick)")
    arguments = parser.parse_args()
    if sys.platform != "linux":
        print("these benchmarks read Linux's clocks; there is nothing to show here")
        return
    problem, tools, started = prefork_problem(), Tools(), time.monotonic()
    bench = Bench(tools, arguments.quick, max(1, arguments.reps or (2 if arguments.quick else 5)), problem is None)
    print(f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} processors, "
          f"{bench.repetitions} repetitions")  # fmt: skip
    if problem:
        print(f"prefork is not measured: {problem}")
    print(LAYOUT.format("figure", "median", "", "goal", "met", "over the repetitions"))
    try:
        for name in arguments.only or FIGURES:
            print(f"{name}: {(FIGURES[name].__doc__ or '').strip()}", flush=True)
            for text in rows(FIGURES[name], bench):
                print(text, flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        tools.close()
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
