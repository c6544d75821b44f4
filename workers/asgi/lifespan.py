"""The lifespan of an ASGI application: its own start and its own end.

An application without a lifespan raises when it sees the scope, and is served all the same, as the specification
demands. An application that has taken the order to start and then raises has failed to start: an old generation is
worth more than a new one without its database. (uvicorn serves such an application.)
"""

import asyncio
from collections.abc import MutableMapping
from typing import Any

from uvicorn import Config

import prefork.kernel.logs as logs
from prefork.errors import PreforkError

log = logs.get("prefork")

END_TIMEOUT = 1.0  # seconds within which a lifespan ends, after it has said that its shutdown is complete


class Lifespan:
    """The task in which an application waits for the orders to start and to end, and what it has answered."""

    def __init__(self, app: Any, config: Config) -> None:
        self.state: dict[str, Any] = {}
        self._app, self._config = app, config
        self._orders: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
        self._task: asyncio.Task[Any] | None = None
        self._taken = self._foreign = False
        self._answer: asyncio.Future[str | None] | None = None

    async def start(self) -> None:
        """Raises what the application's start has raised."""
        if self._config.lifespan == "off":
            return
        scope = {
            "type": "lifespan",
            "asgi": {"version": self._config.asgi_version, "spec_version": "2.0"},
            "state": self.state,
        }
        self._task = asyncio.ensure_future(self._run(scope))
        if failure := await self._order("startup"):
            raise failure
        if self._task.done():
            self._task = None  # the application has no lifespan

    async def _run(self, scope: MutableMapping[str, Any]) -> None:
        # What the call itself raises counts, too: an application may be a class, or a function that is not async.
        await self._app(scope, self._receive, self._send)

    async def stop(self) -> None:
        """Logs what the application's end has raised."""
        if self._task is None:
            return
        if failure := await self._order("shutdown"):
            log.error("the shutdown of the application's lifespan failed [PF0605]", exc_info=failure)
        await asyncio.wait([self._task], timeout=END_TIMEOUT)

    async def _order(self, name: str) -> BaseException | None:
        """Give an order and wait for the answer. Returns the failure, if there was a failure."""
        assert self._task is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._orders.put_nowait({"type": f"lifespan.{name}"})
        await asyncio.wait([self._task, self._answer], return_when=asyncio.FIRST_COMPLETED)
        said = self._answer.result() if self._answer.done() else None
        if said is not None:  # most applications say that they failed, and then raise the reason
            await asyncio.wait([self._task], timeout=END_TIMEOUT)
        raised = self._task.exception() if self._task.done() and not self._task.cancelled() else None
        if said is not None:
            return raised or PreforkError(f"the application's {name} failed: {said or 'it does not say why'}")
        unsupported = not self._taken or self._foreign
        return None if unsupported and self._config.lifespan != "on" else raised

    async def _receive(self) -> MutableMapping[str, Any]:
        self._taken = True
        return await self._orders.get()

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        kind = message["type"]
        if not kind.startswith("lifespan."):
            self._foreign = True
            raise RuntimeError(f"{kind} is not a message of the lifespan protocol")
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(str(message.get("message", "")) if kind.endswith(".failed") else None)
