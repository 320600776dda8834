"""IPFIX messages (RFC 7011): flow records in, bytes out. All elements are of IANA's registry.

Templates are the same for everybody, so they have fixed numbers: one for each of IPv4 or IPv6, with or without UDP
ports, with or without an SPI. A field that a packet does not have is not in its record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from struct import Struct

from .core.records import FlowDelta

_VERSION = 10
_HEADER = Struct("!HHIII")  # version, length, export time, sequence number, observation domain: section 3.1
_SET = Struct("!HH")  # set id, length: section 3.3.2
_TEMPLATE_SET, _OPTIONS_TEMPLATE_SET = 2, 3
_ANY_LENGTH = 0xFFFF  # section 7
_NO_DOMAIN = 0

#: The elements of each flow record, and their lengths in bytes.
_COMMON = (
    (1, 8),  # octetDeltaCount: IP packets, header included
    (2, 8),  # packetDeltaCount
    (152, 8),  # flowStartMilliseconds
    (153, 8),  # flowEndMilliseconds
    (148, 8),  # flowId: the session's id
    (10, 4),  # ingressInterface
    (14, 4),  # egressInterface
    (4, 1),  # protocolIdentifier
    (61, 1),  # flowDirection: 0 ingress, 1 egress
    (89, 1),  # forwardingStatus
    (136, 1),  # flowEndReason
)
_ADDRESSES = {4: ((8, 4), (12, 4)), 16: ((27, 16), (28, 16))}  # source and destination, IPv4 and IPv6
_PORTS = ((7, 2), (11, 2))  # sourceTransportPort, destinationTransportPort
_SPI = ((295, 4),)  # ipSecSPI
_APPLICATION = ((96, _ANY_LENGTH),)  # applicationName

_FORWARDED, _DROPPED = 64, 129  # forwardingStatus (RFC 7270): forwarded; dropped, denied by an access list

#: What an options template's record is about comes first: its scope.
_STATISTICS_ID, _STATISTICS = (
    264,
    (
        (149, 4),  # observationDomainId, the scope
        (42, 8),  # exportedFlowRecordTotalCount
        (166, 8),  # notSentFlowTotalCount
        (167, 8),  # notSentPacketTotalCount
        (168, 8),  # notSentOctetTotalCount
    ),
)
_STATISTICS_RECORD = Struct("!IQQQQ")
_INTERFACES_ID, _INTERFACES = (
    265,
    (
        (10, 4),  # ingressInterface, the scope
        (82, _ANY_LENGTH),  # interfaceName
    ),
)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the exporter says of itself: flow records sent, and flow records, packets and bytes given up."""

    sent: int
    not_sent: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Message:
    """One IPFIX message, and the flow records in it. `count` is how many data records it has, of whatever kind."""

    octets: bytes
    count: int
    deltas: tuple[FlowDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Encoder:
    """Makes messages of one observation domain, `room` bytes at most each."""

    domain: int
    room: int

    def templates(self, sequence: int, at: float) -> Message:
        """The message with the templates of flow records.

        `sequence` is the number of data records before it, `at` the time in seconds since the epoch.
        """
        templates = [_template(number, fields) for number, fields in _TEMPLATES.items()]
        return Message(_message(self.domain, _set(_TEMPLATE_SET, templates), sequence, at), 0)

    def options(self, statistics: Statistics, interfaces: Mapping[int, str], sequence: int, at: float) -> Message:
        """What there is to say of this host, of no domain (section 3.1): its sequence numbers are its own, too.

        `interfaces` are names by index; of very many, those that fit.
        """
        templates = [_options_template(_STATISTICS_ID, _STATISTICS), _options_template(_INTERFACES_ID, _INTERFACES)]
        sets = [
            _set(_OPTIONS_TEMPLATE_SET, templates),
            _set(_STATISTICS_ID, [_STATISTICS_RECORD.pack(self.domain, statistics.sent, *statistics.not_sent)]),
        ]
        room = self.room - _HEADER.size - sum(map(len, sets)) - _SET.size
        names: list[bytes] = []
        for index, name in interfaces.items():
            record = index.to_bytes(4) + _text(name)
            room -= len(record)
            if room < 0:
                break
            names.append(record)
        if names:
            sets.append(_set(_INTERFACES_ID, names))
        return Message(_message(_NO_DOMAIN, b"".join(sets), sequence, at), 1 + len(names))

    def messages(self, deltas: Iterable[FlowDelta], sequence: int, at: float, epoch: float) -> Iterator[Message]:
        """Messages with these flow records.

        `epoch` is what monotonic seconds and those since the epoch differ by.
        """
        by_template: dict[int, list[FlowDelta]] = {}
        for delta in deltas:
            by_template.setdefault(_template_of(delta), []).append(delta)
        room = self.room - _HEADER.size
        sets: list[bytes] = []
        told: list[FlowDelta] = []
        used = 0
        for number, alike in by_template.items():
            records: list[bytes] = []
            for delta in alike:
                record = _record(delta, epoch)
                head = 0 if records else _SET.size
                if used + head + len(record) > room:
                    if records:
                        sets.append(_set(number, records))
                    yield Message(_message(self.domain, b"".join(sets), sequence, at), len(told), tuple(told))
                    sequence += len(told)
                    sets, told, records, used, head = [], [], [], 0, _SET.size
                records.append(record)
                told.append(delta)
                used += head + len(record)
            sets.append(_set(number, records))
        if told:
            yield Message(_message(self.domain, b"".join(sets), sequence, at), len(told), tuple(told))


def _message(domain: int, sets: bytes, sequence: int, at: float) -> bytes:
    return _HEADER.pack(_VERSION, _HEADER.size + len(sets), int(at), sequence & 0xFFFFFFFF, domain) + sets


def _fields(octets: int, has_ports: bool, has_spi: bool) -> tuple[tuple[int, int], ...]:
    return (*_COMMON, *_ADDRESSES[octets], *(_PORTS if has_ports else ()), *(_SPI if has_spi else ()), *_APPLICATION)


def _number(octets: int, has_ports: bool, has_spi: bool) -> int:
    return 256 + (octets == 16) + 2 * has_ports + 4 * has_spi


def _template_of(delta: FlowDelta) -> int:
    return _number(len(delta.source), delta.ports is not None, delta.spi is not None)


_KINDS = [(octets, ports, spi) for spi in (False, True) for ports in (False, True) for octets in (4, 16)]
_TEMPLATES = {_number(*kind): _fields(*kind) for kind in _KINDS}
#: All of a record but its last field, the application's name.
_RECORDS = {_number(*kind): Struct(f"!5Q2I4B{kind[0]}s{kind[0]}s{'HH' * kind[1]}{'I' * kind[2]}") for kind in _KINDS}


def _template(number: int, fields: Iterable[tuple[int, int]]) -> bytes:
    """Section 3.4.1."""
    return _with_fields(_SET.pack(number, len(list(fields))), fields)


def _options_template(number: int, fields: Iterable[tuple[int, int]]) -> bytes:
    """Section 3.4.2; the first field is the scope."""
    return _with_fields(_SET.pack(number, len(list(fields))) + (1).to_bytes(2), fields)


def _with_fields(head: bytes, fields: Iterable[tuple[int, int]]) -> bytes:
    return head + b"".join(_SET.pack(*field) for field in fields)


def _set(number: int, records: list[bytes]) -> bytes:
    body = b"".join(records)
    return _SET.pack(number, _SET.size + len(body)) + body


def _text(text: str) -> bytes:
    """A string of fewer than 255 bytes, behind its length (section 7)."""
    octets = text.encode(errors="replace")[:254]
    return bytes((len(octets),)) + octets


def _record(delta: FlowDelta, epoch: float) -> bytes:
    ports = delta.ports or ()
    spi = () if delta.spi is None else (delta.spi,)
    return _RECORDS[_template_of(delta)].pack(
        delta.octets,
        delta.packets,
        round((delta.started_at + epoch) * 1000),
        round((delta.ended_at + epoch) * 1000),
        delta.session_id,
        delta.ingress,
        delta.egress,
        delta.protocol,
        delta.is_outbound,
        _DROPPED if delta.is_dropped else _FORWARDED,
        delta.end_reason,
        delta.source,
        delta.destination,
        *ports,
        *spi,
    ) + _text(delta.application)
