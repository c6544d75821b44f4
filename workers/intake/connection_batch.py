"""How many connections an event loop takes in one turn, and whether connections end so soon that there is nothing to
share out. Pure: the caller tells the time, and how many connections it holds.

Connections that a loop takes together are made, read and served together. The same code for several in a row costs a
tenth less than in between other code.
"""

SIZE = 8  # connections of one batch; with 1 a connection under load costs a third more
RECENT = 0.01  # seconds; what a batch before that has shown says nothing about now


class Batch:
    """The connections that one turn of the loop takes from the listeners, and what became of the batch before.

    To be read: `ends_soon`, whether connections end so soon that each of them may be taken without a question; `held`,
    how many the worker held at its begin: with so few again, as many have ended as it took.
    """

    def __init__(self) -> None:
        self.ends_soon = False
        self.taken = 0
        self.held = 0
        self._began_at, self._taken_before = 0.0, 0  # of the last batch; `taken` of the batch before it

    def begin(self, now: float, held: int) -> None:
        """A new batch, of a worker that holds `held` connections.

        Connections end soon if at least as many have ended since the last batch, a moment ago, as the batch before it
        took; and one at least.
        """
        ended = self.held + self.taken - held
        self.ends_soon = now - self._began_at < RECENT and ended >= max(1, self._taken_before)
        self._began_at, self.held, self.taken, self._taken_before = now, held, 0, self.taken
