"""The diagrams of docs/design.md, drawn from the tables of the code: `python docs/diagrams.py` prints them.

Each is Mermaid, between the markers by which `tests/project/test_diagrams.py` finds it in the document. After a change
of a table, put the output in the place of the old one.
"""

from collections.abc import Iterable

from prefork.rules.states import ROLLOUT, TRANSITIONS, Rollout, State
from prefork.rules.stop_sequence import ESCALATION, PROGRESS, Stage

Edge = tuple[str, str, str]  # from, to, by


def mermaid(first: str, edges: Iterable[Edge], last: str = "") -> str:
    """A diagram of states. Edges between the same two states are one, with all their labels; loops are left out."""
    labels: dict[tuple[str, str], list[str]] = {}
    for before, after, label in edges:
        if before != after:
            labels.setdefault((before, after), []).append(label)
    lines = [f"{before} --> {after}: {', '.join(events)}" for (before, after), events in labels.items()]
    lines = [f"[*] --> {first}", *lines, *([f"{last} --> [*]"] if last else [])]
    return "```mermaid\nstateDiagram-v2\n" + "".join(f"    {line}\n" for line in lines) + "```"


def worker() -> str:
    edges = [(before.name, after.name, event.value) for (before, event), after in TRANSITIONS.items()]
    return mermaid(State.STARTING.name, edges, State.GONE.name)


def reload() -> str:
    edges = [(before.name, after.name, event.value) for (before, event), after in ROLLOUT.items()]
    return mermaid(Rollout.NONE.name, edges)


def stop() -> str:
    edges = [(before.name, after.name, signal) for (signal, before), after in ESCALATION.items()]
    edges += [(before.name, after.name, "by itself") for before, after in PROGRESS.items()]
    return mermaid(Stage.SERVING.name, edges)


DIAGRAMS = {"worker": worker, "reload": reload, "stop": stop}
TITLES = {
    "worker": "A worker, as the master sees it (`rules.states.TRANSITIONS`).",
    "reload": "A reload (`rules.states.ROLLOUT`).",
    "stop": "A stop, and the signals that begin it or make it harder (`rules.stop_sequence`).",
}


def markdown() -> str:
    """All diagrams, each between its markers."""
    parts = [f"<!-- diagram: {name} -->\n{TITLES[name]}\n\n{draw()}\n<!-- end -->\n" for name, draw in DIAGRAMS.items()]
    return "\n".join(parts)


if __name__ == "__main__":
    print(markdown(), end="")
