"""The SAs of this host: what the IKE daemon said, as values, and the directory that holds them.

An event is an assignment, not a difference: applying one twice, or a snapshot in between, leaves the
directory as charon described it last. That is what makes "subscribe, snapshot, then the events that came
meanwhile" converge (SPEC section 6).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

#: (destination address in network order, ESP in UDP?, SPI): RFC 4301 section 4.1 identifies an inbound SA so.
SpiKey: TypeAlias = tuple[bytes, bool, int]

#: (local address, remote address, reqid): what stays the same when a CHILD_SA is rekeyed.
TunnelKey: TypeAlias = tuple[bytes, bytes, int]


@dataclass(frozen=True, slots=True)
class ChildSa:
    """One CHILD_SA: a pair of ESP SAs, one each way (RFC 7296 section 1.3).

    Addresses are in network order, 4 or 16 bytes; SPIs and ports are plain integers. `spi_in` is the SPI of
    the packets that this host receives, `spi_out` of those that it sends. `age_s` is how long ago it was
    installed, in seconds, when it was read; two readings of one SA are equal all the same.
    """

    ike_name: str
    child_name: str
    uniqueid: int
    reqid: int
    local: bytes
    remote: bytes
    local_port: int
    remote_port: int
    spi_in: int
    spi_out: int
    encap: bool
    is_initiator: bool
    local_id: str
    remote_id: str
    mode: str = "TUNNEL"
    age_s: int = field(default=0, compare=False)

    @property
    def key(self) -> tuple[bytes, bytes, int, int]:
        """What tells this SA pair from every other one."""
        return (self.local, self.remote, self.spi_in, self.spi_out)

    @property
    def tunnel(self) -> TunnelKey:
        """The tunnel that this SA pair is one generation of."""
        return (self.local, self.remote, self.reqid)

    @property
    def key_in(self) -> SpiKey:
        """How a received packet of this SA is found."""
        return (self.local, self.encap, self.spi_in)

    @property
    def key_out(self) -> SpiKey:
        """How a sent packet of this SA is found."""
        return (self.remote, self.encap, self.spi_out)


@dataclass(frozen=True, slots=True)
class SaEstablished:
    """A CHILD_SA is up (VICI child-updown with up=yes)."""

    sa: ChildSa


@dataclass(frozen=True, slots=True)
class SaRekeyed:
    """`new` takes over from `old`, which may carry packets until it is deleted (VICI child-rekey)."""

    old: ChildSa
    new: ChildSa


@dataclass(frozen=True, slots=True)
class SaDeleted:
    """A CHILD_SA is gone (VICI child-updown without up). It may name one that is gone already."""

    sa: ChildSa


@dataclass(frozen=True, slots=True)
class SaSnapshot:
    """All CHILD_SAs that there are (VICI list-sas): what is not in it does not exist."""

    sas: tuple[ChildSa, ...]


@dataclass(frozen=True, slots=True)
class SaSourceLost:
    """The IKE daemon does not answer any more; the SAs known stay in use and grow stale."""

    reason: str


SaEvent: TypeAlias = SaEstablished | SaRekeyed | SaDeleted | SaSnapshot | SaSourceLost


@dataclass(frozen=True, slots=True)
class SaAdded:
    """A CHILD_SA that was not known, or not like this."""

    sa: ChildSa


@dataclass(frozen=True, slots=True)
class SaRemoved:
    """A CHILD_SA that is no more, or not like this any more."""

    sa: ChildSa


SaChange: TypeAlias = SaAdded | SaRemoved


@dataclass(slots=True)
class KnownSa:
    """A CHILD_SA, when it was installed, and when the IKE daemon last spoke of it (monotonic seconds)."""

    sa: ChildSa
    installed_at: float
    confirmed_at: float


class SaDirectory:
    """The CHILD_SAs of this host as charon described them last; they stay in use while it is away."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, bytes, int, int], KnownSa] = {}
        self._by_spi: dict[SpiKey, ChildSa] = {}
        self._predecessor: dict[tuple[bytes, bytes, int, int], tuple[bytes, bytes, int, int]] = {}
        #: Why the IKE daemon does not answer; empty while it does.
        self.lost_reason = "not asked yet"
        #: When it last said anything, in monotonic seconds; None if it never did.
        self.answered_at: float | None = None

    def __iter__(self) -> Iterator[KnownSa]:
        return iter(self._known.values())

    @property
    def is_fresh(self) -> bool:
        """Whether the IKE daemon answers."""
        return not self.lost_reason

    def lookup(self, key: SpiKey) -> ChildSa | None:
        """The CHILD_SA that a packet with this destination and SPI belongs to, either way."""
        return self._by_spi.get(key)

    def stale_s(self, sa: ChildSa, now: float) -> float | None:
        """Seconds since the IKE daemon, which is away, last spoke of this SA; None while it answers."""
        known = self._known.get(sa.key)
        return now - known.confirmed_at if known and self.lost_reason else None

    def apply(self, event: SaEvent, now: float) -> list[SaChange]:
        """Learn what charon said; what it changes, additions first so that no tunnel is ever without an SA."""
        if not isinstance(event, SaSourceLost):
            self.answered_at = now
        match event:
            case SaEstablished(sa):
                return self._assign(sa, now)
            case SaRekeyed(old, new):  # the old SA carries packets until it is deleted
                self._predecessor[new.key] = old.key
                return self._assign(new, now)
            case SaDeleted(sa):
                return self._remove(sa.key)
            case SaSnapshot(sas):
                self.lost_reason = ""
                changes = [change for sa in sas for change in self._assign(sa, now)]
                gone = self._known.keys() - {sa.key for sa in sas}
                return changes + [change for key in gone for change in self._remove(key)]
            case SaSourceLost(reason):
                self.lost_reason = reason
                return []

    def _assign(self, sa: ChildSa, now: float) -> list[SaChange]:
        known = self._known.get(sa.key)
        if known is not None and known.sa == sa:
            known.confirmed_at = now
            return []
        self._known[sa.key] = KnownSa(sa, now - sa.age_s, now)
        changes: list[SaChange] = [SaAdded(sa)]
        if known is not None:
            changes.append(SaRemoved(known.sa))
            self._forget_spis(known.sa)
        self._by_spi[sa.key_in] = self._by_spi[sa.key_out] = sa
        return changes

    def _remove(self, key: tuple[bytes, bytes, int, int]) -> list[SaChange]:
        """Forget an SA, and the one that it replaced: charon does not tell when a rekeyed SA goes."""
        predecessor = self._predecessor.pop(key, None)
        known = self._known.pop(key, None)
        if known is None:
            return []
        self._forget_spis(known.sa)
        return [*(self._remove(predecessor) if predecessor else ()), SaRemoved(known.sa)]

    def _forget_spis(self, sa: ChildSa) -> None:
        for spi_key in (sa.key_in, sa.key_out):
            if self._by_spi.get(spi_key) == sa:
                del self._by_spi[spi_key]
