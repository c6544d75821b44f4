"""What a worker has in progress, as its slot of the scoreboard says it: counts, the oldest, the earliest deadline."""

import asyncio
import os
import signal
import socketserver
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import pytest

import prefork.link.scoreboard as scoreboard
import prefork.link.uplink as uplink
from prefork.errors import RequestTimeout
from prefork.link.worker_context import WorkerContext
from prefork.settings.settings import Options
from prefork.workers.asgi.application import ASGIApplication
from prefork.workers.asgi.worker import ASGIWorker
from prefork.workers.eventloop.loop_worker import LoopWorker
from prefork.workers.worker import Worker

TIMEOUT = 30.0
TOKEN = b"a token."


class Bench:
    """A worker in this process, that is in no pool, and the master's view of its slot."""

    def __init__(self, kind: type[Worker] = Worker, **values: Any) -> None:
        self.board = scoreboard.Scoreboard()
        self.uplink, write = os.pipe()
        self.server = socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        options = Options({"workers": 1, "request_timeout": TIMEOUT, **values})
        self.worker = kind(
            [self.server], WorkerContext(0, 1, options, self.board.slot(0), -1, write, TOKEN, True, "", 1)
        )
        self.worker._ready = True
        self.fds = [self.uplink, write]

    def close(self) -> None:
        self.server.server_close()
        for fd in self.fds:
            os.close(fd)

    @property
    def due_in(self) -> float | None:
        deadline, _ = self.board.deadline(0)
        return deadline - monotonic() if deadline else None

    @property
    def peer(self) -> str | None:
        return self.board.read(0, monotonic()).peer

    @property
    def idle(self) -> bool:
        return self.peer is None and self.due_in is None

    @property
    def requests(self) -> int:
        return self.board.read(0, monotonic()).requests

    def said(self) -> bytes:
        os.set_blocking(self.uplink, False)
        return os.read(self.uplink, 65536)


@pytest.fixture
def bench() -> Iterator[Bench]:
    one = Bench()
    yield one
    one.close()


def client(port: int, host: str = "10.0.0.1") -> tuple[str, int]:
    return host, port


def near(seconds: float | None, wanted: float) -> bool:
    return seconds is not None and wanted - 5 < seconds <= wanted


def test_one_request(bench: Bench) -> None:
    """In progress it is shown with its client and its deadline; after it nothing is, but one more is counted."""
    with bench.worker.serving(client(7)) as request:
        assert bench.peer == "10.0.0.1:7" and near(bench.due_in, TIMEOUT)
        assert request.thread == threading.get_ident()
    assert bench.idle and bench.requests == 1
    request.end()
    assert bench.requests == 1, "it ends once"


def test_the_oldest_is_shown(bench: Bench) -> None:
    """Of several the oldest is shown, whoever ends first."""
    first, second, third = (bench.worker.serving(client(port)).begin() for port in (1, 2, 3))
    assert bench.peer == "10.0.0.1:1"
    second.end()
    assert bench.peer == "10.0.0.1:1"
    first.end()
    assert bench.peer == "10.0.0.1:3" and near(bench.due_in, TIMEOUT)
    third.end()
    assert bench.idle and bench.requests == 3


def test_in_a_loop() -> None:
    """Where nothing has a deadline, requests of an event loop are shown and counted as others are."""
    bench = Bench(LoopWorker, request_timeout=None, max_requests=3, max_requests_jitter=0)
    first, second, third = (bench.worker.serving(client(port)).begin() for port in (1, 2, 3))
    assert bench.peer == "10.0.0.1:1" and bench.due_in is None
    bench.worker.extend_deadline(5)
    assert bench.due_in is None
    second.end()
    assert bench.peer == "10.0.0.1:1"
    first.end()
    first.end()
    assert bench.peer == "10.0.0.1:3" and bench.requests == 2
    spent = bench.board.read(0, monotonic()).busy_time
    linger(monotonic() + 0.02)
    third.end()
    assert bench.board.read(0, monotonic()).busy_time >= spent + 0.02
    assert bench.idle and bench.requests == 3 and not bench.worker._requests.open
    assert uplink.RECYCLE in bench.said()
    bench.close()


