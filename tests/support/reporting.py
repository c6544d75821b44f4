"""A server whose reports of dead workers are notes."""

import json
from typing import Any

from .scripts import Notes, noted
from .waiting import until

REPORTING = """
import json

class Reporting(prefork.PreforkTCPServer):
    workers = 1

    def worker_exited(self, report):
        fields = {name: getattr(report, name) for name in report.__slots__}
        note("exit " + json.dumps({**fields, "reason": report.reason.name, "line": str(report)}))
"""


def reports(notes: Notes, number: int = 1, timeout: float = 10.0) -> list[dict[str, Any]]:
    """The reports, whole: a line with the stacks of many threads is long, and may be read while it is written."""

    def whole() -> list[dict[str, Any]] | None:
        try:
            return [json.loads(line) for line in noted(notes, "exit", number, timeout)]
        except json.JSONDecodeError:
            return None

    found = until(whole, timeout, "whole reports")
    assert found is not None
    return found
