"""What may stand behind a filter key: a list of values, or `not` and a list; how it is read, and what fits it.

A key is of one of a few kinds. Which property of what a key is about, is no matter of this file: sessions have their
keys in session_filter.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any, Final, TypeAlias

from .policy import Prefix

#: Whether something, an address say, is among the values.
Test: TypeAlias = Callable[[Any], bool]

#: Values of one key, at most: each may cost time for each session.
VALUES_PER_KEY: Final = 64

_NOT: Final = "not "

#: What fits into no more than a float holds exactly; ASCII digits only.
_AMOUNT = re.compile(r"[0-9]{1,12}(\.[0-9]{1,3})?")
_NUMBER = re.compile(r"[0-9]{1,10}")
_HEX = re.compile(r"0[xX][0-9a-fA-F]{1,8}")


class FilterError(ValueError):
    """A filter word or its value makes no sense; the message says which and what is wanted."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How one value is read, and what is among several: `read` raises ValueError that says what is wanted.

    `is_list`: there may be several, with commas between.
    """

    read: Callable[[str], Any]
    among: Callable[[tuple[Any, ...]], Test]
    is_list: bool = True

    def parse(self, text: str) -> Wanted:
        """What stands behind a key: `a,b` or `not a,b`. Raises ValueError."""
        values = text.removeprefix(_NOT)
        parts = values.split(",") if self.is_list else [values]
        if len(parts) > VALUES_PER_KEY:
            raise ValueError(f"these are {len(parts)} values, want at most {VALUES_PER_KEY}")
        return Wanted(self, tuple(map(self.read, parts)), values != text)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a key asks for: one of the values (an amount: at least so much), or if `is_negated` all but these."""

    kind: Kind
    values: tuple[Any, ...]
    is_negated: bool = False

    def test(self) -> Test:
        """Whether something has what is asked for, as a function."""
        among = self.kind.among(self.values)
        return (lambda value: not among(value)) if self.is_negated else among


def parse(kinds: Mapping[str, Kind], words: Mapping[str, str]) -> dict[str, Wanted]:
    """What each key asks for, all of which must fit. Raises FilterError."""
    wanted = {}
    for key, text in words.items():
        if key not in kinds:
            raise FilterError(f"no filter key '{key}': use one of {', '.join(kinds)}")
        try:
            wanted[key] = kinds[key].parse(text)
        except ValueError as error:
            raise FilterError(f"filter {key}: '{text}' will not do: {error}") from None
    return wanted


# --- the kinds --------------------------------------------------------------------------------------------


def _prefix(text: str) -> Prefix:
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise ValueError("want an address or a prefix such as 192.0.2.0/24") from None
    return Prefix(network.network_address.packed, network.prefixlen)


def _in_prefix(prefixes: tuple[Prefix, ...]) -> Test:
    if len(prefixes) == 1:
        return prefixes[0].contains
    return lambda address: any(prefix.contains(address) for prefix in prefixes)


def _number(maximum: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text) if _NUMBER.fullmatch(text) else int(text, 16) if _HEX.fullmatch(text) else maximum + 1
        if number > maximum:
            raise ValueError(f"want a number from 0 to {maximum}, in decimal or, behind 0x, in hex")
        return number

    return read


def _amount(text: str) -> float:
    if not _AMOUNT.fullmatch(text):
        raise ValueError("want a number such as 60 or 1.5")
    return float(text)


def _name(text: str) -> str:
    if not text:
        raise ValueError("want a name, or several with commas between")
    return text


def _word(names: Mapping[str, str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        wanted = names.get(text.lower())
        if wanted is None:
            raise ValueError(f"want one of {', '.join(names)}")
        return wanted

    return read


def _equal(values: tuple[Any, ...]) -> Test:
    return frozenset(values).__contains__


def _common(values: tuple[Any, ...]) -> Test:
    """For what has several of them."""
    wanted = frozenset(values)
    return lambda those: not wanted.isdisjoint(those)


def word_of(names: Iterable[str]) -> Kind:
    """A word out of a closed set, in upper or lower case. Held against the word as it is in the set."""
    return Kind(_word({name.lower(): name for name in names}), _equal)


#: An address or a prefix; held against addresses in network order.
PREFIX: Final = Kind(_prefix, _in_prefix)

#: A number of 8 or 32 bits; held against numbers.
OCTET: Final = Kind(_number(2**8 - 1), _equal)
NUMBER: Final = Kind(_number(2**32 - 1), _equal)

#: A name, as it is; held against names.
NAME: Final = Kind(_name, _equal)

#: Numbers, names, or one text with whatever in it; held against all that there are of them.
ANY_NUMBER: Final = Kind(_number(2**32 - 1), _common)
ANY_NAME: Final = Kind(_name, _common)
ANY_TEXT: Final = Kind(_name, _common, is_list=False)

#: At least so much; held against an amount.
AT_LEAST: Final = Kind(_amount, lambda least: least[0].__le__, is_list=False)
