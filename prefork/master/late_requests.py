"""Requests past their deadline: reads the deadlines off the scoreboard, and carries out the verdicts.

`rules.deadlines` decides. With a `request_timeout` the next look is at the earliest deadline that is published, or one
timeout from now: a request that begins later cannot be due before. Without a `request_timeout` nobody looks.
"""

import prefork.kernel.logs as logs
from prefork.link.scoreboard import Scoreboard
from prefork.link.worker_context import INTERRUPT
from prefork.master.roster import Roster
from prefork.rules.deadlines import Deadlines, Reading
from prefork.rules.pool import Pool
from prefork.rules.worker_exit import Reason

log = logs.get("prefork")


class Judge:
    """Judges the requests of one pool.

    To be read: `due`, when to look next; None: no worker has a `request_timeout`.
    """

    def __init__(self, pool: Pool, board: Scoreboard, roster: Roster) -> None:
        self.due: float | None = None
        self._pool, self._board, self._roster = pool, board, roster
        self._deadlines = Deadlines()

    def judge(self, now: float) -> None:
        """Interrupt or condemn those whose request is past its deadline."""
        timeout = self._pool.request_timeout
        if timeout != self._deadlines.timeout:  # a generation has come, or gone, that has another
            self._deadlines.timeout, self.due = timeout, None
        if timeout is None or (self.due is not None and now < self.due):
            return
        readings = []
        for member in self._pool.members.values():
            if not member.aborted and not member.killed:
                deadline, interrupted = self._board.deadline(member.slot)
                readings.append(Reading(member.pid, deadline, interrupted, self._board.threads(member.slot)))
        verdicts, self.due = self._deadlines.judge(now, readings)
        for pid in verdicts.interrupt:
            name = self._roster.handles[pid].name
            log.warning("%s: a request is past its deadline; it is interrupted by RequestTimeout [PF0601]", name)
            self._roster.send(pid, INTERRUPT)
        for pid in verdicts.condemn:
            self._pool.condemn(pid, Reason.REQUEST_TIMEOUT, now)

    def grant(self, now: float, seconds: float) -> None:
        """The master was away: judge no request before it has had that time once more."""
        self._deadlines.grant(now, seconds)
