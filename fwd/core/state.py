"""The session state machine, whole, as one table.

Theory. A session goes through the states that PAN-OS names. It is allocated (INIT -> OPENING), and stays in
OPENING only while it waits for its first packet: that is what a session announced by the IKE daemon does
(type PRED). The first packet asks the policy: ACTIVE or DISCARD. A session whose tunnel went down is CLOSING for a
short while, because packets that were sent before may still arrive; should the tunnel come back meanwhile, as it does
when a peer authenticates anew, it is ACTIVE again, or OPENING if no packet ever came. Every session ends in
the same way, CLOSED -> FREE -> INIT: it leaves the lookup tables (CLOSED), gives back its place (FREE), and
stays readable in the state of an unused slot (INIT), as PAN-OS shows it.

There is no way out of DISCARD but the end: a session that should be allowed after all is a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class State(StrEnum):
    """PAN-OS's session states."""

    INIT = "INIT"
    OPENING = "OPENING"
    ACTIVE = "ACTIVE"
    DISCARD = "DISCARD"
    CLOSING = "CLOSING"
    CLOSED = "CLOSED"
    FREE = "FREE"


class Trigger(StrEnum):
    """What moves a session from one state to another."""

    ALLOCATE = "allocate"
    PERMIT = "permit"
    DENY = "deny"
    TUNNEL_DOWN = "tunnel-down"
    TUNNEL_UP = "tunnel-up"
    TUNNEL_ANNOUNCED = "tunnel-announced"
    END = "end"
    RELEASE = "release"
    RECYCLE = "recycle"


class EndReason(StrEnum):
    """Why a session ended; UNKNOWN while it lives, as PAN-OS prints it."""

    UNKNOWN = "unknown"
    AGED_OUT = "aged-out"
    POLICY_DENY = "policy-deny"
    TUNNEL_DOWN = "tunnel-down"
    CLEARED = "cleared"


TRANSITIONS: Final[Mapping[State, Mapping[Trigger, State]]] = MappingProxyType(
    {
        State.INIT: {Trigger.ALLOCATE: State.OPENING},
        State.OPENING: {
            Trigger.PERMIT: State.ACTIVE,
            Trigger.DENY: State.DISCARD,
            Trigger.TUNNEL_DOWN: State.CLOSING,
            Trigger.END: State.CLOSED,
        },
        State.ACTIVE: {
            Trigger.DENY: State.DISCARD,
            Trigger.TUNNEL_DOWN: State.CLOSING,
            Trigger.END: State.CLOSED,
        },
        State.DISCARD: {Trigger.END: State.CLOSED},
        State.CLOSING: {
            Trigger.TUNNEL_UP: State.ACTIVE,
            Trigger.TUNNEL_ANNOUNCED: State.OPENING,
            Trigger.END: State.CLOSED,
        },
        State.CLOSED: {Trigger.RELEASE: State.FREE},
        State.FREE: {Trigger.RECYCLE: State.INIT},
    }
)


class IllegalTransition(RuntimeError):
    """The table has no such transition; nothing was changed."""


def next_state(state: State, trigger: Trigger) -> State:
    """Where `trigger` leads from `state`. Raises IllegalTransition if the table has no such row."""
    try:
        return TRANSITIONS[state][trigger]
    except KeyError:
        raise IllegalTransition(f"no transition from {state} by {trigger}") from None
