"""The SAs of this host: what the IKE daemon said, as values, and the directory that holds them.

An event is an assignment, not a difference: applying one twice, or a snapshot in between, leaves the
directory as charon described it last. That is what makes "subscribe, snapshot, then the events that came
meanwhile" converge (SPEC section 6).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from typing import NamedTuple, TypeAlias

from .by_number import ByNumber
from .constants import COLLISION_S, FORMER_SPIS_KEPT

#: (destination address in network order, ESP in UDP?, SPI): RFC 4301 section 4.1 identifies an inbound SA so.
SpiKey: TypeAlias = tuple[bytes, bool, int]

#: (IKE connection, local identity, remote identity, name of the CHILD_SA, reqid): what stays the same when a CHILD_SA
#: or its IKE_SA is rekeyed or authenticated anew, and when a peer's address changes (MOBIKE).
TunnelKey: TypeAlias = tuple[str, str, str, str, int]

#: (local address, remote address, SPI in, SPI out): what tells an SA pair from every other one.
SaKey: TypeAlias = tuple[bytes, bytes, int, int]

#: (tunnel, unique id, SPI in, SPI out): the same, wherever its peers are.
_Pair: TypeAlias = tuple[TunnelKey, int, int, int]


#: Why the IKE daemon has not answered, before anybody could ask it.
NOT_ASKED = "not asked yet"


@dataclass(frozen=True, slots=True)
class ChildSa:
    """One CHILD_SA: a pair of ESP SAs, one each way (RFC 7296 section 1.3).

    Addresses are in network order, 4 or 16 bytes; SPIs and ports are plain integers. `spi_in` is the SPI of
    the packets that this host receives, `spi_out` of those that it sends. `age_s` is how long ago it was
    installed, in seconds, when it was read, `packets_in` and `packets_out` are what the IKE daemon says that it
    carried, -1 if it does not say; two readings of one SA are equal all the same. `esn`: its sequence numbers have 64
    bits.
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
    esn: bool = False
    age_s: int = field(default=0, compare=False)
    packets_in: int = field(default=-1, compare=False)
    packets_out: int = field(default=-1, compare=False)

    @property
    def key(self) -> SaKey:
        """What tells this SA pair from every other one."""
        return (self.local, self.remote, self.spi_in, self.spi_out)

    @property
    def tunnel(self) -> TunnelKey:
        """The tunnel that this SA pair is one generation of."""
        return (self.ike_name, self.local_id, self.remote_id, self.child_name, self.reqid)

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
    """All CHILD_SAs that there are (VICI list-sas): what is not in it does not exist.

    Unless it `is_whole`, IKE_SAs are missing in it, with all that is theirs.
    """

    sas: tuple[ChildSa, ...]
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class SaSourceLost:
    """The IKE daemon does not answer any more; the SAs known stay in use and grow stale."""

    reason: str


@dataclass(frozen=True, slots=True)
class SaSourceAlive:
    """The IKE daemon answers, and has nothing to say of its SAs."""


SaEvent: TypeAlias = SaEstablished | SaRekeyed | SaDeleted | SaSnapshot | SaSourceLost | SaSourceAlive


class SaEnd(StrEnum):
    """Why a CHILD_SA is no more."""

    REKEYED = "rekeyed"
    DELETED = "deleted"
    VANISHED = "vanished"  # it was missing when all SAs were read


@dataclass(frozen=True, slots=True)
class SaAdded:
    """A CHILD_SA that was not known."""

    sa: ChildSa


@dataclass(frozen=True, slots=True)
class SaReplaced:
    """A CHILD_SA takes over from another one, as the first to do so.

    When both sides rekey at once, two take over from one; charon soon deletes one of them (RFC 7296 section 2.8.1).
    """

    old: ChildSa
    new: ChildSa


@dataclass(frozen=True, slots=True)
class SaUpdated:
    """A CHILD_SA that lives on with other addresses (MOBIKE), below another IKE_SA, or the like."""

    old: ChildSa
    new: ChildSa


@dataclass(frozen=True, slots=True)
class SaRemoved:
    """A CHILD_SA that is no more."""

    sa: ChildSa
    end: SaEnd


SaChange: TypeAlias = SaAdded | SaUpdated | SaReplaced | SaRemoved


@dataclass(slots=True)
class KnownSa:
    """A CHILD_SA, when it was installed, and when the IKE daemon last spoke of it (monotonic seconds).

    `replaces` is the one that it took over from, `is_rekeyed` says that another one has taken over from it. `number`
    counts the SAs that the directory came to know.
    """

    number: int
    sa: ChildSa
    installed_at: float
    confirmed_at: float
    replaces: KnownSa | None = None
    is_rekeyed: bool = False


