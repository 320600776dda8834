"""A session: two flows, one state, one rule. What PAN-OS shows of it follows from these fields.

The client is the side that opened it; the c2s flow goes from the client to the server, and the s2c flow is
the same turned round: addresses, zones and the two "ports" swap places (SPEC section 1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import NamedTuple, TypeAlias

from .constants import GENERIC_ESP_PORT, PROTO_ESP, PROTO_UDP, SPIS_SEEN
from .packet import Kind, Packet, packet_of
from .policy import Rule, Verdict
from .sa import ChildSa, SpiKey
from .state import EndReason, State, Trigger, next_state


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


def port_of(packet: Packet, udp_port: int) -> int:
    """What a session that no IKE daemon announced shows as the port of one side (SPEC section 1)."""
    return GENERIC_ESP_PORT if packet.kind is Kind.ESP else udp_port


class SessionType(StrEnum):
    """FLOW: packets were seen. PRED: announced by the IKE daemon, no packet yet."""

    FLOW = "FLOW"
    PRED = "PRED"


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


@dataclass(slots=True, eq=False)
class Flow:
    """One direction of a session: who sends, and what was carried.

    `address` (network order), `zone` and `port` are the sender's; the port is what a session shows as such. Counted
    are IP packets and their bytes, IP header included. `spis` holds the most recent SPIs in the order in which they
    were first seen.
    """

    address: bytes
    zone: str
    port: int
    packet_count: int = 0
    byte_count: int = 0
    spis: tuple[int, ...] = ()
    session: Session = field(init=False, repr=False)

    def note_spi(self, spi: int) -> None:
        """Remember an SPI seen on the wire, once; the oldest of more than SPIS_SEEN is forgotten."""
        if spi not in self.spis:
            self.spis = (*self.spis, spi)[-SPIS_SEEN:]

    def absorb(self, other: Flow) -> None:
        """Take over what another flow counted; the other one is to be thrown away."""
        self.packet_count += other.packet_count
        self.byte_count += other.byte_count
        for spi in other.spis:
            self.note_spi(spi)


#: (interface in, interface out, outer): interface indices, 0 for none; `outer` is source and destination address, both
#: UDP ports if it is ESP in UDP, and the SPI, as they stand in the packet. Its length tells which of these it has.
ElementKey: TypeAlias = tuple[int, int, bytes]


class Place(Enum):
    """Who repeats a decision."""

    DAEMON = "daemon"
    PENDING = "pending"  # the kernel, as soon as it has been told
    KERNEL = "kernel"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class Element:
    """One SPI of a flow between two addresses and two interfaces: packets like it share its session's verdict.

    `kernel_packets` and `kernel_bytes` are the kernel's counter as read last. What the daemon answered itself is
    counted in `own_packets` and `own_bytes` until it is credited to the flow. `seen_at` is when a packet was last
    noticed, in monotonic seconds.
    """

    key: ElementKey
    flow: Flow
    verdict: Verdict
    kernel_packets: int
    kernel_bytes: int
    seen_at: float = 0.0
    place: Place = Place.DAEMON
    own_packets: int = 0
    own_bytes: int = 0

    @property
    def spi_key(self) -> SpiKey:
        """What a packet to or from this host with this key is looked up by."""
        packet = packet_of(self.key[2])
        return (packet.dst, packet.kind is Kind.ESP_IN_UDP, int.from_bytes(self.key[2][-4:]))


@dataclass(slots=True, eq=False)
class Session:
    """One entry of the session table.

    Times are monotonic seconds, but for `expires_at`, which is in the ager's own time (see ager.py).
    `refresh_s` is what a packet sets the time to live to: 0 where packets do not prolong it. `ingress` and
    `egress` are interface names as of the first packet. `sas` are the CHILD_SAs of a tunnel that ends here,
    the newest last; `udp_ports` are those of ESP in UDP, client first.
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
    sas: tuple[ChildSa, ...] = ()
    elements: tuple[Element, ...] = field(default=(), repr=False)
    rekeys: int = 0
    udp_ports: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.c2s.session = self.s2c.session = self

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

    def move(self, trigger: Trigger) -> None:
        """Go to the next state. Raises IllegalTransition and changes nothing if the table has none."""
        self.state = next_state(self.state, trigger)

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

    def flow_from(self, address: bytes) -> Flow:
        """The flow of the packets that `address` sends."""
        return self.c2s if address == self.client.address else self.s2c

    def ports_of_sa(self) -> None:
        """Show the SPIs of the newest CHILD_SA that carries traffic, or of the newest one if none does.

        Each side's port is the SPI that it receives on. PAN-OS: kA10g000000ClXiCAK.
        """
        for sa in reversed(self.sas):
            from_here, to_here = self.flow_from(sa.local), self.flow_from(sa.remote)
            if sa.spi_out in from_here.spis or sa.spi_in in to_here.spis:
                break
        else:
            sa = self.sas[-1]
        here, there = (sa.spi_in, sa.local_port), (sa.spi_out, sa.remote_port)
        client, server = (here, there) if sa.local == self.client.address else (there, here)
        self.client.port, self.server.port = client[0], server[0]
        self.udp_ports = (client[1], server[1]) if sa.encap else None
