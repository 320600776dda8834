"""A session: two flows, one state, one rule. What PAN-OS shows of it follows from these fields.

The client is the side that opened it; the c2s flow goes from the client to the server, and the s2c flow is
the same turned round: addresses, zones and the two "ports" swap places (SPEC section 1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from itertools import product
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from .constants import (
    GENERATIONS_KEPT,
    GENERIC_ESP_PORT,
    MISCOUNT_SHARE,
    MISCOUNT_SLACK,
    PROTO_ESP,
    PROTO_UDP,
    REPLAY_WINDOW,
    SPIS_SEEN,
)
from .packet import Kind, Packet, packet_of
from .policy import Rule, Verdict
from .rates import Pace
from .sa import ChildSa, SaEnd, SpiKey
from .sequence import Sequence
from .state import EndReason, State, Trigger, next_state

if TYPE_CHECKING:
    from .gate import Gate


class Application(StrEnum):
    """PAN-OS's names of the IPsec applications, and IKE."""

    IPSEC_ESP = "ipsec-esp"
    IPSEC_UDP = "ipsec-udp"
    IPSEC_ESP_UDP = "ipsec-esp-udp"
    IKE = "ike"

    @property
    def protocol(self) -> int:
        """The IP protocol number that a session of this application shows."""
        return PROTO_ESP if self in (Application.IPSEC_ESP, Application.IPSEC_UDP) else PROTO_UDP


#: What a packet is taken for as long as no IKE daemon claims its SPI.
GENERIC_APPLICATION = {
    Kind.ESP: Application.IPSEC_ESP,
    Kind.ESP_IN_UDP: Application.IPSEC_ESP_UDP,
    Kind.IKE: Application.IKE,
}


def spi_text(spi: int) -> str:
    """An SPI in decimal, as sessions show it, and in hex, as charon and tcpdump do."""
    return f"{spi} (0x{spi:08x})"


class SessionType(StrEnum):
    """FLOW: packets were seen. PRED: announced by the IKE daemon, no packet yet."""

    FLOW = "FLOW"
    PRED = "PRED"


#: How many sessions there are of each application in each state and of each type.
Tally: TypeAlias = dict[tuple[Application, State, SessionType], int]


def empty_tally() -> Tally:
    """None of any kind. A plain dict with all keys, because each session that is set up is counted."""
    return dict.fromkeys(product(Application, State, SessionType), 0)


class FlowKey(NamedTuple):
    """How packets without a known SPI find their session. Both directions have the same key: see `flow_key`."""

    kind: Kind
    low: bytes
    low_port: int
    low_zone: str | None
    high: bytes
    high_port: int
    high_zone: str | None


def flow_key(packet: Packet, src_zone: str | None, dst_zone: str | None) -> FlowKey:
    """The key of a packet, and of its reply.

    The zones are None where the session ends on this host, because its packets may come and go by different
    interfaces.
    """
    kind, src, dst, sport, dport = packet.kind, packet.src, packet.dst, packet.sport, packet.dport
    if (src, sport, src_zone or "") <= (dst, dport, dst_zone or ""):
        return FlowKey(kind, src, sport, src_zone, dst, dport, dst_zone)
    return FlowKey(kind, dst, dport, dst_zone, src, sport, src_zone)


def spi_flow_key(packet: Packet, spi: int, src_zone: str, dst_zone: str) -> FlowKey:
    """The key of an ESP packet in transit, of its SPI and direction alone."""
    return FlowKey(packet.kind, packet.src, spi, src_zone, packet.dst, spi, dst_zone)


def ports_of(packet: Packet, key: FlowKey | SpiKey) -> tuple[int, int]:
    """What a session that no IKE daemon announced shows as the ports of source and destination (SPEC section 1)."""
    if packet.kind is not Kind.ESP:
        return packet.sport, packet.dport
    port = key.low_port if isinstance(key, FlowKey) and key.low_port else GENERIC_ESP_PORT
    return port, port


#: No packets, and none of their bytes.
NOTHING = (0, 0)


