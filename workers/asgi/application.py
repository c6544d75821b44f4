"""An ASGI application as uvicorn's protocols serve it: its lifespan, the accounts around each request, and what can be
told of a connection from outside.

uvicorn is a library here. Taken from it are `Config` (which finds out what kind of application this is), the protocols,
and the state that they share; not its Server, which owns signals and sockets and wakes up ten times a second.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from email.utils import formatdate
from time import monotonic
from typing import Any, Protocol

import uvicorn.lifespan.on  # these three would be imported by `Config.load()`, in each worker
import uvicorn.protocols.http.auto
import uvicorn.protocols.websockets.auto  # noqa: F401
from uvicorn import Config
from uvicorn.server import ServerState

import prefork.kernel.access_file as access_file
import prefork.kernel.logs as logs
from prefork.errors import PreforkError, RequestTimeout
from prefork.settings.settings import Options
from prefork.workers.asgi.protocols import strict

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

log = logs.get("prefork")

FAREWELL = 1.0  # seconds that a lifespan has, once it has said that it is over, to be over


class Accounts(Protocol):
    """What a site asks of its worker."""

    options: Options

    @property
    def _untimed(self) -> Callable[[object], Any]: ...

    def serving(self, peer: object = "", timeout: float | None = None) -> Any: ...


class Connections(set[Any]):
    """Those of a worker. uvicorn's protocols add and remove themselves.

    In the next turn of the loop after some were removed `fewer` is called: by then a WebSocket has taken the place of
    the protocol that it came by.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, fewer: Callable[[], object]) -> None:
        self._soon, self._fewer, self._is_due = loop.call_soon, fewer, False

    def discard(self, one: Any) -> None:
        super().discard(one)
        if not self._is_due:
            self._is_due = True
            self._soon(self._tell)

    def remove(self, one: Any) -> None:
        if one not in self:
            raise KeyError(one)
        self.discard(one)

    def _tell(self) -> None:
        self._is_due = False
        self._fewer()


class AccessLog:
    """Stands in the place of the logger on which uvicorn's protocols log each answer."""

    def __init__(self, file: access_file.AccessFile) -> None:
        self._file, self._second, self._when = file, 0, ""

    def info(self, message: str, *arguments: object, **others: object) -> None:
        now = time.time()
        if int(now) != self._second:
            self._second = int(now)
            self._when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        self._file.write(f"{self._when},{int(now % 1 * 1000):03d} {message % arguments}\n")


class State(ServerState):
    """What the protocols of a site share. The Date header is made when it is asked for, so that nothing ticks."""

    connections: Any

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config
        self._second = 0
        self._headers: list[tuple[bytes, bytes]] = []

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        now = time.time()
        if int(now) != self._second:
            self._second = int(now)
            date = [(b"date", formatdate(now, usegmt=True).encode())] if self._config.date_header else []
            self._headers = date + self._config.encoded_headers
        return self._headers

    @default_headers.setter
    def default_headers(self, value: object) -> None:
        """uvicorn begins with none."""


class HeadBufferingTransport:
    """A transport for uvicorn's protocols that keeps the head of an answer until the body follows, or the turn of the
    loop ends, and sends both at once: uvicorn writes them one by one, and an answer of few bytes costs a seventh more
    for the second system call, and its client is woken twice.

    It is no copy of what a transport can do: what is not here is the transport's own.

    Parameters
    ----------
    kept
        Those that keep a head in this turn, of all that share it: one callback sends them all.
    """

    LARGE = 1 << 14  # bytes; to copy more of a body costs as much as another system call

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, kept: "list[HeadBufferingTransport]"
    ) -> None:
        self._transport, self._soon, self._send, self._kept = transport, loop.call_soon, transport.write, kept
        self._head = b""
        self.is_closing = transport.is_closing  # asked after each answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: Any) -> None:
        if self._head:
            if len(data) > self.LARGE:
                self.flush()
                self._send(data)
            else:
                both = self._head + data
                self._head = b""
                self._send(both)
        elif data[:5] == b"HTTP/" and type(data) is bytes:  # which cannot change while it is kept
            self._head = data
            kept = self._kept
            if not kept:
                self._soon(_flush_all, kept)
            kept.append(self)
        else:
            self._send(data)

    def flush(self) -> None:
        head, self._head = self._head, b""
        if head and not self.is_closing():
            self._send(head)

    def writelines(self, parts: Any) -> None:
        self.flush()
        self._transport.writelines(parts)

    def write_eof(self) -> None:
        self.flush()
        self._transport.write_eof()

    def close(self) -> None:
        if self._head:
            self.flush()
        self._transport.close()


