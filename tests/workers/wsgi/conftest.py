"""Fixtures of the tests of the class `wsgi`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from support.scripts import Start
from support.web import Web


@pytest.fixture
def web(start: Start) -> Iterator[Callable[..., Web]]:
    """`web(program)`: a client that is closed with the test."""
    with ExitStack() as stack:
        yield lambda program, **options: stack.enter_context(Web(program.address, **options))
