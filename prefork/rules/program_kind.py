"""What a NAME of the command stands for, decided from a description of the object. The object itself is not seen here.

`kind_of()` looks at what the object is (a class, a server), then at how it may be called. Each way of calling it is
judged by itself: the object's own signature first, then that of the function that a decorator has wrapped. The first
that tells decides. Names of parameters tell before their number does.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class ProgramKind(enum.Enum):
    """What NAME stands for. The value is the kind in the words of the log."""

    HANDLER = "a handler class"
    ASYNC_HANDLER = "an asynchronous handler class"
    HTTP_HANDLER = "a handler class of http.server"
    SERVER_CLASS = "a server class"
    SERVER = "a server"
    ADDRESS_FACTORY = "a factory of servers that takes an address"
    OPTIONAL_ADDRESS_FACTORY = "a factory of servers that can take an address"
    FACTORY = "a factory of servers"  # or of anything else: it is called with nothing, and its result is judged
    WSGI = "a WSGI application"
    ASGI = "an ASGI application"
    ASGI_2 = "an application of the old ASGI 2"
    UNKNOWN = "something that can be called"
    NOTHING = "nothing that can be served"

    @property
    def is_application(self) -> bool:
        return self in (ProgramKind.WSGI, ProgramKind.ASGI, ProgramKind.ASGI_2)

    @property
    def is_handler(self) -> bool:
        return self in (ProgramKind.HANDLER, ProgramKind.ASYNC_HANDLER, ProgramKind.HTTP_HANDLER)

    @property
    def worker_class(self) -> str:
        """The class of workers that serves it; "": the server says it itself."""
        return _WORKER_CLASSES.get(self, "")


_WORKER_CLASSES = {
    ProgramKind.HANDLER: "sync",
    ProgramKind.ASYNC_HANDLER: "asyncio",
    ProgramKind.HTTP_HANDLER: "sync",
    ProgramKind.WSGI: "wsgi",
    ProgramKind.ASGI: "asgi",
    ProgramKind.ASGI_2: "asgi",
}


@dataclass(frozen=True)
class CallShape:
    """One way to call an object.

    Parameters
    ----------
    required, accepted
        How many positional arguments it must and may be given; None: any number.
    names
        Of the positional parameters, in order.
    is_async
        The call returns a coroutine.
    """

    required: int
    accepted: int | None
    names: tuple[str, ...] = ()
    is_async: bool = False

    def takes(self, number: int) -> bool:
        return self.required <= number and (self.accepted is None or number <= self.accepted)


@dataclass(frozen=True)
class ObjectDescription:
    """What can be seen of an object without calling it.

    Parameters
    ----------
    is_server, is_server_class, is_handler, is_http_handler, is_async_handler
        An instance of socketserver's BaseServer, a subclass of it; a class of handlers, of those of http.server, or
        with a `handle()` that is a coroutine function.
    is_iterable
        A class whose instances can be iterated over.
    calls
        The ways to call it, the object's own first. Empty where that is unknown, as for some callables written in C.
    made_by
        The module whose code is called first. A decorator may leave it as the only trace.
    """

    is_callable: bool = True
    is_class: bool = False
    is_server: bool = False
    is_server_class: bool = False
    is_handler: bool = False
    is_http_handler: bool = False
    is_async_handler: bool = False
    is_iterable: bool = False
    calls: tuple[CallShape, ...] = ()
    made_by: str = ""


_ENVIRON = {"environ", "env", "environment", "wsgi_environ"}
_START_RESPONSE = {"start_response", "startresponse", "start_resp"}
_ASGI = ("scope", "receive", "send")
_NO_ADDRESS = {"request", "req", "event", "self", "cls"}  # first parameters of views, and of methods without an object
# `werkzeug.wrappers.Request.application` shows the signature of the view that it wraps.
_MADE_WSGI_BY = {"werkzeug.wrappers.request"}


def kind_of(described: ObjectDescription) -> ProgramKind:
    """What the object is taken for."""
    if described.is_server:
        return ProgramKind.SERVER
    if described.is_server_class:
        return ProgramKind.SERVER_CLASS
    if described.is_async_handler:
        return ProgramKind.ASYNC_HANDLER
    if described.is_http_handler:
        return ProgramKind.HTTP_HANDLER
    if described.is_handler:
        return ProgramKind.HANDLER
    if not described.is_callable:
        return ProgramKind.NOTHING
    for call in described.calls:
        kind = _by_names(call) or _by_number(call, described)
        if kind is not ProgramKind.UNKNOWN:
            return kind
    return ProgramKind.WSGI if described.made_by in _MADE_WSGI_BY else ProgramKind.UNKNOWN


def _by_names(call: CallShape) -> ProgramKind | None:
    names = tuple(_plain(call.names))
    if names[:3] == _ASGI and call.takes(3):
        return ProgramKind.ASGI
    if names[:1] == _ASGI[:1] and call.takes(1) and not call.takes(3):
        return ProgramKind.ASGI_2
    is_wsgi = bool(_ENVIRON.intersection(names[:1]) or _START_RESPONSE.intersection(names[1:2]))
    return ProgramKind.WSGI if is_wsgi and call.takes(2) and not call.is_async else None


def _plain(names: Iterable[str]) -> Iterable[str]:
    return (name.strip("_").lower() for name in names)


def _by_number(call: CallShape, described: ObjectDescription) -> ProgramKind:
    takes_anything = call.accepted is None and not call.names
    if call.is_async:  # nothing else that is served is a coroutine function of three parameters
        return ProgramKind.ASGI if call.takes(3) and (call.required or takes_anything) else ProgramKind.UNKNOWN
    if takes_anything:
        return ProgramKind.UNKNOWN
    if call.required == 2 and (not described.is_class or described.is_iterable):
        return ProgramKind.WSGI
    first = next(iter(_plain(call.names)), "")
    if call.required == 1 and first not in _NO_ADDRESS and not described.is_class:  # a call of it makes no server
        return ProgramKind.ADDRESS_FACTORY
    if call.required == 0:
        is_address = ("addr" in first or first in ("bind", "listen")) and not described.is_class
        return ProgramKind.OPTIONAL_ADDRESS_FACTORY if is_address else ProgramKind.FACTORY
    return ProgramKind.UNKNOWN
