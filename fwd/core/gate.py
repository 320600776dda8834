"""The IKE gate: ESP in transit between two peers may pass only for a while after an IKE exchange between them.

A stateful rule for pass-through (`ipsec-pass-through = "ike-gated"`): whoever did not negotiate gets no ESP through. It
is no proof of identity, for what IKE says is encrypted; it is proof that both ends answered each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from .ike import Peers, peers_of
from .policy import Action, Rule
from .session import Session

#: Denies what came to a closed gate.
CLOSED = Rule("ike-gate", Action.DENY)


@dataclass(slots=True)
class _Gate:
    open_until: float = 0.0
    sessions: dict[Session, None] = field(default_factory=dict)  # in order: there may be very many


class IkeGate:
    """All gates, one for any two peers; each stays open for `open_s` seconds. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._gates: dict[Peers, _Gate] = {}
        self._deadlines: deque[tuple[float, Peers]] = deque()

    def __len__(self) -> int:
        return len(self._gates)

    def open_until(self, a: bytes, b: bytes) -> float:
        """When the gate between these two closes; in the past if it is closed."""
        gate = self._gates.get(peers_of(a, b))
        return gate.open_until if gate else 0.0

    def join(self, session: Session) -> None:
        """The gate between its peers decides on this session from now on."""
        gate = self._gates.setdefault(_peers(session), _Gate())
        gate.sessions[session] = None

    def leave(self, session: Session) -> None:
        """The session has ended."""
        peers = _peers(session)
        gate = self._gates.get(peers)
        if gate and session in gate.sessions:
            del gate.sessions[session]
            if not gate.sessions and not gate.open_until:
                del self._gates[peers]

    def open(self, a: bytes, b: bytes, until: float) -> list[Session]:
        """Open the gate, or keep it open; gives the sessions that waited before it."""
        peers = peers_of(a, b)
        gate = self._gates.setdefault(peers, _Gate())
        if not gate.open_until:
            self._deadlines.append((until, peers))
        gate.open_until = max(gate.open_until, until)
        return [session for session in gate.sessions if session.rule is CLOSED]

    def next_deadline(self) -> float | None:
        """When the next gate may have to be closed."""
        return self._deadlines[0][0] if self._deadlines else None

    def close_due(self, now: float) -> Iterator[Session]:
        """Close the gates whose time is up; gives the sessions that may pass no more."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, peers = self._deadlines.popleft()
            gate = self._gates[peers]
            if gate.open_until > now:
                self._deadlines.append((gate.open_until, peers))
                continue
            gate.open_until = 0.0
            if not gate.sessions:
                del self._gates[peers]
            yield from list(gate.sessions)


def _peers(session: Session) -> Peers:
    return peers_of(session.client.address, session.server.address)
