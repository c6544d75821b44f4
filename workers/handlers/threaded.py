"""The shipped worker for handlers that wait: several requests at once, a thread each.

The threads accept by turns: one of them is in `accept()`, and gives the turn to a free thread when it has taken
something. Nothing is handed over, so a request costs 0.7 of what it costs with a thread that accepts and a queue. A
worker whose threads are all busy does not accept, and the kernel asks its siblings. With all free threads in `accept()`
a request would cost 0.95 of what it costs now. But the kernel asks waiters in the order in which they came: a worker
with 16 waiting threads would get 16 connections in a row, or nearly all of them beside a worker that has started fewer.

Where a handler class can tell whether a request is there, threads take from a filter. Connections wait in it for their
requests and hold no thread.

The main thread serves nothing. It waits for the end, and so is always free for a signal.
"""

import queue
import signal
import threading
from time import monotonic
from typing import Any

import prefork.kernel.logs as logs
from prefork.errors import RequestTimeout
from prefork.kernel.unpatched import refuse_patched
from prefork.link.worker_context import INTERRUPT
from prefork.workers.handlers.request_filter import Filter, check_of
from prefork.workers.worker import Worker

log = logs.get("prefork")

_HUNG = RequestTimeout("of a request in a thread")  # put among the ends: a hung thread may keep an end from being seen


class ThreadWorker(Worker):
    """Serves any `socketserver` server, the whole chain of its methods, `threads` requests at once.

    The methods of the server are called by several threads, as `ThreadingMixIn` calls `finish_request()`; here
    `verify_request()` and `process_request()` too. `get_request()` is called by one thread at a time.

    A request in a thread cannot be interrupted. Where a request is past its deadline the worker is replaced at once;
    its other requests finish, and then it ends.
    """

    THREADS = 16  # where the setting `threads` is None
    PATIENCE = 60.0  # seconds from the connection until its handler's has_request() must have found a request
    LAST_WORD = 2.0  # the same, since this worker was told to leave, if there is a graceful_timeout of twice as much

    _accepting = 0  # the thread that is in `accept()`, or 0

    @classmethod
    def check(cls, server: Any) -> None:
        super().check(server)
        check_of(server)
        refuse_patched(("threading",), "worker_class thread", "take sync")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._checks = {server: check for server in self.servers if (check := check_of(server))}
        self._filter: Filter | None = None
        self._turn = threading.Lock()  # held by the thread that accepts
        self._free: set[int] = set()
        self.threads = self.options.threads or self.THREADS
        self._started = 0
        self._start_again_at = 0.0
        # What ends the wait of the main thread: None, there is nothing more to take; or an exception to leave with.
        self._ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def prepare_to_accept(self) -> None:
        super().prepare_to_accept()
        if self._checks:
            self._filter = Filter(
                self,
                self.acceptor,
                self._checks,
                limit=self.options.max_connections,
                patience=self.PATIENCE,
                last_word=min(self.LAST_WORD, self.options.graceful_timeout / 2),
                failed=self._ends.put,
            )

    def run(self) -> None:
        with self._turn:
            self._start()
        trouble = None
        while (end := self._ends.get()) is not None:
            if end is _HUNG:
                self._replace_hung()
            else:
                trouble = trouble or end
                self.leave()
        self.finish()
        with self._turn:  # a thread that had just taken a connection has begun its request before this
            self.finish()
        if trouble is not None:
            raise trouble

    def drain(self) -> None:
        if self._checks:  # an epoll waits for the listener, which must stay; and for `drain_fd`
            if self._filter is not None:
                self._filter.leave()
            return
        super().drain()
        # What was done to the listener does not end an accept that has begun; a signal to its thread does. An accept
        # that begins later finds the listener gone: there is no window between the two.
        if self._accepting:
            signal.pthread_kill(self._accepting, INTERRUPT)

    def expired(self) -> None:
        super().expired()
        if self.draining:
            self._ends.put(_HUNG)

    def _replace_hung(self) -> None:
        """Perhaps all threads hang: a thread must be there that finds nothing more to take."""
        try:
            threading.Thread(target=self._take_and_serve, name="prefork-last", daemon=True).start()
        except RuntimeError:
            self._ends.put(None)

    def _start(self) -> None:
        threading.Thread(target=self._take_and_serve, name=f"prefork-{self._started + 1}", daemon=True).start()
        self._started += 1

    def _take_and_serve(self) -> None:
        me = threading.get_ident()
        take = self.accept if self._filter is None else self._filter.take
        while True:
            self._free.add(me)
            with self._turn:
                self._accepting = me
                try:
                    taken = take()
                except BaseException as error:  # the program has closed the listener
                    self._ends.put(error)
                    taken = None
                self._accepting = 0
                self._free.discard(me)
                if taken is not None:
                    # In hand before another thread can find that there is nothing more to take.
                    begun = self.serving(taken[2]).begin()
                    if not self._free and self._started < self.threads:
                        self._start_another()
            if taken is None:
                break
            try:
                self.serve_request(*taken, begun)
            except BaseException as error:  # SystemExit, KeyboardInterrupt: what they end is the worker
                self._ends.put(error)
        self._ends.put(None)
        threading.Event().wait()  # a thread that has ended must not be sent signals

    def _start_another(self) -> None:
        now = monotonic()
        if now < self._start_again_at:
            return
        try:
            self._start()
        except RuntimeError as error:  # the system has no room for it; the threads that there are serve on
            self._start_again_at = now + 1.0
            text = "%s cannot start another thread: %s; it serves with %d threads [PF0409]"
            log.warning(text, self.log_name, error, self._started)