def test_in_an_asgi_application() -> None:
    """Without a deadline, a request that begins when none is in progress is shown and counted as others are."""
    bench = Bench(ASGIWorker, request_timeout=None, max_requests=3, max_requests_jitter=0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await scope["until"].wait()

    async def begin(site: ASGIApplication, port: int) -> tuple[asyncio.Task[Any], asyncio.Event]:
        until = asyncio.Event()
        scope = {"type": "http", "client": client(port), "until": until}
        task = asyncio.create_task(site.config.loaded_app(scope, None, None))
        await asyncio.sleep(0)
        return task, until

    async def end(one: tuple[asyncio.Task[Any], asyncio.Event]) -> None:
        one[1].set()
        await one[0]

    async def main() -> None:
        assert isinstance(bench.worker, ASGIWorker)
        site = ASGIApplication(app, bench.worker, {})
        first, second, third = await begin(site, 1), await begin(site, 2), await begin(site, 3)
        assert bench.peer == "10.0.0.1:1" and bench.due_in is None
        await end(second)
        assert bench.peer == "10.0.0.1:1" and bench.requests == 1
        await end(first)
        assert bench.peer == "10.0.0.1:3" and bench.requests == 2
        spent = bench.board.read(0, monotonic()).busy_time
        linger(monotonic() + 0.02)
        third[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await third[0]
        assert bench.board.read(0, monotonic()).busy_time >= spent + 0.02
        assert bench.idle and bench.requests == 3
        assert uplink.RECYCLE in bench.said()
        spent = bench.board.read(0, monotonic()).busy_time
        alone = await begin(site, 4)
        assert bench.peer == "10.0.0.1:4" and bench.requests == 3
        linger(monotonic() + 0.02)
        await end(alone)
        assert bench.board.read(0, monotonic()).busy_time >= spent + 0.02
        assert bench.idle and bench.requests == 4 and not bench.worker._requests.open
        peers: list[Any] = [None, ("10.0.0.1", None), ("10.0.0.1", -1), ("unix", 7), (), ("unix",), {}, "unix"]
        for peer in peers:
            scope = {"type": "http", "client": peer, "until": alone[1]}
            await site.config.loaded_app(scope, None, None)
        assert bench.idle and bench.requests == 12

    asyncio.run(main())
    bench.close()


def test_a_share_in_a_process_that_the_program_forks() -> None:
    """There it tells siblings nothing."""
    bench = Bench(ASGIWorker, request_timeout=None)
    worker = bench.worker
    assert isinstance(worker, ASGIWorker)
    worker.balancer.hold(3)
    cells = bench.board.slot(0).ints
    assert cells[scoreboard.HELD] == 3
    worker._requests.disown(scoreboard.Slot.detached())
    worker.balancer.hold(4)
    assert cells[scoreboard.HELD] == 3
    os.close(worker.acceptor._null)
    bench.close()


def test_clients_of_every_kind(bench: Bench) -> None:
    """A client's host is shown also after one of the same port, the same host, or no host at all."""
    hosts = []
    for peer in (
        client(1),
        client(2),
        client(2, "10.0.0.2"),
        (None, 5),
        client(5),
        "",
        "/path",
        client(9),
        ("::1", 4, 0, 0),
    ):
        with bench.worker.serving(peer):
            hosts.append(bench.peer)
    unnamed = "a client without a name"
    assert hosts == [
        "10.0.0.1:1", "10.0.0.1:2", "10.0.0.2:2", f"{unnamed}:5", "10.0.0.1:5", unnamed, "/path", "10.0.0.1:9",
        "[::1]:4",
    ]  # fmt: skip


def test_the_earliest_deadline_counts(bench: Bench) -> None:
    """Of several deadlines the earliest is published, through extensions, odd timeouts, and ends in any order."""
    plain = bench.worker.serving(client(1)).begin()
    bench.worker.serving(client(2), timeout=0).begin()
    short = bench.worker.serving(client(3), timeout=10).begin()
    assert near(bench.due_in, 10)
    short.extend_deadline(100)
    assert near(bench.due_in, TIMEOUT)
    plain.extend_deadline(200)
    assert near(bench.due_in, 100)
    another = bench.worker.serving(client(4)).begin()
    assert near(bench.due_in, TIMEOUT)
    another.end()
    assert near(bench.due_in, 100)
    short.end()
    assert near(bench.due_in, 200)
    short.extend_deadline(1)
    assert near(bench.due_in, 200), "what is over has no deadline"
    plain.end()
    assert bench.due_in is None and bench.peer == "10.0.0.1:2"
    assert not bench.worker._requests.default_deadlines and not bench.worker._requests.custom_deadlines


def test_extending_is_for_the_request_in_hand(bench: Bench) -> None:
    """extend_deadline() is for what the calling thread has in progress, and for nothing that is over."""
    with bench.worker.serving(client(1)) as outer:
        thread = threading.Thread(target=bench.worker.extend_deadline, args=(500,))
        thread.start()
        thread.join()
        assert near(outer.deadline - monotonic(), TIMEOUT)
        bench.worker.extend_deadline(500)
        assert near(outer.deadline - monotonic(), 500)
    with bench.worker.serving(client(2), timeout=0):
        bench.worker.extend_deadline(500)
        assert bench.due_in is None
    bench.worker.extend_deadline(500)
    assert bench.due_in is None


def test_an_interrupt_reaches_the_main_thread_only(bench: Bench) -> None:
    """RequestTimeout is raised where the main thread works on the late request; not for a request that is not late,
    not as it begins or ends, and not for a thread's."""
    request = bench.worker.serving(client(1), timeout=0.0001)
    with pytest.raises(RequestTimeout), request:
        while True:
            bench.worker._on_interrupt(signal.SIGXCPU, None)
    assert bench.idle and bench.requests == 1
    with bench.worker.serving(client(1)):
        bench.worker._on_interrupt(signal.SIGXCPU, None)
    with bench.worker.serving(client(1), timeout=0.0001) as request:
        while monotonic() < request.deadline:
            pass
        request.thread = 0
        bench.worker._on_interrupt(signal.SIGXCPU, None)
    assert not bench.worker.draining


def linger(until: float) -> None:
    """In a function of its own: Python 3.13 has no handler for an exception at the end of a loop's turn in a `with`."""
    while monotonic() < until:
        pass


def test_a_signal_at_the_last_moment() -> None:
    """However often a signal comes while requests end at their deadlines, each is ended, once."""
    one = Bench(request_timeout=0.01)
    former = signal.signal(signal.SIGALRM, one.worker._on_interrupt)
    raised = number = 0
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.00005, 0.00005)
        end = monotonic() + 1.5
        while monotonic() < end:
            number += 1
            try:
                with one.worker.serving(client(1), timeout=0.0001) as request:
                    linger(request.deadline - 0.000002)
            except RequestTimeout:
                raised += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        one.close()
    assert 0 < raised < number
    assert not one.worker._requests.open and one.requests == number


class Loop:
    """A loop that keeps the accounts of one request at a time by itself, in this thread."""

    def __init__(self, bench: Bench) -> None:
        self.ints, self.floats = bench.worker._requests.enter_fast_path()
        self.board = bench.worker._board

    def begin(self, seconds: float = 0.0, start: float = 1.0) -> None:
        self.floats[scoreboard.BUSY_SINCE] = start
        self.floats[scoreboard.DEADLINE] = monotonic() + seconds if seconds else 0.0
        self.board.set_peer(client(1))

    def count(self, requests: int, spent: float = 0.0) -> None:
        self.ints[scoreboard.REQUESTS], self.floats[scoreboard.BUSY_TIME] = requests, spent


@pytest.fixture
def loop(bench: Bench) -> Loop:
    return Loop(bench)


def in_another_thread(act: Callable[[], object]) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


def test_within_the_request_of_a_loop(bench: Bench, loop: Loop) -> None:
    """A loop's own request and count are with all others once there are others: it is shown with its own client
    and deadline until it ends, counted once, and extended by its thread. The loop cannot change it any more."""
    requests = bench.worker._requests
    loop.count(7, 3.5)
    loop.begin(20)
    bench.worker.extend_deadline(25)
    assert near(bench.due_in, 25)
    with bench.worker.serving(client(2)):
        assert bench.peer == "10.0.0.1:1" and near(bench.due_in, 25)
        bench.worker.extend_deadline(10)
        assert near(bench.due_in, 10)
    assert bench.peer == "10.0.0.1:1" and near(bench.due_in, 25) and bench.requests == 8
    bench.worker.extend_deadline(50)
    assert near(bench.due_in, 50)
    later = bench.worker.serving(client(3)).begin()
    with pytest.raises(ValueError, match="released"):
        loop.count(8)
    with pytest.raises(ValueError, match="released"):
        loop.begin()
    requests.fast_path_request.end()
    assert bench.peer == "10.0.0.1:3" and near(bench.due_in, TIMEOUT) and bench.requests == 9
    later.end()
    requests.fast_path_request.end()
    assert bench.idle and bench.requests == 10
    assert requests.spent >= 3.5 and not (requests.open or requests.default_deadlines or requests.custom_deadlines)


def test_beside_the_request_of_a_loop(bench: Bench, loop: Loop) -> None:
    """When another thread begins, a loop's own request stays that of the loop's thread, in which it is interrupted and
    extended."""
    loop.begin(0.0001, start=monotonic())
    in_another_thread(lambda: bench.worker.serving("job", timeout=0).begin())
    one, _ = bench.worker._requests.open
    while monotonic() < one.deadline:
        pass
    with pytest.raises(RequestTimeout):
        bench.worker._on_interrupt(signal.SIGXCPU, None)
    bench.worker.extend_deadline(40)
    assert near(bench.due_in, 40)
    one.end()
    assert bench.requests == 1 and bench.due_in is None and bench.peer == "job"


@pytest.mark.parametrize("timeout", [0, 20])
def test_within_what_has_no_deadline(bench: Bench, loop: Loop, timeout: float) -> None:
    """A request of a loop that has no deadline has none afterwards, and others have theirs beside it."""
    loop.begin()
    with bench.worker.serving(client(2), timeout=timeout):
        assert near(bench.due_in, timeout) if timeout else bench.due_in is None
        bench.worker._requests.fast_path_request.extend_deadline(5)
    bench.worker.extend_deadline(5)
    assert bench.due_in is None and bench.peer == "10.0.0.1:1"
    bench.worker._requests.fast_path_request.end()
    assert bench.idle and bench.requests == 2


def test_while_a_loop_is_idle(bench: Bench, loop: Loop) -> None:
    """Where a loop has nothing in progress its counts are taken over, and no request is ended by the end of nothing."""
    loop.count(4, 1.5)
    bench.worker.extend_deadline(5)
    assert bench.idle
    with bench.worker.serving(client(2)):
        assert bench.peer == "10.0.0.1:2"
        bench.worker._requests.fast_path_request.end()
        assert bench.peer == "10.0.0.1:2" and near(bench.due_in, TIMEOUT)
    assert bench.idle and bench.requests == 5 and not bench.worker._requests.open


def test_disowning_a_loop(bench: Bench, loop: Loop) -> None:
    """In a forked child neither a loop nor what it ends changes the slot."""
    loop.begin(20)
    worker = bench.worker
    worker._requests.disown(scoreboard.Slot.detached())
    with pytest.raises(ValueError, match="released"):
        loop.count(1)
    worker._requests.fast_path_request.end()
    with worker.serving(client(2)):
        pass
    assert worker._requests.count == 2
    assert bench.peer == "10.0.0.1:1" and near(bench.due_in, 20) and bench.requests == 0


def test_interrupts_of_what_is_around(bench: Bench) -> None:
    """However the signal comes, a late request is interrupted also where it comes as one within it begins or ends; each
    is ended, once."""
    worker, raised, number = bench.worker, 0, 0
    former = signal.signal(signal.SIGALRM, worker._on_interrupt)
    end = monotonic() + 1.5
    try:
        while monotonic() < end:
            try:
                with worker.serving(client(1)) as outer:
                    number += 1
                    worker._requests.move(outer, monotonic() + 0.0005)
                    # Once, and at the deadline or a moment later: in the middle of something that is within.
                    signal.setitimer(signal.ITIMER_REAL, 0.0005 + number % 50 * 0.000001)
                    for _ in range(10000):
                        with worker.serving(client(2), timeout=0):
                            number += 1
            except RequestTimeout:
                raised += 1
            else:
                pytest.fail(f"the {number}th request was not interrupted")
            assert not worker._requests.open and not worker._requests.custom_deadlines
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert raised > 100
    # One within may have begun when it is not there to be counted here.
    assert number <= bench.requests <= number + raised


def test_late_in_threads(bench: Bench) -> None:
    """Late requests of threads have the worker leave, once; those that are not late have their deadlines still; it
    waits for all but the late."""
    left = threading.Event()
    bench.worker.drain = left.set  # type: ignore[method-assign]
    late = bench.worker.serving(client(1), timeout=0.001).begin()
    fine = bench.worker.serving(client(2)).begin()
    while monotonic() < late.deadline:
        pass
    bench.worker._on_interrupt(signal.SIGXCPU, None)
    assert late.late and not fine.late and bench.worker.draining and left.is_set()
    text = bench.said()
    assert uplink.STUCK in text and b"test_late_in_threads" in text
    assert near(bench.due_in, TIMEOUT)
    finished = threading.Thread(target=bench.worker.finish)
    finished.start()
    late.extend_deadline(1000)
    assert near(bench.due_in, TIMEOUT), "nobody waits for it any more"
    assert finished.is_alive()
    fine.end()
    finished.join(5)
    assert not finished.is_alive() and bench.due_in is None
    late.end()
    assert bench.requests == 2


def test_threads_count_exactly(bench: Bench) -> None:
    """Requests of many threads at once are all counted, and none is left in progress."""

    def serve() -> None:
        for _ in range(500):
            with bench.worker.serving(client(1)):
                pass

    threads = [threading.Thread(target=serve) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bench.requests == 4000 and not bench.worker._requests.open
    assert bench.idle
