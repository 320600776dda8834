"""What the core has to tell: each event names the session, which goes on changing; `moment_of` keeps how it was."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from .health import Finding
from .sa import ChildSa
from .session import Flow, Session


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
class SessionAbsorbed:
    """A session is part of another one from now on, whose id is `into`: its counts, and its packets to come."""

    session: Session
    into: int


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
    SessionCreated
    | SessionPromoted
    | SessionRekeyed
    | SessionDiscarded
    | SessionAbsorbed
    | SessionEnded
    | TunnelTrouble
)
Event: TypeAlias = SessionEvent | TunnelsStale | CounterRose

#: As a tuple, because events come by the thousand: a union is built anew each time it is asked.
ABOUT_NO_SESSION = (TunnelsStale, CounterRose)

#: What of a session changes while it lives, as it was at one moment; see `moment_of`.
Moment: TypeAlias = tuple[Any, ...]


def moment_of(event: Event) -> Moment | None:
    """How the event's session is now: cheap to keep, for nobody asks about most events. None if it is about none."""
    if isinstance(event, ABOUT_NO_SESSION):
        return None
    session = event.session
    c2s, s2c = session.c2s, session.s2c
    return (
        (c2s.address, c2s.zone, c2s.port, c2s.packet_count, c2s.byte_count),
        (s2c.address, s2c.zone, s2c.port, s2c.packet_count, s2c.byte_count),
        (session.rule, session.is_terminated, session.ingress, session.egress, session.timeout_s, session.created_at),
        (session.state, session.type, session.end_reason),
        session.generations[-1:],
    )


def as_it_was(event: Event, moment: Moment | None) -> Event:
    """The event with its session as of that moment: what identifies it and what it had counted.

    Its SPIs are those of now: most events come before the packet is counted that they are about.
    """
    if isinstance(event, ABOUT_NO_SESSION) or moment is None:
        return event
    c2s, s2c, facts, standing, generations = moment
    session = Session(event.session.id, event.session.application, Flow(*c2s), Flow(*s2c), *facts, *standing)
    session.generations = generations
    session.c2s.uses, session.s2c.uses = event.session.c2s.uses, event.session.s2c.uses
    return replace(event, session=session)
