"""Which of the records that outlive the daemon are to be written anew, and when; `succession.py` writes them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from .constants import SAVE_INTERVAL_S, SAVE_PAUSE_S, SAVE_SLICE
from .ike import Peers
from .session import Session
from .traffic_log import TrafficLog


class Changes:
    """What has changed since it was taken last. Times are monotonic seconds."""

    def __init__(self, traffic_log: TrafficLog) -> None:
        #: Whether records are kept at all: if not, nothing is noted.
        self.is_on = False
        self._traffic_log = traffic_log
        self._sessions: dict[int, None] = {}  # ids, in order
        self._gates: dict[Peers, None] = {}
        self._next_at = 0.0

    def __bool__(self) -> bool:
        """Whether there is something to take: a gate alone can wait."""
        return bool(self._sessions) or self._traffic_log.has_changes

    def note(self, session: Session) -> None:
        """The session's record is to be written anew."""
        if self.is_on:
            self._sessions[session.id] = None

    def note_gate(self, peers: Peers) -> None:
        """The same for the gate between two peers."""
        if self.is_on:
            self._gates[peers] = None

    def next_deadline(self) -> float | None:
        """When they are to be taken; None if there are none."""
        return self._next_at if self else None

    def is_due(self, now: float) -> bool:
        """Whether it is time to take them."""
        return bool(self) and now >= self._next_at

    def put_off(self, until: float) -> None:
        """They are not to be taken before."""
        self._next_at = until

    def take(self, now: float, of: Iterable[Session] | None = None) -> list[int]:
        """The ids of the next SAVE_SLICE sessions that have changed, or of those among some sessions."""
        if of is None:
            self._next_at = now + (SAVE_INTERVAL_S if len(self._sessions) <= SAVE_SLICE else SAVE_PAUSE_S)
            taken = list(islice(self._sessions, SAVE_SLICE))
        else:
            taken = [session.id for session in of if session.id in self._sessions]
        for session_id in taken:
            self.forget(session_id)
        return taken

    def take_gates(self) -> list[Peers]:
        """Those of whose gates the records have changed."""
        taken = list(self._gates)
        self._gates.clear()
        return taken

    def forget(self, session_id: int) -> None:
        """The session's record is written anew already."""
        self._sessions.pop(session_id, None)
