"""IKE as it can be seen from outside: the cleartext header of each message, and what follows from it.

An IKE_SA is known by its initiator's SPI, which stays the same while it floats from port 500 to 4500; so one record
spans all sessions that it uses. What the messages say is encrypted: that an exchange was answered can be seen,
whether the answer was yes cannot.

An answer counts if it came the opposite way (`Way.answers`), from the other peer, under the same message id and with
both SPIs of the IKE_SA. Which these are: if its IKE_SA_INIT request was seen, those of the answer to it, and without
that answer nothing counts. An IKE_SA that was first met later, because it is older than fwd or came about by a rekey of
another one, under encryption, has those of the first exchange that was answered. That exchange counts: a peer that does
not know the IKE_SA is silent, or says so in the clear (RFC 7296 section 1.5), which is no answer here. In IKEv1, where
no message says whether it is an answer, the three messages of quick mode have to go to and fro.

Sources: RFC 7296 section 3.1 (IKEv2), RFC 7383 section 2.5 (its fragments), RFC 2408 section 3.1 (IKEv1), RFC 3948
(NAT-T). Payload 132, a fragment of IKEv1, is a vendors' extension.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from struct import Struct
from typing import Any, Final, NamedTuple, TypeAlias

from .constants import IKE_SAS_PER_PEERS, NAT_T_PORT, OPEN_EXCHANGES_KEPT, PEERS_KEPT

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
_QUICK_MODE: Final = 32

#: Exchanges that begin an IKE_SA, in IKEv2 and in IKEv1, and those of IKEv2 after whose answer a CHILD_SA may exist.
_BEGINS: Final = frozenset({34, 38})
_BEGINS_V1: Final = frozenset({2, 4})
_MAKES_A_CHILD: Final = frozenset({35, 36})

#: The first payload, by IKE's major version, of what is a part of a message.
_FRAGMENTS: Final = frozenset({(2, 53), (1, 132)})
_NOTIFY: Final = 41

_INITIATOR: Final = 0x08  # IKEv2's flag I
_RESPONSE: Final = 0x20  # IKEv2's flag R


class IkeHeader(NamedTuple):
    """The header of one IKE message; SPIs are numbers of 64 bits, `length` that of the message in bytes."""

    initiator_spi: int
    responder_spi: int
    next_payload: int
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

    @property
    def is_fragment(self) -> bool:
        """Whether it is one of several that carry a message together; their headers are alike."""
        return (self.major, self.next_payload) in _FRAGMENTS

    @property
    def is_agreed(self) -> bool:
        """Whether it is sent under an IKE_SA: only one who received the answers to the first messages gets so far."""
        begins = self.exchange_type in (_BEGINS if self.major == 2 else _BEGINS_V1)
        return bool(self.responder_spi) and not begins and not self.is_notify

    @property
    def is_notify(self) -> bool:
        """Whether it is an IKEv2 notification in the clear, such as that the IKE_SA is unknown."""
        return self.major == 2 and self.next_payload == _NOTIFY


def parse_header(octets: bytes, offset: int, end: int) -> IkeHeader | None:
    """The IKE header at `offset`; None if what is there is none (too short, another version, no SPI)."""
    if end - offset < HEADER_BYTES:
        return None
    initiator, responder, payload, version, exchange, flags, message_id, length = _HEADER(octets, offset)
    if version >> 4 not in (1, 2) or not initiator or length < HEADER_BYTES:
        return None
    return IkeHeader(initiator, responder, payload, version >> 4, version & 15, exchange, flags, message_id, length)


def peers_of(a: bytes, b: bytes) -> Peers:
    """The key of two peers, whichever way a packet goes."""
    return (a, b) if a <= b else (b, a)


class Way(NamedTuple):
    """Where a packet came in and where it goes out: interface indices, 0 for this host itself, and their zones."""

    ingress: int
    egress: int
    from_zone: str
    to_zone: str

    def answers(self, asked: Way) -> bool:
        """Whether it is the opposite way: the same interfaces, or others of the same two zones.

        For this host it is enough that one came in and the other went out: routes may be asymmetric.
        """
        if not (asked.ingress and asked.egress):
            return bool(self.ingress) == bool(asked.egress) and bool(self.egress) == bool(asked.ingress)
        if (self.ingress, self.egress) == (asked.egress, asked.ingress):
            return True
        is_between_zones = asked.from_zone != asked.to_zone
        return is_between_zones and (self.from_zone, self.to_zone) == (asked.to_zone, asked.from_zone)


@dataclass(slots=True)
class _QuickMode:
    """An IKEv1 exchange: its first message, who sent it and the way it went; the answer's way; whether it is over."""

    first: IkeHeader
    src: bytes
    way: Way
    answered: Way | None = None
    is_complete: bool = False


