"""What an argument says of itself: help, limits, where its value comes from."""

from typing import Any

import attrs
from attrs import frozen


@frozen
class Limits:
    """A closed interval; `above` excludes its lower end. None is unbounded."""

    low: float | None = None
    high: float | None = None
    above: bool = False

    def hold(self, value: float) -> bool:
        over = self.low is None or (value > self.low if self.above else value >= self.low)
        return over and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"greater than {self.low}" if self.above else f"at least {self.low}"
        return f"in {'(' if self.above else '['}{self.low}, {self.high}]"


ANY = Limits()
NOT_NEGATIVE = Limits(0)
POSITIVE = Limits(1)
RATIO = Limits(0, 1)
SEED = Limits(0, 2**63 - 1)


@frozen
class Info:
    """What a field says of itself beside type and default."""

    help: str
    limits: Limits = ANY
    otherwise: str = ""
    """Where a default of None takes its value from; empty where None means off."""
    required: bool = False
    path: bool = False
    """A path to read, which may point into the installed package (`omnistep:…`)."""


def arg(default: Any, help: str, limits: Limits = ANY, **info: Any) -> Any:
    """A field with its `Info`."""
    metadata = {"info": Info(help, limits, **info)}
    if isinstance(default, dict):
        return attrs.field(factory=default.copy, metadata=metadata)
    return attrs.field(default=default, metadata=metadata)


def required(help: str, **info: Any) -> Any:
    """A field without a default: a command that needs it stops while it is empty."""
    return arg("", help, required=True, **info)