def _flush_all(kept: list[HeadBufferingTransport]) -> None:
    some = kept[:]
    kept.clear()
    for one in some:
        if one._head:
            one.flush()


class ASGIApplication:
    """One application in one worker. Made in the worker's event loop.

    Parameters
    ----------
    given
        What `uvicorn.Config` is to be told beside what follows from the options.
    accesses
        The access log, if there is to be one.
    """

    def __init__(
        self, app: Any, worker: Accounts, given: Mapping[str, Any], accesses: access_file.AccessFile | None = None
    ) -> None:
        options = worker.options
        logs.get("uvicorn.error")  # on which the protocols report exceptions of the application
        self._accesses = accesses and AccessLog(accesses)
        if logging.getLogger("uvicorn.error").level == logging.NOTSET:
            given = {"log_level": "info", **given}  # or the protocols log each connection for whoever traces
        settings: dict[str, Any] = {
            "log_config": None,
            "access_log": bool(options.access_log),
            "timeout_keep_alive": options.keepalive_timeout,
            # Trusting a header that every client can send is an order that only the operator can give.
            "proxy_headers": "FORWARDED_ALLOW_IPS" in os.environ,
            "workers": 1,  # or it takes a number from the environment
            **given,
        }
        self.config = Config(app, **settings)
        self.config.load()
        self.state = State(self.config)
        self.closing = not options.keepalive_timeout  # whether each connection is to end with the next reply
        self._app: Any = self.config.loaded_app
        self._serving, self._untimed = worker.serving, worker._untimed
        self._loop = asyncio.get_running_loop()
        self._protocol = _joining(strict(self.config.http_protocol_class), self._loop)
        self.lifespan = Lifespan(self._app, self.config)
        self.lifespan.state["prefork_worker"] = worker  # every scope has a copy of this dictionary
        self.config.loaded_app = self._serve_in_time if options.request_timeout else self._serve

    def protocol(self) -> asyncio.Protocol:
        """For a new connection."""
        made: asyncio.Protocol = self._protocol(
            config=self.config, server_state=self.state, app_state=self.lifespan.state, _loop=self._loop
        )
        made.prefork_since = monotonic()  # type: ignore[attr-defined]
        made._complete, made._told = None, 0  # type: ignore[attr-defined]  # see `protocols`
        if self._accesses is not None:
            made.access_log, made.access_logger = True, self._accesses  # type: ignore[attr-defined]
        return made

    async def _serve(self, scope: Message, receive: Receive, send: Send) -> Any:
        """Without a deadline. (`try` and `finally` cost less than `with`.)"""
        if self.closing and scope["type"] == "http":
            send = _last_reply(send)
        request = self._untimed(scope["client"]).begin()
        try:
            return await self._app(scope, receive, send)
        finally:
            request.end()

    async def _serve_in_time(self, scope: Message, receive: Receive, send: Send) -> Any:
        if scope["type"] != "http":
            return await self._serve(scope, receive, send)  # a WebSocket lives for as long as its ends want
        if self.closing:
            send = _last_reply(send)
        try:
            with self._serving(scope["client"] or ""):
                return await self._app(scope, receive, send)
        except RequestTimeout as late:
            if not _is_answered(receive):
                raise
            log.error("what a request left to be done after its answer was cancelled", exc_info=late)


def _joining(protocol: Any, loop: asyncio.AbstractEventLoop) -> Any:
    """A protocol whose transport is a `HeadBufferingTransport` one."""

    kept: list[HeadBufferingTransport] = []

    def connection_made(self: Any, transport: asyncio.Transport) -> None:
        try:
            protocol.connection_made(self, HeadBufferingTransport(loop, transport, kept))
        except Exception:  # the system has refused to tell its address: nothing would ever end this connection
            self.connections.discard(self)
            transport.abort()
            raise

    return type(protocol.__name__, (protocol,), {"connection_made": connection_made})


