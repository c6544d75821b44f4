"""The scoreboard: anonymous shared memory with one slot per worker, written by that worker alone.

A slot is 16 cells of 8 bytes. Stores of one cell are not torn on any 64-bit machine; cells are not consistent with each
other, and need not be. The master treats all of it as hostile input: it takes numbers and a printable string from a
slot, never an index or a pid, and clamps what it takes.

A fork inherits the mapping itself. It has no file, so nothing is left behind and nothing wakes a disk.

Stores go through a `memoryview` cast to the cell's type: 30-60 ns, where `struct.pack_into` costs three times that.
"""

import math
import mmap
from dataclasses import dataclass
from typing import Any

import prefork.kernel.host_port as host_port
from prefork.rules.states import Phase
from prefork.settings.settings import MAX_WORKERS

CELLS = 16
SIZE = CELLS * 8
SLOTS = 3 * MAX_WORKERS  # for a whole pool, as many workers that leave, and the greatest surge

# Cells of a slot.
PHASE = 0
BUSY_SINCE = 1  # seconds, monotonic; 0.0 is idle
DEADLINE = 2  # seconds, monotonic; 0.0 is none
REQUESTS = 3
BUSY_TIME = 4  # seconds
INTERRUPTED = 5  # the deadline whose request was last interrupted
PEER_PORT = 6  # 0: PEER is the whole name
THREADS = 7  # how many of the worker may want the interpreter at once; 0 counts as 1
HELD = 8  # connections that it keeps, where its class keeps any
PEER = 9  # text to the end of the slot, ended by NUL
PEER_BYTES = SIZE - PEER * 8

MOST_THREADS = 100
_SERVING = int(Phase.SERVING)

# Cells of the header, which the master alone writes.
POOL_DRAINS = 0
SLOTS_USED = 1  # beyond these no slot has ever had a worker


class Slot:
    """A worker's own view of its slot: `ints`, `floats` and `peer` are what the hot path stores into."""

    def __init__(self, view: memoryview, header: memoryview, all: memoryview) -> None:
        self.ints = view.cast("Q")
        self.floats = view.cast("d")
        self.peer = view[PEER * 8 :]
        self._header = header.cast("Q")
        self._all = all.cast("Q")
        self.host: object = ""  # the host whose text is in the slot already

    @classmethod
    def detached(cls) -> "Slot":
        """A slot that nobody reads."""
        return cls(memoryview(bytearray(SIZE)), memoryview(bytearray(SIZE)), memoryview(b""))

    def set_phase(self, phase: Phase) -> None:
        self.ints[PHASE] = phase

    def set_peer(self, peer: object) -> None:
        """Store a client's address for people to read.

        The hot paths store the port alone where the host is `host` already.
        """
        host, port = host_and_port(peer)
        self.ints[PEER_PORT] = port
        if host != self.host:
            name = str(host or "")
            text = (host_port.bracketed(name) if port else name).encode("ascii", "replace")[: PEER_BYTES - 1] + b"\0"
            self.peer[: len(text)] = text
            self.host = host if type(host) is str else self  # no host is equal to a slot

    def has_share(self, held: int, queued: int, single: bool) -> bool:
        """Whether a worker that holds `held` connections has at least its share.

        Shared are the connections in the queue, and those of all workers that could take another now, the caller
        among them.

        Parameters
        ----------
        single
            A worker serves one request at a time, and takes no connection meanwhile.
        """
        slots = self._header[SLOTS_USED]
        if held * (slots - 1) < queued:
            return False  # however many the others hold; usual in a long queue
        cells = self._all[: slots * CELLS]
        columns = (cells[column::CELLS].tolist() for column in (PHASE, BUSY_SINCE, HELD))
        able = [number for phase, busy, number in zip(*columns, strict=True) if phase == _SERVING and not busy * single]
        return len(able) > 1 and held * len(able) >= sum(able) + queued

    @property
    def pool_drains(self) -> bool:
        """Whether the whole pool stops: then the queue of the listener is to be emptied before leaving."""
        return bool(self._header[POOL_DRAINS])


def host_and_port(peer: object) -> tuple[Any, int]:
    """Host and port of a client's address; the port is 0 where there is no valid port."""
    host, port = (peer[0], peer[1]) if type(peer) is tuple and len(peer) > 1 else (peer, 0)
    return host, port if type(port) is int and 0 <= port <= 0xFFFF else 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A slot as the master reads it, clamped."""

    phase: Phase
    busy_for: float
    requests: int
    busy_time: float
    peer: str | None
    held: int


class Scoreboard:
    """The master's view: hands out slots, reads them, clears them for the next owner."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, (SLOTS + 1) * SIZE)
        self._view = memoryview(self._map)

    def _part(self, slot: int) -> memoryview:
        return self._view[(slot + 1) * SIZE : (slot + 2) * SIZE]

    def clear(self, slot: int) -> None:
        """Make a slot that of a worker which has not written anything yet."""
        self._part(slot)[:] = bytes(SIZE)

    def slot(self, slot: int) -> Slot:
        header = self._view[:SIZE].cast("Q")
        header[SLOTS_USED] = max(header[SLOTS_USED], slot + 1)
        return Slot(self._part(slot), self._view[:SIZE], self._view[SIZE:])

    def drain(self, on: bool) -> None:
        """Tell every worker, before its signal arrives, whether the whole pool stops."""
        self._view[:SIZE].cast("Q")[POOL_DRAINS] = int(on)

    def phase(self, slot: int) -> Phase:
        value = int(self._part(slot).cast("Q")[PHASE])
        return Phase(value) if value in Phase._value2member_map_ else Phase.SERVING

    def deadline(self, slot: int) -> tuple[float | None, bool]:
        """The deadline of the request in progress (None: it has none), and whether that request was interrupted."""
        floats = self._part(slot).cast("d")
        deadline = floats[DEADLINE]
        return _clamp(deadline, math.inf) or None, bool(floats[INTERRUPTED] == deadline)

    def threads(self, slot: int) -> int:
        """How many threads of a worker may want the interpreter at once."""
        return min(max(1, int(self._part(slot).cast("Q")[THREADS])), MOST_THREADS)

    def read(self, slot: int, now: float) -> Entry:
        part = self._part(slot)
        ints, floats = part.cast("Q"), part.cast("d")
        since = _clamp(floats[BUSY_SINCE], now)
        peer = None
        if since:
            name = bytes(part[PEER * 8 :]).split(b"\0", 1)[0].decode("ascii", "replace")
            peer = "".join(c if c.isprintable() else "?" for c in name) or "a client without a name"
            if port := int(ints[PEER_PORT]) & 0xFFFF:
                peer = f"{peer}:{port}"
        return Entry(
            self.phase(slot),
            now - since if since else 0.0,
            int(ints[REQUESTS]) & 0xFFFF_FFFF_FFFF,
            _clamp(floats[BUSY_TIME], now),
            peer,
            int(ints[HELD]) & 0xFFFF_FFFF,
        )


def _clamp(value: float, high: float) -> float:
    return min(value, high) if value > 0.0 else 0.0  # NaN is not greater than anything
