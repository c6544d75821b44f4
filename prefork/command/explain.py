"""`prefork --explain PF0203`: the page of a message. The pages are `docs/messages/`, which the wheel has too."""

import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path


def folder() -> Traversable:
    """Where the pages are: in the installed package, or in the checkout."""
    package = files("prefork")
    installed = package / "messages"
    return installed if installed.is_dir() else Path(str(package)).parent / "docs" / "messages"


def page(text: str) -> str:
    """The page of a code, which may be given as the log shows it (`[PF0203]`), or as its number alone.

    Raises
    ------
    LookupError
        There is no such code. The error is one line, and names the nearest one.
    """
    pages = folder()
    codes = sorted(name[:-3] for name in (page.name for page in pages.iterdir()) if re.fullmatch(r"PF\d{4}\.md", name))
    match = re.fullmatch(r"\[?(?:PF)?(\d{1,4})\]?", text.strip(), re.IGNORECASE)
    if match is None:
        raise LookupError(f"{text!r} is no message code; a code is PF and four digits, such as {codes[0]}")
    number = int(match[1])
    code = f"PF{number:04}"
    if code not in codes:
        nearest = min(codes, key=lambda known: abs(int(known[2:]) - number))
        raise LookupError(f"there is no message {code}; the nearest is {nearest}")
    return (pages / f"{code}.md").read_text(encoding="utf-8")