@dataclass(slots=True, eq=False)
class SpiUse:
    """One SPI in one direction of a session, as it was seen on the wire: its share of what the flow counted.

    Times are monotonic seconds. `first_seq` is the first sequence number that was looked at, `next_seq` that of the
    next packet if none is missing (-1: none was looked at yet); `unseen_count` packets were decided in the kernel and
    not looked at. `sequence` is None while nothing but packets in order were seen; `told` is how much of what it tells
    stands in the totals (totals.py). `exported` is the part of packets and bytes that flow records have told of
    (flow_export.py).
    """

    spi: int
    flow: Flow
    first_seen_at: float
    last_seen_at: float
    packet_count: int = 0
    byte_count: int = 0
    first_seq: int = -1
    next_seq: int = -1
    unseen_count: int = 0
    sequence: Sequence | None = None
    told: tuple[int, int, int] | None = None
    exported: tuple[int, int] = NOTHING

    def look(self, seq: int) -> None:
        """Note the sequence number of a packet that is not yet counted."""
        if self.next_seq < 0:
            self.first_seq, self.next_seq = seq, seq + 1
            if self.sequence is not None:
                self.sequence.resume(seq, self.unseen_count)
            elif self.unseen_count:
                self.sequence = Sequence(seq, unseen=self.unseen_count)
            return
        sequence = self.sequence
        if sequence is None:
            if seq == self.next_seq and not self.unseen_count:
                self.next_seq += 1
                return
            sequence = Sequence(self.next_seq - 1, min(REPLAY_WINDOW, self.next_seq - self.first_seq))
            self.sequence = sequence
        elif sequence.top != self.next_seq - 1:
            sequence.run_to(self.next_seq - 1)
        sequence.observe(seq, self.unseen_count)
        self.next_seq = sequence.top + 1

    def absorb(self, other: SpiUse) -> None:
        """Take over what was seen of the same SPI elsewhere."""
        self.first_seen_at = min(self.first_seen_at, other.first_seen_at)
        self.last_seen_at = max(self.last_seen_at, other.last_seen_at)
        self.packet_count += other.packet_count
        self.byte_count += other.byte_count
        self.exported = (self.exported[0] + other.exported[0], self.exported[1] + other.exported[1])
        # Which numbers lay between the two cannot be told any more: the next packet is taken for the first.
        self.first_seq = self.next_seq = -1
        self.unseen_count, self.sequence, self.told = 0, None, (0, 0, 0)


@dataclass(slots=True, eq=False)
class Flow:
    """One direction of a session: who sends, and what was carried.

    `address` (network order), `zone` and `port` are the sender's; the port is what a session shows as such. Counted
    are IP packets and their bytes, IP header included. `fragment_count` are those seen that were fragments, or larger
    than what their interface carries in one. `uses` holds the most recent SPIs in the order in which they
    were first seen; what older ones carried is in the flow's counts alone. `exported` is the part of packets and bytes
    that flow records have told of, those of `uses` included.
    """

    address: bytes
    zone: str
    port: int
    packet_count: int = 0
    byte_count: int = 0
    fragment_count: int = 0
    uses: tuple[SpiUse, ...] = ()
    pace: Pace | None = field(default=None, repr=False)
    exported: tuple[int, int] = NOTHING
    session: Session = field(init=False, repr=False)

    @property
    def spis(self) -> tuple[int, ...]:
        """The SPIs seen on the wire, the oldest first."""
        return tuple(use.spi for use in self.uses)

    def use(self, spi: int) -> SpiUse | None:
        """What was seen of an SPI; None if nothing was."""
        for use in reversed(self.uses):
            if use.spi == spi:
                return use
        return None

    def note_spi(self, spi: int, now: float) -> SpiUse:
        """What was seen of an SPI, with a new record if it is a new one."""
        return self.use(spi) or self.add_spi(spi, now)

    def add_spi(self, spi: int, now: float) -> SpiUse:
        """The record of an SPI that was not seen before.

        Of more than SPIS_SEEN one goes that carried the fewest packets: a flood of SPIs drives out its own.
        """
        use = SpiUse(spi, self, now, now)
        self._take_in(use)
        return use

    def _take_in(self, use: SpiUse) -> None:
        kept = self.uses
        if len(kept) >= SPIS_SEEN:
            least = min(kept, key=lambda old: (old.packet_count, old.last_seen_at))
            kept = tuple(old for old in kept if old is not least)
        self.uses = (*kept, use)

    def absorb(self, other: Flow) -> None:
        """Take over what another flow counted; the other one is to be thrown away."""
        self.pace = None
        self.packet_count += other.packet_count
        self.byte_count += other.byte_count
        self.fragment_count += other.fragment_count
        self.exported = (self.exported[0] + other.exported[0], self.exported[1] + other.exported[1])
        for use in other.uses:
            known = self.use(use.spi)
            if known is None:
                use.flow = self
                self._take_in(use)
            else:
                known.absorb(use)


#: (interface in, interface out, outer): interface indices, 0 for none; `outer` is source and destination address, both
#: UDP ports if it is ESP in UDP, and the SPI, as they stand in the packet. Its length tells which of these it has.
ElementKey: TypeAlias = tuple[int, int, bytes]


