"""The two pipes of a worker, lifeline and uplink, as the master makes them before a fork."""

import os
from dataclasses import dataclass

import prefork.kernel.private_fds as private_fds


@dataclass(frozen=True, slots=True)
class WorkerPipes:
    """Four descriptors. None of them is inherited by an exec, and those of the master by no fork either."""

    lifeline_read: int
    lifeline_write: int
    uplink_read: int
    uplink_write: int

    @classmethod
    def open(cls) -> "WorkerPipes":
        """Raises OSError (EMFILE, ENFILE), and leaves nothing open then."""
        fds: list[int] = []
        try:
            with private_fds.fork_lock():
                for masters_end in (1, 0):
                    fds += (pipe := os.pipe())
                    private_fds.add([pipe[masters_end]])
            for fd in fds[2:]:
                os.set_blocking(fd, False)
        except BaseException:
            private_fds.close(fds)
            raise
        return cls(*fds)

    def of_master(self) -> tuple[int, int]:
        return self.lifeline_write, self.uplink_read

    def of_worker(self) -> tuple[int, int]:
        return self.lifeline_read, self.uplink_write
