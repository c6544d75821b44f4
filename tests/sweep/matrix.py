"""Chooses cells, runs some at a time, and prints what came of them."""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace

from sweep import faults
from sweep.life import PHASES, PROGRAMS, Cell, Life, Outcome, Result
from sweep.worker import CLASSES, WorkerLife

JOBS = 4  # most of a life is waiting


def census(programs: Iterable[str] = PROGRAMS, phases: Iterable[str] = PHASES) -> list[Result]:
    """The same lives without a fault: which calls are made, and how often. Each must be right."""
    cells = [Cell(program, phase) for program in programs for phase in phases]
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(run, cells))


def cells_of(results: Iterable[Result]) -> list[Cell]:
    """Every cell that the census gives."""
    return [
        Cell(result.cell.program, result.cell.phase, fault)
        for result in results
        for call, number in sorted(result.counted.items())
        for fault in faults.of_call(result.cell.phase, call, number)
    ]


def unknown(results: Iterable[Result]) -> set[str]:
    """The calls of the census about which the table says nothing."""
    calls = {call for result in results for call in result.counted}
    return {call for call in calls if call not in faults.ERRORS and not faults.left_out(call)}


def sample(cells: Iterable[Cell], seed: int) -> list[Cell]:
    """All of them, in an order in which each beginning has as many of each call in each phase as can be."""
    dice = random.Random(seed)
    by_call: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        assert cell.fault
        by_call[cell.phase, cell.fault.call].append(cell)
    ranked = []
    for group in by_call.values():
        dice.shuffle(group)
        ranked += [(rank, dice.random(), cell) for rank, cell in enumerate(group)]
    return [cell for _, _, cell in sorted(ranked, key=lambda entry: entry[:2])]


def run(cell: Cell) -> Result:
    """Live it. Whatever happens, no process and no file is left."""
    with ExitStack() as stack:
        return (WorkerLife if cell.program in CLASSES else Life)(cell, stack).go()


def attempt(cell: Cell) -> Result:
    """Run it; if the call was made less often than in the census, once more with the number of times that it was."""
    result = run(cell)
    fault = cell.fault
    if result.outcome is Outcome.MISSED and fault and fault.last and (number := result.counted[fault.call]):
        result = run(replace(cell, fault=replace(fault, first=number, last=number)))
        result = replace(result, cell=cell)
    return result


def run_all(
    cells: Sequence[Cell], seconds: float | None = None, jobs: int = JOBS, each: Callable[[Result], None] | None = None
) -> list[Result]:
    """Run them, `jobs` at a time. With `seconds`, none is begun after that time."""
    results: list[Result] = []
    end = time.monotonic() + seconds if seconds is not None else float("inf")
    left = iter(cells)
    with ThreadPoolExecutor(jobs) as pool:
        running: set[Future[Result]] = set()
        while True:
            while len(running) < jobs and time.monotonic() < end and (cell := next(left, None)) is not None:
                running.add(pool.submit(attempt, cell))
            if not running:
                return results
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                results.append(future.result())
                if each is not None:
                    each(results[-1])


def table(results: Iterable[Result]) -> str:
    """A row for each phase, call, error and program, a column for each place of the fault."""
    rows: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for result in results:
        cell, fault = result.cell, result.cell.fault
        assert fault
        rows[cell.phase, fault.call, fault.error, cell.program][fault.when] = result.outcome.value
    lines = [["phase", "call", "error", "program", *faults.WHENS]]
    lines += [[*row, *(outcomes.get(when, "") for when in faults.WHENS)] for row, outcomes in sorted(rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def summary(results: Sequence[Result]) -> str:
    counts = Counter(result.outcome for result in results)
    return f"{len(results)} runs: " + ", ".join(f"{counts[kind]} {kind.value}" for kind in Outcome if counts[kind])


def failures(results: Iterable[Result], lines: int = 40) -> str:
    """What is wrong, each with its place and its log."""
    text = []
    for result in sorted(results, key=lambda result: str(result.cell)):
        if not result.outcome.right:
            text.append(f"{result.cell}: {result.outcome.value}: {result.detail}")
            text += [f"    strace: {line}" for line in result.injected[:3]]
            text += [f"    {line}" for line in result.log[:lines]]
    return "\n".join(text)
