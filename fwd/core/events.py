"""What the core has to tell: each event names the session, which goes on changing; `frozen` keeps it as it was."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

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


def frozen(event: Event) -> Event:
    """The event with its session as it is now: what identifies it and what it has counted, without its records."""
    if isinstance(event, TunnelsStale | CounterRose):
        return event
    session = event.session
    c2s, s2c = (
        Flow(flow.address, flow.zone, flow.port, flow.packet_count, flow.byte_count)
        for flow in (session.c2s, session.s2c)
    )
    then = Session(
        session.id,
        session.application,
        c2s,
        s2c,
        session.rule,
        session.is_terminated,
        session.ingress,
        session.egress,
        session.timeout_s,
        session.created_at,
        session.state,
        session.type,
        session.end_reason,
        generations=session.generations[-1:],
    )
    return replace(event, session=then)
