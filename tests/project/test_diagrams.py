"""The diagrams of docs/design.md are those of the tables in the code."""

import re
import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_diagrams_are_those_of_the_code() -> None:
    """Between its markers docs/design.md has, of each diagram, exactly what docs/diagrams.py prints; and no other."""
    pattern = re.compile(r"^<!-- diagram: \w+ -->$.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
    drawn = runpy.run_path(str(DOCS / "diagrams.py"))["markdown"]()
    assert len(pattern.findall(drawn)) == 3
    assert pattern.findall((DOCS / "design.md").read_text()) == pattern.findall(drawn), "run: python docs/diagrams.py"
