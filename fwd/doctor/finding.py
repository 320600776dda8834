"""What a check finds, and how it is said that something could not be looked at."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, TypeAlias, TypeVar


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"  # worth knowing
    WARNING = "warning"  # may cost packets, or knowledge of them
    PROBLEM = "problem"  # fwd cannot do its work, or does it wrong
    UNKNOWN = "unknown"  # could not look


class Told(NamedTuple):
    """One thing that a check has to say: what is, and the command that mends or shows it."""

    level: Level
    text: str
    action: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """The same with where it belongs."""

    area: str
    check: str
    level: Level
    text: str
    action: str


class CannotLook(Exception):
    """A fact that cannot be had: why, and how to have it. It stands in the fact's place until a check wants that."""

    def __init__(self, why: str, action: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.action = action


_T = TypeVar("_T")

Fact: TypeAlias = _T | CannotLook


def known(fact: Fact[_T]) -> _T:
    """The fact itself. Raises CannotLook."""
    if isinstance(fact, CannotLook):
        raise CannotLook(fact.why, fact.action)
    return fact
