"""The IKE gate: ESP in transit between two peers may pass only for a while after an IKE exchange between them.

A stateful rule for pass-through (`ipsec-pass-through = "ike-gated"`): whoever did not negotiate gets no ESP through.
What opens a gate is seen from outside (ike.py): a request, and from the other side an answer that fits it. It proves
that somebody on either side took part. It does not prove who, for addresses can be forged on each side, nor that the
answer was yes, for that is encrypted.

Whether a gate is open is a matter of the time alone. The sessions that it has decided on follow at their next packet
that is looked at, or in their turn, GATE_SLICE at a time: until then the fast path repeats what was decided before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf

from .between import ends_of
from .constants import GATE_SLICE
from .ike import Peers, peers_of
from .policy import Action, Rule
from .session import Session

#: Denies what came to a closed gate.
CLOSED = Rule("ike-gate", Action.DENY)


@dataclass(slots=True, eq=False)
class Gate:
    """Between two peers. `open_until`: monotonic seconds, 0.0 if it was closed in time."""

    open_until: float = 0.0
    sessions: dict[Session, None] = field(default_factory=dict, repr=False)  # in order: there may be very many

    def is_open(self, now: float) -> bool:
        """Whether ESP may pass."""
        return self.open_until > now


class IkeGate:
    """All gates, one for any two peers. Times are monotonic seconds. `changed` is told which open longer, or close."""

    def __init__(self, changed: Callable[[Peers], None]) -> None:
        self._note = changed
        self._gates: dict[Peers, Gate] = {}
        self._deadlines: list[tuple[float, Peers]] = []
        self._moved: deque[Session] = deque()

    def __len__(self) -> int:
        return len(self._gates)

    def open_until(self, a: bytes, b: bytes) -> float:
        """When the gate between these two closes; in the past if it is closed."""
        gate = self._gates.get(peers_of(a, b))
        return gate.open_until if gate else 0.0

    def join(self, session: Session) -> Gate:
        """The gate between its peers decides on this session from now on."""
        gate = session.gate = self._gates.setdefault(ends_of(session), Gate())
        gate.sessions[session] = None
        return gate

    def leave(self, session: Session) -> None:
        """The session has ended."""
        if (gate := session.gate) is None:
            return
        gate.sessions.pop(session, None)
        peers = ends_of(session)
        if not gate.sessions and not gate.open_until and self._gates.get(peers) is gate:
            del self._gates[peers]

    def open(self, a: bytes, b: bytes, until: float) -> None:
        """Open the gate, or keep it open."""
        peers = peers_of(a, b)
        gate = self._gates.setdefault(peers, Gate())
        if not gate.open_until:
            self._moved.extend(gate.sessions)
            heappush(self._deadlines, (until, peers))
        gate.open_until = max(gate.open_until, until)
        self._note(peers)

    def open_all(self) -> None:
        """Gates are no more: what waits may pass, and nothing closes."""
        for peers, gate in self._gates.items():
            gate.open_until = inf
            self._moved.extend(gate.sessions)
            self._note(peers)
        self._gates.clear()
        self._deadlines.clear()

    def next_deadline(self) -> float | None:
        """When `due` may have something to give."""
        if self._moved:
            return 0.0
        return self._deadlines[0][0] if self._deadlines else None

    def due(self, now: float) -> list[Session]:
        """Close the gates whose time is up; gives the next sessions whose gate has opened or closed."""
        for _ in range(GATE_SLICE):
            if not self._deadlines or self._deadlines[0][0] > now:
                break
            _, peers = heappop(self._deadlines)
            gate = self._gates[peers]
            self._moved.extend(gate.sessions)  # even if it is open: it may have been closed for a moment
            if gate.is_open(now):
                heappush(self._deadlines, (gate.open_until, peers))
                continue
            gate.open_until = 0.0
            self._note(peers)
            if not gate.sessions:
                del self._gates[peers]
        return [self._moved.popleft() for _ in range(min(GATE_SLICE, len(self._moved)))]
