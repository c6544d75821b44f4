"""CPython's own tests of socketserver and http.server, with PreforkMixIn in the place of ForkingMixIn.

What passes with ForkingMixIn must pass with ours. Both are run here, on the Python that runs this: no list of tests is
kept that could grow old. `stdlib_driver.py` says how it is done.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import state, until

DRIVER = Path(__file__).resolve().parent / "stdlib_driver.py"

# So many tests, at least, must pass with ForkingMixIn after a server with the mix-in in front was told to serve: where
# the patching is in vain, or the tests do not run, there is nothing to compare. (Seen: 17; 34 as root, 48 with nobody.)
FLOORS = {"test_socketserver": 14, "test_httpservers": 30}

# Not about forking: the server was replaced by one with the mix-in in front, and the test looks in the parent for what
# is done in a worker of ours.
DIFFERENT = {
    "MiscTestCase.test_shutdown_request_called_if_verify_request_false",  # counts calls of shutdown_request()
    "MiscTestCase.test_threads_reaped",  # counts the threads of ThreadingMixIn
}

FORKING = {
    "test_ForkingTCPServer",
    "test_ForkingUDPServer",
    "test_ForkingUnixDatagramServer",
    "test_ForkingUnixStreamServer",
    "test_forking_handled",
    "test_forking_not_handled",
}


def drive(mixin: str, module: str, *options: object) -> dict[str, Any]:
    """The driver's report; the test is skipped if this Python was installed without its tests."""
    ran = subprocess.run(
        [sys.executable, DRIVER, "--mixin", mixin, "--module", module, *map(str, options)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr
    report: dict[str, Any] = json.loads(ran.stdout)
    if report["missing"]:
        pytest.skip(report["missing"])
    assert not report["error"], report["error"]
    return report


def passed(report: dict[str, Any]) -> set[str]:
    return {name for name, result in report["results"].items() if result["outcome"] == "passed"}


def short(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def told(name: str, result: dict[str, Any]) -> str:
    """What a failure says: the test's own traceback and what the server's processes wrote meanwhile."""
    return f"{short(name)}: {result['outcome']}\n{result['detail']}\n--- stderr\n{result.get('stderr', '')}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("module", FLOORS)
def test_what_passes_with_forking_passes_with_prefork(module: str) -> None:
    """Each test of CPython's that passes with ForkingMixIn (twice of twice) passes with ours; no process is left."""
    # One test hangs with ForkingMixIn, which waits for a kept-alive connection. All others need less than a second.
    baseline = drive("forking", module, "--times", 2, "--deadline", 3)
    ours = drive("prefork", module)
    served = {name for name in passed(baseline) if baseline["results"][name]["served"]}
    wanted = {name for name in passed(baseline) if short(name) not in DIFFERENT}
    failed = sorted(wanted - passed(ours))
    print(
        f"{module}, Python {ours['python']}: of {len(baseline['results'])} tests {len(passed(baseline))} pass with"
        f" ForkingMixIn, {len(served)} by serving; with ours {len(wanted) - len(failed)} of the {len(wanted)} that must"
    )
    assert len(served) >= FLOORS[module]
    if module == "test_socketserver":
        assert {name.rpartition(".")[2] for name in served} >= FORKING
    nothing = {"outcome": "not run", "detail": ""}
    assert not failed, "\n\n".join(told(name, ours["results"].get(name, nothing)) for name in failed)
    assert not {name for name in served & wanted if not ours["results"][name]["served"]}
    assert not ours["left"]


def of_one(mixin: str, *options: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report about one test with a mix-in that has a fault, and the result of that test."""
    name = "test.test_socketserver.SocketServerTest.test_ForkingTCPServer"
    report = drive(mixin, "test_socketserver", "--match", name, *options)
    assert list(report["results"]) == [name]
    return report, report["results"][name]


def test_the_harness_passes_what_is_right() -> None:
    """The test that the faults below fail passes with ForkingMixIn itself, which serves in it."""
    report, result = of_one("forking")
    assert (result["outcome"], result["served"], report["left"]) == ("passed", True, [])


def test_the_harness_notices_a_dropped_request() -> None:
    """A mix-in that drops every third request fails the test that makes three."""
    report, result = of_one("broken")
    assert (result["outcome"], report["left"]) == ("failed", [])
    assert "AssertionError" in result["detail"]


def test_the_harness_notices_a_server_that_does_not_stop() -> None:
    """A mix-in whose shutdown() does not return costs its test, at the deadline, and shows where it waits."""
    _, result = of_one("stuck", "--deadline", 2)
    assert result["outcome"] == "hung"
    assert "in shutdown" in result["stderr"]


def test_the_harness_notices_a_crash_and_goes_on() -> None:
    """A mix-in that takes the process down fails each test that closes a server, and all the others are run."""
    report = drive("crashing", "test_socketserver", "--match", "test_Forking")
    results = report["results"]
    assert {short(name).rpartition(".")[2] for name in results} == {name for name in FORKING if "_F" in name}
    assert {(one["outcome"], one["detail"]) for one in results.values()} == {("died", "exit status 9")}


def test_the_harness_notices_a_process_left_behind() -> None:
    """A mix-in that leaves a process behind is found out, and the process is ended."""
    report, result = of_one("leaky")
    assert (result["outcome"], len(report["left"])) == ("passed", 1)
    pid = int(report["left"][0].split()[0])
    until(
        lambda: state(pid) in ("", "Z", "X"), 5.0, "what was left is dead"
    )  # it was killed, and must be scheduled to die
