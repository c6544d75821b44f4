"""The commands that see and steer a running pool: `prefork status`, `prefork reload --wait` and their like.

They find the pool by themselves where there is only one. Exit codes: 0 done, 1 it was refused or has failed, 2 usage,
or several pools of which one is to be named. A program with the name of a command is served as `prefork status:app`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import prefork.kernel.unix_path as unix_path
import prefork.operations.client as client
import prefork.operations.instances as instances
import prefork.operations.render as render
from prefork.command.words import COMMANDS
from prefork.operations.protocol import ControlError

POLL = 0.1  # seconds between two questions of `reload --wait`
_LOCK_POLL = 0.02  # seconds between two looks whether a pool is there


def main(arguments: Sequence[str]) -> int:
    """Run one of `COMMANDS` and return its exit code."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "ps":
            return _ps(given)
        path = given.control or _only_pool()
        return _RUN[given.command](path, given)
    except ControlError as error:
        print(f"prefork {given.command}: error: {render.printable(str(error))}", file=sys.stderr)
        return 2 if error.kind == "several" else 1
    except BrokenPipeError:  # of standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prefork", description="See and steer a running pool.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name in ("status", "explain", "ps"):
            command.add_argument("--json", action="store_true", help="print the answer of the pool as JSON")
        if name in ("reload", "stop"):
            end = "the new generation serves, or has failed" if name == "reload" else "the pool has ended"
            command.add_argument("--wait", action="store_true", help=f"return when {end}")
        if name == "scale":
            command.add_argument("workers", metavar="N", type=int, help="the number of workers")
        if name == "recycle":
            command.add_argument("slot", metavar="SLOT", type=int, help="as `prefork status` shows it")
        if name != "ps":
            command.add_argument("--control", metavar="PATH", help="the control socket of the pool")
    return parser


def _pools() -> list[str]:
    return instances.paths(os.environ, os.geteuid())


def _only_pool() -> str:
    paths = _pools()
    if len(paths) > 1:
        raise ControlError("several", f"there are several pools; name one of them:\n{_listed(paths)}".rstrip())
    if not paths:
        raise ControlError("no-pool", "no pool of this user was found; name its socket by --control PATH")
    return paths[0]


def _listed(paths: Sequence[str]) -> str:
    return render.pools(_asked(path) for path in paths)


def _asked(path: str) -> tuple[str, object, str]:
    try:
        return path, client.ask(path, "status"), ""
    except ControlError as error:
        return path, None, str(error)


def _ps(given: argparse.Namespace) -> int:
    asked = [_asked(path) for path in _pools()]
    if given.json:
        _print_json([{"path": path, "error": problem, "pool": value} for path, value, problem in asked])
    elif asked:
        sys.stdout.write(render.pools(asked))
    return 0


def _status(path: str, given: argparse.Namespace) -> int:
    answer = client.ask(path, "status")
    _print_json(answer) if given.json else sys.stdout.write(render.status(answer))
    return 0


def _explain(path: str, given: argparse.Namespace) -> int:
    answer = client.ask(path, "explain")
    _print_json(answer) if given.json else sys.stdout.write(render.explain(answer))
    return 0


def _reload(path: str, given: argparse.Namespace) -> int:
    result = client.ask(path, "reload")
    while given.wait and result.get("done") is not True:
        time.sleep(POLL)
        result = client.ask(path, "reload-result", ticket=result.get("ticket", 0))
    if not given.wait:
        return 0
    stream = sys.stdout if result.get("good") is True else sys.stderr
    stream.write(render.reload_result(result))
    return 0 if result.get("good") is True else 1


def _stop(path: str, given: argparse.Namespace) -> int:
    connection = client.Connection(path, time.monotonic() + client.TIMEOUT)
    pid = connection.pid
    answer = connection.ask("stop")
    if given.wait:
        while unix_path.is_held(path):
            time.sleep(_LOCK_POLL)
        if answer.get("ends_process") is True and pid:
            from prefork.kernel.processes import await_end

            await_end(pid)
    return 0


def _scale(path: str, given: argparse.Namespace) -> int:
    client.ask(path, "scale", workers=given.workers)
    return 0


def _recycle(path: str, given: argparse.Namespace) -> int:
    client.ask(path, "recycle", slot=given.slot)
    return 0


_RUN: dict[str, Callable[[str, argparse.Namespace], int]] = {
    "status": _status,
    "explain": _explain,
    "reload": _reload,
    "stop": _stop,
    "scale": _scale,
    "recycle": _recycle,
}


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout)
    sys.stdout.write("\n")