class Place(Enum):
    """Who repeats a decision."""

    DAEMON = "daemon"
    KERNEL = "kernel"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class Element:
    """One SPI of a flow between two addresses and two interfaces: packets like it share its session's verdict.

    `kernel_packets` and `kernel_bytes` are the kernel's counter as read last. What the daemon answered itself is
    counted in `own_packets` and `own_bytes` until it is credited to the flow. `seen_at` is when a packet was last
    noticed, `looked_at` when the daemon last saw one itself, in monotonic seconds. `mtu` is the interface's, in bytes,
    `tries` how often the kernel did not answer when it was to remove it. `is_unsaved`: its counts are newer than its
    session's record.
    """

    key: ElementKey
    use: SpiUse
    verdict: Verdict
    kernel_packets: int
    kernel_bytes: int
    seen_at: float = 0.0
    place: Place = Place.DAEMON
    own_packets: int = 0
    own_bytes: int = 0
    looked_at: float = 0.0
    mtu: int = 0x1_0000
    tries: int = 0
    is_unsaved: bool = False

    @property
    def flow(self) -> Flow:
        """The flow that it is counted in."""
        return self.use.flow

    @property
    def spi_key(self) -> SpiKey:
        """What a packet to or from this host with this key is looked up by."""
        packet = packet_of(self.key[2])
        return (packet.dst, packet.kind is Kind.ESP_IN_UDP, int.from_bytes(self.key[2][-4:]))


@dataclass(slots=True)
class Comparison:
    """The IKE daemon's packet counts of one SA pair beside fwd's: in and out, at one moment (monotonic seconds).

    `base` is what the IKE daemon had counted before fwd could. fwd's counts were `least` just before and `most` just
    after: what lies between is no difference. `is_asked`: fwd's are being read for it. `was_off`: there was a
    difference at the comparison before, as well.
    """

    at: float
    theirs: tuple[int, int]
    least: tuple[int, int]
    most: tuple[int, int]
    base: tuple[int, int]
    is_asked: bool = False
    was_off: bool = False

    @property
    def drift(self) -> tuple[int, int]:
        """How many packets more fwd counted than the IKE daemon, in and out; less than nothing: fewer."""
        into, out = (
            min(max(theirs - base, least), most) - (theirs - base)
            for theirs, base, least, most in zip(self.theirs, self.base, self.least, self.most, strict=True)
        )
        return into, out

    @property
    def is_off(self) -> bool:
        """Whether that is more than packets under way explain."""
        return any(
            abs(drift) > MISCOUNT_SLACK + MISCOUNT_SHARE * count
            for drift, count in zip(self.drift, self.most, strict=True)
        )


@dataclass(slots=True, eq=False)
class Generation:
    """One CHILD_SA of a tunnel: a pair of SPIs between two rekeys. Times are monotonic seconds.

    `is_whole`: all its packets are counted here, from the first. `moves` counts the address changes that it went
    through (MOBIKE, RFC 4555), `after_end_count` the packets that came long after it was gone. `comparison` holds the
    IKE daemon's packet counts against fwd's; `told` is the next one, which waits for fwd's counts to be read.
    """

    sa: ChildSa
    installed_at: float
    is_whole: bool = False
    removed_at: float | None = None
    end: SaEnd | None = None
    moves: int = 0
    after_end_count: int = 0
    comparison: Comparison | None = None
    told: Comparison | None = None


