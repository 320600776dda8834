"""By what sessions can be put in order: the words of `sort`, and the value of each for a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from .rates import NOTHING
from .session import Session

if TYPE_CHECKING:
    from .firewall import Firewall

#: A text or a number; all values of one key are of one type. What changes with time is given as a moment, so that pages
#: that are asked for one after the other fit together.
Value: TypeAlias = Any


class OrderError(ValueError):
    """There is no such key; the message says which there are."""


def _address(address: bytes) -> str:
    """Addresses in their own order, IPv4 before IPv6."""
    return f"{len(address):02}{address.hex()}"


def _rate(firewall: Firewall, session: Session, now: float) -> tuple[float, float]:
    """Packets and bytes a second, of both directions."""
    sent, received = firewall.rate(session.c2s, now) or NOTHING, firewall.rate(session.s2c, now) or NOTHING
    return sent[0] + received[0], sent[1] + received[1]


KEYS: Mapping[str, Callable[[Firewall, Session, float], Value]] = {
    "id": lambda _, session, now: session.id,
    "age": lambda _, session, now: -session.created_at,
    "idle": lambda _, session, now: session.idle_s(0.0),
    "ttl": lambda _, session, now: session.expires_at,
    "packets": lambda _, session, now: session.packet_count,
    "bytes": lambda _, session, now: session.byte_count,
    "packet-rate": lambda firewall, session, now: _rate(firewall, session, now)[0],
    "bit-rate": lambda firewall, session, now: _rate(firewall, session, now)[1] * 8,
    "source": lambda _, session, now: _address(session.client.address),
    "destination": lambda _, session, now: _address(session.server.address),
    "from": lambda _, session, now: session.client.zone,
    "to": lambda _, session, now: session.server.zone,
    "application": lambda _, session, now: session.application.value,
    "state": lambda _, session, now: session.state.value,
    "rule": lambda _, session, now: session.rule.name,
    "trouble": lambda firewall, session, now: firewall.trouble_count(session),
}

#: Those that are measured only while somebody asks.
RATES = frozenset({"packet-rate", "bit-rate"})


def value_of(key: str) -> Callable[[Firewall, Session, float], Value]:
    """The function that gives a session's value. Raises OrderError."""
    if key not in KEYS:
        raise OrderError(f"cannot sort by '{key}': use one of {', '.join(KEYS)}")
    return KEYS[key]
