"""Looks at an object of the program, and calls nothing of it: for the decision of what it is, and for errors."""

import contextlib
import functools
import inspect
import socketserver
import sys
import types
from collections.abc import Callable
from typing import Any

import prefork.workers.intake.dispatch as dispatch
from prefork.rules.program_kind import CallShape, ObjectDescription

_ROUTINES = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def describe(named: Any) -> ObjectDescription:
    """What can be seen of an object. Raises nothing: what an object refuses to tell is left out."""
    is_class = issubclass(type(named), type)  # `isinstance` would ask the object, which may refuse
    # Nothing of the module can be a handler of it where it was never imported.
    http_handler = getattr(sys.modules.get("http.server"), "BaseHTTPRequestHandler", None)
    return ObjectDescription(
        is_callable=callable(named),
        is_class=is_class,
        is_server=_is_server(named),
        is_server_class=is_class and issubclass(named, socketserver.BaseServer),
        is_handler=is_class and issubclass(named, socketserver.BaseRequestHandler),
        is_http_handler=is_class and http_handler is not None and issubclass(named, http_handler),
        is_async_handler=is_class and dispatch.is_async(named),
        is_iterable=is_class and hasattr(named, "__iter__"),
        calls=_calls(named) if callable(named) else (),
        made_by=_made_by(named),
    )


def shape(named: Any) -> str:
    """What an object is, for an error: "a function (a, b)", "a str"."""
    if issubclass(type(named), types.ModuleType):
        return "a module"
    if not callable(named):
        return _with_article(type(named).__name__)
    signature = _signature(named, wrapped=False)
    called = f" {_short(str(signature))}" if signature is not None else " (its parameters are unknown)"
    if issubclass(type(named), type):
        return f"a class{called}"
    if issubclass(type(named), _ROUTINES):
        return f"{'a coroutine function' if _is_async(named) else 'a function'}{called}"
    return f"{_with_article(type(named).__name__)} object{called}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _with_article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _is_server(named: Any) -> bool:
    try:
        return isinstance(named, socketserver.BaseServer)
    except Exception:  # a proxy whose `__class__` raises
        return False


def _calls(named: Callable[..., Any]) -> tuple[CallShape, ...]:
    """How it is called, and how what is wrapped in it is called."""
    shapes: list[CallShape] = []
    inner = named
    with contextlib.suppress(Exception):
        inner = inspect.unwrap(named)
    for candidate, wrapped in ((named, False), (inner, True)):
        signature = _signature(candidate, wrapped=wrapped)
        call = _shape_of(signature, _is_async(candidate)) if signature is not None else None
        if call is not None and call not in shapes:
            shapes.append(call)
    return tuple(shapes)


def _signature(named: Any, *, wrapped: bool) -> inspect.Signature | None:
    try:
        if sys.version_info >= (3, 14):  # names of annotations may be there for type checkers only
            import annotationlib

            form = annotationlib.Format.FORWARDREF
            return inspect.signature(named, follow_wrapped=wrapped, annotation_format=form)
        return inspect.signature(named, follow_wrapped=wrapped)
    except Exception:  # a builtin, or an object that answers for itself
        return None


def _shape_of(signature: inspect.Signature, is_async: bool) -> CallShape | None:
    """None where it cannot be called with positional arguments alone."""
    parameters = list(signature.parameters.values())
    if any(one.kind is one.KEYWORD_ONLY and one.default is one.empty for one in parameters):
        return None
    positional = [one for one in parameters if one.kind in _POSITIONAL]
    required = sum(one.default is one.empty for one in positional)
    has_rest = any(one.kind is one.VAR_POSITIONAL for one in parameters)
    return CallShape(required, None if has_rest else len(positional), tuple(one.name for one in positional), is_async)


def _is_async(named: Any) -> bool:
    """Whether a call returns a coroutine."""
    with contextlib.suppress(Exception):
        while isinstance(named, functools.partial):
            named = named.func
        if isinstance(named, type):
            return hasattr(named, "__await__")
        return inspect.iscoroutinefunction(named) or inspect.iscoroutinefunction(type(named).__call__)
    return False


def _made_by(named: Any) -> str:
    """The module of the function that is called first; "" where there is none."""
    with contextlib.suppress(Exception):
        return str(named.__globals__["__name__"])
    return ""
