"""uvicorn's protocols for HTTP/1.1, made strict where they let pass what a standard forbids, as the class `wsgi` is.

Each correction overrides a method or property that uvicorn's own code calls anyway: which application serves this head,
which protocol a client may change to, what becomes of a header, of an error, of the bytes behind an upgrade. So a
request that needs none of them costs one call more than in uvicorn.

A head is refused by an application in the place of the program's, so that its answer waits for the answers before it.
"""

import contextlib
import re
import sys
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

with contextlib.suppress(ModuleNotFoundError):  # then h11 parses
    import httptools

Application = Callable[[Any, Any, Any], Awaitable[None]]

HEAD_LIMIT = 65536  # bytes of a head, or between two pieces of a body in chunks; looked at after each read: 431

_ABSOLUTE = re.compile(rb"https?://([^/?#@]+)(/[^?]*)?(?:\?(.*))?", re.IGNORECASE | re.DOTALL)
_TELLING = frozenset((b"host", b"expect", b"transfer-encoding"))  # headers that say more than a value
_SLASH, _HASH = b"/#"  # numbers: to look for bytes in bytes takes 0.3 us


def fault_of(method: str, version: str, target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> int:
    """The status with which a head is refused that a parser has let pass; 0: it is served.

    Names of headers are in small letters.
    """
    if version not in ("1.0", "1.1"):
        return 505
    if method == "CONNECT":
        return 501
    names = [name for name, _ in headers]
    hosts = names.count(b"host")
    if hosts > 1 or (version == "1.1" and not hosts):  # RFC 9112, 3.2
        return 400
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if codings and (version == "1.0" or b"content-length" in names):  # RFC 9112, 6.1: the framing is faulty
        return 400
    if codings and codings != [b"chunked"]:
        return 501
    if target == b"*":
        return 0 if method == "OPTIONS" else 400
    known = target.startswith(b"/") or _ABSOLUTE.fullmatch(target)
    return 0 if known and b"#" not in target else 400


def refusal(status: int) -> Application:
    """An application that answers with an error and ends the connection, whatever is asked."""
    body = f"{HTTPStatus(status).phrase}\n".encode()
    fields = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": body})

    return refuse


REFUSALS = {status: refusal(status) for status in (400, 431, 501, 505)}


def strict(protocol: Any) -> Any:
    """A subclass of one of uvicorn's two protocols for HTTP/1.1; any other class is returned as it is."""
    for module, name, rules in (("h11_impl", "H11Protocol", _H11), ("httptools_impl", "HttpToolsProtocol", _HttpTools)):
        # A module that is not imported has no class from which the protocol could derive.
        base = getattr(sys.modules.get(f"uvicorn.protocols.http.{module}"), name, None)
        if base is not None and issubclass(protocol, base):
            return type(protocol.__name__, (rules, protocol), {})
    return protocol


_Protocol: Any = object  # each subclass is mixed into one of uvicorn's protocols, and uses its attributes


class _Strict(_Protocol):  # type: ignore[misc]
    """The rules that both protocols have in common.

    `_incomplete`: the headers of a head that has come in part, or the mark of trailers. With a body of chunks also
    `_body` and the `_length` that it had. `_size`: bytes since then.
    """

    _application: Any = None
    _incomplete: Any = None
    _body: Any = None
    _length = _size = 0

    def _target(self) -> bytes:
        """The target of the request line."""
        raise NotImplementedError

    def _fault(self) -> int:
        scope = self.scope
        return fault_of(scope["method"], scope["http_version"], self._target(), scope["headers"])

    @property
    def app(self) -> Any:
        """The application for the request whose head is complete: uvicorn reads this once for each request."""
        if status := self._fault():
            return REFUSALS[status]
        if absolute := _ABSOLUTE.fullmatch(self._target()):
            self._locate(*absolute.groups())
        return self._application

    @app.setter
    def app(self, application: Any) -> None:
        self._application = application

    def _locate(self, host: bytes, path: bytes | None, query: bytes | None) -> None:
        """A whole URL, as to a proxy: its host counts, the header does not (RFC 9112, 3.2.2)."""
        scope, raw, root = self.scope, path or b"/", self.root_path
        scope["headers"][:] = [(name, host if name == b"host" else value) for name, value in scope["headers"]]
        scope["path"], scope["raw_path"] = root + unquote(raw.decode("ascii")), root.encode("ascii") + raw
        scope["query_string"] = query or b""

    def _get_upgrade(self) -> Any:
        """Ignore the wish for any other protocol than WebSockets, and that of a client of HTTP/1.0 (RFC 9110, 7.8)."""
        wanted = super()._get_upgrade()
        return wanted if wanted == b"websocket" and self.scope["http_version"] == "1.1" and not self._fault() else None

    def handle_websocket_upgrade(self, *event: Any) -> None:
        """Answer a handshake that the parser for WebSockets gives up (with a body, with long headers).

        uvicorn leaves its client waiting.
        """
        super().handle_websocket_upgrade(*event)
        if not getattr(self.transport.get_protocol(), "handshake_initiated", True):
            self._answer(400)

    def _answer(self, status: int) -> None:
        """Answer where there is no request that an application could answer."""
        phrase = HTTPStatus(status).phrase
        body = f"{phrase}\n"
        fields = [b"%b: %b\r\n" % field for field in self.server_state.default_headers]
        head = f"content-type: text/plain\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n{body}"
        self.transport.write(f"HTTP/1.1 {status} {phrase}\r\n".encode() + b"".join(fields) + head.encode())
        self.transport.close()


class _H11(_Strict):
    """h11 itself refuses what is wrong with Host, and knows trailers."""

    def _target(self) -> bytes:
        raw: bytes = self.scope["raw_path"][len(self.root_path) :]
        query = self.scope["query_string"]
        return raw + b"?" + query if query else raw

    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.close()  # an error in the middle of an answer would be a part of it
        else:
            super().send_400_response(msg)


class _Trailers:
    """Takes the place of a list of headers: trailers behind a body are no headers (RFC 9110, 6.5.1)."""

    def append(self, field: object) -> None: ...


_TRAILERS = _Trailers()


class _HttpTools(_Strict):
    """`_told`: a count of the headers of this head that need a check. It is 1 in most heads: the one Host.

    `_complete`: the headers of the last head that was complete.
    """

    # Slots, because the dictionary would have more than the 30 attributes whose places the interpreter shares.
    # Set by `ASGIApplication.protocol()`: a `connection_made()` for them alone costs a hundredth of a short connection.
    __slots__ = ("_complete", "_told")
    _complete: Any
    _told: int

    def _target(self) -> bytes:
        target: bytes = self.url
        return target

    @property
    def app(self) -> Any:
        self._complete, target = self.headers, self.url
        is_plain = self._told == 1 and target[0] == _SLASH and _HASH not in target
        self._told = 0
        if is_plain and self.scope["http_version"] == "1.1":
            return self._application
        if self.scope["http_version"] != "1.1":
            self.expect_100_continue = False  # RFC 9110, 10.1.1
        return super().app

    @app.setter
    def app(self, application: Any) -> None:
        self._application = application

    def _get_upgrade(self) -> Any:
        """uvicorn asks this first, where the parser takes what follows the head for another protocol."""
        if self.scope["method"] == "CONNECT":
            self._told = 2
        return super()._get_upgrade()

    # -- bytes in --------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, apart from an upgrade that is not made, and from heads and trailers without an end."""
        self._unset_keepalive_if_required()
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as switch:
                if self._should_upgrade():
                    self.handle_websocket_upgrade()
                    return
                self._ignore_upgrade()
                data = data[switch.args[0] :]
            except httptools.HttpParserError:
                self.logger.warning("Invalid HTTP request received.")
                self.send_400_response("")
                return
            else:
                break
        if self.headers is not self._complete:
            self._measure(len(data))

    def _measure(self, size: int) -> None:
        """A head has come in part, or a body comes in chunks: count its bytes."""
        body, length = None, 0
        if self.headers is _TRAILERS:
            if self.cycle.response_complete:
                return  # the bytes that come are not kept
            body, length = self.cycle.body, len(self.cycle.body)
        if self._incomplete is not self.headers or self._body is not body or self._length != length:
            self._incomplete, self._body, self._length, self._size = self.headers, body, length, 0
            return
        self._size += size
        if self._size > HEAD_LIMIT:
            self.logger.warning("A request has more than %d bytes of headers.", HEAD_LIMIT)
            self.send_400_response("", 431)

    def _ignore_upgrade(self) -> None:
        """The message goes on as HTTP/1.1.

        The parser takes all that follows for the other protocol, the body too, and has said that the message is
        complete. So a new parser, which a head of its own tells how the body is delimited, goes on from there.
        """
        if self._get_upgrade() is not None:
            self.logger.warning("No library for WebSockets: the request is served as HTTP; pip install websockets")
        self.cycle.more_body = True
        self.cycle.message_event.clear()
        headers = dict(self.scope["headers"])
        chunked, length = b"transfer-encoding" in headers, headers.get(b"content-length", b"0")
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: " + length
        resumed = _Resumed(self)
        self.parser = httptools.HttpRequestParser(resumed)
        self.parser.feed_data(b"POST / HTTP/1.1\r\nHost: \r\n" + framing + b"\r\n\r\n")
        resumed.knows = True

    def send_400_response(self, msg: str, status: int = 400) -> None:
        """Send an error after the answers that are due before it."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._answer(status)
        elif not cycle.more_body:  # bytes behind a request: the request is answered, and the connection ends
            cycle.keep_alive = False
        elif self.pipeline:
            self.pipeline[0] = cycle, REFUSALS[status]
        elif cycle.response_started:
            self.transport.close()  # an error in the middle of an answer would be a part of it
        else:
            self._answer(status)

    # -- the parser's callbacks ------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """As uvicorn's, and counts the headers that need a check."""
        name = name.lower()
        if name in _TELLING:
            if name == b"host":
                self._told += 1
            elif name == b"expect":
                self.expect_100_continue = value.lower() == b"100-continue"
            else:
                self._told += 2
        self.headers.append((name, value))

    def on_chunk_header(self) -> None:
        self.headers = _TRAILERS

    def on_chunk_complete(self) -> None:
        """Called for the last chunk when its trailers have come."""
        self.headers, self._told = self._complete, 0


class _Resumed:
    """The callbacks of a parser that begins in the middle of a message.

    Until it `knows`, the callbacks of a head are dropped, because the parser is given a head that no client has sent.
    The end of the message is not dropped, because there may be no body.
    """

    knows = False

    def __init__(self, protocol: Any) -> None:
        for name in ("on_message_begin", "on_url", "on_header", "on_headers_complete"):
            setattr(self, name, self._later(getattr(protocol, name)))
        for name in ("on_body", "on_chunk_header", "on_chunk_complete", "on_message_complete"):
            setattr(self, name, getattr(protocol, name))

    def _later(self, callback: Callable[..., None]) -> Callable[..., None]:
        def call(*given: Any) -> None:
            if self.knows:
                callback(*given)

        return call
