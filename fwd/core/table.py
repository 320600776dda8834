"""The session table: bounded, found by id and by packet key, with the ended sessions still readable.

All keys of a session are indexed together or not at all (SPEC section 2): a table that knows one direction
only would show half a tunnel.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

from .sa import SpiKey
from .session import Flow, FlowKey, Session, Tally, empty_tally
from .state import Trigger

Key: TypeAlias = FlowKey | SpiKey

MAX_ID = 2**31 - 1

#: The list of ids is written anew when, beside so many, more than half of it are no session's any more.
_STALE_IDS = 64


class TableFull(Exception):
    """All places are taken; nothing was changed."""


class KeyInUse(Exception):
    """Another session has one of the keys; nothing was changed."""


class SessionTable:
    """Live sessions by id and by key, at most `capacity`; ended ones by id, at most `keep_ended`."""

    def __init__(self, capacity: int, keep_ended: int) -> None:
        self.capacity = capacity
        self.keep_ended = keep_ended
        self._live: dict[int, Session] = {}
        self._ended: dict[int, Session] = {}
        self._flows: dict[Key, Flow] = {}
        #: The ids of the live sessions in ascending order, among others that were.
        self._order: list[int] = []
        self.last_id = 0
        #: How many live sessions there are of each kind: nobody has to look through the table for that.
        self.tally: Tally = empty_tally()
        #: What a packet asks for, with no call in between: the flow that counts it, or None.
        self.lookup = self._flows.get

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Session]:
        """The live sessions in the order of their allocation."""
        return iter(self._live.values())

    def after(self, session_id: int) -> Iterator[Session]:
        """The live sessions with a higher id, in the order of their ids; the table must not change meanwhile."""
        for position in range(bisect_right(self._order, session_id), len(self._order)):
            session = self._live.get(self._order[position])
            if session is not None:
                yield session

    @property
    def utilisation(self) -> float:
        """The share of places taken, 0 to 1 (more after the capacity was lowered)."""
        return len(self._live) / self.capacity

    @property
    def ended(self) -> Iterator[Session]:
        """Sessions that ended and are still readable, the oldest end first."""
        return iter(self._ended.values())

    @property
    def ended_count(self) -> int:
        """How many these are."""
        return len(self._ended)

    def allocate_id(self) -> int:
        """The next session id: from 1 upwards, never one that is still readable."""
        while True:
            self.last_id = self.last_id % MAX_ID + 1
            if self.last_id not in self._live and self.last_id not in self._ended:
                return self.last_id

    def find(self, session_id: int) -> Session | None:
        """The session of that id, live or ended."""
        return self._live.get(session_id) or self._ended.get(session_id)

    def live(self, session_id: int) -> Session | None:
        """The session of that id if it has not ended."""
        return self._live.get(session_id)

    def add(self, session: Session, entries: Mapping[Key, Flow]) -> None:
        """Take a new session in, with all its keys. Raises TableFull or KeyInUse and changes nothing."""
        if len(self._live) >= self.capacity:
            raise TableFull
        self.index(session, entries)
        session.move(Trigger.ALLOCATE)
        self._enter(session)
        # Ids ascend, but for those of sessions that take over a provisional one's.
        if not self._order or session.id > self._order[-1]:
            self._order.append(session.id)
        elif self._order[position := bisect_left(self._order, session.id)] != session.id:
            self._order.insert(position, session.id)

    def restore(self, session: Session, entries: Mapping[Key, Flow]) -> None:
        """Take a session in as it was in another table, even if there are too many now.

        Sessions come in the order of their ids, the ended ones in that of their ends. Raises KeyInUse, and then nothing
        has changed.
        """
        if session.ended_at is not None:
            self._ended[session.id] = session
            return
        self.index(session, entries)
        self._enter(session)
        self._order.append(session.id)

    def _enter(self, session: Session) -> None:
        self._live[session.id] = session
        session.tally = self.tally
        self.tally[session.application, session.state, session.type] += 1

    def index(self, session: Session, entries: Mapping[Key, Flow]) -> None:
        """Let further keys lead to the session, all or none. Raises KeyInUse and changes nothing."""
        fresh = []
        for key in entries:
            taken = self._flows.get(key)
            if taken is None:
                fresh.append(key)
            elif taken.session is not session:
                raise KeyInUse
        session.keys = (*session.keys, *fresh)
        self._flows.update(entries)

    def unindex(self, session: Session, keys: Iterable[Key]) -> None:
        """Let these keys lead to the session no more; those of others stay."""
        for key in keys:
            flow = self._flows.get(key)
            if flow is not None and flow.session is session:
                del self._flows[key]
        session.keys = tuple(key for key in session.keys if key in self._flows)

    def end(self, session: Session, now: float) -> list[Session]:
        """Take a live session out; it stays readable by its id for a while. Gives those that are so no more."""
        self.remove(session)
        session.move(Trigger.END)
        session.move(Trigger.RELEASE)
        session.move(Trigger.RECYCLE)
        session.ended_at = now
        self._ended[session.id] = session
        forgotten = []
        while len(self._ended) > self.keep_ended:
            forgotten.append(self._ended.pop(next(iter(self._ended))))
        return forgotten

    def remove(self, session: Session) -> None:
        """Take a live session out without a trace: its counts live on in another one."""
        self.unindex(session, session.keys)
        del self._live[session.id]
        session.tally = None
        self.tally[session.application, session.state, session.type] -= 1
        if len(self._order) > 2 * len(self._live) + _STALE_IDS:
            self._order = sorted(self._live)

    def forget_ended(self, before: float) -> list[Session]:
        """Drop the ended sessions that ended before that time, and give them."""
        forgotten = []
        while self._ended:
            session = next(iter(self._ended.values()))
            assert session.ended_at is not None
            if session.ended_at >= before:
                break
            del self._ended[session.id]
            forgotten.append(session)
        return forgotten
