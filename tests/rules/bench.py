"""A pool with a fake clock, for the tests that name one rule of the pool each."""

import random

from prefork.rules.pool import Member, Order, Pool, PoolEvent, Spawn
from prefork.rules.states import State
from prefork.settings.settings import Options


class Bench:
    """A pool with a clock that stands until it is moved, and forks that succeed until `refuse` is set."""

    def __init__(self, workers: int = 2, *, ready: bool = True, **values: float) -> None:
        self.pool = Pool(Options({"workers": workers, **values}), random.Random(1))
        self.now, self.pid, self.refuse = 100.0, 0, False
        if ready:
            self.look()
            self.boot(*self.pool.members)
            assert self.look() == []
            self.pool.events.clear()

    def look(self, after: float = 0.0) -> list[Order]:
        """Carry out the orders, `after` so many seconds."""
        self.now += after
        orders = self.pool.orders(self.now)
        for order in orders:
            if isinstance(order, Spawn):
                self.pid += 1
                if self.refuse:
                    self.pool.spawn_failed(self.now)
                else:
                    self.pool.spawned(order, self.pid, self.now)
        return orders

    def boot(self, *pids: int) -> None:
        for pid in pids:
            self.pool.booted(pid, self.now)

    def exit(self, *pids: int, crashed: bool = False, served: bool = False) -> Member:
        """By themselves (`crashed`), as ordered, or killed from outside."""
        for pid in pids:
            asked = self.pool.members[pid].state is State.RETIRING
            member = self.pool.exited(pid, self.now, status=1 if crashed else 0 if asked else -9, served=served)
        return member

    def wait(self) -> float:
        """Sleep until the next deadline; how long that was."""
        due = self.pool.next_deadline()
        assert due is not None
        slept, self.now = due - self.now, due
        return round(slept, 6)

    @property
    def ready(self) -> list[int]:
        return [m.pid for m in self.pool.ready]

    def events(self) -> list[tuple[PoolEvent, int]]:
        events = list(self.pool.events)
        self.pool.events.clear()
        return events
