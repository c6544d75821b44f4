"""Answers as text for a terminal: aligned, 80 columns, no colour. Pure.

Each takes what `protocol.parse_answer` returned. An answer comes from a process that may be broken or of another
version: a member that is missing or of a wrong type is shown as `?`, and what is not printable is escaped.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WIDTH = 80
_MOST = 1e12
_STEPS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))
_TITLES = ("slot", "pid", "gen", "state", "age", "requests", "busy", "now")
_ALIGN = ">>><>>><"


class Answer(Mapping[str, Any]):
    """A part of an answer, of which nothing can be missing."""

    def __init__(self, value: object) -> None:
        self._value: dict[str, Any] = value if isinstance(value, dict) else {}

    def __getitem__(self, name: str) -> Any:
        return self._value[name]

    def __iter__(self) -> Any:
        return iter(self._value)

    def __len__(self) -> int:
        return len(self._value)

    def text(self, name: str) -> str:
        """On one line."""
        return self.block(name).replace("\n", " ")

    def block(self, name: str) -> str:
        """On as many lines as it has."""
        value = self._value.get(name)
        return "?" if value is None or isinstance(value, dict | list) else printable(str(value))

    def number(self, name: str) -> float:
        value = self._value.get(name)
        if not isinstance(value, int | float) or value != value:
            return 0.0
        return float(max(-_MOST, min(value, _MOST)))

    def part(self, name: str) -> "Answer":
        return Answer(self._value.get(name))

    def parts(self, name: str) -> "list[Answer]":
        value = self._value.get(name)
        return [Answer(item) for item in value] if isinstance(value, list) else []


def printable(text: str) -> str:
    """One line or more, without anything that a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else ascii(c)[1:-1] for c in text)


def duration(seconds: float) -> str:
    """A span of time in at most seven characters: `0.25 s`, `59 s`, `3 h`."""
    for size, unit in _STEPS:
        if seconds >= 2 * size:
            return f"{min(seconds / size, 99999):.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def status(value: object) -> str:
    """`prefork status`."""
    pool = Answer(value)
    rows = [_worker_row(worker) for worker in pool.parts("workers")]
    lines = [_headline(pool), _state_line(pool), *_reload_lines(pool), ""]
    return _joined([*lines, *table(_TITLES, rows, _ALIGN)])


def explain(value: object) -> str:
    """`prefork explain`."""
    pool = Answer(value)
    exits = pool.parts("exits")
    lines = [_headline(pool), _state_line(pool), "", "What the master does next:"]
    lines += _wrapped(next_steps(pool, exits), "  ")
    failed = pool.part("last_failed_reload")
    if failed:
        lines += ["", f"The last reload that failed, {duration(failed.number('ago'))} ago:"]
        lines += textwrap.indent(failed.block("text"), "  ").splitlines()
    lines += ["", "Why workers exited, the latest first:" if exits else "No worker has exited."]
    known = ""
    for exit in reversed(exits):
        lines += _wrapped([f"{duration(exit.number('ago'))} ago: {exit.text('line')}"], "  ")
        detail = "" if exit.get("detail") == "" else exit.block("detail")
        if detail and detail == known:
            lines.append("      as above")
        elif detail:
            lines += textwrap.indent(detail, "      ").splitlines()
        known = detail or known
    return _joined(lines)


def next_steps(pool: Answer, exits: Sequence[Answer]) -> list[str]:
    """What the master will do without a further event, and when; a sentence each."""
    steps = _pool_steps(pool)
    for backoff in pool.parts("slot_backoffs"):
        slot = backoff.text("slot")
        last = next((exit for exit in reversed(exits) if exit.text("slot") == slot and exit.get("fault")), None)
        busy = any(worker.text("slot") == slot for worker in pool.parts("workers"))
        failed = f"slot {slot}: failed {_times(backoff)} in a row{_reason(last)}"
        next_try = "tried again now" if busy else f"next try in {backoff.number('next_try_in'):.1f} s"
        steps.append(f"{failed}; {next_try}")
    system = pool.part("system_backoff")
    if system.number("failures"):
        when = f"next try in {system.number('next_try_in'):.1f} s"
        steps.append(f"all slots: the system refused to start a process {_times(system)} in a row; {when}")
    for worker in pool.parts("workers"):
        who = f"slot {worker.text('slot')}: pid {worker.text('pid')}"
        left = f"{worker.number('killed_in'):.1f} s"
        if worker.get("state") == "starting":
            steps.append(f"{who} starts; it is killed in {left} if it is not ready by then")
        elif worker.get("state") == "retiring":
            limit = "" if worker.get("killed_in") is None else f"; it is killed in {left} unless it ends before"
            steps.append(f"{who} leaves, because {worker.text('leaves_because')}{_why(worker)}{limit}")
        elif worker.get("recycle_requested"):
            steps.append(f"{who} is replaced{_why(worker)}")
    if not steps:
        steps.append("nothing: the pool is as it should be" if _is_whole(pool) else "it waits for the workers")
    return steps


