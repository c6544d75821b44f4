"""What a NAME is taken for, decided from a description alone."""

import pytest

from prefork.rules.program_kind import CallShape, ObjectDescription, ProgramKind, kind_of

K = ProgramKind


def called(*names: str, required: int | None = None, rest: bool = False, is_async: bool = False) -> CallShape:
    """A way to call something with these positional parameters."""
    number = len(names) if required is None else required
    return CallShape(number, None if rest else len(names), names, is_async)


ANYTHING = called(rest=True)

CALLS = {
    "wsgi": (called("environ", "start_response"), K.WSGI),
    "wsgi by its first name": (called("env", "respond"), K.WSGI),
    "wsgi by its second name": (called("e", "start_response"), K.WSGI),
    "wsgi by its number": (called("a", "b"), K.WSGI),
    "wsgi with a default": (called("environ", "start_response", required=1), K.WSGI),
    "wsgi with more": (called("environ", "start_response", rest=True), K.WSGI),
    "asgi": (called("scope", "receive", "send", is_async=True), K.ASGI),
    "asgi with other names": (called("a", "b", "c", is_async=True), K.ASGI),
    "asgi with defaults": (called("s", "receive", "send", required=1, is_async=True), K.ASGI),
    "asgi that is no coroutine function": (called("scope", "receive", "send"), K.ASGI),
    "asgi with names of its own lines": (called("_scope", "_receive", "_send"), K.ASGI),
    "asgi, decorated": (called(rest=True, is_async=True), K.ASGI),
    "asgi 2": (called("scope"), K.ASGI_2),
    "a coroutine function for an address": (called("address", is_async=True), K.UNKNOWN),
    "a coroutine function of nothing": (called(is_async=True), K.UNKNOWN),
    "a coroutine function of two": (called("environ", "start_response", is_async=True), K.UNKNOWN),
    "three that are not asgi": (called("a", "b", "c"), K.UNKNOWN),
    "a factory": (called(), K.FACTORY),
    "a factory with settings": (called("config", required=0), K.FACTORY),
    "a factory with settings and more": (called("config", required=0, rest=True), K.FACTORY),
    "a factory for an address": (called("address"), K.ADDRESS_FACTORY),
    "a factory for whatever": (called("where"), K.ADDRESS_FACTORY),
    "a factory for an address, or not": (called("server_address", required=0), K.OPTIONAL_ADDRESS_FACTORY),
    "a view": (called("request"), K.UNKNOWN),
    "a method without an object": (called("self"), K.UNKNOWN),
    "anything": (ANYTHING, K.UNKNOWN),
}


@pytest.mark.parametrize("name", CALLS)
def test_by_its_call(name: str) -> None:
    """Names of parameters tell first, then their number; what may be anything is not guessed."""
    call, kind = CALLS[name]
    assert kind_of(ObjectDescription(calls=(call,))) is kind


@pytest.mark.parametrize(
    ("described", "kind"),
    [
        (ObjectDescription(is_server=True), K.SERVER),
        (ObjectDescription(is_class=True, is_server_class=True, calls=(called("a", "b"),)), K.SERVER_CLASS),
        (ObjectDescription(is_class=True, is_handler=True, calls=(called("a", "b", "c"),)), K.HANDLER),
        (ObjectDescription(is_class=True, is_handler=True, is_http_handler=True), K.HTTP_HANDLER),
        (ObjectDescription(is_class=True, is_async_handler=True), K.ASYNC_HANDLER),
        (ObjectDescription(is_callable=False), K.NOTHING),
        (ObjectDescription(), K.UNKNOWN),
        (ObjectDescription(made_by="werkzeug.wrappers.request", calls=(ANYTHING, called("request"))), K.WSGI),
        (ObjectDescription(made_by="elsewhere", calls=(ANYTHING, called("request"))), K.UNKNOWN),
    ],
)
def test_by_what_it_is(described: ObjectDescription, kind: ProgramKind) -> None:
    """A class or a server is what it is, however it is called; what cannot be looked into is unknown."""
    assert kind_of(described) is kind


def test_a_wrapped_function_tells_where_its_wrapper_does_not() -> None:
    """The object's own parameters decide; those of what it wraps do where its own say nothing."""
    inside = called("scope", "receive", "send", is_async=True)
    assert kind_of(ObjectDescription(calls=(ANYTHING, inside))) is K.ASGI
    assert kind_of(ObjectDescription(calls=(called("environ", "start_response"), inside))) is K.WSGI


def test_a_class_of_two_parameters_serves_only_if_it_is_iterable() -> None:
    """An application may be a class whose instance is the body (PEP 3333); other classes of two parameters are not."""
    call = called("a", "b")
    assert kind_of(ObjectDescription(is_class=True, is_iterable=True, calls=(call,))) is K.WSGI
    assert kind_of(ObjectDescription(is_class=True, calls=(call,))) is K.UNKNOWN


def test_every_kind_that_is_served_at_an_address_names_its_workers() -> None:
    """Handlers and applications have a class of workers; a server says it itself."""
    for kind in K:
        assert bool(kind.worker_class) is (kind.is_handler or kind.is_application)