def _is_answered(receive: Any) -> bool:
    """Whether what still runs is a background task: uvicorn would close the connection under a next request."""
    return bool(getattr(getattr(receive, "__self__", None), "response_complete", False))


def _last_reply(send: Send) -> Send:
    """Have a reply say that the connection ends with it: uvicorn then ends it."""

    async def last(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await send(message)

    return last


class Lifespan:
    """An application's own start and end.

    An application without a lifespan raises when it sees the scope, and is served all the same, as the specification
    demands. One that has taken the order to start and then raises has failed to start: an old generation is worth more
    than a new one without its database. (uvicorn serves such a one.)
    """

    def __init__(self, app: Any, config: Config) -> None:
        self.state: dict[str, Any] = {}
        self._app, self._config = app, config
        self._orders: asyncio.Queue[Message] = asyncio.Queue()
        self._task: asyncio.Task[Any] | None = None
        self._taken = self._foreign = False
        self._answer: asyncio.Future[str | None] | None = None

    async def start(self) -> None:
        """Raises whatever the application's start has raised."""
        if self._config.lifespan == "off":
            return
        scope = {
            "type": "lifespan",
            "asgi": {"version": self._config.asgi_version, "spec_version": "2.0"},
            "state": self.state,
        }
        self._task = asyncio.ensure_future(self._app(scope, self._receive, self._send))
        if failure := await self._ask("startup"):
            raise failure
        if self._task.done():
            self._task = None  # it has none

    async def stop(self) -> None:
        """Logs what the application's end has raised."""
        if self._task is None:
            return
        if failure := await self._ask("shutdown"):
            log.error("the application's lifespan has failed", exc_info=failure)
        await asyncio.wait([self._task], timeout=FAREWELL)

    async def _ask(self, what: str) -> BaseException | None:
        """Give an order, wait for the answer. Returns the failure, if it is one."""
        assert self._task is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._orders.put_nowait({"type": f"lifespan.{what}"})
        await asyncio.wait([self._task, self._answer], return_when=asyncio.FIRST_COMPLETED)
        said = self._answer.result() if self._answer.done() else None
        if said is not None:  # most raise what it was after they have said that they failed
            await asyncio.wait([self._task], timeout=FAREWELL)
        raised = self._task.exception() if self._task.done() and not self._task.cancelled() else None
        if said is not None:
            return raised or PreforkError(f"the application's {what} failed: {said or 'it does not say why'}")
        unsupported = not self._taken or self._foreign
        return None if unsupported and self._config.lifespan != "on" else raised

    async def _receive(self) -> Message:
        self._taken = True
        return await self._orders.get()

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if not kind.startswith("lifespan."):
            self._foreign = True
            raise RuntimeError(f"{kind} is no message of a lifespan")
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(str(message.get("message", "")) if kind.endswith(".failed") else None)


# -- what can be told of a connection ----------------------------------------------------------------------------------


def is_websocket(one: Any) -> bool:
    return not hasattr(one, "cycle")


def is_open_websocket(one: Any) -> bool:
    """Whether its handshake is over: one that is closed before that gets a 500."""
    return bool(getattr(one, "handshake_complete", True))


def is_between(one: Any) -> bool:
    """Whether an HTTP connection has no request in hand: none yet, or the last one is answered."""
    return one.cycle is None or one.cycle.response_complete


def has_begun(one: Any) -> bool:
    """Whether the head of another request has come in part (the first one's: with httptools only)."""
    if one.cycle is None:
        return getattr(one, "scope", None) is not None
    return one.timeout_keep_alive_task is None


def silent_for(one: Any, now: float) -> float:
    """Seconds since the last reply, or since the accept. `now` is on the loop's clock, which is the monotonic one."""
    timer = one.timeout_keep_alive_task
    since = timer.when() - one.timeout_keep_alive if timer is not None else one.prefork_since
    return now - float(since)


def descriptor(one: Any) -> int:
    """Of its socket; -1: it is closed."""
    sock = one.transport.get_extra_info("socket")
    return -1 if sock is None or one.transport.is_closing() else int(sock.fileno())