class FormerSa(NamedTuple):
    """A CHILD_SA that is gone: why, and when (monotonic seconds)."""

    sa: ChildSa
    end: SaEnd
    removed_at: float


class SaDirectory:
    """The CHILD_SAs of this host as charon described them last; they stay in use while it is away."""

    def __init__(self) -> None:
        self._known: dict[SaKey, KnownSa] = {}
        self._by_number: ByNumber[KnownSa] = ByNumber()
        self._by_spi: dict[SpiKey, ChildSa] = {}
        self._by_pair: dict[_Pair, KnownSa] = {}
        self._former: dict[SpiKey, FormerSa] = {}
        self._numbers = count(1)
        #: Why the IKE daemon does not answer; empty while it does.
        self.lost_reason = NOT_ASKED
        #: When it last said anything, in monotonic seconds; None if it never did.
        self.answered_at: float | None = None

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[KnownSa]:
        return iter(self._known.values())

    def after(self, number: int) -> Iterator[KnownSa]:
        """The SAs with a higher number, in the order in which they came to be known; nothing must change meanwhile."""
        return self._by_number.after(number)

    @property
    def is_fresh(self) -> bool:
        """Whether the IKE daemon answers."""
        return not self.lost_reason

    def lookup(self, key: SpiKey) -> ChildSa | None:
        """The CHILD_SA that a packet with this destination and SPI belongs to, either way."""
        return self._by_spi.get(key)

    def former(self, key: SpiKey) -> FormerSa | None:
        """The CHILD_SA that such a packet belonged to until a while ago; None if there is no memory of one."""
        return self._former.get(key)

    def stale_s(self, sa: ChildSa, now: float) -> float | None:
        """Seconds since the IKE daemon, which is away, last spoke of this SA; None while it answers."""
        known = self._known.get(sa.key)
        return now - known.confirmed_at if known and self.lost_reason else None

    def apply(self, event: SaEvent, now: float) -> Iterator[SaChange | None]:
        """Learn what charon said; gives what it changes, additions first so that no tunnel is ever without an SA.

        It is learned bit by bit, as the changes are taken, because a snapshot may have very many: each is there when it
        is given, and None stands for an SA that is as it was. The next event has to wait until all are taken.
        """
        if not isinstance(event, SaSourceLost):
            self.answered_at = now
        match event:
            case SaEstablished(sa):
                yield from self._assign(sa, now)
            case SaRekeyed(old, new):  # the old SA carries packets until it is deleted
                yield from self._assign(new, now, self._find(old))
            case SaDeleted(sa):
                if found := self._find(sa):
                    yield from self._remove(found, SaEnd.DELETED, now)
            case SaSnapshot(sas, is_whole):
                self.lost_reason = ""
                yield from self._replace_all(sas, is_whole, now)
            case SaSourceLost(reason):
                self.lost_reason = reason

    def restore(self, sa: ChildSa, installed_at: float, replaces: KnownSa | None, is_rekeyed: bool) -> KnownSa:
        """Know an SA as a former daemon knew it; the next snapshot tells what is true now.

        `replaces` is the one that it took over from, if that is still there.
        """
        confirmed_at = installed_at if self.answered_at is None else self.answered_at
        known = self._known.get(sa.key) or self._add(sa, installed_at, confirmed_at)
        known.replaces, known.is_rekeyed = replaces, is_rekeyed
        return known

    def remember(self, sa: ChildSa, end: SaEnd, removed_at: float) -> None:
        """An SA was there until that time."""
        for spi_key in (sa.key_in, sa.key_out):
            self._former.pop(spi_key, None)
            self._former[spi_key] = FormerSa(sa, end, removed_at)
        while len(self._former) > FORMER_SPIS_KEPT:
            del self._former[next(iter(self._former))]

    def known(self, sa: ChildSa) -> KnownSa | None:
        """What is known of an SA; None if it is gone."""
        return self._known.get(sa.key)

    def _find(self, sa: ChildSa) -> KnownSa | None:
        """The same SA pair, maybe under the addresses that its peers had before (MOBIKE)."""
        return self._known.get(sa.key) or self._by_pair.get(_pair(sa))

    def _replace_all(self, sas: Iterable[ChildSa], is_whole: bool, now: float) -> Iterator[SaChange | None]:
        there = {sa.key: sa for sa in sas}
        for key, sa in there.items():
            moved = self._by_pair.get(_pair(sa)) if key not in self._known else None
            if moved is not None and moved.sa.key not in there:
                del self._known[moved.sa.key]
                changes = self._update(moved, sa, now)
            else:
                changes = self._assign(sa, now)
            yield from changes or (None,)
        gone = [known for key, known in self._known.items() if key not in there]
        if not is_whole:  # of an IKE_SA that was not told of, what was replaced will have gone
            told_of = {_ike_sa(sa) for sa in there.values()}
            gone = [known for known in gone if known.is_rekeyed or _ike_sa(known.sa) in told_of]
        newest: dict[TunnelKey, KnownSa] = {known.sa.tunnel: known for known in gone}
        for known in self._known.values() if gone else ():
            rival = newest.get(known.sa.tunnel)
            if rival is not None and known.installed_at >= rival.installed_at:
                newest[known.sa.tunnel] = known
        for known in gone:
            successor = newest[known.sa.tunnel]
            # By a rekey of which no event told; two that came up at once are a collision, and one of them had to go.
            if successor.installed_at > known.installed_at + COLLISION_S and not known.is_rekeyed:
                known.is_rekeyed = True
                yield SaReplaced(known.sa, successor.sa)
            yield from self._remove(known, SaEnd.VANISHED, now)

    def _assign(self, sa: ChildSa, now: float, replaces: KnownSa | None = None) -> list[SaChange]:
        known = self._known.get(sa.key)
        changes: list[SaChange] = []
        if known is not None:
            changes += self._update(known, sa, now)
        else:
            known = self._add(sa, now - sa.age_s, now)
            changes.append(SaAdded(sa))
        if replaces is not None:
            known.replaces = replaces
            if not replaces.is_rekeyed:
                replaces.is_rekeyed = True
                changes.append(SaReplaced(replaces.sa, sa))
        return changes

    def _add(self, sa: ChildSa, installed_at: float, confirmed_at: float) -> KnownSa:
        known = KnownSa(next(self._numbers), sa, installed_at, confirmed_at)
        self._known[sa.key] = self._by_pair[_pair(sa)] = known
        self._by_number.put(known.number, known)
        self._by_spi[sa.key_in] = self._by_spi[sa.key_out] = sa
        return known

    def _update(self, known: KnownSa, sa: ChildSa, now: float) -> list[SaChange]:
        """What was known was said again, maybe otherwise."""
        before, known.sa, known.confirmed_at = known.sa, sa, now
        if before == sa:  # but for its counts
            return []
        self._forget_pair(known, before)
        self._known[sa.key] = self._by_pair[_pair(sa)] = known
        self._forget_spis(before)
        self._by_spi[sa.key_in] = self._by_spi[sa.key_out] = sa
        return [SaUpdated(before, sa)]

    def _remove(self, known: KnownSa, end: SaEnd, now: float) -> list[SaChange]:
        """Forget an SA, and those that it replaced: charon does not tell when a rekeyed SA goes."""
        line: list[KnownSa] = []
        following: KnownSa | None = known
        while following is not None and self._known.get(following.sa.key) is following:
            line.append(following)
            following = following.replaces
            line[-1].replaces = None
        changes: list[SaChange] = []
        for gone in reversed(line):
            sa, why = gone.sa, SaEnd.REKEYED if gone is not known or gone.is_rekeyed else end
            del self._known[sa.key]
            self._by_number.drop(gone.number)
            self._forget_pair(gone, sa)
            self._forget_spis(sa)
            self.remember(sa, why, now)
            changes.append(SaRemoved(sa, why))
        return changes

    def _forget_pair(self, known: KnownSa, sa: ChildSa) -> None:
        if self._by_pair.get(_pair(sa)) is known:
            del self._by_pair[_pair(sa)]

    def _forget_spis(self, sa: ChildSa) -> None:
        for spi_key in (sa.key_in, sa.key_out):
            if self._by_spi.get(spi_key) == sa:
                del self._by_spi[spi_key]


def _ike_sa(sa: ChildSa) -> tuple[str, str, str, bytes, bytes, int, int]:
    """What tells its IKE_SA from others', unless a peer has two of the same."""
    return (sa.ike_name, sa.local_id, sa.remote_id, sa.local, sa.remote, sa.local_port, sa.remote_port)


def _pair(sa: ChildSa) -> _Pair:
    """What tells an SA pair from every other one, wherever its peers are."""
    return (sa.tunnel, sa.uniqueid, sa.spi_in, sa.spi_out)
