"""The session table: bounded, found by id and by packet key, with the ended sessions still readable.

All keys of a session are indexed together or not at all (SPEC section 2): a table that knows one direction
only would show half a tunnel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

from .by_number import ByNumber
from .sa import SpiKey
from .session import Flow, FlowKey, Session, Tally, empty_tally
from .state import Trigger

Key: TypeAlias = FlowKey | SpiKey

MAX_ID = 2**31 - 1


class TableFull(Exception):
    """All places are taken; nothing was changed."""


class KeyInUse(Exception):
    """Another session has one of the keys; nothing was changed."""


class SessionTable:
    """Live sessions by id and by key, at most `capacity`; ended ones by id, at most `keep_ended`."""

    def __init__(self, capacity: int, keep_ended: int) -> None:
        self.capacity = capacity
        self.keep_ended = keep_ended
        self._live: ByNumber[Session] = ByNumber()
        self._ended: dict[int, Session] = {}
        self._flows: dict[Key, Flow] = {}
        #: Those of both that are tunnels' of this host: all, and by the names of their SAs.
        self._tunnels: ByNumber[Session] = ByNumber()
        self._tunnels_named: dict[str, ByNumber[Session]] = {}
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
        return self._live.after(session_id)

    def tunnels_after(self, session_id: int, name: str | None = None) -> Iterator[Session]:
        """The same of tunnels that end on this host, and of those that ended and are still readable.

        With a name only those whose IKE_SA or CHILD_SA is called so.
        """
        sessions = self._tunnels if name is None else self._tunnels_named.get(name)
        return iter(()) if sessions is None else sessions.after(session_id)

    @property
    def utilisation(self) -> float:
        """The share of places taken, 0 to 1 (more after the capacity was lowered)."""
        return len(self._live) / self.capacity

    @property
    def ended(self) -> Iterator[Session]:
        """Sessions that ended and are still readable, the oldest end first."""
        return iter(self._ended.values())

    @property
    def ended_last(self) -> Iterator[Session]:
        """The same, the newest end first."""
        return reversed(self._ended.values())

    @property
    def ended_count(self) -> int:
        """How many these are."""
        return len(self._ended)

    def flows_of(self, session: Session) -> dict[Key, Flow]:
        """The keys of a session, each with the flow that it leads to."""
        flows = {key: self.lookup(key) for key in session.keys}
        return {key: flow for key, flow in flows.items() if flow is not None}

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

    def restore(self, session: Session, entries: Mapping[Key, Flow]) -> None:
        """Take a session in as it was in another table, even if there are too many now.

        Sessions come in the order of their ids, the ended ones in that of their ends. Raises KeyInUse, and then nothing
        has changed.
        """
        if session.ended_at is not None:
            self._ended[session.id] = session
            self._enter_tunnel(session)
            return
        self.index(session, entries)
        self._enter(session)

    def _enter(self, session: Session) -> None:
        self._live.put(session.id, session)  # ids ascend, but for those of sessions that take over a provisional one's
        session.tally = self.tally
        self.tally[session.application, session.state, session.type] += 1
        if session.generations:
            self._enter_tunnel(session)

    def _enter_tunnel(self, session: Session) -> None:
        if (sa := session.sa) is not None:
            self._tunnels.put(session.id, session)
            for name in {sa.ike_name, sa.child_name}:  # all SAs that a tunnel ever has are called so
                self._tunnels_named.setdefault(name, ByNumber()).put(session.id, session)

    def _leave_tunnel(self, session: Session) -> None:
        if (sa := session.sa) is not None:
            self._tunnels.drop(session.id)
            for name in {sa.ike_name, sa.child_name}:
                named = self._tunnels_named[name]
                named.drop(session.id)
                if not named:
                    del self._tunnels_named[name]

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
        self._take_out(session)
        session.move(Trigger.END)
        session.move(Trigger.RELEASE)
        session.move(Trigger.RECYCLE)
        session.ended_at = now
        self._ended[session.id] = session
        forgotten = []
        while len(self._ended) > self.keep_ended:
            forgotten.append(self._forget_oldest())
        return forgotten

    def remove(self, session: Session) -> None:
        """Take a live session out without a trace: its counts live on in another one."""
        self._take_out(session)
        self._leave_tunnel(session)

    def _take_out(self, session: Session) -> None:
        self.unindex(session, session.keys)
        self._live.drop(session.id)
        session.tally = None
        self.tally[session.application, session.state, session.type] -= 1

    def _forget_oldest(self) -> Session:
        session = self._ended.pop(next(iter(self._ended)))
        self._leave_tunnel(session)
        return session

    def forget_ended(self, before: float) -> list[Session]:
        """Drop the ended sessions that ended before that time, and give them."""
        forgotten = []
        while self._ended:
            session = next(iter(self._ended.values()))
            assert session.ended_at is not None
            if session.ended_at >= before:
                break
            forgotten.append(self._forget_oldest())
        return forgotten
