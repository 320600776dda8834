"""Sessions by the two addresses that they run between."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain, islice

from .ike import Peers, peers_of
from .session import Session


def ends_of(session: Session) -> Peers:
    """The two addresses that a session runs between, the lower one first."""
    return peers_of(session.client.address, session.server.address)


class Between:
    """A set of sessions, by their addresses; whoever changes those takes the session out before."""

    def __init__(self) -> None:
        self._sessions: dict[Peers, dict[Session, None]] = {}  # in order: there may be very many

    def __bool__(self) -> bool:
        return bool(self._sessions)

    def __contains__(self, session: Session) -> bool:
        return session in self._sessions.get(ends_of(session), ())

    def __iter__(self) -> Iterator[Session]:
        return chain.from_iterable(self._sessions.values())

    def add(self, session: Session) -> None:
        """It is one of them."""
        self._sessions.setdefault(ends_of(session), {})[session] = None

    def discard(self, session: Session) -> None:
        """It is one no more, if it was."""
        ends = ends_of(session)
        sessions = self._sessions.get(ends, {})
        if session in sessions:
            del sessions[session]
            if not sessions:
                del self._sessions[ends]

    def of(self, a: bytes, b: bytes) -> Collection[Session]:
        """Those between two addresses, whichever way."""
        return self._sessions.get(peers_of(a, b), {}).keys()

    def turn(self, count: int) -> list[Collection[Session]]:
        """Those of the next so many pairs of addresses, which go to the end of the line."""
        chosen = list(islice(self._sessions, count))
        for ends in chosen:
            self._sessions[ends] = self._sessions.pop(ends)
        return [self._sessions[ends].keys() for ends in chosen]
