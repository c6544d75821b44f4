"""Fixtures of the tests of the class `asgi`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.asgi import HTTPLoad


@pytest.fixture
def load() -> Iterator[Callable[..., HTTPLoad]]:
    begun: list[HTTPLoad] = []

    def begin(*arguments: Any, **options: Any) -> HTTPLoad:
        begun.append(HTTPLoad(*arguments, **options))
        return begun[-1]

    yield begin
    for one in begun:
        one.over.set()
