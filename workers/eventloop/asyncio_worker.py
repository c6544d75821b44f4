"""The shipped worker for handlers that are coroutines: an event loop, and many requests in progress at once."""

import asyncio
import contextlib
import functools
import socket
import socketserver
from time import monotonic
from typing import Any

import prefork.kernel.logs as logs
import prefork.workers.client_errors as client_errors
import prefork.workers.eventloop.handlers as handlers
from prefork.errors import OptionError
from prefork.workers.eventloop.listener_gate import ListenerGate
from prefork.workers.eventloop.loop_worker import TURN, LoopWorker, bared
from prefork.workers.intake.acceptor import PAUSE, RESOURCE_ERRORS

log = logs.get("prefork")


class AsyncioWorker(LoopWorker):
    """Serves handlers that are coroutines, `max_connections` at once, on uvloop where that is installed.

    May be overridden, beside what `LoopWorker` says
    ------------------------------------------------
    setup()
        `self.loop` is there, and does not turn yet: open a pool of connections by
        `self.loop.run_until_complete(...)`. Tasks made here run while the worker serves.
    teardown()
        The loop does not turn any more: `self.loop.run_until_complete(...)` again, and then `super().teardown()`.

    To be read, beside what `LoopWorker` says
    -----------------------------------------
    loop, leaving (an `asyncio.Event` that is set once the worker is to leave)

    A worker that leaves takes no more, and waits for what it has in progress. What is left shortly before the end of
    `graceful_timeout` is cancelled, so that `finally` blocks still run.
    """

    farewell = 1.0  # seconds before the end of `graceful_timeout`, at most a quarter of it

    @classmethod
    def check(cls, server: Any) -> None:
        super().check(server)
        handlers.check_handler(getattr(server, "RequestHandlerClass", None), server.socket_type)
        for name in ("process_request", "finish_request", "shutdown_request", "close_request"):
            stock = (
                getattr(kind, name)
                for kind in (socketserver.BaseServer, socketserver.TCPServer, socketserver.UDPServer)
            )
            if name in vars(server) or getattr(type(server), name) not in stock:
                raise OptionError(
                    f"worker_class: {cls.__name__} does not call {type(server).__name__}.{name}(); leave it out "
                    "(ThreadingMixIn too), or choose another worker_class",
                    code="PF0106",
                )

    @functools.cached_property
    def leaving(self) -> asyncio.Event:
        return asyncio.Event()

    # -- the life of the loop --------------------------------------------------------------------------------------

    _turning = _cut_off = False
    _left_at = 0.0

    def prepare_to_accept(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Event()
        self._tls = {id(server): bared(server) for server in self.servers}
        limit = self.options.max_connections
        self._gate = ListenerGate(self.loop, self.acceptor, self.balancer, self._take, lambda: len(self._tasks), limit)

    def run(self) -> None:
        self._turning = True
        if self.draining:  # told before there was a loop to wake
            self._told()
        self.loop.run_until_complete(self._run_until_drained())

    def drain(self) -> None:
        self._left_at = monotonic()
        if self._turning:
            self.loop.call_soon_threadsafe(self._told)

    def teardown(self) -> None:
        """Cancel all tasks that are left, end asynchronous generators and the default executor, close the loop."""
        self._runner.close()

    def _told(self) -> None:
        self.leaving.set()
        if not self._gate.over.done():
            self._gate.end()
            timeout = self.options.graceful_timeout
            end = self._left_at + timeout - min(self.farewell, timeout / 4)
            self.loop.call_later(max(0.0, end - monotonic()), self._cut)

    def _cut(self) -> None:
        """`graceful_timeout` is about to end: have the requests left end by themselves, before the master ends them."""
        self._cut_off = True
        self._room.set()
        if self._tasks:
            text = "%s: graceful_timeout is over; requests that are cancelled: %d [PF0603]"
            log.warning(text, self.log_name, len(self._tasks))
        for task in self._tasks:
            task.cancel()

    async def _run_until_drained(self) -> None:
        self._gate.watch()
        try:
            await self._gate.over
            if not self.quitting:
                await self._take_rest()
            while self._tasks and not self.quitting:  # `teardown()` cancels what is left in a hurry
                await asyncio.wait(self._tasks, timeout=TURN)
        finally:
            self._turning = False
            self._gate.discard()

    # -- taking ----------------------------------------------------------------------------------------------------

    def _take(self, fd: int) -> bool:
        taken = self.acceptor.try_take(fd)
        if taken is None:
            return False
        task = self.loop.create_task(self._serve_request(*taken))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return True

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._room.set()
        self._gate.freed()

    async def _take_rest(self) -> None:
        """A last look, for connections for which the kernel has woken this worker alone; or the whole queue."""
        for fd in self.acceptor.fds:
            for number in range(self.acceptor.last_look()):
                while not self._gate.has_room() and self.pool_drains and not self._cut_off:
                    self._room.clear()
                    await self._room.wait()
                if self._cut_off or (number and not self._gate.has_room()):
                    break
                try:
                    if not self._take(fd):
                        break
                except OSError as error:
                    self.acceptor.say_full(error)
                    if error.errno not in RESOURCE_ERRORS or not self.pool_drains:
                        break
                    await asyncio.sleep(PAUSE)
                await asyncio.sleep(0)

    # -- serving ---------------------------------------------------------------------------------------------------

    async def _serve_request(self, server: Any, request: Any, peer: Any) -> None:
        """Serve one request, from the accept to the close."""
        serve = self._serve_datagram if server.socket_type == socket.SOCK_DGRAM else self._serve_stream
        try:
            await serve(server, request, peer)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            server.handle_error(request, peer)  # the handler has cancelled itself, or something that it waited for
        except Exception:
            server.handle_error(request, peer)

    async def _serve_datagram(self, server: Any, request: Any, peer: Any) -> None:
        with self.serving(peer):
            if server.verify_request(request, peer):
                await server.RequestHandlerClass(request, peer, server).serve()

    async def _serve_stream(self, server: Any, request: socket.socket, peer: Any) -> None:
        writer = None
        try:
            with self.serving(peer):
                if not server.verify_request(request, peer):
                    return
                reader, writer, protocol = await self._streams(server, request)
                try:
                    await server.RequestHandlerClass((reader, writer), peer, server).serve()
                except Exception as error:
                    client_errors.look_at_stream(protocol, reader.exception(), error)
                    server.handle_error(request, peer)
                await _sent(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        except _Dropped:
            pass
        finally:
            if writer is None:
                request.close()
            else:
                writer.transport.abort()

    async def _streams(
        self, server: Any, request: socket.socket
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, asyncio.BaseProtocol]:
        reader = asyncio.StreamReader(handlers.unwrapped(server.RequestHandlerClass).limit, self.loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=self.loop)
        try:
            transport, _ = await self.loop.connect_accepted_socket(lambda: protocol, request, **self._tls[id(server)])
        except OSError as error:
            raise _Dropped from error
        return reader, asyncio.StreamWriter(transport, protocol, reader, self.loop), protocol


class _Dropped(Exception):
    """A client that has left before it was served, or has failed in its handshake: no error of the program."""


async def _sent(writer: asyncio.StreamWriter) -> None:
    """Wait until the kernel has all of what was written, as far as the transport knows."""
    if writer.transport.get_write_buffer_size():
        writer.transport.set_write_buffer_limits(high=0)
        with contextlib.suppress(OSError):  # the client did not wait for the answer
            await writer.drain()
