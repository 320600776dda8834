"""How many sessions anybody may open: limits by source, by pair of peers, and on sessions that nobody has answered.

Counted are the sessions that a packet from outside opened. Those that the IKE daemon announces are under no limit, for
their peers are authenticated; nor are those that this host opens by sending.

Half-open is a session of which no packet has come back: who forges a source gets no answer. These have a limit of their
own, for strangers: it does not hold for peers that have a session that was answered, a tunnel of this host, or a
complete IKE exchange behind them. IKE may have IKE_ROOM times as many. Without a place, the oldest half-open session
gives way to a new one if it was silent for HALF_OPEN_IDLE_S, and to a tunnel of this host in any case; one that was
answered never does.
All of it is counted as sessions come and go, never by looking through the table.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from .constants import HALF_OPEN_LOOKS

if TYPE_CHECKING:
    from .session import Session

#: The drop counters of what is refused.
BY_SOURCE: Final = "flow_limit_source"
BY_PEERS: Final = "flow_limit_peers"
HALF_OPEN: Final = "flow_limit_half_open"

#: Whoever has one IPv6 address has the whole /64 of it (RFC 4291 section 2.5.4), in bytes.
_IPV6_SOURCE: Final = 8


class LimitReached(Exception):
    """There may be no further session of this kind; nothing was changed."""

    def __init__(self, counter: str) -> None:
        super().__init__(counter)
        self.counter = counter


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most sessions of one source, between two peers, and half-open in all; 0: as many as there is place for."""

    source: int = 0
    peers: int = 0
    half_open: int = 0


def source_of(address: bytes) -> bytes:
    """What counts as one source: an IPv4 address, or an IPv6 /64."""
    return address if len(address) == 4 else address[:_IPV6_SOURCE]


class _Counts(dict[bytes, int]):
    """How many sessions each has, and how many the one that has most, which nobody has to look for."""

    __slots__ = ("_having",)

    def __init__(self) -> None:
        super().__init__()
        #: How many have two sessions, three, and so on, up to the most; those with one, of which a flood has many, are
        #: not counted.
        self._having = [0, 0]

    @property
    def most(self) -> int:
        """How many sessions the one that has most has."""
        return len(self._having) - 1 if self else 0

    def more(self, key: bytes) -> None:
        """It has one more."""
        before = self.get(key, 0)
        self[key] = before + 1
        if before:
            self.rise(before)

    def rise(self, before: int) -> None:
        """One that had so many, and not none, was given one more."""
        having = self._having
        having[before] -= 1
        if before + 1 < len(having):
            having[before + 1] += 1
        else:
            having.append(1)

    def less(self, key: bytes) -> None:
        """It has one less."""
        left = self[key] - 1
        if not left:
            del self[key]
            return
        self[key] = left
        having = self._having
        having[left + 1] -= 1
        having[left] += 1
        if not having[-1]:
            having.pop()


class Limits:
    """Who has how many sessions."""

    def __init__(self, bounds: Bounds) -> None:
        self.set_bounds(bounds)
        self._of_source, self._of_peers = _Counts(), _Counts()
        #: Of the sessions of two peers, those that are not half-open.
        self._answered = _Counts()
        #: The oldest first. A plain dict takes long to find its first entry after many have gone.
        self._half_open: OrderedDict[Session, None] = OrderedDict()

    def set_bounds(self, bounds: Bounds) -> None:
        """Take other limits for all sessions to come."""
        self.bounds = bounds
        self._most_of_source = bounds.source or math.inf
        self._most_of_peers = bounds.peers or math.inf
        self._most_half_open = bounds.half_open or math.inf

    @property
    def half_open_count(self) -> int:
        """Sessions that nobody has answered yet."""
        return len(self._half_open)

    def most(self) -> tuple[int, int]:
        """How many sessions the busiest source has, and the busiest pair of peers."""
        return self._of_source.most, self._of_peers.most

    def counts(self, client: bytes, server: bytes) -> tuple[int, int]:
        """How many sessions this source has, and these two peers."""
        return self._of_source.get(source_of(client), 0), self._of_peers.get(_peers(client, server), 0)

    def refusal(self, client: bytes, server: bytes, room: float = 1.0) -> str | None:
        """What `admit` would say, but nothing is counted."""
        of_source, of_peers = self.counts(client, server)
        if of_source >= self._most_of_source:
            return BY_SOURCE
        if of_peers >= self._most_of_peers:
            return BY_PEERS
        return HALF_OPEN if len(self._half_open) >= self._most_half_open * room else None

    def admit(self, client: bytes, server: bytes, room: float = 1.0) -> str | None:
        """Count a session that a packet from outside is about to open; or say by which drop counter it is refused.

        `room`: how many times the limit of half-open sessions there may be. To be followed by `enter` or `retract`.
        It is in a hurry: a flood comes through here.
        """
        source = client if len(client) == 4 else client[:_IPV6_SOURCE]
        peers = client + server if client < server else server + client
        of_source, of_peers = self._of_source.get(source, 0), self._of_peers.get(peers, 0)
        if of_source >= self._most_of_source:
            return BY_SOURCE
        if of_peers >= self._most_of_peers:
            return BY_PEERS
        if len(self._half_open) >= self._most_half_open * room:
            return HALF_OPEN
        self._of_source[source] = of_source + 1
        self._of_peers[peers] = of_peers + 1
        if of_source:
            self._of_source.rise(of_source)
        if of_peers:
            self._of_peers.rise(of_peers)
        return None

    def enter(self, session: Session) -> None:
        """The session that was admitted is there; it is half-open."""
        self._half_open[session] = None
        session.is_limited = True

    def retract(self, client: bytes, server: bytes) -> None:
        """The session that was admitted did not come about."""
        self._of_source.less(source_of(client))
        self._of_peers.less(_peers(client, server))

    def take_over(self, session: Session, *, is_half_open: bool) -> None:
        """Count a session that was there before this daemon, whatever the limits are."""
        self._of_source.more(source_of(session.c2s.address))
        self._of_peers.more(_peers(session.c2s.address, session.s2c.address))
        self.enter(session)
        if not is_half_open:
            self.settle(session)

    def has_answered(self, a: bytes, b: bytes) -> bool:
        """Whether these two have a session that is not half-open."""
        return _peers(a, b) in self._answered

    def is_half_open(self, session: Session) -> bool:
        """Whether nobody has answered it yet."""
        return session in self._half_open

    def settle(self, session: Session) -> None:
        """Somebody has answered: nothing pushes it out any more. Once is enough."""
        if session in self._half_open:
            del self._half_open[session]
            self._answered.more(_peers(session.c2s.address, session.s2c.address))

    def leave(self, session: Session) -> None:
        """Count it no more, whatever it ended by; one that was never counted does no harm."""
        if not session.is_limited:
            return
        session.is_limited = False
        if session in self._half_open:
            del self._half_open[session]
        else:
            self._answered.less(_peers(session.c2s.address, session.s2c.address))
        self.retract(session.c2s.address, session.s2c.address)

    def silent_since(self, before: float) -> Session | None:
        """The oldest half-open session, if it saw no packet since then: it may give way. Others go to the end."""
        for session in list(islice(self._half_open, HALF_OPEN_LOOKS)):
            if session.last_seen_at < before:
                return session
            if session.created_at >= before:
                return None  # those behind it are younger, or were heard not long ago
            self._half_open.move_to_end(session)
        return None


def _peers(a: bytes, b: bytes) -> bytes:
    return a + b if a < b else b + a
