"""State diagrams in Mermaid as tables. A browser would have to fetch the library that draws them from a network."""

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import prefork
from reference_tables import table

EDGE = re.compile(r"(?P<source>\S+) --> (?P<target>[^\s:]+)(?:: (?P<event>.+))?")


def transitions(diagram: str) -> list[tuple[str, str, str]]:
    """Source, event and target of each transition of a `stateDiagram-v2`."""
    first, *lines = diagram.split("\n")
    if first.strip() != "stateDiagram-v2":
        raise ValueError(f"not a state diagram: {first!r}")
    rows = []
    for line in filter(None, map(str.strip, lines)):
        match = EDGE.fullmatch(line)
        if match is None:
            raise ValueError(f"not a transition: {line!r}")
        source = "" if match["source"] == "[*]" else f"`{match['source']}`"
        target = "the end" if match["target"] == "[*]" else f"`{match['target']}`"
        rows.append((source or "the start", match["event"] or "", target))
    return rows


class StateDiagram(SphinxDirective):
    """`{mermaid}`: a state diagram."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(table(["from", "event", "to"], transitions("\n".join(self.content))))


def setup(app: Sphinx) -> dict[str, object]:
    app.add_directive("mermaid", StateDiagram)
    return {"version": prefork.__version__, "parallel_read_safe": True}
