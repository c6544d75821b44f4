"""Deaths: noticed, collected, reported. Here a worker's exit becomes a line of the log and a call of `worker_exited()`.

A death has two notices: the pidfd, and the end of the uplink. The pipe closes a moment before there is an exit to
collect, and a child of the worker may hold it open; so where there is no pidfd, the pid is looked at again and again.

Only pids that the master forked are waited for. Others are collected by their owner (`collect_others`), or, as process
1, when the kernel hands them over.
"""

import collections
import logging
import time
from collections.abc import Callable
from dataclasses import replace

import prefork.kernel.logs as logs
import prefork.kernel.processes as processes
from prefork.errors import with_code
from prefork.link.scoreboard import Entry, Scoreboard
from prefork.master.error_guard import Guard
from prefork.master.roster import Roster
from prefork.master.stop import Stop
from prefork.master.worker_handle import WorkerHandle
from prefork.rules.c_stack import without_interpreter
from prefork.rules.pool import Pool
from prefork.rules.reload_history import excerpt
from prefork.rules.worker_exit import Reason, WorkerExit

log = logs.get("prefork")

SWEEP = 0.005  # seconds to the next look for an exit whose pipe is closed already
TICK = 0.5  # seconds to the next look where the kernel has no pidfd, or the pipe has been closed for that long
LAST_EXITS = 64  # deaths that a snapshot tells of
DETAIL_KEPT = 4096  # characters of what each of these workers said last


class Reaper:
    """Collects the workers of one pool.

    To be read: `due`, when to look although there was no notice (None: never); `last_exits`, the latest deaths with
    their times, oldest first; `last_words`, what the last worker that did not boot has said.
    """

    def __init__(
        self,
        roster: Roster,
        pool: Pool,
        board: Scoreboard,
        stop: Stop,
        guard: Guard,
        worker_exited: Callable[[WorkerExit], None],
        collect_others: Callable[[], float | None],
        adopts: bool,
    ) -> None:
        self.due: float | None = None
        self.last_exits: collections.deque[tuple[float, WorkerExit]] = collections.deque(maxlen=LAST_EXITS)
        self.last_words = ""
        self._roster, self._pool, self._board, self._stop, self._guard = roster, pool, board, stop, guard
        self._worker_exited, self._collect_others, self._adopts = worker_exited, collect_others, adopts

    def look_at(self, due: float) -> None:
        """Look at this time, or before."""
        self.due = due if self.due is None else min(self.due, due)

    def last_said(self, generation: int) -> str:
        """The latest death in a generation, and what that worker said; '' where nobody of it has died."""
        for _, report in reversed(self.last_exits):
            if report.generation == generation:
                return f"{report}\n{report.detail}".rstrip()
        return ""

    def reap(self, now: float, *, probing: bool) -> None:
        """Collect every worker that has ended, and report it.

        Parameters
        ----------
        probing
            A probe has a child of its own, so strangers are left alone.
        """
        sweep = self.due is not None and now >= self.due
        if sweep:
            self.due = None
        for handle in list(self._roster.handles.values()):
            with self._guard.protect("%s cannot be collected; the master tries again [PF0417]", handle.name):
                if (sweep or handle.child.ended or handle.closed_at is not None) and self._collect(handle):
                    continue
            if handle.closed_at is not None:
                # A worker that closed its uplink by mistake and lives on must not keep the master awake.
                self.look_at(now + (SWEEP if now - handle.closed_at < TICK else TICK))
            elif handle.child.pidfd is None:
                self.look_at(now + TICK)
        if (again := self._collect_others()) is not None:
            self.look_at(again)
        if self._adopts and (probing or processes.reap_strangers(self._roster.handles)):
            self.look_at(now + TICK)

    def _collect(self, handle: WorkerHandle) -> bool:
        """Reap one worker if it has ended, and report it. Whether it is gone."""
        exit = handle.child.reap()
        if exit is None:
            return False
        if handle.closed_at is None:
            with self._guard.protect("the messages of %s cannot be read [PF0418]", handle.name):
                self._roster.hear(handle)  # what it said before it died comes before its death
        status, memory = exit
        now = time.monotonic()
        entry = self._board.read(handle.slot, now)
        self._roster.forget(handle)
        # A worker that its first request has ended has taken a request: that is no crash loop, the clients set its
        # pace.
        served = entry.requests > 0 or entry.busy_for > 0
        member = self._pool.exited(handle.child.pid, now, status=status, served=served)
        report = report_of(handle, entry, member.reason or Reason.EXITED, status, memory, now, member.why)
        if report.reason is Reason.STOPPED and status == 0 and member.ready_at is not None:
            self._stop.found_empty()
        self.last_exits.append((now, replace(report, detail=excerpt(report.detail, DETAIL_KEPT))))
        delay = self._pool.backoff_of(handle.slot, now)
        if report.reason in (Reason.BOOT_FAILED, Reason.BOOT_TIMEOUT):
            log_exit(report, known=self.last_words, delay=delay)
            self.last_words = report.detail or str(report)
        else:
            log_exit(report, delay=delay)
        with self._guard.protect_hook("worker_exited() raised; the pool serves on [PF0702]"):
            self._worker_exited(report)
        return True


def report_of(
    handle: WorkerHandle,
    entry: Entry,
    reason: Reason,
    status: int | None,
    memory: int | None,
    now: float,
    why: str = "",
) -> WorkerExit:
    """The report of a worker's end. `entry` is what its slot says."""
    return WorkerExit(
        handle.slot,
        handle.child.pid,
        handle.generation,
        reason,
        status,
        entry.peer,
        entry.busy_for,
        entry.requests,
        memory,
        now - handle.born,
        without_interpreter(handle.link.text),
        why,
    )


def log_exit(report: WorkerExit, *, known: str = "", delay: float = 0.0) -> None:
    """One line, and what the worker said last unless that is `known` from the one before: a crash loop says it once.

    Parameters
    ----------
    delay
        Seconds for which the slot is in back-off.
    """
    text = report.text
    if report.detail and report.detail == known:
        text += ", as before"
    elif report.detail:
        text += f"\n{report.detail}"
    if delay > 0.0:
        first, newline, detail = text.partition("\n")
        text = f"{first}; its slot starts the next worker in {delay:.1f} s{newline}{detail}"
    level = logging.ERROR if not report.reason.ordered else logging.WARNING if report.status else logging.INFO
    log.log(level, "%s", with_code(text, report.code))
