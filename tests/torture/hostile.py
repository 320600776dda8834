"""What must hold for any bytes whatever, as functions of one input: for Hypothesis, for mutations and for a fuzzer.

An input of `decoder` is one packet, or what is meant to be one; one of `firewall` is a program of packets, SA events
and pauses, in the form that `program` writes. They return nothing, and raise whatever is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fwd.core.events import Event
from fwd.core.ike import HEADER_BYTES, parse_header
from fwd.core.packet import Kind, Packet, PacketError, packet_of, parse, peek
from fwd.core.policy import Action, Rule
from fwd.core.sa import SaDeleted, SaEstablished, SaRekeyed, SaSnapshot
from fwd.core.settings import PassThrough, TransitPorts, UnknownSpi
from tests.builders import Bench, child_sa

_OUTER_BYTES = (12, 16, 36, 40)  # ESP and ESP in UDP, IPv4 and IPv6


def decoder(octets: bytes) -> None:
    """Both decoders, what leads from one to the other, and IKE's header at every place that an input offers."""
    packet = _parsed(octets)
    if packet is not None:
        assert len(packet.src) == len(packet.dst) == (4 if octets[0] >> 4 == 4 else 16)
        assert (20 if packet.spi is None else 28) <= packet.length <= 40 + 0xFFFF
        assert packet.spi is None or 0 < packet.spi < 2**32
        assert (packet.spi is None) == (packet.seq is None) == (packet.outer == b"")
        assert packet.kind is Kind.ESP or not (packet.sport == packet.dport == 0)
        assert packet.ike is None or packet.kind is Kind.IKE
        if packet.spi is None:
            assert packet.is_fragment or packet.kind is Kind.IKE
        else:
            again = packet_of(packet.outer)
            assert (again.kind, again.src, again.dst) == (packet.kind, packet.src, packet.dst)
            assert (again.spi, again.sport, again.dport) == (packet.spi, packet.sport, packet.dport)
    _peeked_as_parsed(octets, packet)
    size = _OUTER_BYTES[len(octets) % 4]
    if len(octets) >= size:
        outer = packet_of(octets[:size])
        assert outer.outer == octets[:size] and outer.spi == int.from_bytes(octets[size - 4 : size])
    is_ip = octets[:1] and octets[0] >> 4 in (4, 6)
    ike_header(octets, octets[-1] % len(octets) if is_ip else 0)


def _parsed(octets: bytes) -> Packet | None:
    """What the bytes are; those that do not belong to the packet must not change that."""
    try:
        packet = parse(octets)
    except PacketError as error:
        length = _length(octets)
        if length and len(octets) >= length:
            try:
                parse(octets[:length] + b"\x32\x01\x94")
            except PacketError as other:
                assert other.reason is error.reason
            else:
                raise AssertionError("bytes behind the packet are read") from error
        return None
    if len(octets) > packet.length:
        assert parse(octets[: packet.length]) == packet
    return packet


def _length(octets: bytes) -> int:
    """The length in bytes that an IP header tells, 0 if there is none."""
    if len(octets) >= 40 and octets[0] >> 4 == 6:
        return 40 + int.from_bytes(octets[4:6])
    return max(20, int.from_bytes(octets[2:4])) if len(octets) >= 20 and octets[0] >> 4 == 4 else 0


def _peeked_as_parsed(octets: bytes, packet: Packet | None) -> None:
    """The fast decoder says what the slow one says, or something that nobody asks for."""
    seen = peek(octets)
    if seen is None:
        return
    outer, length, seq = seen
    if packet is not None and packet.spi is not None:
        assert (outer, length, seq) == (packet.outer, packet.length, packet.seq) and not packet.is_fragment
        return
    no_ones = packet_of(outer)  # an element is of an SPI, and of ports, that the slow one accepted
    assert not no_ones.spi or (no_ones.kind is Kind.ESP_IN_UDP and 4500 not in (no_ones.sport, no_ones.dport))


def ike_header(octets: bytes, offset: int) -> None:
    """IKE's header, read a second time by hand."""
    header = parse_header(octets, offset, len(octets))
    there = octets[offset : offset + HEADER_BYTES]
    is_header = len(there) == HEADER_BYTES and there[17] >> 4 in (1, 2) and there[:8] != bytes(8)
    if not is_header or int.from_bytes(there[24:]) < HEADER_BYTES:
        assert header is None
        return
    assert header is not None
    assert header.initiator_spi.to_bytes(8) + header.responder_spi.to_bytes(8) == there[:16]
    assert bytes([header.next_payload, header.major << 4 | header.minor, header.exchange_type]) == there[16:19]
    assert bytes([header.flags]) + header.message_id.to_bytes(4) + header.length.to_bytes(4) == there[19:]
    assert header.exchange and {header.is_from_initiator, header.is_response, header.is_fragment} <= {True, False}


