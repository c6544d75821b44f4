"""What a pool answers, made from its snapshot alone: no worker is asked, and nothing is waited for.

An answer is made in pieces of a few workers each, and the next piece only when the one before it was sent: so a request
takes the master little time at once, however many workers there are. Workers that come and go meanwhile may be missing.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import prefork.operations.protocol as protocol
from prefork.master.loop import Master
from prefork.master.snapshot import ExitSnapshot, PoolSnapshot, WorkerSnapshot
from prefork.operations.protocol import ControlError, Request
from prefork.rules.pacing import HEALTHY
from prefork.rules.pool import SIGKILL
from prefork.rules.reload_history import OPEN, Progress, Ticket
from prefork.rules.worker_exit import Reason

PIECE = 32  # workers, or deaths, of one piece
WATCHED = 2 * HEALTHY  # seconds for which a new generation is watched before its reload counts as good
_FAULTS = frozenset({Reason.BOOT_FAILED, Reason.BOOT_TIMEOUT, Reason.EXITED, Reason.KILLED})


class Answers:
    """Answers the requests to one pool.

    Parameters
    ----------
    about
        What is always the same: title, version, path.
    """

    def __init__(self, master: Master, about: dict[str, Any]) -> None:
        self._master, self._about = master, about
        self._makers: dict[str, Callable[[dict[str, int]], Iterator[bytes]]] = {
            "status": self._status,
            "explain": self._explain,
            "reload": self._reload,
            "reload-result": self._reload_result,
            "stop": self._stop,
            "scale": self._scale,
            "recycle": self._recycle,
        }

    def answer(self, request: Request) -> Iterator[bytes]:
        """Do what is asked, and return the answer in pieces.

        Raises
        ------
        ControlError
            The request is refused. A piece raises none.
        """
        return self._makers[request.do](request.members)

    # -- what is seen ----------------------------------------------------------------------------------------------

    def _status(self, members: dict[str, int]) -> Iterator[bytes]:
        first = self._look(0)
        return _pieces(self._pool(first), {"workers": self._workers(first)})

    def _explain(self, members: dict[str, int]) -> Iterator[bytes]:
        first = self._look(0)
        head = self._pool(first)
        head["last_failed_reload"] = _ticket(first.last_failed_reload)
        return _pieces(head, {"workers": self._workers(first), "exits": _exits(first.last_exits)})

    def _look(self, slot: int) -> PoolSnapshot:
        return self._master.snapshot(time.monotonic(), range(slot, slot + PIECE))

    def _pool(self, pool: PoolSnapshot) -> dict[str, Any]:
        return {
            **self._about,
            "pid": os.getpid(),
            "uptime": _seconds(pool.uptime),
            "size": pool.size,
            "ready": pool.ready,
            "generation": pool.generation,
            "candidate": pool.candidate,
            "reloading": pool.reloading,
            "stage": pool.stage.name.lower(),
            "boot_failed": pool.boot_failed,
            "slot_backoffs": [
                {"slot": slot, "failures": backoff.failures, "next_try_in": _seconds(backoff.remaining)}
                for slot, backoff in pool.slot_backoffs.items()
            ],
            "system_backoff": {
                "failures": pool.system_backoff.failures,
                "next_try_in": _seconds(pool.system_backoff.remaining),
            },
            "last_reload": _ticket(pool.last_reload),
        }

    def _workers(self, first: PoolSnapshot) -> Iterator[list[dict[str, Any]]]:
        yield [_worker(worker) for worker in first.workers]
        slot = PIECE
        while slot <= max((member.slot for member in self._master.pool.members.values()), default=-1):
            yield [_worker(worker) for worker in self._look(slot).workers]
            slot += PIECE

    # -- what is ordered -------------------------------------------------------------------------------------------

    def _reload(self, members: dict[str, int]) -> Iterator[bytes]:
        ticket = self._master.begin_reload()
        if ticket is None:
            raise ControlError("stopping", "the pool stops; it does not reload any more")
        return self._reload_result({"ticket": ticket})

    def _reload_result(self, members: dict[str, int]) -> Iterator[bytes]:
        ticket = self._master.reload_ticket(members["ticket"])
        if ticket is None:
            raise ControlError("no-such-ticket", "this pool knows of no such reload, or not any more")
        now = time.monotonic()
        exits = self._master.snapshot(now, ()).last_exits
        return iter([protocol.answer_line(verdict(ticket, exits, now))])

    def _stop(self, members: dict[str, int]) -> Iterator[bytes]:
        self._master.stop()
        return iter([protocol.answer_line({"pid": os.getpid(), **self._about})])

    def _scale(self, members: dict[str, int]) -> Iterator[bytes]:
        self._refuse_in_stop()
        former = self._master.pool.size
        self._master.resize(members["workers"])
        return iter([protocol.answer_line({"size": self._master.pool.size, "former": former})])

    def _recycle(self, members: dict[str, int]) -> Iterator[bytes]:
        self._refuse_in_stop()
        pid = self._master.recycle(members["slot"])
        if pid is None:
            raise ControlError("no-such-slot", f"no worker serves in slot {members['slot']}")
        return iter([protocol.answer_line({"slot": members["slot"], "pid": pid})])

    def _refuse_in_stop(self) -> None:
        if self._master.stopping:
            raise ControlError("stopping", "the pool stops; it does not do this any more")


def verdict(ticket: Ticket, exits: tuple[ExitSnapshot, ...], now: float) -> dict[str, Any]:
    """What has become of a reload: `done` or not, `good` or not, and of a failure why.

    A new generation is good when all its workers serve, and none of them has failed within the first `WATCHED` seconds.
    """
    faults = [exit.report for exit in exits if exit.report.generation == ticket.generation and is_fault(exit)]
    done = ticket.progress not in OPEN
    good = ticket.progress is Progress.SERVES
    text = ticket.text
    if good and now - ticket.at < WATCHED:
        done = good = False
    if faults and ticket.progress in (Progress.SERVES, Progress.ROLLING):
        done, good = True, False
        last = faults[-1]
        text = f"a worker of generation {last.generation} has failed\n{last}\n{last.detail}".rstrip()
    if ticket.progress is Progress.DROPPED:
        text = "the pool was told to stop before the reload was over"
    return {**(_ticket(replace(ticket, at=now - ticket.at)) or {}), "done": done, "good": good, "text": text}


def is_fault(exit: ExitSnapshot) -> bool:
    """Whether a worker has left by its program's own doing: not by an order, nor by SIGKILL from outside."""
    reason = exit.report.reason
    return reason in _FAULTS and not (reason is Reason.KILLED and exit.report.status == SIGKILL)


