"""Rows of the table, their goals, and how servers are compared.

Rules of this room: servers that are compared run in the same repetition, in turn, in an order that changes; a ratio is
taken within a round, the median over the rounds is the repetition's, the median over the repetitions is the figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from measure import Server, Tools, median

C_LOOP = "C loop"
NO_COMPILER = "no compiler"
NO_PREFORK = "no prefork"


@dataclass(frozen=True)
class Goal:
    """A bound with its unit; `Goal("<=", 1.05, "x bare")`."""

    sign: str
    bound: float
    unit: str = ""

    def met_by(self, value: float) -> bool:
        return value <= self.bound if self.sign == "<=" else value >= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g} {self.unit}".rstrip()


@dataclass
class Row:
    """One line: what was measured, its values (one a repetition; the median counts), the goal if it has one."""

    name: str
    values: list[float]
    unit: str = ""
    goal: Goal | None = None
    note: str = ""

    @property
    def value(self) -> float:
        return median(self.values)


@dataclass
class Bench:
    """What a figure is given."""

    tools: Tools
    quick: bool
    repetitions: int
    has_prefork: bool


Figure = Callable[[Bench], Iterator[Row]]
Makers = list[Callable[[], Server | None]]
Samples = dict[str, list[list[float]]]  # a server's values, by repetition and round


def in_turn(bench: Bench, servers: Makers, rounds: int, measure: Callable[[Server], float]) -> Samples:
    """Each repetition starts all servers, lets each warm up once, and visits them round by round, rotating the order.

    A server that is None (there is no compiler) is left out.
    """
    samples: Samples = {}
    for repetition in range(bench.repetitions):
        with ExitStack() as stack:
            running = [stack.enter_context(s) for s in (make() for make in servers) if s]
            for server in running:
                server.wait_for_workers()
                measure(server)
                samples.setdefault(server.name, []).append([])
            for number in range(rounds):
                start = (repetition + number) % len(running)
                for server in running[start:] + running[:start]:
                    samples[server.name][-1].append(measure(server))
    return samples


def ratios(samples: Samples, one: str, other: str) -> list[float]:
    """One ratio a repetition, the median of those of its rounds; nothing if either server is missing."""
    if one not in samples or other not in samples:
        return []
    pairs = zip(samples[one], samples[other], strict=True)
    return [median([a / b for a, b in zip(left, right, strict=True)]) for left, right in pairs]


def ratio(samples: Samples, one: str, other: str, goal: Goal | None = None, label: str = "") -> Row:
    note = (
        "" if {one, other} <= samples.keys() else NO_COMPILER if C_LOOP in {one, other} - samples.keys() else NO_PREFORK
    )
    return Row(f"{label}{one} / {other}", ratios(samples, one, other), "x", goal, note)


def cost_rows(samples: Samples, unit: str) -> Iterator[Row]:
    for name, repetitions in samples.items():
        yield Row(name, [median(values) / 1000 for values in repetitions], unit)
