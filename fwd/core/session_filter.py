"""Which sessions an operator asked for: PAN-OS's `filter` words as one predicate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from .filter_value import (
    ANY_NAME,
    ANY_NUMBER,
    ANY_TEXT,
    AT_LEAST,
    NAME,
    NUMBER,
    OCTET,
    PREFIX,
    Kind,
    Test,
    parse,
    word_of,
)
from .session import Application, Session, SessionType
from .state import State

Predicate: TypeAlias = Callable[[Session, float], bool]


class Key(NamedTuple):
    """A filter word: of which kind its values are, and what of a session they are held against."""

    kind: Kind
    value: Callable[[Session, float], Any]


def _spis(session: Session, now: float) -> Iterable[int]:
    """The SPIs that were seen in either direction, and those of all generations of a tunnel that ends here."""
    spis = [use.spi for flow in (session.c2s, session.s2c) for use in flow.uses]
    for generation in session.generations:
        spis += (generation.sa.spi_in, generation.sa.spi_out)
    return spis


def _tunnels(session: Session, now: float) -> Iterable[str]:
    sa = session.sa
    return (sa.child_name, sa.ike_name, f"{sa.ike_name}/{sa.child_name}") if sa else ()


def _ike_ids(session: Session, now: float) -> Iterable[str]:
    return (session.sa.local_id, session.sa.remote_id) if session.sa else ()


#: Every filter word but `count`, which is the client's. Times are monotonic seconds.
KEYS: Mapping[str, Key] = {
    "application": Key(word_of(Application), lambda session, now: session.application),
    "source": Key(PREFIX, lambda session, now: session.client.address),
    "destination": Key(PREFIX, lambda session, now: session.server.address),
    "source-port": Key(NUMBER, lambda session, now: session.client.port),
    "destination-port": Key(NUMBER, lambda session, now: session.server.port),
    "protocol": Key(OCTET, lambda session, now: session.application.protocol),
    "from": Key(NAME, lambda session, now: session.client.zone),
    "to": Key(NAME, lambda session, now: session.server.zone),
    "state": Key(word_of(State), lambda session, now: session.state),
    "type": Key(word_of(SessionType), lambda session, now: session.type),
    "rule": Key(NAME, lambda session, now: session.rule.name),
    "min-age": Key(AT_LEAST, lambda session, now: now - session.created_at),
    "min-kb": Key(AT_LEAST, lambda session, now: session.byte_count / 1024),
    "ingress-interface": Key(NAME, lambda session, now: session.ingress),
    "egress-interface": Key(NAME, lambda session, now: session.egress),
    "spi": Key(ANY_NUMBER, _spis),
    "tunnel": Key(ANY_NAME, _tunnels),
    "ike-id": Key(ANY_TEXT, _ike_ids),
}

_KINDS = {name: key.kind for name, key in KEYS.items()}


def build_filter(words: Mapping[str, str]) -> Predicate:
    """One predicate (session, now in monotonic seconds) for all words together. Raises FilterError."""
    tests = [_predicate(KEYS[key], wanted.test()) for key, wanted in parse(_KINDS, words).items()]
    match tests:  # without a loop where none is needed: a page asks this for thousands of sessions
        case []:
            return lambda session, now: True
        case [test]:
            return test
        case [first, second]:
            return lambda session, now: first(session, now) and second(session, now)
    return lambda session, now: all(test(session, now) for test in tests)


def _predicate(key: Key, test: Test) -> Predicate:
    value = key.value
    return lambda session, now: test(value(session, now))
