"""The scoreboard: what a worker writes is what the master reads, and hostile contents are clamped."""

import math
import multiprocessing
import random
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prefork.link.scoreboard as scoreboard
from prefork.link.scoreboard import Scoreboard
from prefork.rules.states import Phase
from prefork.settings.settings import MAX_WORKERS

NOW = 1000.0


def test_an_idle_slot() -> None:
    """A slot that was never written is a worker that boots and has nothing in progress."""
    entry = Scoreboard().read(0, NOW)
    assert (entry.phase, entry.busy_for, entry.requests, entry.busy_time, entry.peer) == (Phase.BOOTING, 0, 0, 0, None)


def test_what_is_written_is_read() -> None:
    """Phase, peer, counts and times of one slot are read back, and the neighbours are untouched."""
    board = Scoreboard()
    slot = board.slot(5)
    slot.set_phase(Phase.SERVING)
    slot.set_peer(("127.0.0.1", 4242))
    slot.floats[scoreboard.BUSY_SINCE] = NOW - 2.5
    slot.floats[scoreboard.DEADLINE] = NOW + 1
    slot.ints[scoreboard.REQUESTS] = 17
    slot.floats[scoreboard.BUSY_TIME] = 3.5
    entry = board.read(5, NOW)
    assert (entry.phase, entry.busy_for, entry.requests, entry.busy_time) == (Phase.SERVING, 2.5, 17, 3.5)
    assert entry.peer == "127.0.0.1:4242"
    assert board.phase(5) is Phase.SERVING
    assert board.deadline(5) == (NOW + 1, False)
    slot.floats[scoreboard.INTERRUPTED] = NOW + 1
    assert board.deadline(5) == (NOW + 1, True)
    for other in (4, 6):
        assert board.read(other, NOW).requests == 0
    board.clear(5)
    assert board.read(5, NOW) == board.read(4, NOW)


def test_written_by_a_child() -> None:
    """The memory is shared with a forked child."""
    board = Scoreboard()
    slot = board.slot(1)

    def write() -> None:
        slot.ints[scoreboard.REQUESTS] = 99

    child = multiprocessing.get_context("fork").Process(target=write)
    child.start()
    child.join(10)
    child.close()
    assert board.read(1, NOW).requests == 99


def test_the_drain_is_told_to_everybody() -> None:
    """The header says to each slot whether the whole pool stops."""
    board = Scoreboard()
    slots = [board.slot(number) for number in (0, 1, scoreboard.SLOTS - 1)]
    assert [slot.pool_drains for slot in slots] == [False] * 3
    board.drain(True)
    assert [slot.pool_drains for slot in slots] == [True] * 3
    board.drain(False)
    assert [slot.pool_drains for slot in slots] == [False] * 3


def test_room_for_every_worker() -> None:
    """There is a slot for a whole pool, as many that leave, and the greatest surge."""
    assert scoreboard.SLOTS >= 3 * MAX_WORKERS
    Scoreboard().slot(scoreboard.SLOTS - 1).set_phase(Phase.LEAVING)


@pytest.mark.parametrize(
    "peer",
    [
        None, "", b"", "/tmp/" + "x" * 300, b"/tmp/\xff\x1b[31m\n", ("::1", 80, 0, 0), ("x" * 500, 65535), ("a", -1),
        ("a", 2**40), ("a", "b"), (), (None, None), 7, object(), ("caf\u00e9\0hidden", 1), "\udcff\u202e\u0000",
    ],
    ids=lambda peer: "object" if type(peer) is object else str(peer),
)  # fmt: skip
def test_any_peer(peer: object) -> None:
    """Whatever a client calls itself, its name on the scoreboard is short and printable."""
    board = Scoreboard()
    slot = board.slot(3)
    slot.set_peer(peer)
    _, port = scoreboard.host_and_port(peer)
    slot.ints[scoreboard.PEER_PORT] = port
    slot.floats[scoreboard.BUSY_SINCE] = 1.0
    entry = board.read(3, NOW)
    assert entry.peer and entry.peer.isprintable() and len(entry.peer) <= scoreboard.PEER_BYTES + 6
    assert entry.busy_for == NOW - 1.0
    assert board.read(2, NOW) == board.read(4, NOW) == Scoreboard().read(0, NOW)


def test_a_shorter_name_hides_the_longer() -> None:
    """Nothing of a former client's name is left behind the next one's."""
    board = Scoreboard()
    slot = board.slot(0)
    slot.set_peer("a-very-long-name")
    slot.set_peer("ab")
    slot.floats[scoreboard.BUSY_SINCE] = 1.0
    assert board.read(0, NOW).peer == "ab"


def check_clamped(board: Scoreboard) -> None:
    entry = board.read(7, NOW)
    assert isinstance(entry.phase, Phase)
    assert 0.0 <= entry.busy_for <= NOW and math.isfinite(entry.busy_for)
    assert 0.0 <= entry.busy_time <= NOW and math.isfinite(entry.busy_time)
    assert 0 <= entry.requests < 1 << 48
    assert entry.peer is None or (entry.peer.isprintable() and len(entry.peer) <= scoreboard.PEER_BYTES + 6)
    deadline, interrupted = board.deadline(7)
    assert (deadline is None or deadline > 0.0) and isinstance(interrupted, bool)
    assert isinstance(board.phase(7), Phase)


@given(st.binary(min_size=scoreboard.SIZE, max_size=scoreboard.SIZE))
def test_any_bytes(data: bytes) -> None:
    """Whatever bytes a worker leaves in its slot, the master reads numbers in their range and a printable name."""
    board = Scoreboard()
    cells = board.slot(7).ints
    for index, value in enumerate(struct.unpack(f"{scoreboard.CELLS}Q", data)):
        cells[index] = value
    check_clamped(board)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -1.0, -0.0, 5e-324, sys.float_info.max, NOW + 1], ids=str
)
def test_any_number(value: float) -> None:
    """NaN, infinities, the future and negative times are clamped."""
    board = Scoreboard()
    slot = board.slot(7)
    for cell in (scoreboard.BUSY_SINCE, scoreboard.DEADLINE, scoreboard.BUSY_TIME, scoreboard.INTERRUPTED):
        slot.floats[cell] = value
    for cell in (scoreboard.PHASE, scoreboard.REQUESTS, scoreboard.PEER_PORT):
        slot.ints[cell] = 2**64 - 1
    check_clamped(board)


def test_cells_are_not_torn() -> None:
    """A cell that a child writes all the time is always one of the values it wrote."""
    board = Scoreboard()
    slot = board.slot(0)
    values = [struct.unpack("Q", bytes([byte]) * 8)[0] >> 16 for byte in (0x11, 0xEE)]

    def write() -> None:
        while True:
            slot.ints[scoreboard.REQUESTS] = values[0]
            slot.ints[scoreboard.REQUESTS] = values[1]

    child = multiprocessing.get_context("fork").Process(target=write, daemon=True)
    child.start()
    try:
        seen = {board.read(0, NOW).requests for _ in range(50_000)}
    finally:
        child.kill()
        child.join(10)
        child.close()
    assert seen <= {0, *values}


def test_random_slots_do_not_overlap() -> None:
    """Each slot has its own cells, from the first to the last."""
    board = Scoreboard()
    numbers = random.Random(1).sample(range(scoreboard.SLOTS), 200)
    for number in numbers:
        board.slot(number).ints[scoreboard.REQUESTS] = number + 1
        board.slot(number).set_peer("x" * 200)
    for number in numbers:
        assert board.read(number, NOW).requests == number + 1
