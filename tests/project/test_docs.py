"""The documents name files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*.md"))]
# `kernel/processes.py` is said of the package, `tests/rules/` of the project.
NAMED = re.compile(r"`([\w./-]+/(?:[\w-]+\.(?:py|md|toml))?)`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document: Path) -> None:
    """Each file or folder of this project that a document names is there, none of an old house."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    packages = {path.name for path in (ROOT / "prefork").iterdir()} | {path.name for path in ROOT.iterdir()}
    named = {path for path in NAMED.findall(text) if path.split("/")[0] in packages}
    assert not [path for path in named if not any((base / path).exists() for base in (ROOT, ROOT / "prefork"))]


def test_the_design_names_files() -> None:
    """What the test above looks for is found where it is known to stand."""
    assert "rules/pool.py" in NAMED.findall((ROOT / "docs/design.md").read_text(encoding="utf-8"))
