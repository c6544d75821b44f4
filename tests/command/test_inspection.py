"""What objects of real frameworks, and odd ones, are taken for."""

import functools
import http.server
import operator
import socketserver
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

import prefork
from prefork.command.inspection import describe, shape
from prefork.rules.program_kind import ProgramKind, kind_of

K = ProgramKind


def wsgi(environ: Any, start_response: Any) -> list[bytes]:
    return []


async def asgi(scope: Any, receive: Any, send: Any) -> None: ...


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def around(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    return around


def bare(function: Callable[..., Any]) -> Callable[..., Any]:
    def around(*arguments: Any) -> Any:
        return function(*arguments)

    return around


def unknown() -> None:
    """As some that are written in C."""


unknown.__signature__ = "none"  # type: ignore[attr-defined]


class Bottle:
    """As bottle's: an object that is called as WSGI says."""

    def wsgi(self, environ: Any, start_response: Any) -> list[bytes]:
        return []

    def __call__(self, environ: Any, start_response: Any) -> list[bytes]:
        return self.wsgi(environ, start_response)


class Middleware:
    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


class Body:
    """An application that is a class: an instance is the body."""

    def __init__(self, environ: Any, start_response: Any) -> None: ...

    def __iter__(self) -> Iterator[bytes]:
        return iter(())


class Old:
    def __init__(self, scope: Any) -> None: ...

    async def __call__(self, receive: Any, send: Any) -> None: ...


class NoArguments:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...


class Generator:
    @staticmethod
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        yield b""


class Refuses:
    """An object that tells nothing about itself."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("no")

    def __call__(self, *arguments: Any) -> Any: ...


class Datagrams(socketserver.DatagramRequestHandler): ...


class Lines(prefork.AsyncStreamRequestHandler):
    async def handle(self) -> None: ...


def flask() -> Any:
    import flask

    return flask.Flask(__name__)


def django_wsgi() -> Any:
    from django.core.handlers.wsgi import WSGIHandler  # type: ignore[import-untyped]

    return WSGIHandler.__new__(WSGIHandler)


def django_asgi() -> Any:
    from django.core.handlers.asgi import ASGIHandler  # type: ignore[import-untyped]

    return ASGIHandler.__new__(ASGIHandler)


def fastapi() -> Any:
    import fastapi

    return fastapi.FastAPI()


def starlette() -> Any:
    import starlette.applications

    return starlette.applications.Starlette()


def starlette_middleware() -> Any:
    from starlette.middleware.gzip import GZipMiddleware

    return GZipMiddleware(asgi)


def werkzeug_view() -> Any:
    import werkzeug

    @werkzeug.Request.application
    def app(request: Any) -> Any: ...

    return app


def werkzeug_proxy_fix() -> Any:
    from werkzeug.middleware.proxy_fix import ProxyFix

    return ProxyFix(wsgi)


def werkzeug_local() -> Any:
    from werkzeug.local import LocalProxy

    return LocalProxy(lambda: wsgi)


def asgiref_of_wsgi() -> Any:
    from asgiref.wsgi import WsgiToAsgi

    return WsgiToAsgi(wsgi)  # type: ignore[no-untyped-call]


OBJECTS: dict[str, tuple[Callable[[], Any], ProgramKind]] = {
    "flask": (flask, K.WSGI),
    "flask's wsgi_app": (lambda: flask().wsgi_app, K.WSGI),
    "django, wsgi": (django_wsgi, K.WSGI),
    "django, asgi": (django_asgi, K.ASGI),
    "fastapi": (fastapi, K.ASGI),
    "starlette": (starlette, K.ASGI),
    "starlette's middleware": (starlette_middleware, K.ASGI),
    "werkzeug's view": (werkzeug_view, K.WSGI),
    "werkzeug's middleware": (werkzeug_proxy_fix, K.WSGI),
    "werkzeug's proxy object": (werkzeug_local, K.WSGI),
    "asgiref": (asgiref_of_wsgi, K.ASGI),
    "bottle": (Bottle, K.WSGI),
    "bottle, its class": (lambda: Bottle, K.FACTORY),
    "a bound method": (lambda: Bottle().wsgi, K.WSGI),
    "a method of a class": (lambda: Bottle.wsgi, K.UNKNOWN),
    "a static method": (lambda: Generator.app, K.WSGI),
    "wsgi": (lambda: wsgi, K.WSGI),
    "asgi": (lambda: asgi, K.ASGI),
    "a lambda": (lambda: lambda e, s: [], K.WSGI),
    "a middleware": (lambda: Middleware(asgi), K.ASGI),
    "a middleware, its class": (lambda: Middleware, K.UNKNOWN),
    "a class that is the body": (lambda: Body, K.WSGI),
    "a class of asgi 2": (lambda: Old, K.ASGI_2),
    "a class of applications": (lambda: NoArguments, K.FACTORY),
    "a partial": (lambda: functools.partial(lambda config, environ, start_response: [], {}), K.WSGI),
    "a partial, async": (lambda: functools.partial(asgi), K.ASGI),
    "a partial of an object": (lambda: functools.partial(Middleware(asgi)), K.ASGI),
    "a partial that is full": (lambda: functools.partial(wsgi, {}, print), K.FACTORY),
    "decorated wsgi": (lambda: decorated(wsgi), K.WSGI),
    "decorated asgi": (lambda: decorated(asgi), K.ASGI),
    "decorated twice": (lambda: decorated(decorated(asgi)), K.ASGI),
    "decorated without a trace": (lambda: bare(wsgi), K.UNKNOWN),
    "cached": (lambda: functools.lru_cache(wsgi), K.WSGI),
    "written in C, with parameters": (lambda: operator.add, K.WSGI),
    "of unknown parameters": (lambda: unknown, K.UNKNOWN),
    "print": (lambda: print, K.UNKNOWN),
    "an exception": (lambda: ValueError, K.UNKNOWN),
    "a mock": (mock.Mock, K.UNKNOWN),
    "a mock of an application": (lambda: mock.create_autospec(wsgi), K.WSGI),
    "a mock that is awaited": (mock.AsyncMock, K.ASGI),
    "one that refuses": (Refuses, K.UNKNOWN),
    "a handler": (lambda: socketserver.StreamRequestHandler, K.HANDLER),
    "a handler of datagrams": (lambda: Datagrams, K.HANDLER),
    "an async handler": (lambda: Lines, K.ASYNC_HANDLER),
    "a handler of http.server": (lambda: http.server.SimpleHTTPRequestHandler, K.HTTP_HANDLER),
    "a server class": (lambda: socketserver.TCPServer, K.SERVER_CLASS),
    "a server class of ours": (lambda: prefork.PreforkUDPServer, K.SERVER_CLASS),
    "a server": (lambda: socketserver.TCPServer.__new__(socketserver.TCPServer), K.SERVER),
    "a module": (lambda: operator, K.NOTHING),
    "text": (lambda: "app", K.NOTHING),
    "nothing": (lambda: None, K.NOTHING),
    "a namespace": (types.SimpleNamespace, K.NOTHING),
}


def test_annotations_for_type_checkers() -> None:
    """A name in an annotation that only a type checker sees does not hide the parameters."""
    text = "def app(environ: WSGIEnvironment, start_response: StartResponse) -> Body: ...\n"
    if sys.version_info < (3, 14):  # there a name that is not there is an error of the program
        text = f"from __future__ import annotations\n{text}"
    names: dict[str, Any] = {}
    exec(text, names)
    assert kind_of(describe(names["app"])) is K.WSGI
    assert "environ" in shape(names["app"])


@pytest.mark.parametrize("name", OBJECTS)
def test_taken_for(name: str) -> None:
    """Each object is taken for what its users mean by it, or is left to the user; nothing of it is called."""
    make, kind = OBJECTS[name]
    assert kind_of(describe(make())) is kind


@pytest.mark.parametrize(
    ("named", "text"),
    [
        (wsgi, "a function (environ: Any, start_response: Any) -> list[bytes]"),
        (asgi, "a coroutine function (scope: Any, receive: Any, send: Any) -> None"),
        (lambda a, *b: None, "a function (a, *b)"),
        (Middleware, "a class (app: Any) -> None"),
        (Middleware(asgi), "a Middleware object (scope: Any, receive: Any, send: Any) -> None"),
        (unknown, "a function (its parameters are unknown)"),
        (7, "an int"),
        ("x", "a str"),
        (operator, "a module"),
    ],
)
def test_shape(named: Any, text: str) -> None:
    """An error says what was seen: the type, and how it is called."""
    assert shape(named) == text
