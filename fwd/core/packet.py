"""The decoder: the bytes of one IP packet down to ESP's SPI or the UDP ports of IKE and NAT-T.

It reads the outer headers only and trusts no length in them. Arbitrary bytes give a `Packet` or raise
`PacketError`; nothing else leaves `parse`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from struct import Struct
from struct import error as StructError

from . import ike
from .constants import (
    IKE_PORT,
    MAX_IPV6_EXTENSIONS,
    NAT_KEEPALIVE,
    NAT_T_PORT,
    NON_ESP_MARKER,
    PROTO_AH,
    PROTO_ESP,
    PROTO_UDP,
)


class Malformation(StrEnum):
    """Why a packet could not be decoded; each is a drop counter of its own, `flow_parse_...`."""

    TRUNCATED = "truncated"
    IP_VERSION = "ip_version"
    IP_HEADER = "ip_header"
    IPV6_EXTENSION = "ipv6_extension"
    ESP = "esp"
    UDP = "udp"
    NOT_IPSEC = "not_ipsec"


class PacketError(ValueError):
    """The bytes are no packet that fwd handles; `reason` says why. The one error that `parse` raises."""

    def __init__(self, reason: Malformation) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Kind(StrEnum):  # a part of keys: that of a plain Enum is hashed in Python
    """What an IPsec gateway makes of the packet."""

    ESP = "esp"
    ESP_IN_UDP = "esp-in-udp"
    IKE = "ike"


@dataclass(slots=True)
class Packet:
    """The outer headers of one packet.

    `src` and `dst` are in network order, 4 or 16 bytes. `length` is that of the whole IP packet in bytes, from
    the IP header, never from the copy that the kernel handed over. `spi` is None for IKE and for a later
    fragment, which does not carry it; `seq` likewise (it is not authenticated: never decide on it, RFC 4303
    section 3.4.3 checks it after the ICV). The UDP ports are 0 for plain ESP. `is_fragment` is true for the first
    fragment and for later ones. `ike` is the header of an IKE message, None if what is on IKE's port has none;
    `is_keepalive` is true for the one byte that keeps a NAT's mapping alive (RFC 3948 section 2.3).
    """

    kind: Kind
    src: bytes
    dst: bytes
    length: int
    spi: int | None = None
    seq: int | None = None
    sport: int = 0
    dport: int = 0
    is_fragment: bool = False
    ike: ike.IkeHeader | None = None
    is_keepalive: bool = False

    @property
    def outer(self) -> bytes:
        """Addresses, UDP ports if any, and SPI, as they stand in the packet: what `peek` finds in a plain one."""
        if self.spi is None:
            return b""
        ports = _TWO_PORTS(self.sport, self.dport) if self.kind is Kind.ESP_IN_UDP else b""
        return self.src + self.dst + ports + self.spi.to_bytes(4)


_TWO_PORTS = Struct("!HH").pack
_TWO_WORDS = Struct("!II").unpack_from
_TWO_HALVES = Struct("!HH").unpack_from
_WORD = Struct("!I").unpack_from
_HALF = Struct("!H").unpack_from
_HALF_AND_BYTE = Struct("!HB").unpack_from
#: Version and header length, total length, fragment, protocol, the 12 bytes from the source address on, and the next 4.
_IPV4_PLAIN = Struct("!BxHxxHxBxx12sI").unpack_from

_IPV4_HEADER = 20  # RFC 791 section 3.1, without options
_IPV6_HEADER = 40  # RFC 8200 section 3
_UDP_HEADER = 8  # RFC 768

# RFC 8200 section 4: hop-by-hop, routing, destination options; and mobility, HIP, shim6 in the same format:
# next header, length in 8-byte units without the first.
_IPV6_OPTIONS = frozenset({0, 43, 60, 135, 139, 140})
_IPV6_FRAGMENT = 44


def parse(octets: bytes) -> Packet:
    """Decode one IPv4 or IPv6 packet from its first byte; a copy cut short after the headers will do.

    Raises PacketError for everything that is not whole ESP, ESP in UDP, IKE or a NAT-T keepalive.
    Sources: RFC 791, RFC 8200, RFC 4303 section 2, RFC 3948 section 2.
    """
    if not octets:
        raise PacketError(Malformation.TRUNCATED)
    version = octets[0] >> 4
    if version == 4:
        return _parse_ipv4(octets)
    if version == 6:
        return _parse_ipv6(octets)
    raise PacketError(Malformation.IP_VERSION)


def peek(octets: bytes) -> tuple[bytes, int, int] | None:
    """`outer`, length and sequence number as `parse` gives them, at a fifth of its cost.

    None for a packet with IP options and the like, for a fragment, and for one that may be malformed: `parse` knows.
    """
    try:
        first, length, fragment, protocol, outer, seq = _IPV4_PLAIN(octets)
    except StructError:
        return None
    if first == 0x45 and not fragment & 0x3FFF:
        if protocol == PROTO_ESP and length >= 28:
            return outer, length, seq
        if protocol == PROTO_UDP and length >= 36 and len(octets) >= 36:
            return outer + octets[28:32], length, _WORD(octets, 32)[0]
    elif first >> 4 == 6:
        payload, protocol = _HALF_AND_BYTE(octets, 4)
        if protocol == PROTO_ESP and payload >= 8 and len(octets) >= 48:
            return octets[8:44], 40 + payload, _WORD(octets, 44)[0]
        if protocol == PROTO_UDP and payload >= 16 and len(octets) >= 56:
            return octets[8:44] + octets[48:52], 40 + payload, _WORD(octets, 52)[0]
    return None


def packet_of(outer: bytes) -> Packet:
    """A packet, of no length, with these addresses, UDP ports and SPI: the way back from `peek`."""
    has_ports = len(outer) % 8 == 0  # addresses and SPI are an odd number of words
    size = (len(outer) - (8 if has_ports else 4)) // 2
    kind, ports = (Kind.ESP_IN_UDP, _TWO_HALVES(outer, 2 * size)) if has_ports else (Kind.ESP, (0, 0))
    return Packet(kind, outer[:size], outer[size : 2 * size], 0, int.from_bytes(outer[-4:]), None, *ports)


def _parse_ipv4(octets: bytes) -> Packet:
    if len(octets) < _IPV4_HEADER:
        raise PacketError(Malformation.TRUNCATED)
    header = (octets[0] & 0x0F) * 4
    (length,) = _HALF(octets, 2)
    if header < _IPV4_HEADER or length < header:
        raise PacketError(Malformation.IP_HEADER)
    (fragment,) = _HALF(octets, 6)
    packet = _parse_payload(octets, octets[9], header, length, octets[12:16], octets[16:20], fragment & 0x1FFF)
    packet.is_fragment = fragment & 0x3FFF != 0
    return packet


def _parse_ipv6(octets: bytes) -> Packet:
    if len(octets) < _IPV6_HEADER:
        raise PacketError(Malformation.TRUNCATED)
    (payload,) = _HALF(octets, 4)
    if payload == 0:  # a jumbogram (RFC 2675): no ESP or IKE is that large
        raise PacketError(Malformation.IP_HEADER)
    length = _IPV6_HEADER + payload
    end = min(length, len(octets))
    protocol, offset, fragment, is_fragment = octets[6], _IPV6_HEADER, 0, False
    for _ in range(MAX_IPV6_EXTENSIONS):
        if protocol in _IPV6_OPTIONS:
            header = _ipv6_extension(octets, offset, end, 8)
        elif protocol == PROTO_AH:  # RFC 4302 section 2.2: its length counts 4-byte units, less two
            header = _ipv6_extension(octets, offset, end, 4)
        elif protocol == _IPV6_FRAGMENT:
            if offset + 8 > end:
                raise PacketError(Malformation.TRUNCATED)
            (field,) = _HALF(octets, offset + 2)
            fragment = field >> 3
            is_fragment = field & 0xFFF9 != 0
            header = 8
        else:
            break
        protocol = octets[offset]
        offset += header
        if fragment:  # what follows is the middle of the packet: no header can be read from it
            break
    else:
        raise PacketError(Malformation.IPV6_EXTENSION)
    packet = _parse_payload(octets, protocol, offset, length, octets[8:24], octets[24:40], fragment)
    packet.is_fragment = is_fragment
    return packet


def _ipv6_extension(octets: bytes, offset: int, end: int, unit: int) -> int:
    """The length in bytes of the extension header at `offset`."""
    if offset + 2 > end:
        raise PacketError(Malformation.TRUNCATED)
    header = (octets[offset + 1] + 8 // unit) * unit
    if offset + header > end:
        raise PacketError(Malformation.IPV6_EXTENSION)
    return header


def _parse_payload(
    octets: bytes, protocol: int, offset: int, length: int, src: bytes, dst: bytes, fragment: int
) -> Packet:
    """Decode what follows the IP header(s); `fragment` is the fragment offset in units of 8 bytes."""
    if protocol == PROTO_ESP:
        if fragment:
            return Packet(Kind.ESP, src, dst, length)
        spi, seq = _esp(octets, offset, min(length, len(octets)))
        return Packet(Kind.ESP, src, dst, length, spi, seq)
    if protocol == PROTO_UDP and not fragment:
        return _parse_udp(octets, offset, length, src, dst)
    raise PacketError(Malformation.NOT_IPSEC)


def _esp(octets: bytes, offset: int, end: int) -> tuple[int, int]:
    if offset + 8 > end:
        raise PacketError(Malformation.TRUNCATED)
    spi, seq = _TWO_WORDS(octets, offset)
    if spi == 0:  # RFC 4303 section 2.1: zero must not be sent on the wire
        raise PacketError(Malformation.ESP)
    return spi, seq


def _parse_udp(octets: bytes, offset: int, length: int, src: bytes, dst: bytes) -> Packet:
    end = min(length, len(octets))
    payload = offset + _UDP_HEADER
    if payload > end:
        raise PacketError(Malformation.TRUNCATED)
    sport, dport = _TWO_HALVES(octets, offset)
    if NAT_T_PORT in (sport, dport):
        first = octets[payload : min(payload + 4, end)]
        if first == NON_ESP_MARKER:
            header = ike.parse_header(octets, payload + 4, end)
            return Packet(Kind.IKE, src, dst, length, None, None, sport, dport, ike=header)
        if first == NAT_KEEPALIVE:
            return Packet(Kind.IKE, src, dst, length, None, None, sport, dport, is_keepalive=True)
        if payload + 8 > end:
            raise PacketError(Malformation.UDP)
        spi, seq = _esp(octets, payload, end)
        return Packet(Kind.ESP_IN_UDP, src, dst, length, spi, seq, sport, dport)
    if IKE_PORT in (sport, dport):
        header = ike.parse_header(octets, payload, end)
        return Packet(Kind.IKE, src, dst, length, None, None, sport, dport, ike=header)
    raise PacketError(Malformation.NOT_IPSEC)
