"""Which sessions an operator asked for: PAN-OS's `filter` words as one predicate."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from ipaddress import ip_network
from typing import TypeAlias

from .policy import Prefix
from .session import Application, Session, SessionType
from .state import State

Predicate: TypeAlias = Callable[[Session, float], bool]


class FilterError(ValueError):
    """A filter word or its value makes no sense; the message says which and what is wanted."""


#: What fits into no more than a float holds exactly; ASCII digits only.
_AMOUNT = re.compile(r"[0-9]{1,12}(\.[0-9]{1,3})?")
_NUMBER = re.compile(r"[0-9]{1,10}")


def _prefix(text: str) -> Prefix:
    """A prefix or a single address, in text form, as a Prefix. Raises ValueError, saying what is wanted."""
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise ValueError("want an address or a prefix such as 192.0.2.0/24") from None
    return Prefix(network.network_address.packed, network.prefixlen)


def _address(side: str) -> Callable[[str], Predicate]:
    def build(text: str) -> Predicate:
        prefix = _prefix(text)
        return lambda session, now: prefix.contains(getattr(session, side).address)

    return build


def _number(maximum: int, value_of: Callable[[Session], int]) -> Callable[[str], Predicate]:
    def build(text: str) -> Predicate:
        if not _NUMBER.fullmatch(text) or int(text) > maximum:
            raise ValueError(f"want a number from 0 to {maximum}")
        number = int(text)
        return lambda session, now: value_of(session) == number

    return build


def _text(value_of: Callable[[Session], str]) -> Callable[[str], Predicate]:
    return lambda text: lambda session, now: value_of(session) == text


def _one_of(names: Mapping[str, str], value_of: Callable[[Session], str]) -> Callable[[str], Predicate]:
    """A word out of a closed set, in upper or lower case."""

    def build(text: str) -> Predicate:
        wanted = names.get(text.lower())
        if wanted is None:
            raise ValueError(f"want one of {', '.join(names)}")
        return lambda session, now: value_of(session) == wanted

    return build


def _amount(text: str) -> float:
    if not _AMOUNT.fullmatch(text):
        raise ValueError("want a number such as 60 or 1.5")
    return float(text)


def _min_age(text: str) -> Predicate:
    seconds = _amount(text)
    return lambda session, now: now - session.created_at >= seconds


def _min_kb(text: str) -> Predicate:
    kilobytes = _amount(text)
    return lambda session, now: session.byte_count >= kilobytes * 1024


#: Every filter word but `count`, which is the client's, with what turns its value into a predicate.
KEYS: Mapping[str, Callable[[str], Predicate]] = {
    "application": _one_of({app.lower(): app for app in Application}, lambda session: session.application),
    "source": _address("client"),
    "destination": _address("server"),
    "source-port": _number(2**32 - 1, lambda session: session.client.port),
    "destination-port": _number(2**32 - 1, lambda session: session.server.port),
    "protocol": _number(255, lambda session: session.application.protocol),
    "from": _text(lambda session: session.client.zone),
    "to": _text(lambda session: session.server.zone),
    "state": _one_of({state.lower(): state for state in State}, lambda session: session.state),
    "type": _one_of({kind.lower(): kind for kind in SessionType}, lambda session: session.type),
    "rule": _text(lambda session: session.rule.name),
    "min-age": _min_age,
    "min-kb": _min_kb,
    "ingress-interface": _text(lambda session: session.ingress),
    "egress-interface": _text(lambda session: session.egress),
}


def build_filter(words: Mapping[str, str]) -> Predicate:
    """One predicate (session, now in monotonic seconds) for all words together. Raises FilterError."""
    tests = []
    for key, value in words.items():
        if key not in KEYS:
            raise FilterError(f"no filter key '{key}': use one of {', '.join(KEYS)}")
        try:
            tests.append(KEYS[key](value))
        except ValueError as error:
            raise FilterError(f"filter {key}: '{value}' will not do: {error}") from None
    match tests:  # without a loop where none is needed: a page asks this for thousands of sessions
        case []:
            return lambda session, now: True
        case [test]:
            return test
        case [first, second]:
            return lambda session, now: first(session, now) and second(session, now)
    return lambda session, now: all(test(session, now) for test in tests)
