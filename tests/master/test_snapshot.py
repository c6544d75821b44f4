"""The snapshot of a pool: made from the pool and the scoreboard alone, and true of a real pool."""

import json
import random
import signal
from contextlib import ExitStack

import prefork.link.scoreboard as scoreboard
from prefork.link.scoreboard import Scoreboard
from prefork.master.snapshot import BackoffSnapshot, PoolSnapshot, snapshot
from prefork.rules.pool import Pool, Spawn
from prefork.rules.reload_history import ReloadHistory
from prefork.rules.states import Phase, State
from prefork.rules.stop_sequence import Stage
from prefork.rules.worker_exit import Reason
from prefork.settings.settings import Options
from support.scripts import Notes, Start, hold, launch, noted

NOW = 1000.0


class Bench:
    """A pool with a scoreboard, and no process."""

    def __init__(self, workers: int) -> None:
        self.pool = Pool(Options({"workers": workers}), random.Random(1))
        self.board = Scoreboard()
        self.forks = 0

    def look(self, now: float = NOW) -> None:
        for order in self.pool.orders(now):
            if isinstance(order, Spawn):
                self.forks += 1
                self.pool.spawned(order, 100 + self.forks, now)
                self.board.slot(order.slot)

    def snapshot(self, now: float = NOW, stage: Stage = Stage.SERVING) -> PoolSnapshot:
        return snapshot(now, self.pool, self.board, stage, [], ReloadHistory(), NOW - 60)


def test_what_members_and_slots_say() -> None:
    """A worker's line joins what the pool knows of it with what it wrote into its slot."""
    bench = Bench(3)
    bench.look(NOW - 5)
    bench.pool.booted(101, NOW - 4)
    bench.pool.booted(102, NOW - 4)
    slot = bench.board.slot(0)
    slot.set_phase(Phase.SERVING)
    slot.set_peer(("127.0.0.1", 4242))
    slot.floats[scoreboard.BUSY_SINCE] = NOW - 2.5
    slot.floats[scoreboard.BUSY_TIME] = 1.25
    slot.ints[scoreboard.REQUESTS] = 17
    slot.ints[scoreboard.HELD] = 3
    bench.pool.request_recycle(102, "max_requests: 3 of 3")
    bench.pool.leaves(103, NOW, Reason.EXITED)
    pool = bench.snapshot()
    first, second, third = pool.workers
    assert (pool.size, pool.ready, pool.generation, pool.candidate, pool.stage) == (3, 2, 1, None, Stage.SERVING)
    assert (first.slot, first.pid, first.generation, first.age) == (0, 101, 1, 5.0)
    assert (first.state, first.phase, first.requests, first.held) == (State.READY, Phase.SERVING, 17, 3)
    assert (first.busy_for, first.busy_time, first.peer) == (2.5, 1.25, "127.0.0.1:4242")
    assert (first.recycle_requested, first.leaves_because, first.why) == (False, None, "")
    assert (second.recycle_requested, second.leaves_because, second.why) == (True, None, "max_requests: 3 of 3")
    assert (third.state, third.leaves_because, third.busy_for, third.peer) == (State.RETIRING, Reason.EXITED, 0.0, None)


def test_reload_and_stop() -> None:
    """The generation that a reload tries is there until it serves, and the stage is that of the stop."""
    bench = Bench(1)
    bench.look()
    bench.pool.booted(101, NOW)
    bench.look()
    bench.pool.reload()
    bench.look()
    pool = bench.snapshot()
    assert (pool.generation, pool.candidate, pool.reloading) == (1, 2, True)
    assert [worker.generation for worker in pool.workers] == [1, 2]
    assert bench.snapshot(stage=Stage.SETTLING).stage is Stage.SETTLING


def test_back_off() -> None:
    """Slots whose workers fail tell how often in a row they did, and for how long they wait; so does the system."""
    bench = Bench(2)
    bench.look()
    bench.pool.booted(101, NOW)
    bench.pool.exited(102, NOW, status=1, served=False)
    bench.pool.spawn_failed(NOW)
    pool = bench.snapshot()
    assert set(pool.slot_backoffs) == {1}
    for backoff in (pool.slot_backoffs[1], pool.system_backoff):
        assert backoff.failures == 1 and 0.08 <= backoff.remaining <= 0.1
    later = bench.snapshot(NOW + 1)
    assert later.slot_backoffs == {1: BackoffSnapshot(1, 0.0)}


def test_hostile_slots() -> None:
    """Whatever a worker writes into its slot, the snapshot is made, and its texts are printable."""
    bench = Bench(1)
    bench.look()
    dice = random.Random(1)
    for _ in range(500):
        slot = bench.board.slot(0)
        for cell in range(scoreboard.CELLS):
            slot.ints[cell] = dice.getrandbits(64)
        (worker,) = bench.snapshot().workers
        assert 0.0 <= worker.busy_for <= NOW and 0.0 <= worker.busy_time <= NOW
        assert 0 <= worker.held < 1 << 32 and (worker.peer or "").isprintable()


def test_a_real_pool(start: Start, notes: Notes) -> None:
    """Of a pool that serves, the snapshot tells which worker is busy, for whom, and which one has died."""
    program = launch(
        start,
        """
        import json
        import operator

        class Server(prefork.PreforkTCPServer):
            workers = 2
            number = 0

            def service_actions(self):
                if (HOME / f"look{self.number}").exists():
                    self.number += 1
                    pool = self._pool._master.snapshot(time.monotonic())
                    fields = operator.attrgetter("pid", "state.name", "phase.name", "requests", "busy_for", "peer")
                    workers = [fields(worker) for worker in pool.workers]
                    exits = [(exit.report.pid, exit.report.reason.name) for exit in pool.last_exits]
                    note("pool " + json.dumps([pool.size, pool.ready, pool.generation, exits, workers]))

        with Server(("127.0.0.1", 0), Handler) as server:
            server.serve_forever(0.02)
        """,
    ).ready()
    before = program.wait_ready(2)
    with ExitStack() as stack:
        client = hold(program.address, stack, "gate open")
        noted(notes, "begun")
        program.write("look0", "")
        size, ready, generation, exits, workers = json.loads(noted(notes, "pool")[0])
        assert (size, ready, generation, exits) == (2, 2, 1, [])
        assert sorted(worker[0] for worker in workers) == sorted(before)
        (busy,) = [worker for worker in workers if worker[4]]
        host, port = client.getsockname()
        assert busy[1:4] == ["READY", "SERVING", 0] and 0 < busy[4] < 30 and busy[5] == f"{host}:{port}"
        idle = next(worker[0] for worker in workers if not worker[4])
        program.kill_workers(idle)
        program.wait_ready(2, without=[idle])
        program.write("look1", "")
        assert json.loads(noted(notes, "pool", 2)[1])[3] == [[idle, "KILLED"]]
        program.write("open", "")
        client.recv(100)
    assert program.stop(signal.SIGTERM).code == 0
    program.finish()