# --- the whole core -----------------------------------------------------------------------------------

#: What one step of a program does, by its first byte modulo the number of them; packets are followed by their length
#: in one byte, and by themselves.
PACKETS = ("receive", "send", "forward", "forward back", "again")
EVENTS = ("wait 1", "wait 6", "late 61", "established", "rekeyed", "deleted", "snapshot", "clear")
_STEPS = PACKETS + EVENTS

#: The bits of a program's first byte.
FAST_PATH, SPI_PORTS, IKE_GATED, DISCARD_UNKNOWN, DENY_TRANSIT = 1, 2, 4, 8, 16

#: So few that tables are full soon, and that everything can be looked at after each step.
_SESSIONS = 6
_STEPS_PER_PROGRAM = 64


def program(options: int, *steps: tuple[str, bytes] | str) -> bytes:
    """The bytes of a program; a step is a word of EVENTS, or a word of PACKETS and a packet (its first 255 bytes)."""
    octets = bytearray([options])
    for step in steps:
        word, packet = (step, b"") if isinstance(step, str) else step
        octets.append(_STEPS.index(word))
        if word in PACKETS and word != "again":
            octets += bytes([len(packet[:255])]) + packet[:255]
    return bytes(octets)


def steps_of(octets: bytes) -> Iterable[tuple[str, bytes]]:
    """The way back, from any bytes."""
    position, packet = 1, ("receive", b"")
    for _ in range(_STEPS_PER_PROGRAM):
        if position >= len(octets):
            return
        word = _STEPS[octets[position] % len(_STEPS)]
        position += 1
        if word in PACKETS:
            if word != "again" and position < len(octets):
                end = position + 1 + octets[position]
                packet = (word, octets[position + 1 : end])
                position = end
            yield packet
        else:
            yield (word, b"")


def firewall(octets: bytes) -> int:
    """Run a program; after each step the books have to balance. Gives the number of packets in it."""
    bench, _ = run(octets)
    bench.clear(*bench.sessions)
    bench.wait(2)
    return bench.offered


def run(octets: bytes) -> tuple[Bench, list[Event]]:
    """The firewall after a program, and what it told."""
    options = octets[0] if octets else 0
    rules = [Rule("no-transit", Action.DENY, from_zones=frozenset({"trust"}))] if options & DENY_TRANSIT else []
    bench = Bench(
        *rules,
        Rule("any-any", Action.ALLOW),
        fast_path=bool(options & FAST_PATH),
        max_sessions=_SESSIONS,
        transit_ports=TransitPorts.SPI if options & SPI_PORTS else TransitPorts.GENERIC,
        pass_through=PassThrough.IKE_GATED if options & IKE_GATED else PassThrough.ALWAYS,
        unknown_spi=UnknownSpi.DISCARD if options & DISCARD_UNKNOWN else UnknownSpi.GENERIC,
        ike_gate_s=30,
    )
    packets, events = 0, []
    for word, packet in steps_of(octets):
        if word in PACKETS:
            packets += 1
            _PASS[word](bench, packet)
        else:
            _DO[word](bench)
        while (event := bench.firewall.next_event()) is not None:
            events.append(event)
    assert bench.offered == packets
    return bench, events


_PASS: dict[str, Callable[[Bench, bytes], bool]] = {
    "receive": Bench.receive,
    "send": Bench.send,
    "forward": Bench.forward,
    "forward back": lambda bench, packet: bench.forward(packet, to_left=True),
}


def _held_up(bench: Bench, seconds: float) -> None:
    """Time passes, and the daemon has its turn only at the end."""
    bench.now += seconds
    bench.firewall.handle_timer(bench.now)
    bench.serve_kernel()
    bench.check()


_OLD, _NEW = child_sa(0x1001, 0x2001), child_sa(0x1002, 0x2002)
_DO: dict[str, Callable[[Bench], None]] = {
    "wait 1": lambda bench: bench.wait(1),
    "wait 6": lambda bench: bench.wait(6),
    "late 61": lambda bench: _held_up(bench, 61),
    "established": lambda bench: bench.sas(SaEstablished(_OLD)),
    "rekeyed": lambda bench: bench.sas(SaRekeyed(_OLD, _NEW)),
    "deleted": lambda bench: bench.sas(SaDeleted(_NEW)),
    "snapshot": lambda bench: bench.sas(SaSnapshot((_NEW,))),
    "clear": lambda bench: bench.clear(*bench.sessions),
}