def _pool_steps(pool: Answer) -> list[str]:
    """What the master does that is about the pool as a whole."""
    steps = []
    if pool.get("boot_failed"):
        steps.append("the pool ends: no worker of the first generation became ready")
    if (stage := pool.text("stage")) != "serving":
        steps.append(f"the pool stops ({stage}); the master ends when the last worker has left")
    last = pool.part("last_reload")
    progress, since = last.get("progress"), duration(last.number("ago"))
    if progress == "probing":
        steps.append(f"reload: for {since} a child tries the program; the pool is as before until it succeeds")
    elif progress == "waiting":
        steps.append("reload: it follows the reload under way")
    elif progress == "rolling" and pool.get("candidate") is not None:
        steps.append(f"reload: for {since} one worker of generation {last.text('generation')} is tried")
    elif progress == "rolling":
        steps.append(f"reload: for {since} generation {last.text('generation')} replaces the workers")
    return steps


def reload_result(value: object) -> str:
    """How a reload ended."""
    result = Answer(value)
    if result.get("good"):
        return f"generation {result.text('generation')} serves\n"
    return f"reload failed: {result.block('text')}\n"


def pools(answers: Iterable[tuple[str, object, str]]) -> str:
    """`prefork ps`: of each pool its path, its answer, and if there is none the reason."""
    titles, rows, paths = ("pid", "up", "workers", "gen", "state", "program"), [], []
    for path, value, problem in answers:
        pool = Answer(value)
        if problem:
            rows.append(["?", "?", "?", "?", "unknown", printable(problem).replace("\n", " ")])
        else:
            workers = f"{pool.text('ready')}/{pool.text('size')}"
            up = duration(pool.number("uptime"))
            rows.append([pool.text("pid"), up, workers, pool.text("generation"), _state(pool), pool.text("program")])
        paths.append(f"    --control {printable(path)}")
    lines = table(titles, rows, ">>>><<")
    return _joined([lines[0], *(line for pair in zip(lines[1:], paths, strict=True) for line in pair)])


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Columns; the last one is cut at the edge, the others are as wide as they need."""
    widths = [max(len(row[column]) for row in (titles, *rows)) for column in range(len(titles) - 1)]
    lines = []
    for row in (titles, *rows):
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return [_cut(line) for line in lines]


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _headline(pool: Answer) -> str:
    listeners = pool.get("listeners")
    names = " ".join(printable(str(name)) for name in listeners) if isinstance(listeners, list) else "?"
    return _cut(f"{pool.text('program')} on {names}".replace("\n", " "))


def _state_line(pool: Answer) -> str:
    return _cut(
        f"{_state(pool)}: {pool.text('ready')} of {pool.text('size')} workers ready, "
        f"generation {pool.text('generation')}, up {duration(pool.number('uptime'))}, pid {pool.text('pid')}"
    )


def _state(pool: Answer) -> str:
    stage = pool.text("stage")
    return "reloading" if stage == "serving" and pool.get("reloading") else stage


def _is_whole(pool: Answer) -> bool:
    return pool.get("ready") == pool.get("size") and _state(pool) == "serving"


def _reload_lines(pool: Answer) -> list[str]:
    last = pool.part("last_reload")
    if last.get("progress") != "failed":
        return []
    return [f"the last reload failed {duration(last.number('ago'))} ago; `prefork explain` says why"]


def _worker_row(worker: Answer) -> list[str]:
    busy_for, age = worker.number("busy_for"), worker.number("age")
    state = worker.text("state")
    if state == "ready":
        state = "busy" if busy_for else "idle"
    now = f"{duration(busy_for)} for {worker.text('peer')}" if busy_for else ""
    if state == "retiring":
        now = "; ".join(filter(None, [now, worker.text("leaves_because")]))
    elif worker.get("recycle_requested"):
        now = "; ".join(filter(None, [now, "is to be replaced"]))
    share = f"{100 * min(1.0, (worker.number('busy_time') + busy_for) / age):.0f} %" if age else "0 %"
    cells = [worker.text(name) for name in ("slot", "pid", "generation")]
    return [*cells, state, duration(age), worker.text("requests"), share, now]


def _times(backoff: Answer) -> str:
    number = int(min(backoff.number("failures"), 1e9))
    return "once" if number == 1 else f"{number} times"


def _reason(exit: Answer | None) -> str:
    """The last line of a traceback, or why the worker exited."""
    if exit is None:
        return ""
    detail = exit.block("detail").strip().splitlines() if exit.get("detail") else []
    return f", {detail[-1].strip()}" if detail and not detail[-1].startswith(" ") else f", {exit.text('line')}"


def _why(worker: Answer) -> str:
    return f" ({worker.text('why')})" if worker.get("why") else ""


def _wrapped(sentences: Iterable[str], indent: str) -> list[str]:
    lines: list[str] = []
    for sentence in sentences:
        lines += textwrap.wrap(
            sentence, WIDTH, initial_indent=indent, subsequent_indent=indent + "    ", break_on_hyphens=False
        )
    return lines


def _joined(lines: Iterable[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"
