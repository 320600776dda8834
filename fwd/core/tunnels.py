"""The sessions of tunnels that end on this host: by tunnel, and by the two addresses that it runs between."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from .between import Between
from .sa import TunnelKey
from .session import Session


class Tunnels:
    """Live sessions of tunnels whose SAs are there, or were until a moment ago."""

    def __init__(self) -> None:
        self._sessions: dict[TunnelKey, Session] = {}
        self._between = Between()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def get(self, key: TunnelKey) -> Session | None:
        """The session of a tunnel, if it has one."""
        return self._sessions.get(key)

    def between(self, a: bytes, b: bytes) -> Collection[Session]:
        """The sessions of all tunnels between two addresses, in network order."""
        return self._between.of(a, b)

    def add(self, key: TunnelKey, session: Session) -> None:
        """The tunnel has this session."""
        self._sessions[key] = session
        self._between.add(session)

    def remove(self, key: TunnelKey) -> None:
        """The tunnel has no session any more."""
        self._between.discard(self._sessions.pop(key))

    def move(self, session: Session, local: bytes, remote: bytes) -> None:
        """The tunnel of this session runs between other addresses now (MOBIKE)."""
        is_known = session in self._between
        self._between.discard(session)
        session.outbound.address, session.inbound.address = local, remote
        if is_known:
            self._between.add(session)