def _pieces(head: dict[str, Any], lists: dict[str, Iterator[list[dict[str, Any]]]]) -> Iterator[bytes]:
    """An object whose last members are lists that come in batches."""
    piece = protocol.ANSWER_HEAD + json.dumps(head)[:-1].encode()
    for name, batches in lists.items():
        piece += f', "{name}": ['.encode()
        comma = b""
        for batch in batches:
            if batch:
                yield piece + comma + json.dumps(batch)[1:-1].encode()
                piece, comma = b"", b", "
        piece += b"]"
    yield piece + b"}" + protocol.ANSWER_END


def _exits(exits: tuple[ExitSnapshot, ...]) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(exits), PIECE):
        yield [_exit(exit) for exit in exits[start : start + PIECE]]


def _seconds(value: float) -> float:
    return round(value, 3)


def _ticket(ticket: Ticket | None) -> dict[str, Any] | None:
    if ticket is None:
        return None
    return {
        "ticket": ticket.number,
        "progress": ticket.progress.name.lower(),
        "generation": ticket.generation,
        "ago": _seconds(ticket.at),
        "text": ticket.text,
    }


def _worker(worker: WorkerSnapshot) -> dict[str, Any]:
    return {
        "slot": worker.slot,
        "pid": worker.pid,
        "generation": worker.generation,
        "state": worker.state.value,
        "phase": worker.phase.name.lower(),
        "age": _seconds(worker.age),
        "requests": worker.requests,
        "busy_for": _seconds(worker.busy_for),
        "busy_time": _seconds(worker.busy_time),
        "peer": worker.peer,
        "held": worker.held,
        "recycle_requested": worker.recycle_requested,
        "leaves_because": worker.leaves_because and worker.leaves_because.value,
        "why": worker.why,
        "killed_in": None if worker.killed_in is None else _seconds(worker.killed_in),
    }


def _exit(exit: ExitSnapshot) -> dict[str, Any]:
    report = exit.report
    return {
        "ago": _seconds(exit.ago),
        "slot": report.slot,
        "pid": report.pid,
        "generation": report.generation,
        "reason": report.reason.name.lower(),
        "fault": is_fault(exit),
        "status": report.status,
        "requests": report.requests,
        "uptime": _seconds(report.uptime),
        "line": str(report),
        "detail": report.detail,
    }
