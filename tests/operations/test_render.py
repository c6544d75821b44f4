"""Answers as text: aligned, 80 columns, and harmless to a terminal whatever the answer says."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prefork.operations.render as render

WORKER: dict[str, Any] = {
    "slot": 0, "pid": 101, "generation": 2, "state": "ready", "phase": "serving", "age": 100.0, "requests": 17,
    "busy_for": 0.0, "busy_time": 25.0, "peer": None, "held": 0, "recycle_requested": False, "leaves_because": None,
    "why": "", "killed_in": None,
}  # fmt: skip
POOL: dict[str, Any] = {
    "program": "app:Handler", "listeners": ["tcp://127.0.0.1:8000"], "pid": 100, "uptime": 7300.0, "size": 2,
    "ready": 2, "generation": 2, "candidate": None, "reloading": False, "stage": "serving", "boot_failed": False,
    "slot_backoffs": [], "system_backoff": {"failures": 0, "next_try_in": 0.0}, "last_reload": None,
    "workers": [WORKER, {**WORKER, "slot": 10, "pid": 102, "busy_for": 2.5, "peer": "10.0.0.1:4242"}],
}  # fmt: skip
EXIT: dict[str, Any] = {
    "ago": 12.34, "slot": 3, "pid": 103, "generation": 2, "reason": "boot_failed", "fault": True, "status": 1,
    "requests": 0, "uptime": 0.1, "detail": "Traceback (most recent call last):\n  File ...\nImportError: no numpy",
    "line": "worker 103 (slot 3, generation 2) exited: it failed before it was ready, exit code 1; 0 requests in 0.1 s",
}  # fmt: skip


def test_status() -> None:
    """The pool in two lines, and a line per worker in aligned columns."""
    assert render.status(POOL) == (
        "app:Handler on tcp://127.0.0.1:8000\n"
        "serving: 2 of 2 workers ready, generation 2, up 2 h, pid 100\n"
        "\n"
        "slot  pid  gen  state    age  requests  busy  now\n"
        "   0  101    2  idle   100 s        17  25 %\n"
        "  10  102    2  busy   100 s        17  28 %  2.5 s for 10.0.0.1:4242\n"
    )


def test_status_of_a_failed_reload() -> None:
    """Status says that the last reload has failed, and where the reason is told."""
    failed = {"progress": "failed", "ago": 60.0, "text": "SyntaxError"}
    assert "the last reload failed 60 s ago; `prefork explain` says why\n" in render.status(
        {**POOL, "last_reload": failed}
    )
    assert "failed" not in render.status({**POOL, "last_reload": {**failed, "progress": "serves"}})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "nothing: the pool is as it should be"),
        (
            {"slot_backoffs": [{"slot": 3, "failures": 4, "next_try_in": 3.21}], "exits": [EXIT]},
            "slot 3: failed 4 times in a row, ImportError: no numpy; next try in 3.2 s",
        ),
        (
            {"slot_backoffs": [{"slot": 0, "failures": 1, "next_try_in": 0.0}]},
            "slot 0: failed once in a row; tried again now",
        ),
        (
            {"system_backoff": {"failures": 2, "next_try_in": 0.15}},
            "all slots: the system refused to start a process 2 times in a row; next try in 0.1 s",
        ),
        (
            {"workers": [{**WORKER, "state": "starting", "killed_in": 29.96}]},
            "slot 0: pid 101 starts; it is killed in 30.0 s if it is not ready by then",
        ),
        (
            {"workers": [{**WORKER, "state": "retiring", "leaves_because": "the pool shrinks", "killed_in": 5.0}]},
            "slot 0: pid 101 leaves, because the pool shrinks; it is killed in 5.0 s unless it ends before",
        ),
        (
            {"workers": [{**WORKER, "recycle_requested": True, "why": "max_requests: 3 of 3"}]},
            "slot 0: pid 101 is replaced (max_requests: 3 of 3)",
        ),
        ({"boot_failed": True}, "the pool ends: no worker of the first generation became ready"),
        ({"ready": 1}, "it waits for the workers"),
        ({"stage": "draining"}, "the pool stops (draining); the master ends when the last worker has left"),
        (
            {"last_reload": {"progress": "probing", "ago": 1.5}},
            "reload: for 1.5 s a child tries the program; the pool is as before until it succeeds",
        ),
        ({"last_reload": {"progress": "waiting", "ago": 1.5}}, "reload: it follows the reload under way"),
        (
            {"candidate": 3, "last_reload": {"progress": "rolling", "ago": 1.5, "generation": 3}},
            "reload: for 1.5 s one worker of generation 3 is tried",
        ),
        (
            {"last_reload": {"progress": "rolling", "ago": 1.5, "generation": 3}},
            "reload: for 1.5 s generation 3 replaces the workers",
        ),
        ({"last_reload": {"progress": "serves", "ago": 1.5}}, "nothing: the pool is as it should be"),
    ],
)
def test_next_steps(changes: dict[str, Any], says: str) -> None:
    """explain says what the master does next and when, for each reason that it has to do something."""
    text = render.explain({**POOL, **changes})
    assert " ".join(says.split()) in " ".join(text.split())


def test_why_workers_left() -> None:
    """explain tells the latest death first, what a worker said last below it, and the same words only once."""
    text = render.explain({**POOL, "exits": [{**EXIT, "ago": 20.0}, EXIT]})
    assert text.endswith(
        "Why workers exited, the latest first:\n"
        "  12 s ago: worker 103 (slot 3, generation 2) exited: it failed before it was\n"
        "      ready, exit code 1; 0 requests in 0.1 s\n"
        "      Traceback (most recent call last):\n"
        "        File ...\n"
        "      ImportError: no numpy\n"
        "  20 s ago: worker 103 (slot 3, generation 2) exited: it failed before it was\n"
        "      ready, exit code 1; 0 requests in 0.1 s\n"
        "      as above\n"
    )


def test_the_last_failed_reload() -> None:
    """explain has the whole text of the last reload that failed."""
    text = render.explain({**POOL, "last_failed_reload": {"ago": 3.0, "text": "it fails\n  File 'x'\nSyntaxError"}})
    assert "The last reload that failed, 3.0 s ago:\n  it fails\n    File 'x'\n  SyntaxError\n" in text


def test_pools() -> None:
    """ps has a line per pool, with the words that name it below."""
    text = render.pools([("/run/a.sock", POOL, ""), ("/run/b.sock", None, "no answer within 5 s")])
    assert text == (
        "pid   up  workers  gen  state    program\n"
        "100  2 h      2/2    2  serving  app:Handler\n"
        "    --control /run/a.sock\n"
        "  ?    ?        ?    ?  unknown  no answer within 5 s\n"
        "    --control /run/b.sock\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.96, "10.0 s"), (59.4, "59 s"), (119, "119 s"), (121, "2 min"), (7300, "2 h"), (864000, "10 d")],
)
def test_durations(seconds: float, text: str) -> None:
    """A span of time is shown in the unit in which it has at most three digits."""
    assert render.duration(seconds) == text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=200),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*POOL, "exits", "last_failed_reload"]), VALUES), st.data())
def test_any_answer(changes: dict[str, Any], data: st.DataObject) -> None:
    """Whatever an answer holds, there is a text of it, and nothing in it that a terminal would obey."""
    worker = {**WORKER, **data.draw(st.dictionaries(st.sampled_from([*WORKER]), VALUES, max_size=4))}
    exit = {**EXIT, **data.draw(st.dictionaries(st.sampled_from([*EXIT]), VALUES, max_size=4))}
    answer = {**POOL, "workers": [worker], "exits": [exit], **changes}
    texts = [render.status(answer), render.explain(answer), render.pools([("/x", answer, "")])]
    for text in [*texts, render.reload_result(answer)]:
        assert text.endswith("\n") and all(line.isprintable() for line in text.splitlines())
    assert all(len(line) <= render.WIDTH for line in texts[0].splitlines())
