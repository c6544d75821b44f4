"""The table of waiting connections, over pairs of sockets and an epoll of its own."""

import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from prefork.workers.intake.waiting import BODY, HEAD, IDLE, LINGER, WaitingConnections, WaitPhase

PATIENCE = {IDLE: 5.0, HEAD: 10.0, BODY: 30.0, LINGER: 2.0}


@dataclass(eq=False)
class Waiting:
    """A connection, and its client's end."""

    sock: socket.socket
    client: socket.socket
    phase: WaitPhase = IDLE
    deadline: float = 0.0
    parked: bool = False
    in_service: bool = False
    fd: int = field(init=False)

    def __post_init__(self) -> None:
        self.fd = self.sock.fileno()


class Bench:
    """A table of at most three connections, what it told of their number, and an epoll."""

    def __init__(self, stack: ExitStack, shared: bool) -> None:
        self.stack, self.told = stack, list[int]()
        self.epoll = stack.enter_context(select.epoll())
        self.table: WaitingConnections[Waiting] = WaitingConnections(3, dict(PATIENCE), shared)
        self.table.open(self.epoll, self.told.append)

    def connect(self) -> Waiting:
        """A connection that is in no table."""
        sock, client = socket.socketpair()
        return Waiting(self.stack.enter_context(sock), self.stack.enter_context(client))

    def dial(self, phase: WaitPhase = IDLE) -> Waiting:
        """A connection that waits."""
        connection = self.connect()
        self.table.park(connection, phase)
        return connection

    def ready(self) -> list[int]:
        """The descriptors that have an event."""
        return [fd for fd, _ in self.epoll.poll(0)]


@pytest.fixture(params=[False, True], ids=["alone", "shared"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Without and with threads."""
    with ExitStack() as stack:
        yield Bench(stack, request.param)


def test_the_deadline_follows_from_the_phase(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection in a new phase has the time of that phase, and keeps its deadline where it waits as before."""
    monkeypatch.setattr("prefork.workers.intake.waiting.monotonic", lambda: 100.0)
    for phase, seconds in PATIENCE.items():
        connection = bench.dial(phase)
        bench.table.park(connection)
        assert (connection.phase, connection.deadline) == (phase, 100.0 + seconds)


def test_a_parked_connection_is_heard(bench: Bench) -> None:
    """What a client sends is an event until the connection is removed, and then the table tells its new size."""
    first, second = bench.dial(), bench.dial()
    first.client.send(b"x")
    assert bench.ready() == [first.fd]
    bench.table.remove(first)
    bench.table.remove(first)
    assert (bench.ready(), list(bench.table.by_fd.values()), bench.told) == ([], [second], [1])


def test_room(bench: Bench) -> None:
    """There is room below the limit."""
    connections = [bench.dial() for _ in range(3)]
    assert not bench.table.has_room
    bench.table.remove(connections[1])
    assert bench.table.has_room
    assert bench.table.first() is connections[0]


def test_late_connections(bench: Bench) -> None:
    """Late is a connection whose deadline is over, and which no thread serves."""
    early, late, served = (bench.dial() for _ in range(3))
    early.deadline, late.deadline, served.deadline, served.in_service = 7.5, 7.0, 6.0, True
    assert bench.table.late(7.0) == [late]
    assert bench.table.waiting() == [early, late]


def test_the_longest_idle(bench: Bench) -> None:
    """Of the idle connections a sixteenth, and at least one, are those that idle longest."""
    assert bench.table.longest_idle() == []
    connections = [bench.dial() for _ in range(40)]
    for number, connection in enumerate(connections):
        connection.deadline = float(-number)
    connections[39].phase = HEAD
    assert bench.table.longest_idle() == [connections[38], connections[37], connections[36]]


def test_shorter_times(bench: Bench) -> None:
    """Shorter times are for the connections that are in these phases, and for those that come."""
    idle, head = bench.dial(), bench.dial(HEAD)
    before = idle.deadline, head.deadline
    bench.table.shorten({IDLE: 0.5}, lambda connection: -4.5)
    assert (idle.deadline, head.deadline) == (before[0] - 4.5, before[1])
    assert bench.table.patience == {**PATIENCE, IDLE: 0.5}


def test_an_epoll_without_room(bench: Bench) -> None:
    """Where the epoll takes no more the error is the caller's, who can remove the connection."""
    connection = bench.connect()
    bench.epoll.register(connection.fd)
    with pytest.raises(OSError):
        bench.table.park(connection, IDLE)
    bench.table.remove(connection)
    assert not bench.table.by_fd


def test_a_connection_in_service_is_muted() -> None:
    """An event of a connection that a thread serves is reported once, and again when the thread has given it back."""
    with ExitStack() as stack:
        bench = Bench(stack, shared=True)
        connection = bench.dial()
        connection.in_service = True
        connection.client.send(b"x")
        assert bench.ready() == [connection.fd]
        bench.table.mute(connection)
        assert (bench.ready(), connection.parked) == ([], False)
        bench.table.park(connection, IDLE)
        assert (bench.ready(), connection.in_service) == ([connection.fd], False)
        bench.table.mute(connection)  # it was given back meanwhile
        assert bench.ready() == [connection.fd]
