"""An ASGI application behind uvicorn's protocols, with the accounts around each request.

uvicorn is a library here. prefork uses its `Config` (which finds out what kind of application this is), its protocols,
and the state that they share; not its Server, which owns signals and sockets and wakes up ten times per second.
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
from prefork.errors import RequestTimeout
from prefork.link.scoreboard import BUSY_SINCE, BUSY_TIME, PEER_PORT, REQUESTS
from prefork.settings.settings import Options
from prefork.workers.active_requests import ActiveRequests
from prefork.workers.asgi.lifespan import Lifespan
from prefork.workers.asgi.protocols import strict
from prefork.workers.asgi.transport import with_buffered_heads

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

log = logs.get("prefork")


class AccountingWorker(Protocol):
    """What an application uses of its worker."""

    options: Options
    _requests: ActiveRequests

    @property
    def _untimed(self) -> Callable[[object], Any]: ...

    def serving(self, peer: object = "", timeout: float | None = None) -> Any: ...


class UvicornAccessLog:
    """Takes the place of the logger on which uvicorn's protocols log each answer."""

    def __init__(self, file: access_file.AccessFile) -> None:
        self._file, self._second, self._when = file, 0, ""

    def info(self, message: str, *arguments: object, **others: object) -> None:
        now = time.time()
        if int(now) != self._second:
            self._second = int(now)
            self._when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        self._file.write(f"{self._when},{int(now % 1 * 1000):03d} {message % arguments}\n")


class ProtocolState(ServerState):
    """What the protocols of one application share. The Date header is made when it is read, so that no timer ticks."""

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


class ASGIApplication:
    """One application in one worker. Made in the worker's event loop.

    Parameters
    ----------
    given
        Arguments of `uvicorn.Config` beside those that follow from the options.
    accesses
        The file of the access log; None: there is no access log.
    """

    def __init__(
        self,
        app: Any,
        worker: AccountingWorker,
        given: Mapping[str, Any],
        accesses: access_file.AccessFile | None = None,
    ) -> None:
        options = worker.options
        logs.get("uvicorn.error")  # on which the protocols report exceptions of the application
        self._accesses = accesses and UvicornAccessLog(accesses)
        if logging.getLogger("uvicorn.error").level == logging.NOTSET:
            given = {"log_level": "info", **given}  # else the protocols log each connection at the level "trace"
        settings: dict[str, Any] = {
            "log_config": None,
            "access_log": bool(options.access_log),
            "timeout_keep_alive": options.keepalive_timeout,
            # Only the operator can decide to trust a header that every client can send.
            "proxy_headers": "FORWARDED_ALLOW_IPS" in os.environ,
            "workers": 1,  # else uvicorn takes a number from the environment
            **given,
        }
        self.config = Config(app, **settings)
        self.config.load()
        self.state = ProtocolState(self.config)
        self.closing = not options.keepalive_timeout  # whether each connection is to end with the next reply
        self._app: Any = self.config.loaded_app
        self._serving, self._untimed, self._requests = worker.serving, worker._untimed, worker._requests
        self._loop = asyncio.get_running_loop()
        self._protocol = with_buffered_heads(strict(self.config.http_protocol_class), self._loop)
        self.lifespan = Lifespan(self._app, self.config)
        self.lifespan.state["prefork_worker"] = worker  # every scope has a copy of this dictionary
        self.config.loaded_app = self._serve_in_time if options.request_timeout else self._serve

    def protocol(self) -> asyncio.Protocol:
        """The protocol for a new connection."""
        made: asyncio.Protocol = self._protocol(
            config=self.config, server_state=self.state, app_state=self.lifespan.state, _loop=self._loop
        )
        made.prefork_since = monotonic()  # type: ignore[attr-defined]
        made._complete, made._told = None, 0  # type: ignore[attr-defined]  # see `protocols`
        if self._accesses is not None:
            made.access_log, made.access_logger = True, self._accesses  # type: ignore[attr-defined]
        return made

    async def _serve(self, scope: Message, receive: Receive, send: Send) -> Any:
        """Without a deadline.

        Where no other request is in progress, as nearly always in a loop whose application seldom waits, the accounts
        of an `UntimedRequest` are kept here without an object: by one the CPU of a request is 1.005 to 1.02.
        """
        if self.closing and scope["type"] == "http":
            send = _last_reply(send)
        requests = self._requests
        if requests.published is not None:
            request = self._untimed(scope["client"]).begin()
            try:
                return await self._app(scope, receive, send)
            finally:
                request.end()
        board, client = requests.board, scope["client"]
        try:
            if client and client[0] == board.host:
                board.ints[PEER_PORT] = client[1]
            else:
                board.set_peer(client)
        except (TypeError, ValueError):  # of a protocol that was set in `uvicorn_options`
            board.set_peer(client)
        start = monotonic()
        requests.published = self
        board.floats[BUSY_SINCE] = start
        try:
            return await self._app(scope, receive, send)
        finally:
            end = monotonic()
            requests.count = count = requests.count + 1
            requests.spent = spent = requests.spent + end - start
            board = requests.board  # another one in a process that the application has forked
            floats = board.floats
            board.ints[REQUESTS] = count
            floats[BUSY_TIME] = spent
            if requests.open:
                requests.show_oldest()
            else:
                requests.published = None
                floats[BUSY_SINCE] = 0.0
            if count >= requests.first_check:
                requests.check(count, end)

    async def _serve_in_time(self, scope: Message, receive: Receive, send: Send) -> Any:
        if scope["type"] != "http":
            return await self._serve(scope, receive, send)  # a WebSocket has no deadline
        if self.closing:
            send = _last_reply(send)
        try:
            with self._serving(scope["client"] or ""):
                return await self._app(scope, receive, send)
        except RequestTimeout as late:
            if not _is_answered(receive):
                raise
            log.error(
                "a background task exceeded request_timeout after the response; it was cancelled [PF0604]",
                exc_info=late,
            )


def _is_answered(receive: Any) -> bool:
    """Whether a background task still runs: uvicorn would close the connection under the next request."""
    return bool(getattr(getattr(receive, "__self__", None), "response_complete", False))


def _last_reply(send: Send) -> Send:
    """A `send` whose reply says that the connection ends with it: uvicorn then ends it."""

    async def last(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await send(message)

    return last
