"""`python -m sweep` in the folder `tests`: all cells, or those that are asked for."""

import argparse
import random
import sys
import time

from sweep import faults, matrix, tracer
from sweep.life import PHASES, PROGRAMS, Result
from sweep.worker import CLASSES, WORKER_PHASES


def main() -> int:
    parser = argparse.ArgumentParser(prog="make sweep ARGS=...", description=__doc__)
    parser.add_argument("--seconds", type=float, help="a sample: begin no run after this time")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the order of the runs")
    parser.add_argument("--jobs", type=int, default=matrix.JOBS, help="runs at a time")
    parser.add_argument("--call", action="append", help="only this call; may be repeated")
    parser.add_argument("--error", action="append", help="only this error")
    parser.add_argument("--when", action="append", choices=faults.WHENS)
    parser.add_argument("--phase", action="append", choices=PHASES)
    parser.add_argument("--program", action="append", choices=PROGRAMS)
    parser.add_argument("--list", action="store_true", help="print the census and the number of cells, run nothing")
    parser.add_argument(
        "--workers", choices=CLASSES, help="not the master's calls fail, but those of a worker of this class"
    )
    given = parser.parse_args()
    programs, phases = given.program or PROGRAMS, given.phase or PHASES
    if given.workers:
        programs, phases = [given.workers], WORKER_PHASES
    if reason := tracer.missing():
        print(f"not run: {reason}")
        return 2
    begun = time.monotonic()
    counted = matrix.census(programs, phases)
    if bad := matrix.failures(counted):
        print("without any fault:", bad, sep="\n")
        return 1
    cells = [
        cell
        for cell in matrix.cells_of(counted)
        if cell.fault
        and (not given.call or cell.fault.call in given.call)
        and (not given.error or cell.fault.error in given.error)
        and (not given.when or cell.fault.when in given.when)
    ]
    for result in counted:
        print(f"{result.cell}:", *(f"{call} {number}" for call, number in sorted(result.counted.items())))
    for calls, reason in faults.LEFT_OUT.items():
        print(f"left out, {reason}: {calls}")
    for call, reason in faults.NO_OTHER_WAY.items():
        print(f"late is right where it fails for good, {reason}: {call}")
    if strange := matrix.unknown(counted):
        print(f"nothing is known of: {' '.join(sorted(strange))}")
    print(f"{len(cells)} cells, seed {given.seed}", flush=True)
    if given.list:
        return 0
    number = 0

    def progress(result: Result) -> None:
        nonlocal number
        number += 1
        if not result.outcome.right or number % 50 == 0:
            print(
                f"{number} {time.monotonic() - begun:.0f} s  {result.cell}: {result.outcome.value} {result.detail}",
                flush=True,
            )

    results = matrix.run_all(matrix.sample(cells, given.seed), given.seconds, given.jobs, progress)
    print("", matrix.table(results), "", matrix.failures(results), "", sep="\n")
    print(f"{matrix.summary(results)}; {time.monotonic() - begun:.0f} s, seed {given.seed}")
    return 0 if all(result.outcome.right for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
