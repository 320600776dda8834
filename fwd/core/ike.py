"""IKE as it can be seen from outside: the cleartext header of each message, and what follows from it.

An IKE_SA is known by its initiator's SPI, which stays the same while it floats from port 500 to 4500; so one record
spans all sessions that it uses. What the messages say is encrypted: that an exchange was answered can be seen,
whether the answer was yes cannot.

Sources: RFC 7296 section 3.1 (IKEv2), RFC 2408 section 3.1 (IKEv1), RFC 3948 (NAT-T).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from struct import Struct
from typing import Final, NamedTuple, TypeAlias

from .constants import IKE_SAS_PER_PEERS, NAT_T_PORT, PEERS_KEPT

#: Two addresses in network order, the lower one first.
Peers: TypeAlias = tuple[bytes, bytes]

HEADER_BYTES: Final = 28
_HEADER = Struct("!QQBBBBII").unpack_from

#: Exchange types: IKEv1 (RFC 2408 section 3.1, RFC 2409 appendix A) and IKEv2 (RFC 7296 section 3.1, RFC 9242).
_EXCHANGES: Final = {
    (1, 2): "Identity Protection",
    (1, 4): "Aggressive",
    (1, 5): "Informational",
    (1, 6): "Transaction",
    (1, 32): "Quick Mode",
    (2, 34): "IKE_SA_INIT",
    (2, 35): "IKE_AUTH",
    (2, 36): "CREATE_CHILD_SA",
    (2, 37): "INFORMATIONAL",
    (2, 38): "IKE_SESSION_RESUME",
    (2, 43): "IKE_INTERMEDIATE",
}
_QUICK_MODE: Final = (1, 32)
_QUICK_MODE_MESSAGES: Final = 3

#: Exchanges after whose answer a CHILD_SA may exist.
_ANSWERED_MEANS_COMPLETE: Final = frozenset({(2, 35), (2, 36)})

_INITIATOR: Final = 0x08  # IKEv2's flag I
_RESPONSE: Final = 0x20  # IKEv2's flag R


class IkeHeader(NamedTuple):
    """The header of one IKE message; SPIs are numbers of 64 bits, `length` that of the message in bytes."""

    initiator_spi: int
    responder_spi: int
    major: int
    minor: int
    exchange_type: int
    flags: int
    message_id: int
    length: int

    @property
    def exchange(self) -> str:
        """The exchange's name, or its number if it has none here."""
        return _EXCHANGES.get((self.major, self.exchange_type), f"exchange {self.exchange_type}")

    @property
    def is_from_initiator(self) -> bool:
        """Whether the IKE_SA's initiator sent it; IKEv1 says so in no other message than the first."""
        return self.flags & _INITIATOR != 0 if self.major == 2 else not self.responder_spi

    @property
    def is_response(self) -> bool:
        """Whether it answers a request; only IKEv2 says so."""
        return self.major == 2 and self.flags & _RESPONSE != 0


def parse_header(octets: bytes, offset: int, end: int) -> IkeHeader | None:
    """The IKE header at `offset`; None if what is there is none (too short, another version, no SPI)."""
    if end - offset < HEADER_BYTES:
        return None
    initiator, responder, _, version, exchange, flags, message_id, length = _HEADER(octets, offset)
    if version >> 4 not in (1, 2) or not initiator or length < HEADER_BYTES:
        return None
    return IkeHeader(initiator, responder, version >> 4, version & 15, exchange, flags, message_id, length)


def peers_of(a: bytes, b: bytes) -> Peers:
    """The key of two peers, whichever way a packet goes."""
    return (a, b) if a <= b else (b, a)


