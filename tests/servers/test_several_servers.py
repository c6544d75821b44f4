"""Several servers on one pool, and several pools in one process."""

import os
import signal
from contextlib import ExitStack

import pytest

from support import ask, dial, patterns, pids_serving, until
from support.contract import KINDS
from support.processes import alive
from support.scripts import Notes, Start, hold, launch, noted, rest

pytestmark = pytest.mark.timeout(60)


def test_several_listeners(start: Start, notes: Notes) -> None:
    """serve() with TCP, Unix and UDP: one pool whose workers answer at all of them, through reload, retirement and
    stop."""
    program = launch(
        start,
        """
        class First(prefork.PreforkTCPServer):
            workers = 2

        with (
            First(("127.0.0.1", 0), Handler) as one,
            prefork.PreforkUnixStreamServer(str(RUN / "s"), Handler) as two,
            prefork.PreforkUDPServer(("127.0.0.1", 0), Datagrams) as three,
        ):
            for _ in range(2):
                prefork.serve(one, two, three)
        """,
    ).ready()
    workers = program.wait_ready(2)
    assert [address.kind for address in program.addresses] == ["tcp", "unix", "udp"]
    for address in program.addresses:
        assert ask(address).pid in workers
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOADED)
    again = program.wait_ready(2, without=workers)
    program.send(signal.SIGTERM, again[0])
    program.wait_ready(2, without=again[:1])
    for address in program.addresses:
        assert ask(address).pid not in (*workers, again[0])
    with ExitStack() as stack:
        held = [hold(address, stack, "gate go") for address in program.addresses[:2]]
        noted(notes, "begun", 2)
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPING)
        program.write("go", "")
        for sock in held:
            assert rest(sock).endswith(b":held:done\n")
    program.wait_for(patterns.READY, number=2)
    for address in program.addresses[3:]:
        ask(address)
    assert list(map(str, program.addresses[:3])) == list(map(str, program.addresses[3:]))
    program.finish()


def test_connections_at_once_wake_as_many_workers(start: Start, notes: Notes) -> None:
    """Of two that arrive together at two listeners, none waits for the request of the other while a worker is idle."""
    program = launch(
        start,
        """
        class First(prefork.PreforkTCPServer):
            workers = 2

        with (
            First(("127.0.0.1", 0), Handler) as one,
            prefork.PreforkUnixStreamServer(str(RUN / "s"), Handler) as two,
        ):
            prefork.serve(one, two)
        """,
    ).ready()
    program.wait_ready(2)
    everywhere = os.sched_getaffinity(0)
    one = {min(everywhere)}  # on one core both have arrived before a worker runs
    try:
        for pid in (0, *program.children()):
            os.sched_setaffinity(pid, one)
        for turn in range(20):
            with ExitStack() as stack:
                clients = [stack.enter_context(dial(address, 20)) for address in program.addresses]
                for client in clients:
                    client.sendall(f"x gate go-{turn}\n".encode())
                noted(notes, "begun", 2 * (turn + 1))
                program.write(f"go-{turn}", "")
                assert all(rest(client).endswith(b":x:done\n") for client in clients)
    finally:
        os.sched_setaffinity(0, everywhere)
    program.stop()
    program.finish()


def test_a_worker_of_several_listeners_that_leaves_takes_no_queue_with_it(start: Start, notes: Notes) -> None:
    """A retired worker takes one more from each listener at most, for which it may have been woken alone: a long queue
    would keep it past graceful_timeout."""
    program = launch(
        start,
        """
        class First(prefork.PreforkTCPServer):
            workers = 1

        with First(("127.0.0.1", 0), Handler) as one, First(("127.0.0.1", 0), Handler) as two:
            prefork.serve(one, two)
        """,
    ).ready()
    (old,) = program.wait_ready(1)
    with ExitStack() as stack:
        first = hold(program.address, stack, "gate a")
        noted(notes, "begun", 1)
        second = hold(program.address, stack, "gate b")
        queue = [hold(program.address, stack, "") for _ in range(10)]
        program.send(signal.SIGTERM, old)
        noted(notes, "begun", 2)  # by its replacement
        program.write("a", "")
        until(lambda: not alive(old), 5.0, "the old worker left")
        program.write("b", "")
        pids = [int(rest(client).split(b":")[0]) for client in (first, second, *queue)]
    assert pids[0] == old != pids[1]
    assert pids[2:].count(old) <= 1
    program.stop()
    program.finish()


def test_two_pools_in_one_process(start: Start, notes: Notes) -> None:
    """Two servers in two threads are two pools: each has its own workers, and one stops without the other."""
    program = launch(
        start,
        """
        class Server(prefork.PreforkTCPServer):
            workers = 2

        threads = []
        for name in ("one", "two"):
            server = Server(("127.0.0.1", 0), Handler)
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            when(f"stop-{name}", server.shutdown)
            when(f"close-{name}", server.server_close)
            when("look", lambda server=server: note(f"pool {sorted(server.active_children)}"))
            threads.append(thread)
        for thread in threads:
            thread.join()
        pass_gate("end")
        """,
    )
    program.wait_for(patterns.READY, number=2)
    workers = program.wait_ready(4)
    first, second = program.addresses
    pools = [pids_serving(address, 2) for address in (first, second)]
    assert not pools[0] & pools[1] and pools[0] | pools[1] == set(workers)
    program.write("look", "")
    assert sorted(noted(notes, "pool", 2)) == sorted(str(sorted(pool)) for pool in pools)
    program.write("stop-one", "")
    program.wait_for(patterns.STOPPED)
    left = set(program.wait_ready(2))
    assert left in pools
    stopped, alive = (first, second) if left == pools[1] else (second, first)
    for _ in range(4):
        assert ask(alive).pid in left
    with pytest.raises((ConnectionRefusedError, TimeoutError)):
        ask(stopped, timeout=0.3)
    program.kill_workers(*left)
    pids_serving(alive, 2, without=left)
    program.write("stop-two", "")
    program.wait_for(patterns.STOPPED, number=2)
    program.write("close-one", "")
    program.write("close-two", "")
    noted(notes, "done", 5)
    program.write("end", "")
    assert program.wait_exit().code == 0
    program.finish()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_shutdown_in_a_handler(start: Start, kind: str) -> None:
    """server.shutdown() called by a handler stops the whole pool, and that handler's answer still arrives."""
    base, _, address, _ = KINDS[kind]
    program = launch(
        start,
        f"""
        class Stops(Handler):
            def answer(self, order):
                if order == "stop":
                    self.server.shutdown()
                return "done"

        with prefork.{base}({address}, Stops) as server:
            server.serve_forever()
        """,
    ).ready()
    ask(program.address)
    assert ask(program.address, "stop").result == "done"
    assert program.wait_exit().code == 0
    program.finish()
