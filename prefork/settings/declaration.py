"""How a setting is declared: type, default, bounds, unit and one sentence of help. No setting is named here.

A setting is a class attribute; overriding it is plain assignment, as with socketserver's own attributes. A wrong value
is one error in one line, which names the setting, what it takes, and what it was given.
"""

import math
from typing import Any, TypeVar, cast

from prefork.errors import OptionError

T = TypeVar("T")


class Setting:
    """A class attribute with a default, its bounds, and its help. Overriding it is plain assignment."""

    def __init__(
        self,
        default: object,
        kind: type,
        help: str,
        *,
        low: float | None,
        high: float | None,
        none: bool,
        flag: bool,
        unit: str,
        octal: bool,
    ) -> None:
        self.default, self.kind, self.help, self.low, self.high, self.none = default, kind, help, low, high, none
        self.flag, self.unit, self.octal = flag, unit, octal
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type | None = None) -> object:
        return self.default() if callable(self.default) and not isinstance(self.default, type) else self.default

    def check(self, value: object) -> object:
        """Return `value` as the setting's type.

        Raises
        ------
        OptionError
            naming the setting, what it takes, and what it was given.
        """
        if value is None and self.none:
            return None
        if self.kind is object:
            return value
        good = isinstance(value, self.kind) or (self.kind is float and isinstance(value, int))
        if not good or (isinstance(value, bool) and self.kind is not bool):
            raise self._wrong(value)
        if self.kind in (int, float):
            try:
                number = self.kind(cast(Any, value))
            except OverflowError:  # a whole number that no float holds
                raise self._wrong(value) from None
            if (
                (isinstance(number, float) and not math.isfinite(number))
                or (self.low is not None and number < self.low)
                or (self.high is not None and number > self.high)
            ):
                raise self._wrong(value)
            return cast(object, number)
        return value

    def _wrong(self, value: object) -> OptionError:
        try:
            text = " ".join(repr(value).split())  # one line
        except Exception:  # a stranger's repr, or a whole number of too many digits
            text = f"a value of type {type(value).__name__}"
        text = text if len(text) <= 80 else text[:77] + "..."
        return OptionError(f"{self.name}: must be {self._wanted()}, not {text}")

    def _wanted(self) -> str:
        wanted = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}[self.kind]
        if self.unit:
            wanted += f" of {self.unit}"
        if self.octal:
            wanted = f"an octal number from 0o{self.low or 0:o} to 0o{self.high or 0:o}"
        elif self.low is not None and self.high is not None:
            wanted += f" from {self.low:g} to {self.high:g}"
        elif self.low is not None:
            wanted += f", {self.low:g} or more"
        return wanted + (" (or None)" if self.none else "")


def setting(
    default: T,
    kind: type,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    none: bool = False,
    flag: bool = True,
    unit: str = "",
    octal: bool = False,
) -> T:
    """Declare a setting. To a type checker it is its value, as with `dataclasses.field`.

    Parameters
    ----------
    octal
        The command reads it, and errors show its bounds, as chmod(1) does.
    """
    declared = Setting(default, kind, help, low=low, high=high, none=none, flag=flag, unit=unit, octal=octal)
    return cast(T, declared)
