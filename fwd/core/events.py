"""What the core has to tell: each event names the session as it is when the event is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

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


Event: TypeAlias = SessionCreated | SessionPromoted | SessionRekeyed | SessionDiscarded | SessionEnded
