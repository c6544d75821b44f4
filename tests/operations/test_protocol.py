"""The language of the control socket: any bytes are a request or a typed error, in bounded time and memory."""

import json
import time
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import prefork.operations.protocol as protocol
from prefork.operations.protocol import ControlError, Request

LINES = st.one_of(
    st.binary(max_size=protocol.REQUEST_LIMIT),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries(
        {"prefork": st.just(1), "do": st.sampled_from([*protocol.REQUESTS, "", "dance"])},
        optional={name: st.integers() | st.none() | st.floats() for name in ("workers", "slot", "ticket", "other")},
    ).map(lambda value: json.dumps(value).encode()),
)


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        (b'{"prefork": 1, "do": "status"}', Request("status", {})),
        (b'  {"do":"scale","workers":1,"prefork":1}  \r', Request("scale", {"workers": 1})),
        (b'{"prefork": 1, "do": "recycle", "slot": 0}', Request("recycle", {"slot": 0})),
        (b'{"prefork": 1, "do": "reload-result", "ticket": 7}', Request("reload-result", {"ticket": 7})),
    ],
)
def test_requests(line: bytes, request_: Request) -> None:
    """A request is an object with the version, a name, and the numbers that belong to that name."""
    assert protocol.parse_request(line) == request_


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"", "bad-request"),
        (b"status", "bad-request"),
        (b"[1]", "bad-request"),
        (b"\xff\xfe", "bad-request"),
        (b"[" * 4000, "bad-request"),
        (b'{"prefork": 1, "do": "scale", "workers": NaN}', "bad-request"),
        (b"9" * 4000, "bad-request"),
        (b'{"do": "status"}', "version"),
        (b'{"prefork": 2, "do": "status"}', "version"),
        (b'{"prefork": true, "do": "status"}', "version"),
        (b'{"prefork": 1}', "unknown-request"),
        (b'{"prefork": 1, "do": "dance"}', "unknown-request"),
        (b'{"prefork": 1, "do": ["status"]}', "unknown-request"),
        (b'{"prefork": 1, "do": "status", "workers": 1}', "bad-argument"),
        (b'{"prefork": 1, "do": "scale"}', "bad-argument"),
        (b'{"prefork": 1, "do": "scale", "workers": 0}', "bad-argument"),
        (b'{"prefork": 1, "do": "scale", "workers": 2049}', "bad-argument"),
        (b'{"prefork": 1, "do": "scale", "workers": true}', "bad-argument"),
        (b'{"prefork": 1, "do": "scale", "workers": 2.0}', "bad-argument"),
        (b'{"prefork": 1, "do": "scale", "workers": "2"}', "bad-argument"),
        (b'{"prefork": 1, "do": "recycle", "slot": -1}', "bad-argument"),
        (b" " * 4097, "too-long"),
    ],
)
def test_refusals(line: bytes, kind: str) -> None:
    """What is not understood in full is refused, with a kind for programs and a line for people."""
    with pytest.raises(ControlError) as caught:
        protocol.parse_request(line)
    assert caught.value.kind == kind and caught.value.text.isprintable()
    assert kind in protocol.ERRORS


@given(LINES)
@example(b'{"a":' * 800)
@example(b'{"prefork": 1, "do": "scale", "workers": 1' + b"0" * 4000 + b"}")
def test_any_bytes(line: bytes) -> None:
    """Any bytes are a request of the table or a typed error, within 50 ms and 1 MiB."""
    tracemalloc.start()
    begun = time.process_time()
    try:
        request = protocol.parse_request(line)
    except ControlError as error:
        assert error.kind in protocol.ERRORS and error.text.isprintable() and len(error.text) < 200
    else:
        assert request.members.keys() == protocol.REQUESTS[request.do].keys()
        assert protocol.parse_request(protocol.request_line(request.do, **request.members)) == request
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1 << 20
    assert time.process_time() - begun < 0.05


@given(st.binary(max_size=200) | LINES.map(lambda line: line + b"\n"))
def test_any_answer(line: bytes) -> None:
    """Whatever answers at a socket, the client has an object or a typed error."""
    try:
        assert isinstance(protocol.parse_answer(line), dict)
    except ControlError as error:
        assert error.kind


def test_answers_come_back() -> None:
    """An answer and a refusal are read as they were written."""
    assert protocol.parse_answer(protocol.answer_line({"size": 2})) == {"size": 2}
    with pytest.raises(ControlError) as caught:
        protocol.parse_answer(protocol.error_line(ControlError("busy", "8 clients")))
    assert (caught.value.kind, caught.value.text) == ("busy", "8 clients")
    with pytest.raises(ControlError, match="no control socket"):
        protocol.parse_answer(protocol.answer_line({})[:-1])
