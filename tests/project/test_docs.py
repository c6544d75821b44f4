"""The documents name files that exist, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

import prefork

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("docs/*/*.md")])
# `kernel/processes.py` is said of the package, `tests/rules/` of the project.
NAMED = re.compile(r"`([\w./-]+/(?:[\w-]+\.(?:py|md|toml))?)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(document: Path) -> str:
    """Its text without code blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """The anchors of its headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Each file that a document links to is there, and has the heading that the link names."""
    for link in LINK.findall(prose(document)):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            there = (document.parent / path).resolve() if path else document
            assert there.exists(), link
            assert not anchor or anchor in anchors(there), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_document_names_exist(document: Path) -> None:
    """Each file or folder of this project that a document names is there, none of an old house."""
    text = prose(document)
    packages = {path.name for path in (ROOT / "prefork").iterdir()} | {path.name for path in ROOT.iterdir()}
    named = {path for path in NAMED.findall(text) if path.split("/")[0] in packages}
    assert not [path for path in named if not any((base / path).exists() for base in (ROOT, ROOT / "prefork"))]


def test_there_are_names_and_links() -> None:
    """What the tests above look for is found where it is known to stand."""
    assert "design.md" in LINK.findall(prose(ROOT / "docs/measurements.md"))
    assert "rules/pool.py" in NAMED.findall((ROOT / "docs/design.md").read_text(encoding="utf-8"))


def test_public_names_are_in_the_reference() -> None:
    """docs/reference/api.md has each public name of the package, and no other."""
    text = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8")
    made = set(re.findall(r"^\.\. auto\w+:: prefork\.(\w+)$", text, re.MULTILINE)) - {"testing"}
    named = {name for name in prefork.__all__ if name.startswith("__") or f"`{name}`" in text}
    assert made <= set(prefork.__all__)
    assert made | named == set(prefork.__all__)