@dataclass(slots=True)
class IkeSa:
    """One IKE_SA as it was seen. Times are monotonic seconds; `completed_at` is when an exchange that makes a CHILD_SA
    was answered last, None if none was. `ports` are those used last, the initiator's first. `floated_at`: when it went
    to port 4500, because there is a NAT or the peers wish so. `message_count` has each fragment of a message.
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
    _has_spis: bool = False  # both, beyond doubt
    _is_begun: bool = False  # its IKE_SA_INIT request was seen
    #: Requests that wait for their answer, by source, exchange and message id: the responder's SPI, and the way.
    _open: dict[tuple[bytes, int, int], tuple[int, Way]] = field(default_factory=dict)
    #: The highest message id of a source that was answered: they rise (RFC 7296 section 2.2).
    _answered: dict[bytes, int] = field(default_factory=dict)
    _quick_modes: dict[int, _QuickMode] = field(default_factory=dict)
    #: The last request (in IKEv1 any message) and the last response of each source.
    _last: dict[tuple[bytes, bool], IkeHeader] = field(default_factory=dict)

    def note(
        self, header: IkeHeader, src: bytes, dst: bytes, ports: tuple[int, int], way: Way, session_id: int, now: float
    ) -> bool:
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
        if not header.is_fragment:
            sender = (src, header.is_response)
            self.retransmit_count += self._last.get(sender) == header
            self._last[sender] = header
        if header.major == 1:
            is_complete = header.exchange_type == _QUICK_MODE and self._note_quick_mode(header, src, way)
        elif header.is_response:
            is_complete = self._note_response(header, src, dst, way)
        else:
            self._note_request(header, src, way)
            is_complete = False
        if is_complete:
            self.completed_at = now
        return is_complete

    def _note_request(self, header: IkeHeader, src: bytes, way: Way) -> None:
        if header.exchange_type in _BEGINS:
            self._is_begun = self._is_begun or not self._has_spis
        elif header.message_id <= self._answered.get(src, -1):
            return
        request = (src, header.exchange_type, header.message_id)
        self._open.pop(request, None)
        self._open[request] = (header.responder_spi, way)
        _keep_newest(self._open)

    def _note_response(self, header: IkeHeader, src: bytes, dst: bytes, way: Way) -> bool:
        """Whether it is the first answer to an exchange that makes a CHILD_SA."""
        request = (dst, header.exchange_type, header.message_id)
        asked = self._open.get(request)
        if asked is None or src == dst or not header.responder_spi or not way.answers(asked[1]):
            return False
        if header.exchange_type in _BEGINS:
            if not self._answered:  # else it is one that was sent again: they are beyond that
                self.responder_spi, self._has_spis = header.responder_spi, True
            return False
        if asked[0] != header.responder_spi or header.is_notify:
            return False
        if self._has_spis:
            if header.responder_spi != self.responder_spi:
                return False
        elif self._is_begun:
            return False
        self.responder_spi, self._has_spis = header.responder_spi, True
        del self._open[request]
        self._answered[dst] = header.message_id
        return header.exchange_type in _MAKES_A_CHILD

    def _note_quick_mode(self, header: IkeHeader, src: bytes, way: Way) -> bool:
        """Whether it is the third message (RFC 2409 section 5.5).

        Fragments tell no message id, so an exchange with one is not seen to complete.
        """
        if header.is_fragment or not header.responder_spi:
            return False
        mode = self._quick_modes.get(header.message_id)
        if mode is None:
            self._quick_modes[header.message_id] = _QuickMode(header, src, way)
            _keep_newest(self._quick_modes)
        elif mode.is_complete or header.responder_spi != mode.first.responder_spi:
            pass
        elif src != mode.src:
            if way.answers(mode.way):
                mode.answered = way
        elif mode.answered and header != mode.first and way.answers(mode.answered):
            mode.is_complete = True
            return True
        return False


def _keep_newest(exchanges: dict[Any, Any]) -> None:
    while len(exchanges) > OPEN_EXCHANGES_KEPT:
        del exchanges[next(iter(exchanges))]


@dataclass(slots=True)
class PeerRecord:
    """What is known of two peers: their IKE_SAs by initiator SPI, the latest last, NAT keepalives, and who spoke."""

    ike_sas: OrderedDict[int, IkeSa] = field(default_factory=OrderedDict)
    keepalive_count: int = 0
    senders: set[bytes] = field(default_factory=set)


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
        self,
        header: IkeHeader | None,
        src: bytes,
        dst: bytes,
        ports: tuple[int, int],
        way: Way,
        session_id: int,
        now: float,
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
        record.senders.add(src)
        sa = record.ike_sas.get(header.initiator_spi)
        if sa is None:
            initiator = src if header.is_from_initiator else dst
            sa = IkeSa(header.initiator_spi, header.responder_spi, header.major, header.minor, initiator, now)
            record.ike_sas[header.initiator_spi] = sa
            while len(record.ike_sas) > IKE_SAS_PER_PEERS:
                record.ike_sas.popitem(last=False)
        record.ike_sas.move_to_end(header.initiator_spi)
        return sa.note(header, src, dst, ports, way, session_id, now)

    def keepalives(self, a: bytes, b: bytes) -> int:
        """How many NAT keepalives were seen between these two, either way."""
        record = self.record(a, b)
        return record.keepalive_count if record else 0

    def only_sender(self, a: bytes, b: bytes) -> bytes | None:
        """The one of these two whose IKE messages were seen while none of the other's was: its go another way, or are
        lost. None if both were heard, or neither.
        """
        record = self.record(a, b)
        return next(iter(record.senders)) if record and len(record.senders) == 1 else None

    def ike_sas(self, a: bytes, b: bytes) -> Iterator[IkeSa]:
        """The IKE_SAs seen between these two, the one used last first."""
        record = self.record(a, b)
        yield from reversed(record.ike_sas.values()) if record else ()


def of_tunnel(ike_sas: Iterable[IkeSa], ports: tuple[int, int] | None) -> list[IkeSa]:
    """Those that a tunnel between the same peers may belong to: with ESP in UDP, those that use the same ports."""
    return [sa for sa in ike_sas if ports is None or ports in (sa.ports, sa.ports[::-1])]
