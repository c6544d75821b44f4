"""The language of the control socket, version 1. Pure: bytes to values, and back.

A connection carries one request and its answer, each a line of JSON in ASCII:

    {"prefork": 1, "do": "scale", "workers": 8}
    {"prefork": 1, "ok": true, "answer": {...}}
    {"prefork": 1, "ok": false, "error": "bad-argument", "text": "workers: must be a whole number from 1 to 2048"}

A request is a name and numbers. Nothing in it is evaluated, and what is not understood in full is refused. A later
version may add members to an answer; whoever reads one ignores those that it does not know.
"""

import json
from dataclasses import dataclass
from typing import Any

from prefork.errors import PreforkError
from prefork.settings.settings import MAX_WORKERS

VERSION = 1
REQUEST_LIMIT = 4096  # bytes of a request, its end of line included
_LAST_SLOT = 3 * MAX_WORKERS
_LAST_TICKET = 1 << 53  # beyond it a number of JSON may not be what was written

# Of each request its members, with the least and the greatest value; one that is optional has a default.
_INTEGER = tuple[int, int]
REQUESTS: dict[str, dict[str, _INTEGER]] = {
    "status": {},
    "explain": {},
    "reload": {},
    "reload-result": {"ticket": (1, _LAST_TICKET)},
    "stop": {},
    "scale": {"workers": (1, MAX_WORKERS)},
    "recycle": {"slot": (0, _LAST_SLOT)},
}

ORDERS = frozenset({"reload", "stop", "scale", "recycle"})  # those that change something

ERRORS = (
    "bad-request",  # it is not a line of JSON in this language
    "too-long",
    "too-slow",
    "version",  # the language is of another version
    "unknown-request",
    "bad-argument",
    "forbidden",  # the client has another uid
    "busy",  # too many clients
    "stopping",  # the pool stops, and does not do this any more
    "no-such-slot",
    "no-such-ticket",
    "failed",  # the pool cannot answer; its log says why
)


class ControlError(PreforkError):
    """A request was refused. `kind` is one of `ERRORS`."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind, self.text = kind, text


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: a name of `REQUESTS`, and all of its members."""

    do: str
    members: dict[str, int]

    def __str__(self) -> str:
        return " ".join([self.do, *map(str, self.members.values())])


def parse_request(line: bytes) -> Request:
    """Read a request.

    Raises
    ------
    ControlError
        naming what is wrong.
    """
    if len(line) > REQUEST_LIMIT:
        raise too_long()
    value = _object(line)
    if (version := value.pop("prefork", None)) != VERSION or type(version) is not int:
        raise ControlError("version", f"this pool speaks version {VERSION} of the protocol: 'prefork': {VERSION}")
    do = value.pop("do", None)
    if not isinstance(do, str) or do not in REQUESTS:
        raise ControlError("unknown-request", f"do: must be one of {', '.join(REQUESTS)}")
    known = REQUESTS[do]
    if unknown := value.keys() - known.keys():
        raise ControlError("bad-argument", f"{do}: takes no {_shown(min(unknown))}")
    for name, (low, high) in known.items():
        number = value.get(name)
        if type(number) is not int or not low <= number <= high:
            raise ControlError("bad-argument", f"{name}: must be a whole number from {low} to {high}")
    return Request(do, value)


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line, parse_constant=_refused)
    except (ValueError, RecursionError):
        raise ControlError("bad-request", "a request is one line of JSON") from None
    if not isinstance(value, dict):
        raise ControlError("bad-request", "a request is an object of JSON")
    return value


def _refused(constant: str) -> None:
    raise ValueError(constant)


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:37] + "...")


def too_long() -> ControlError:
    return ControlError("too-long", f"a request has at most {REQUEST_LIMIT} bytes")


def request_line(do: str, **members: int) -> bytes:
    """A request as it is sent."""
    return json.dumps({"prefork": VERSION, "do": do, **members}).encode() + b"\n"


# An answer is sent in pieces: its head, items of lists, its end.
ANSWER_HEAD = f'{{"prefork": {VERSION}, "ok": true, "answer": '.encode()
ANSWER_END = b"}\n"


def answer_line(value: object) -> bytes:
    """An answer as it is sent."""
    return ANSWER_HEAD + json.dumps(value).encode() + ANSWER_END


def error_line(error: ControlError) -> bytes:
    """A refusal as it is sent."""
    value = {"prefork": VERSION, "ok": False, "error": error.kind, "text": error.text}
    return json.dumps(value).encode() + b"\n"


def parse_answer(line: bytes) -> Any:
    """Read an answer.

    Raises
    ------
    ControlError
        The request was refused, or what came is no answer of this protocol.
    """
    value = _object(line) if line.endswith(b"\n") else {}
    if value.get("prefork") == VERSION and value.get("ok") is True and isinstance(value.get("answer"), dict):
        return value["answer"]
    if value.get("prefork") == VERSION and isinstance(text := value.get("text"), str):
        raise ControlError(str(value.get("error")), text)
    raise ControlError("bad-answer", "what answers there is no control socket of this version of prefork")