@dataclass(slots=True, eq=False)
class Session:
    """One entry of the session table.

    Times are monotonic seconds, but for `expires_at`, which is in the ager's own time (see ager.py).
    `refresh_s` is what a packet sets the time to live to: 0 where packets do not prolong it. `ingress` and
    `egress` are interface names as of the first packet. `generations` are the CHILD_SAs of a tunnel that ends here,
    those that are gone included, the newest last, and `is_client_here` says whether this host initiated it.
    `udp_ports` are those of ESP in UDP, client first. `gate` is the IKE gate that it may have to pass.
    `is_limited`: it counts towards the limits (limits.py). `tally` is where it is counted while it is in the table: so
    state and type change by `move` and `begin_flow` alone. `exported_at` is when flow records told of it last,
    `ended_at` when it ended; None while it lives.
    """

    id: int
    application: Application
    c2s: Flow
    s2c: Flow
    rule: Rule
    is_terminated: bool
    ingress: str
    egress: str
    timeout_s: int
    created_at: float
    state: State = State.INIT
    type: SessionType = SessionType.FLOW
    end_reason: EndReason = EndReason.UNKNOWN
    is_provisional: bool = False
    last_seen_at: float = 0.0
    expires_at: float = 0.0
    refresh_s: int = 0
    armed_at: float | None = None
    keys: tuple[FlowKey | SpiKey, ...] = ()
    generations: tuple[Generation, ...] = ()
    is_client_here: bool = False
    elements: tuple[Element, ...] = field(default=(), repr=False)
    rekeys: int = 0
    udp_ports: tuple[int, int] | None = None
    gate: Gate | None = None
    is_limited: bool = False
    tally: Tally | None = field(default=None, repr=False)
    exported_at: float = 0.0
    ended_at: float | None = None

    def __post_init__(self) -> None:
        self.c2s.session = self.s2c.session = self

    @property
    def sas(self) -> tuple[ChildSa, ...]:
        """The CHILD_SAs that its tunnel has now, the newest last."""
        return tuple(generation.sa for generation in self.generations if generation.removed_at is None)

    @property
    def sa(self) -> ChildSa | None:
        """The newest CHILD_SA of its tunnel, even if it is gone; None if it is no tunnel's."""
        return self.generations[-1].sa if self.generations else None

    def generation(self, sa: ChildSa) -> Generation | None:
        """The generation that this CHILD_SA is, if it is one of this tunnel's now."""
        for generation in self.generations:
            # The SPI first: to compare all fields of very many SAs takes its time.
            if generation.removed_at is None and generation.sa.spi_in == sa.spi_in and generation.sa == sa:
                return generation
        return None

    def generation_of(self, spi: int) -> Generation | None:
        """The newest generation with this SPI, in or out; it may be gone."""
        for generation in reversed(self.generations):
            if spi in (generation.sa.spi_in, generation.sa.spi_out):
                return generation
        return None

    def add_generation(self, generation: Generation) -> None:
        """The tunnel has a further CHILD_SA; of more than GENERATIONS_KEPT the oldest that is gone is forgotten."""
        self.generations += (generation,)
        if len(self.generations) > GENERATIONS_KEPT:
            gone = next((old for old in self.generations if old.removed_at is not None), None)
            self.generations = tuple(kept for kept in self.generations if kept is not gone)

    @property
    def client(self) -> Flow:
        """The side that opened the session: what it sends is the c2s flow, which has its address, zone and port."""
        return self.c2s

    @property
    def server(self) -> Flow:
        """The other side, by what it sends."""
        return self.s2c

    @property
    def packet_count(self) -> int:
        """Packets of both flows."""
        return self.c2s.packet_count + self.s2c.packet_count

    @property
    def byte_count(self) -> int:
        """Bytes of both flows."""
        return self.c2s.byte_count + self.s2c.byte_count

    def idle_s(self, now: float) -> float:
        """Seconds since its last packet, or since it was opened if there was none."""
        return now - max(self.last_seen_at, self.created_at)

    def move(self, trigger: Trigger) -> None:
        """Go to the next state. Raises IllegalTransition and changes nothing if the table has none."""
        self._become(next_state(self.state, trigger), self.type)

    def begin_flow(self) -> None:
        """Its first packet came."""
        self._become(self.state, SessionType.FLOW)

    def _become(self, state: State, type_: SessionType) -> None:
        if self.tally is not None:
            self.tally[self.application, self.state, self.type] -= 1
            self.tally[self.application, state, type_] += 1
        self.state, self.type = state, type_

    @property
    def is_decided(self) -> bool:
        """Whether every packet of it meets the same verdict until something changes."""
        return not self.is_provisional and self.state in (State.ACTIVE, State.DISCARD)

    def flow(self, is_c2s: bool) -> Flow:
        """The flow of that direction."""
        return self.c2s if is_c2s else self.s2c

    def flow_of(self, packet: Packet) -> Flow:
        """The flow of a packet of this session, by its source; if source and destination are alike, c2s."""
        is_c2s = packet.src == self.c2s.address and (not packet.sport or packet.sport == self.c2s.port)
        return self.c2s if is_c2s else self.s2c

    @property
    def outbound(self) -> Flow:
        """What this host sends through its tunnel."""
        return self.c2s if self.is_client_here else self.s2c

    @property
    def inbound(self) -> Flow:
        """What this host receives through its tunnel."""
        return self.s2c if self.is_client_here else self.c2s

    def ports_of_sa(self) -> None:
        """Show the SPIs of the newest CHILD_SA that carries traffic, or of the newest one if none does.

        Each side's port is the SPI that it receives on. PAN-OS: kA10g000000ClXiCAK.
        """
        if not (sas := self.sas):
            return
        sent, received = self.outbound.spis, self.inbound.spis
        sa = next((sa for sa in reversed(sas) if sa.spi_out in sent or sa.spi_in in received), sas[-1])
        self.outbound.port, self.inbound.port = sa.spi_in, sa.spi_out
        ports = (sa.local_port, sa.remote_port) if self.is_client_here else (sa.remote_port, sa.local_port)
        self.udp_ports = ports if sa.encap else None