@dataclass(slots=True)
class IkeSa:
    """One IKE_SA as it was seen. Times are monotonic seconds; `completed_at` is when an exchange that makes a CHILD_SA
    was answered last, None if none was. `ports` are those used last, the initiator's first. `floated_at`: when it went
    to port 4500, because there is a NAT or the peers wish so.
    """

    initiator_spi: int
    responder_spi: int
    major: int
    minor: int
    initiator: bytes
    first_seen_at: float
    last_seen_at: float = 0.0
    message_count: int = 0
    retransmit_count: int = 0
    last_exchange: str = ""
    ports: tuple[int, int] = (0, 0)
    floated_at: float | None = None
    completed_at: float | None = None
    session_ids: tuple[int, ...] = ()
    _open: tuple[bytes, int, int] | None = None  # the request that waits for its answer
    _last: tuple[bytes, IkeHeader] | None = None
    _quick_mode: tuple[int, int] = (0, 0)  # message id, messages

    def note(self, header: IkeHeader, src: bytes, ports: tuple[int, int], session_id: int, now: float) -> bool:
        """A message came by; `ports` are source and destination. Whether it completes an exchange."""
        self.last_seen_at = now
        self.message_count += 1
        self.responder_spi = self.responder_spi or header.responder_spi
        self.last_exchange = header.exchange
        ours = ports if src == self.initiator else (ports[1], ports[0])
        if NAT_T_PORT in ours and self.floated_at is None:
            self.floated_at = now
        self.ports = ours
        if session_id not in self.session_ids:
            self.session_ids = (*self.session_ids, session_id)[-8:]
        is_new = self._last != (src, header)
        self.retransmit_count += not is_new
        self._last = (src, header)
        if is_new and self._completes(header, src):
            self.completed_at = now
            return True
        return False

    def _completes(self, header: IkeHeader, src: bytes) -> bool:
        kind = (header.major, header.exchange_type)
        if kind == _QUICK_MODE:
            message_id, count = self._quick_mode
            count = count + 1 if message_id == header.message_id else 1
            self._quick_mode = (header.message_id, count)
            return count == _QUICK_MODE_MESSAGES
        if kind not in _ANSWERED_MEANS_COMPLETE:
            return False
        if not header.is_response:
            self._open = (src, header.exchange_type, header.message_id)
            return False
        asked, self._open = self._open, None
        return asked is not None and asked[0] != src and asked[1:] == (header.exchange_type, header.message_id)


@dataclass(slots=True)
class PeerRecord:
    """What is known of two peers: their IKE_SAs by initiator SPI, the latest last, and NAT keepalives."""

    ike_sas: OrderedDict[int, IkeSa] = field(default_factory=OrderedDict)
    keepalive_count: int = 0

    @property
    def completed_at(self) -> float | None:
        """When an exchange between the two was completed last."""
        return max((sa.completed_at for sa in self.ike_sas.values() if sa.completed_at is not None), default=None)


class IkeWatcher:
    """The IKE_SAs seen between any two peers; of more than PEERS_KEPT peers those silent longest are forgotten."""

    def __init__(self) -> None:
        self._records: OrderedDict[Peers, PeerRecord] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def record(self, a: bytes, b: bytes) -> PeerRecord | None:
        """What is known of these two."""
        return self._records.get(peers_of(a, b))

    def note(
        self, header: IkeHeader | None, src: bytes, dst: bytes, ports: tuple[int, int], session_id: int, now: float
    ) -> bool:
        """An IKE message, or a NAT keepalive (no header), came by. Whether it completes an exchange."""
        peers = peers_of(src, dst)
        record = self._records.get(peers)
        if record is None:
            record = self._records[peers] = PeerRecord()
            while len(self._records) > PEERS_KEPT:
                self._records.popitem(last=False)
        self._records.move_to_end(peers)
        if header is None:
            record.keepalive_count += 1
            return False
        sa = record.ike_sas.get(header.initiator_spi)
        if sa is None:
            initiator = src if header.is_from_initiator else dst
            sa = IkeSa(header.initiator_spi, header.responder_spi, header.major, header.minor, initiator, now)
            record.ike_sas[header.initiator_spi] = sa
            while len(record.ike_sas) > IKE_SAS_PER_PEERS:
                record.ike_sas.popitem(last=False)
        record.ike_sas.move_to_end(header.initiator_spi)
        return sa.note(header, src, ports, session_id, now)

    def ike_sas(self, a: bytes, b: bytes) -> Iterator[IkeSa]:
        """The IKE_SAs seen between these two, the one used last first."""
        record = self.record(a, b)
        yield from reversed(record.ike_sas.values()) if record else ()


def of_tunnel(ike_sas: Iterable[IkeSa], ports: tuple[int, int] | None) -> list[IkeSa]:
    """Those that a tunnel between the same peers may belong to: with ESP in UDP, those that use the same ports."""
    return [sa for sa in ike_sas if ports is None or ports in (sa.ports, sa.ports[::-1])]
