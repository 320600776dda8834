"""What the core has to tell: each event names the session as it is when the event is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from .health import Finding
from .sa import ChildSa
from .session import Session


@dataclass(frozen=True, slots=True)
class SessionCreated:
    """A session was set up, by a packet (type FLOW) or by the IKE daemon (type PRED)."""

    session: Session


@dataclass(frozen=True, slots=True)
class SessionPromoted:
    """An announced session got its first packet, or a provisional one its SA."""

    session: Session


@dataclass(frozen=True, slots=True)
class SessionRekeyed:
    """A tunnel's session got a further CHILD_SA."""

    session: Session
    sa: ChildSa


@dataclass(frozen=True, slots=True)
class SessionDiscarded:
    """A session was denied: its packets are dropped from now on."""

    session: Session


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """A session ended; `session.end_reason` says why."""

    session: Session


@dataclass(frozen=True, slots=True)
class TunnelTrouble:
    """Something is wrong with a tunnel that ends here; `is_over`: it was, and is no more."""

    session: Session
    finding: Finding
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class TunnelsStale:
    """The IKE daemon does not answer: what is known of tunnels may be out of date. `is_over`: it answers again."""

    reason: str
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class CounterRose:
    """A counter of severity warn or drop rose by `amount` within about a second."""

    name: str
    description: str
    amount: int
    value: int


SessionEvent: TypeAlias = (
    SessionCreated | SessionPromoted | SessionRekeyed | SessionDiscarded | SessionEnded | TunnelTrouble
)
Event: TypeAlias = SessionEvent | TunnelsStale | CounterRose
