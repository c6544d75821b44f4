"""The pool at one moment, as values: what status, metrics and sizing are made from.

It is made from the pool, and from the scoreboard for what the workers themselves write. No worker is asked, nothing is
waited for, and beyond shared memory there is no I/O. Texts from clients were made printable when they were read.
Times are seconds. A snapshot of 64 busy workers takes 0.3 ms.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

from prefork.link.scoreboard import Scoreboard
from prefork.rules.pacing import Backoff
from prefork.rules.pool import Member, Pool
from prefork.rules.reload_history import ReloadHistory, Ticket
from prefork.rules.states import Phase, State
from prefork.rules.stop_sequence import Stage
from prefork.rules.worker_exit import Reason, WorkerExit


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """One worker.

    state, phase
        What the master knows of it, and what it says of itself.
    busy_for, peer
        Of the request in progress, of several the oldest: its seconds and its client. 0.0 and None: it is idle.
    busy_time
        Seconds in which it had a request, since its start.
    held
        Connections that it keeps, where its class of workers does so.
    recycle_requested
        It is to be replaced, although its generation is right.
    leaves_because, why
        The reason for which it leaves, None while it serves; and the limit that it has reached, or ''.
    killed_in
        Seconds until the master ends it unless it is ready, or gone, before; None: it may stay.
    """

    slot: int
    pid: int
    generation: int
    state: State
    phase: Phase
    age: float
    requests: int
    busy_for: float
    busy_time: float
    peer: str | None
    held: int
    recycle_requested: bool
    leaves_because: Reason | None
    why: str
    killed_in: float | None


@dataclass(frozen=True, slots=True)
class BackoffSnapshot:
    """A back-off: the failures in a row, and the seconds until the next try; 0.0: it may be tried now."""

    failures: int
    remaining: float


@dataclass(frozen=True, slots=True)
class ExitSnapshot:
    """A death, and how many seconds ago it was. What the worker said last is there in part (`reaper.DETAIL_KEPT`)."""

    ago: float
    report: WorkerExit


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """The pool and its workers.

    uptime
        Seconds since the master began.
    size, ready
        The number of workers that is wanted, and the number of those that serve.
    generation, candidate
        The generation in force, and the generation that a reload tries; None: none is tried.
    slot_backoffs, system_backoff
        Of the slots whose workers fail, by slot; and of forks that the system refuses.
    boot_failed
        The first generation is over before any of its workers was ready.
    last_exits
        The latest deaths, the oldest first; at most `reaper.LAST_EXITS`.
    last_reload, last_failed_reload
        The latest reload that was asked for, and the latest that has failed; `at` is how many seconds ago that was.
    workers
        By slot.
    """

    uptime: float
    size: int
    ready: int
    generation: int
    candidate: int | None
    reloading: bool
    stage: Stage
    boot_failed: bool
    slot_backoffs: dict[int, BackoffSnapshot]
    system_backoff: BackoffSnapshot
    last_exits: tuple[ExitSnapshot, ...]
    last_reload: Ticket | None
    last_failed_reload: Ticket | None
    workers: tuple[WorkerSnapshot, ...]


def snapshot(
    now: float,
    pool: Pool,
    board: Scoreboard,
    stage: Stage,
    last_exits: Iterable[tuple[float, WorkerExit]],
    reloads: ReloadHistory,
    began: float,
    slots: Container[int] | None = None,
) -> PoolSnapshot:
    """Make a snapshot.

    Parameters
    ----------
    stage
        The stop's own: the pool has no part in the first stage.
    slots
        The workers of these alone are in it; None: all are.
    """
    members = [member for member in pool.members.values() if slots is None or member.slot in slots]
    members.sort(key=lambda member: member.slot)
    return PoolSnapshot(
        uptime=now - began,
        size=pool.size,
        ready=len(pool.ready),
        generation=pool.generation,
        candidate=pool.candidate,
        reloading=pool.reloading,
        stage=stage,
        boot_failed=pool.boot_failed,
        slot_backoffs={slot: _backoff(backoff, now) for slot, backoff in sorted(pool.slot_backoffs.items())},
        system_backoff=_backoff(pool.system_backoff, now),
        last_exits=tuple(ExitSnapshot(now - at, report) for at, report in last_exits),
        last_reload=_ticket(reloads.latest, now),
        last_failed_reload=_ticket(reloads.last_failure, now),
        workers=tuple(_worker(member, board, now) for member in members),
    )


def _backoff(backoff: Backoff, now: float) -> BackoffSnapshot:
    return BackoffSnapshot(backoff.failures, max(0.0, backoff.until - now))


def _ticket(ticket: Ticket | None, now: float) -> Ticket | None:
    return None if ticket is None else replace(ticket, at=now - ticket.at)


def _killed_in(member: Member, now: float) -> float | None:
    at = member.boot_deadline if member.state is State.STARTING else member.kill_at
    return None if at is None else max(0.0, at - now)


def _worker(member: Member, board: Scoreboard, now: float) -> WorkerSnapshot:
    entry = board.read(member.slot, now)
    return WorkerSnapshot(
        slot=member.slot,
        pid=member.pid,
        generation=member.generation,
        state=member.state,
        phase=entry.phase,
        age=now - member.born,
        requests=entry.requests,
        busy_for=entry.busy_for,
        busy_time=entry.busy_time,
        peer=entry.peer,
        held=entry.held,
        recycle_requested=member.recycle_requested,
        leaves_because=member.reason,
        why=member.why,
        killed_in=_killed_in(member, now),
    )
