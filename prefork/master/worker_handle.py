"""One worker as the master holds it: process, pipes, slot; and how it is made."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import prefork.kernel.inherited_pipes as inherited_pipes
import prefork.kernel.private_fds as private_fds
import prefork.kernel.processes as processes
import prefork.link.uplink as uplink
import prefork.link.worker_pipes as worker_pipes
from prefork.link.scoreboard import Scoreboard
from prefork.link.worker_context import WorkerContext
from prefork.rules.worker_exit import worker_name
from prefork.settings.settings import Options

# What runs in the child: given its context and `unblock`, it returns an exit code.
Start = Callable[[WorkerContext, Callable[[], None]], int]


@dataclass(slots=True)
class WorkerHandle:
    """The worker to the master: a process and two pipes. What is wanted of it is in the pool's `Member`.

    The two are apart because the pool is pure, and because a worker for a single request (`handle_request()`) has a
    process but no pool.
    """

    slot: int
    generation: int
    child: processes.Child
    lifeline_write: int
    link: uplink.UplinkReader
    born: float
    closed_at: float | None = None  # when its end of the uplink was seen; None: it is open
    name: str = field(init=False)  # in texts of the log

    def __post_init__(self) -> None:
        self.name = worker_name(self.child.pid, self.slot, self.generation)

    def release(self) -> None:
        self.child.release()
        private_fds.close([self.lifeline_write, self.link.fd])


def launch(
    board: Scoreboard,
    slot: int,
    generation: int,
    options: Options,
    title: str,
    start: Start,
    *,
    use_pidfd: bool = True,
    pipes: set[tuple[int, int]] | None = None,
) -> WorkerHandle:
    """Fork one worker into a slot. Where other threads run, it gets only those pipes of theirs that are in `pipes`.

    Raises
    ------
    OSError
        EMFILE, ENFILE, EAGAIN, ENOMEM: nothing was left open.
    """
    born = time.monotonic()
    token = random.randbytes(uplink.TOKEN)  # against accidents: whoever runs in the worker can read it anyway
    beside = pipes is not None and bool(processes.threads_left_behind())
    ends = worker_pipes.WorkerPipes.open()
    try:
        board.clear(slot)
        context = WorkerContext(
            slot,
            generation,
            options,
            board.slot(slot),
            ends.lifeline_read,
            ends.uplink_write,
            token,
            threading.current_thread() is threading.main_thread(),
            f"prefork: worker {slot} {title} generation {generation}",
            random.getrandbits(64),
        )

        def main(unblock: Callable[[], None]) -> int:
            if beside and pipes is not None:
                inherited_pipes.drop(pipes, ends.of_worker())
            return start(context, unblock)

        pid = processes.fork(main)
    except BaseException:
        private_fds.close(ends.of_master())
        raise
    finally:
        private_fds.close(ends.of_worker())
    child = processes.Child(pid, use_pidfd=use_pidfd)
    return WorkerHandle(
        slot, generation, child, ends.lifeline_write, uplink.UplinkReader(ends.uplink_read, token), born
    )
