"""Settings: declared once, checked once, frozen then."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefork.errors import OptionError, PreforkError
from prefork.kernel.cgroup import usable_cpus
from prefork.settings.settings import MAX_WORKERS, Options, Settings, declared


class Lines:
    """Whose repr is more than one line."""

    def __repr__(self) -> str:
        return "<a\nb>"


class Mute:
    """Whose repr raises."""

    def __repr__(self) -> str:
        raise RuntimeError


WRONG: dict[str, list[object]] = {
    "workers": [0, -1, MAX_WORKERS + 1, 1.0, 1.5, "4", None, True, [], math.nan],
    "request_timeout": [0, 0.0, -1, "1", math.nan, math.inf, True, 10**400],
    "boot_timeout": [0, 0.01, None, "", math.nan, -math.inf, False],
    "graceful_timeout": [-0.1, None, math.inf],
    "threads": [0, -1, 1025, 1.0, "4", True],
    "max_connections": [0, 1_000_001, 10.0, None],
    "keepalive_timeout": [-1, None, math.inf, "5"],
    "max_body": [-1, 1.0, None],
    "access_log": [None, 1, b"log"],
    "max_requests": [-1, 1.0, None, True],
    "max_requests_jitter": [-1, 0.5, "1"],
    "max_memory": [-1, 1e9, None],
    "max_lifetime": [-1, None, math.nan],
    "max_surge": [0, -1, 1.0, None, MAX_WORKERS + 1],
    "block_on_close": [0, 1, None, "yes"],
    "unix_mode": [-1, 0o1000, "0600", 660, 0.5, True],
    "unix_group": [None, 33, b"adm"],
    "control": [None, 1, b"path"],
}
STRANGE = [Lines(), Mute(), object(), "x" * 1000, "a\nb", -(10**5000), b"\n", ..., {}]


def refused(name: str, value: object) -> str:
    with pytest.raises(OptionError) as caught:
        Options({name: value})
    return str(caught.value)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong(name: str, value: object) -> None:
    """A value out of range or of the wrong type is refused in one line: the setting, what it takes, what it got."""
    line = refused(name, value)
    assert line.startswith(f"{name}: must be ") and "\n" not in line
    assert value == 10**400 or line.endswith(f"not {value!r}")


@pytest.mark.parametrize("name", sorted(WRONG))
@pytest.mark.parametrize("value", STRANGE, ids=range(len(STRANGE)))
def test_strange(name: str, value: object) -> None:
    """Also a value that cannot be shown, or only at length, is refused in one short line."""
    if name in ("access_log", "unix_group", "control") and isinstance(value, str):
        assert getattr(Options({name: value}), name) == value, "any text may be the name of a file, or of a group"
        return
    line = refused(name, value)
    assert line.startswith(f"{name}: must be ") and len(line.splitlines()) == 1 and len(line) < 200


def test_all_settings_are_tried() -> None:
    """No setting with bounds or a type is missing above."""
    assert {one.name for one in declared()} - set(WRONG) == {"worker_class"}


def test_all_settings_have_a_flag() -> None:
    """The command takes every setting, apart from the one that is about a call which only programs make."""
    assert {one.name for one in declared() if not one.flag} == {"block_on_close"}


def test_the_words() -> None:
    """The line says type, unit, bounds, and whether None will do."""
    assert refused("workers", 0) == f"workers: must be a whole number from 1 to {MAX_WORKERS}, not 0"
    seconds = "a number of seconds, 0.01 or more (or None)"
    assert refused("request_timeout", "x") == f"request_timeout: must be {seconds}, not 'x'"
    assert refused("block_on_close", 1) == "block_on_close: must be True or False, not 1"


def test_the_first_error_is_exit_code_2() -> None:
    """It is a ValueError for a program and exit code 2 for the command."""
    assert issubclass(OptionError, ValueError) and issubclass(OptionError, PreforkError)
    assert OptionError.exit_code == 2


def test_unknown() -> None:
    """A setting that does not exist is named."""
    assert refused("wrokers", 2) == "wrokers: there is no setting of this name"


def test_defaults() -> None:
    """Without any value, the defaults are in force, and pass their own checks."""
    options = Options({})
    assert options.workers == usable_cpus() >= 1
    assert options.request_timeout is None and options.boot_timeout == 30.0 and options.max_surge == 1
    for one in declared():
        assert getattr(options, one.name) == getattr(Settings, one.name)
        assert one.help and "\n" not in one.help


def test_frozen() -> None:
    """Options neither change nor lose a setting, nor gain one."""
    options = Options({"workers": 3})
    for name in ("workers", "wrokers"):
        with pytest.raises(AttributeError, match=name):
            setattr(options, name, 4)
        with pytest.raises(AttributeError, match=name):
            delattr(options, name)
    assert options.workers == 3


def test_copied() -> None:
    """What the server changes after serving began does not reach its options."""

    class Server(Settings):
        workers = 5
        max_memory = 1

    server = Server()
    server.max_memory = 2
    options = Options.of(server)
    server.workers = 6
    assert (options.workers, options.max_memory, options.max_surge) == (5, 2, 1)


def test_a_bare_object_has_the_defaults() -> None:
    """Whatever a server does not carry has its default."""
    assert Options.of(object()).__dict__ == Options({}).__dict__


def test_whole_seconds() -> None:
    """A whole number will do for seconds, and becomes a float."""
    assert repr(Options({"boot_timeout": 5}).boot_timeout) == "5.0"


@pytest.mark.parametrize(
    ("requests", "jitter", "most"), [(0, None, 0), (1, None, 0), (1000, None, 100), (10, 5, 5), (10, 99, 9), (0, 5, 0)]
)
def test_requests_jitter(requests: int, jitter: int | None, most: int) -> None:
    """By default a tenth; never so much that a worker would serve nothing."""
    assert Options({"max_requests": requests, "max_requests_jitter": jitter}).requests_jitter == most


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.lists(st.integers())


@given(name=st.sampled_from(sorted(WRONG)), value=ANYTHING)
@settings(deadline=None, database=None, derandomize=False)
def test_anything(name: str, value: Any) -> None:
    """Any value is taken, or refused by an OptionError that names the setting in one line."""
    try:
        taken = getattr(Options({name: value}), name)
    except OptionError as error:
        assert str(error).startswith(f"{name}: ") and len(str(error).splitlines()) == 1
    else:
        assert taken == (
            float(value) if isinstance(taken, float) else value
        )  # beyond 2**53 s a float is another number
