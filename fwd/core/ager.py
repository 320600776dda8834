"""The session ager: which sessions have run out of time, with bounded work at each turn.

It has a clock of its own. Accelerated ageing (PAN-OS: from 80 % table use, factor 2) lets that clock run
faster, so that every time to live shrinks at once without touching a single session. A packet that prolongs
a session only writes `expires_at`; the heap hears of it when the old deadline comes up.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from .constants import AGER_WORK_PER_TURN
from .session import Session
from .table import SessionTable

#: Deadlines so close are the same one: the way to real time and back costs a rounding error.
_TICK_S = 1e-6


class Ager:
    """Deadlines of the sessions of one table. Times named `now` are monotonic seconds."""

    def __init__(self, table: SessionTable, now: float) -> None:
        self._table = table
        self._heap: list[tuple[float, int]] = []
        self._age = 0.0
        self._since = now
        self.factor = 1

    def age(self, now: float) -> float:
        """The ager's own time, in which `Session.expires_at` is kept."""
        return self._age + (now - self._since) * self.factor

    def set_factor(self, factor: int, now: float) -> None:
        """From now on let the ager's time run so many times as fast as the clock."""
        self._age, self._since = self.age(now), now
        self.factor = factor

    def time_to_live_s(self, session: Session, now: float) -> float:
        """Seconds of real time until the session ends if no packet comes."""
        return max(0.0, (session.expires_at - self.age(now)) / self.factor)

    def arm(self, session: Session, timeout_s: float, now: float) -> None:
        """Let the session be due after that many seconds of the ager's time."""
        session.expires_at = self.age(now) + timeout_s
        if session.armed_at is None or session.expires_at < session.armed_at:
            self._push(session)
            if len(self._heap) > 2 * len(self._table) + 4096:
                self._compact()

    def is_due(self, session: Session, now: float) -> bool:
        """Whether the session's time is up."""
        return session.expires_at <= self.age(now) + _TICK_S  # a turn at `next_deadline` finds what it was meant for

    def resume(self, session: Session) -> None:
        """A session that was due is not, after all: its `expires_at` says when it will be."""
        self._push(session)

    def due(self, now: float) -> Iterator[Session]:
        """The sessions whose time is up; those left over by the bound on work come with the next turn."""
        age = self.age(now) + _TICK_S
        for _ in range(AGER_WORK_PER_TURN):
            if not self._heap or self._heap[0][0] > age:
                return
            armed_at, session_id = heapq.heappop(self._heap)
            session = self._table.live(session_id)
            if session is None or session.armed_at != armed_at:
                continue  # it ended, or has an earlier deadline by now
            session.armed_at = None
            if self.is_due(session, now):
                yield session
            else:
                self._push(session)

    def next_deadline(self) -> float | None:
        """When `due` may have something to give, in monotonic seconds; None if nothing is armed."""
        if not self._heap:
            return None
        return self._since + (self._heap[0][0] - self._age) / self.factor

    def _push(self, session: Session) -> None:
        session.armed_at = session.expires_at
        heapq.heappush(self._heap, (session.armed_at, session.id))

    def _compact(self) -> None:
        """Throw out the deadlines of sessions that ended otherwise, so that the heap stays bounded."""
        self._heap = [(session.armed_at, session.id) for session in self._table if session.armed_at is not None]
        heapq.heapify(self._heap)
