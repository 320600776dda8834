"""The dataplane without its I/O: packets, SA events and the time go in; verdicts and events come out.

    verdict = firewall.receive_packet(octets, hook, indev, outdev, now)
    while (work := firewall.take_work()):    # what the kernel is to do before that verdict is given
        firewall.apply_outcome(work, outcome, now)
    firewall.apply_sa(event, now)            # what the IKE daemon said
    firewall.apply_interface(event, now)     # what the kernel said
    firewall.handle_timer(now)               # at firewall.next_deadline() at the latest
    while (event := firewall.next_event()):  # what there is to tell

Every packet gets exactly one verdict, and is counted in exactly one place: a flow (`_account`), an element that
repeats the flow's verdict, in the daemon or in the kernel (`_count` brings its counts to the flow), or a drop counter
(`_drop`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum

from .ager import Ager
from .constants import (
    CLEAR_SLICE,
    ELEMENT_IDLE_S,
    GATE_SLICE,
    LOOK_INTERVAL_S,
    LOOK_MAX_PACKETS,
    LOOK_MIN_PACKETS,
    LOOKS_PER_TURN,
    SA_LINGER_S,
    UNKNOWN_SPI_KEYS,
    WATCH_INTERVAL_S,
    WATCH_SLICE,
)
from .counters import Counters
from .events import (
    CounterRose,
    Event,
    SessionCreated,
    SessionDiscarded,
    SessionEnded,
    SessionPromoted,
    SessionRekeyed,
    TunnelsStale,
    TunnelTrouble,
)
from .fast_path import FastPath, Found, Outcome, Reading, Work
from .gate import CLOSED, IkeGate
from .health import Finding, Trouble, compare, findings
from .ike import IkeSa, IkeWatcher, Way, of_tunnel
from .interfaces import InterfaceEvent, InterfaceTable
from .packet import Kind, Packet, PacketError, packet_of, parse, peek
from .pairing import Unpaired, proven_pairs
from .policy import Action, Rule, Verdict
from .sa import (
    ChildSa,
    SaAdded,
    SaDeleted,
    SaDirectory,
    SaEnd,
    SaEstablished,
    SaEvent,
    SaRekeyed,
    SaRemoved,
    SaSnapshot,
    SaSourceLost,
    SaUpdated,
    SpiKey,
    TunnelKey,
)
from .session import (
    GENERIC_APPLICATION,
    Application,
    Element,
    ElementKey,
    Flow,
    FlowKey,
    Generation,
    Place,
    Session,
    SessionType,
    SpiUse,
    flow_key,
    ports_of,
    spi_flow_key,
)
from .settings import PassThrough, Settings, TransitPorts, UnknownSpi
from .state import EndReason, State, Trigger
from .table import Key, SessionTable, TableFull


class Hook(IntEnum):
    """Where the packet is on its way: the kernel's NF_INET_ hooks (linux/netfilter.h)."""

    INPUT = 1
    FORWARD = 2
    OUTPUT = 3


_SA_COUNTERS: Mapping[type[SaEvent], str] = {
    SaEstablished: "sa_established",
    SaRekeyed: "sa_rekeyed",
    SaDeleted: "sa_deleted",
    SaSnapshot: "sa_snapshot",
    SaSourceLost: "sa_source_lost",
}

_END_COUNTERS = {
    EndReason.AGED_OUT: "session_aged_out",
    EndReason.CLEARED: "session_cleared",
    EndReason.TUNNEL_DOWN: "session_tunnel_down",
}


class Firewall:
    """The session table, the SAs, the interfaces and the policy of one host. Times are monotonic seconds."""

    def __init__(self, settings: Settings, now: float) -> None:
        self.settings = settings
        self.table = SessionTable(settings.max_sessions, settings.keep_ended)
        self.ager = Ager(self.table, now)
        self.counters = Counters(now)
        self.directory = SaDirectory()
        self.interfaces = InterfaceTable()
        # One element each way is what most sessions need.
        self.fast_path = FastPath(2 * settings.max_sessions, self._credit)
        self._element = self.fast_path.lookup
        self.started_at = now
        self._tunnels: dict[TunnelKey, Session] = {}
        self._lingering: deque[tuple[float, Session, ChildSa]] = deque()
        self._zone_of_index: dict[int, str] = {}
        #: IKE as it was seen between any two peers, and the gate that it opens for their ESP in transit.
        self.ike = IkeWatcher()
        self.gate = IkeGate()
        self._to_gate: deque[Session] = deque()
        self.unpaired = Unpaired()
        self._to_watch: deque[Session] = deque()
        self._next_watch_at = 0.0
        self._troubles: dict[int, dict[Trouble, Finding]] = {}
        self._is_to_compare = False
        self._events: deque[Event] = deque()
        self._to_clear: deque[Session] = deque()
        self._asked: list[Session] = []

    # --- what goes in --------------------------------------------------------------------------------

    def receive_packet(self, octets: bytes, hook: int, indev: int, outdev: int, now: float) -> Verdict:
        """Decide on one packet: its bytes from the IP header on, and the interface indices (0: none).

        A copy cut short after the headers will do. Never raises for what the bytes contain.
        """
        if plain := peek(octets):
            element = self._element((indev, outdev, plain[0]))
            if element is not None:  # like one that was decided before: under load, this is all that is done
                element.own_packets += 1
                element.own_bytes += plain[1]
                element.seen_at = now
                use = element.use
                if plain[2] == use.next_seq:  # none is missing, or it is the kernel that saw it
                    use.next_seq += 1
                else:
                    use.look(plain[2])
                return element.verdict
        self.counters.add("pkt_recv")
        try:
            packet = parse(octets)
        except PacketError as error:
            return self._drop(f"flow_parse_{error.reason}")
        # A packet to or from this host has one interface only; the session shows it on both sides.
        ingress, egress = indev or outdev, outdev or indev
        key = self._key(packet, hook, ingress, egress)
        flow = self.table.lookup(key)
        if flow is not None and flow.session.gate is not None:
            self._follow_gate(flow.session, now)
            flow = self.table.lookup(key)
        if flow is None:
            try:
                flow = self._set_up(packet, key, hook, ingress, egress, now)
            except TableFull:
                return self._drop("flow_table_full")
        session = flow.session
        if isinstance(key, FlowKey):  # of both directions
            flow = session.flow_of(packet)
        if session.state is State.OPENING:
            zone = self._zone(ingress)
            self._promote(session, self.interfaces.name_of(ingress), zone, now)
        if packet.kind is Kind.IKE and session.state is State.ACTIVE:
            self._note_ike(packet, flow, indev, outdev, now)
        counted = self._account(flow, packet, now)
        if packet.is_fragment or packet.length > self.interfaces.mtu_of(ingress):
            flow.fragment_count += 1
            self.counters.add("pkt_fragment")
        verdict = Verdict.DROP if session.state is State.DISCARD else Verdict.ACCEPT
        if counted is not None and session.is_decided:
            like_it = (indev, outdev, packet.outer)
            first = (1, packet.length)
            if self._element(like_it) is None and not self.fast_path.learn(like_it, counted, verdict, first, now):
                self.counters.add("fast_path_full")
        return verdict

    def drop_unhandled(self) -> Verdict:
        """The verdict on a packet that `receive_packet` raised for: a defect of fwd, counted as such."""
        return self._drop("flow_internal_error")

    def apply_sa(self, event: SaEvent, now: float) -> None:
        """Learn what the IKE daemon says of its SAs; sessions follow at once."""
        self.counters.add(_SA_COUNTERS[type(event)])
        if isinstance(event, SaSourceLost):
            self._events.append(TunnelsStale(event.reason))
        elif isinstance(event, SaSnapshot) and self.directory.lost_reason:
            self._events.append(TunnelsStale(self.directory.lost_reason, is_over=True))
        for change in self.directory.apply(event, now):
            match change:
                case SaAdded(sa):
                    self._add_sa(sa, now)
                case SaUpdated(old, new):
                    self._update_sa(old, new, now)
                case SaRemoved(sa, end):
                    self._remove_sa(sa, end, now)
        if isinstance(event, SaSnapshot):
            self._predict_missing(now)
            self.fast_path.read_sessions(self._tunnels.values())
            self._is_to_compare = True
            if not self.fast_path.is_asking:
                self._compare(now)
        elif isinstance(event, SaRekeyed) and (session := self._tunnels.get(event.new.tunnel)):
            session.rekeys += 1
            self._events.append(SessionRekeyed(session, event.new))

    def apply_interface(self, event: InterfaceEvent) -> None:
        """Learn of interfaces and addresses of this host."""
        self.interfaces.apply(event)
        self._zones_changed()

    def reconfigure(self, settings: Settings) -> None:
        """Take new settings for all sessions to come; those that exist keep their rule and timeout.

        If ESP in transit has to pass the IKE gate from now on, what exists opens it, once, as an exchange would.
        """
        if settings.pass_through is not self.settings.pass_through:
            self.gate.open_all()
            self._to_gate = deque(self.table if settings.pass_through is PassThrough.IKE_GATED else ())
        self.settings = settings
        self.table.capacity = settings.max_sessions
        self.table.keep_ended = settings.keep_ended
        self._zones_changed()

    def use_fast_path(self, is_on: bool) -> None:
        """Whether the kernel is to repeat decisions. Off: it forgets those that it has, bit by bit."""
        self.fast_path.is_on = is_on
        if not is_on:
            self.fast_path.retire(element for element in self.fast_path if element.place is Place.KERNEL)
        else:  # their next packet hands them on
            self.fast_path.withdraw(element for element in self.fast_path if element.place is Place.DAEMON)

    def clear(self, sessions: Sequence[Session], now: float) -> None:
        """End live sessions on an operator's word, the first CLEAR_SLICE of them now and the others soon.

        A tunnel that is still up gets a new session at once.
        """
        for session in sessions[:CLEAR_SLICE]:
            self._end(session, EndReason.CLEARED, now)
        self._to_clear.extend(sessions[CLEAR_SLICE:])

    def next_deadline(self) -> float:
        """When `handle_timer` wants to be called, at the latest."""
        deadlines = [self.counters.next_sample_at()]
        if (ager := self.ager.next_deadline()) is not None:
            deadlines.append(ager)
        if self._lingering:
            deadlines.append(self._lingering[0][0])
        if (sweep := self.fast_path.next_deadline()) is not None:
            deadlines.append(sweep)
        if (gate := self.gate.next_deadline()) is not None:
            deadlines.append(gate)
        if self._tunnels:
            deadlines.append(self._next_watch_at)
        if (pairing := self.unpaired.next_deadline()) is not None:
            deadlines.append(pairing)
        if self._to_clear or self._to_gate:
            deadlines.append(0.0)
        return min(deadlines)

    def handle_timer(self, now: float) -> None:
        """Do what is due, a bounded amount of it."""
        for counter, amount in self.counters.sample(now):
            value = self.counters.values[counter.name]
            self._events.append(CounterRose(counter.name, counter.description, amount, value))
        for session in self.ager.due(now):
            self._expire(session, now)
        while self._lingering and self._lingering[0][0] <= now:
            _, session, sa = self._lingering.popleft()
            in_use = {key for other in session.sas for key in (other.key_in, other.key_out)}
            if self.table.live(session.id) is session and sa not in session.sas:
                self._unindex(session, {sa.key_in, sa.key_out} - in_use)
        for session in [self._to_clear.popleft() for _ in range(min(CLEAR_SLICE, len(self._to_clear)))]:
            if self.table.live(session.id) is session:
                self._end(session, EndReason.CLEARED, now)
        for session in [self._to_gate.popleft() for _ in range(min(GATE_SLICE, len(self._to_gate)))]:
            is_in_transit = not session.is_terminated and session.application is not Application.IKE
            if is_in_transit and session.state is State.ACTIVE and self.table.live(session.id) is session:
                self.gate.open(session.client.address, session.server.address, now + self.settings.ike_gate_s)
                self.gate.join(session)
        self._follow_gates(now)
        self._pair_up(now)
        if now >= self._next_watch_at:
            self._watch(now)
        idle_since = now - ELEMENT_IDLE_S
        self.fast_path.withdraw(element for element in self.fast_path.sweep(now) if element.seen_at < idle_since)
        self.table.forget_ended(now - self.settings.keep_ended_s)
        is_pressed = self.table.utilisation >= self.settings.ageing_threshold
        factor = self.settings.ageing_factor if is_pressed else 1
        if factor != self.ager.factor:
            self.ager.set_factor(factor, now)

    def next_event(self) -> Event | None:
        """What happened next, in order; None when all is told.

        While the kernel owes the last counts of elements that were removed, events wait: they would tell too little.
        """
        return self._events.popleft() if self._events and not self.fast_path.is_owed_counts else None

    # --- what the kernel does and says ----------------------------------------------------------------

    def take_work(self) -> Work | None:
        """What the kernel is to do for the fast path, before any verdict is given; None if nothing."""
        return self.fast_path.take_work()

    def apply_outcome(self, work: Work, outcome: Outcome, now: float) -> None:
        """Hear what came of it: count what the kernel counted, and end the sessions that only waited for that."""
        self.fast_path.settle(work.installs, outcome.installed)
        if work.installs and not outcome.installed:
            self.counters.add("fast_path_refused", len(work.installs))
        idle_since = now - ELEMENT_IDLE_S
        to_look_at: list[Element] = []
        for elements, readings in ((work.removals, outcome.removed), (work.reads, outcome.read)):
            for element in elements:
                reading = readings.get(element.key)
                if reading is None:
                    self.fast_path.forget_lost(element)
                    self.counters.add("fast_path_lost")
                elif packets := reading[0] - element.kernel_packets:
                    self._credit_reading(element, reading, now)
                    is_fit = packets <= LOOK_MAX_PACKETS and reading[0] > LOOK_MIN_PACKETS
                    if is_fit and now - element.looked_at >= LOOK_INTERVAL_S:
                        to_look_at.append(element)
                elif element.seen_at < idle_since and element.place is Place.KERNEL:
                    self.fast_path.withdraw((element,))
        self.fast_path.look_at(e for e in to_look_at[:LOOKS_PER_TURN] if e.place is Place.KERNEL)
        if self._is_to_compare and not self.fast_path.is_asking:
            self._compare(now)
        asked, self._asked = self._asked, []
        for session in asked:
            if self.table.live(session.id) is not session:
                continue
            if self.ager.is_due(session, now):
                self._time_is_up(session, now)
            else:
                self.ager.resume(session)

    def adopt(self, everything: Iterable[Found], now: float) -> list[ElementKey]:
        """Take over what a former daemon left in the kernel: its sessions go on, with what was counted under them.

        To be called before the first packet. Sessions of this host's tunnels wait for the IKE daemon to claim them.
        Gives those elements that there is no place for: the kernel is to be rid of them.
        """
        refused = []
        # The newest word on a session's gate comes first: older elements of it do not know of later exchanges.
        for found in sorted(everything, key=lambda found: found.gated_until or 0.0, reverse=True):
            try:
                flow = self._revive(found, now)
            except TableFull:
                refused.append(found.key)
                continue
            session = flow.session
            self.fast_path.adopt(found, flow.note_spi(int.from_bytes(found.key[2][-4:]), now), now)
            session.elements[-1].use.unseen_count += found.reading[0]
            self._count(session.elements[-1], *found.reading)
            self.counters.add("pkt_fast_path", found.reading[0])
            is_otherwise = (found.verdict is Verdict.DROP) != (session.state is State.DISCARD)
            if is_otherwise or (session.gate is not None and found.gated_until is None):
                self.fast_path.withdraw(session.elements)  # today it is decided otherwise, or by a gate that it names
        return refused

    def hand_over(self) -> list[Element]:
        """Prepare for a successor: withdraw one element of each flow of which the daemon counted packets itself.

        After their outcome, `finish_hand_over` puts them back with all that was counted. Empty: there is nothing to do.
        """
        carriers = []
        for session in self.table:
            for element in session.elements:
                self._credit(element)
            for flow in (session.c2s, session.s2c):
                elements = [e for e in session.elements if e.flow is flow and e.place is Place.KERNEL]
                if elements and flow.packet_count != sum(element.kernel_packets for element in elements):
                    carriers.append(elements[0])
        self.fast_path.withdraw(carriers)
        return carriers + self.fast_path.take_looked_at()

    def finish_hand_over(self, carriers: Iterable[Element], now: float) -> None:
        """The kernel's counters include what the daemon counted: whoever adopts the elements goes on from there."""
        for carrier in carriers:
            flow = carrier.flow
            others = [e for e in flow.session.elements if e.flow is flow and e.place is Place.KERNEL]
            packets = flow.packet_count - sum(element.kernel_packets for element in others)
            octets = flow.byte_count - sum(element.kernel_bytes for element in others)
            self.fast_path.learn(carrier.key, carrier.use, carrier.verdict, (packets, octets), now)

    def linked(self, session: Session) -> list[Session]:
        """Other live sessions of the same peers that are part of the same tunnel: ESP, and the IKE beside it."""
        a, b = session.client.address, session.server.address
        ids: list[int] = []
        for sa in self.ike_sas(session):
            ids += sa.session_ids
            for port in {0, *sa.ports}:
                kind = Kind.ESP_IN_UDP if port else Kind.ESP
                for zones in {(session.client.zone, session.server.zone), (None, None)}:
                    ports = sa.ports if sa.initiator == a else sa.ports[::-1]
                    packet = Packet(kind, a, b, 0, None, None, *(ports if port else (0, 0)))
                    if flow := self.table.lookup(flow_key(packet, *zones)):
                        ids.append(flow.session.id)
        ids += [other.id for other in self.unpaired.between(a, b)]
        if session.application is Application.IKE:
            tunnels = (self.tunnel_of(sa.sa) for sa in self.directory if {sa.sa.local, sa.sa.remote} == {a, b})
            ids += [tunnel.id for tunnel in tunnels if tunnel]
        found = (self.table.live(number) for number in dict.fromkeys(ids))
        return [other for other in found if other is not None and other is not session]

    def ike_sas(self, session: Session) -> list[IkeSa]:
        """The IKE_SAs seen on the wire that a session belongs to, or may belong to; the one used last first."""
        seen = self.ike.ike_sas(session.client.address, session.server.address)
        if session.application is Application.IKE:
            return [sa for sa in seen if session.id in sa.session_ids]
        if session.application is Application.IPSEC_ESP_UDP:
            return of_tunnel(seen, (session.client.port, session.server.port))
        return list(seen)

    def findings(self, session: Session, now: float) -> list[Finding]:
        """What is wrong with a tunnel that ends here."""
        return list(findings(session, self.directory, self.settings.tunnel_silent_s, now))

    def tunnel_of(self, sa: ChildSa) -> Session | None:
        """The live session of the tunnel that this SA belongs to."""
        return self._tunnels.get(sa.tunnel)

    # --- one verdict, one place to count ------------------------------------------------------------

    def _credit(self, element: Element) -> None:
        """Count what the daemon answered from an element."""
        if element.own_packets:
            self._count(element, element.own_packets, element.own_bytes)
            element.own_packets = element.own_bytes = 0

    def _credit_reading(self, element: Element, reading: Reading, now: float) -> None:
        """Count what the kernel counted under an element since it was read last."""
        packets, octets = reading[0] - element.kernel_packets, reading[1] - element.kernel_bytes
        element.kernel_packets, element.kernel_bytes = reading
        element.seen_at = now
        element.use.unseen_count += packets
        self._count(element, packets, octets)
        self.counters.add("pkt_fast_path", packets)

    def _count(self, element: Element, packets: int, octets: int) -> None:
        """Packets that were decided like one before them."""
        use, flow = element.use, element.use.flow
        flow.packet_count += packets
        flow.byte_count += octets
        use.packet_count += packets
        use.byte_count += octets
        use.last_seen_at = max(use.last_seen_at, element.seen_at)
        if flow.session.is_terminated:
            self._hold_against_control(use, packets, element.looked_at)
        for name, amount in (("pkt_recv", packets), ("pkt_session", packets), ("byte_session", octets)):
            self.counters.add(name, amount)
        self._prolong(flow.session, element.seen_at)

    def _prolong(self, session: Session, seen_at: float) -> None:
        """A packet was seen: the session lives so much longer."""
        session.last_seen_at = max(session.last_seen_at, seen_at)
        if session.refresh_s:
            session.expires_at = max(session.expires_at, self.ager.age(seen_at) + session.refresh_s)

    def _account(self, flow: Flow, packet: Packet, now: float) -> SpiUse | None:
        """Count one packet that was looked at; gives the record of its SPI, if it has one."""
        flow.packet_count += 1
        flow.byte_count += packet.length
        self.counters.add("pkt_session")
        self.counters.add("byte_session", packet.length)
        self._prolong(flow.session, now)
        if packet.spi is None or packet.seq is None:
            return None
        known = flow.use(packet.spi)
        use = known or flow.note_spi(packet.spi, now)
        use.look(packet.seq)
        use.packet_count += 1
        use.byte_count += packet.length
        use.last_seen_at = now
        if flow.session.is_terminated:
            self._hold_against_control(use, 1, now)
        if known is None:
            flow.session.ports_of_sa()
        return use

    def _hold_against_control(self, use: SpiUse, packets: int, decided_at: float) -> None:
        """Count packets of this host that its IKE daemon has no SA for, and those that came when it had none any more.

        What came before an SA went was decided before.
        """
        session = use.flow.session
        generation = session.generation_of(use.spi)
        if generation is None:
            to = session.s2c if use.flow is session.c2s else session.c2s
            former = self.directory.former((to.address, session.application is Application.IPSEC_ESP_UDP, use.spi))
            if former is None:
                self.counters.add("pkt_unknown_spi", packets)
                return
            tunnel = self._tunnels.get(former.sa.tunnel)
            generation = tunnel.generation_of(use.spi) if tunnel else None
        elif generation.removed_at is None or decided_at <= generation.removed_at:
            return
        self.counters.add("pkt_deleted_sa", packets)
        if generation is not None:
            generation.after_end_count += packets

    def _drop(self, counter: str) -> Verdict:
        self.counters.add(counter)
        return Verdict.DROP

    # --- sessions that a packet opens ---------------------------------------------------------------

    def _key(self, packet: Packet, hook: int, ingress: int, egress: int) -> Key:
        if hook == Hook.FORWARD:
            src_zone, dst_zone = self._zone(ingress), self._zone(egress)
            if packet.kind is Kind.ESP and packet.spi and self.settings.transit_ports is TransitPorts.SPI:
                return spi_flow_key(packet, packet.spi, src_zone, dst_zone)
            zones: tuple[str | None, str | None] = (src_zone, dst_zone)
        elif packet.spi is not None:
            return _spi_key(packet, packet.spi)
        else:
            zones = (None, None)
        return flow_key(packet, *zones)

    def _set_up(
        self, packet: Packet, key: Key, hook: int, ingress: int, egress: int, now: float, was: Found | None = None
    ) -> Flow:
        """Open a session for a packet that belongs to none; `was` says if there was one before. Raises TableFull."""
        if not isinstance(key, FlowKey):
            sa = self.directory.lookup(key)
            if sa is not None:  # its session was refused or lost its place: make it now
                self._add_sa(sa, now)
                known = self.table.lookup(key)
                if known is not None:
                    return known
        application = GENERIC_APPLICATION[packet.kind]
        is_provisional = not isinstance(key, FlowKey)
        is_c2s = was is None or was.is_c2s
        sport, dport = ports_of(packet, key)
        sides = [
            (Flow(packet.src, self._zone(ingress), sport), self.interfaces.name_of(ingress)),
            (Flow(packet.dst, self._zone(egress), dport), self.interfaces.name_of(egress)),
        ]
        (client, client_interface), (server, server_interface) = sides if is_c2s else reversed(sides)
        session = Session(
            self.table.allocate_id(was.session_id if was else None),
            application,
            client,
            server,
            # Until its tunnel is known, a provisional session is judged as the tunnel that it may turn out to be.
            self._rule(client, server, Application.IPSEC_UDP if is_provisional else application),
            hook != Hook.FORWARD,
            client_interface,
            server_interface,
            self.settings.timeouts_s[application],
            was.started_at if was else now,
            is_provisional=is_provisional,
        )
        flow = session.flow(is_c2s)
        self._take_in(session, {key: flow})
        if is_provisional:
            self.counters.add("session_provisional")
        elif packet.kind is not Kind.IKE and hook == Hook.FORWARD:
            if self.settings.pass_through is PassThrough.IKE_GATED:
                self._ask_gate(session, was, now)
            if isinstance(key, FlowKey) and key.low_port and packet.kind is Kind.ESP:
                self.unpaired.join(session)
        self._decide(session, now)
        if is_provisional and session.state is State.ACTIVE:
            session.refresh_s = 0
            self.ager.arm(session, self.settings.unknown_spi_grace_s, now)
        return flow

    def _ask_gate(self, session: Session, was: Found | None, now: float) -> None:
        """Let the IKE gate between its peers have its say on a session in transit that a rule allows."""
        if session.rule.action is Action.DENY:
            return
        a, b = session.client.address, session.server.address
        if was is not None and was.verdict is Verdict.ACCEPT:  # a former daemon saw the exchange, or had no gate
            until = now + self.settings.ike_gate_s if was.gated_until is None else was.gated_until
            if until > now:
                self.gate.open(a, b, until)
        if not self.gate.join(session).is_open(now):
            session.rule = CLOSED
            self.counters.add("flow_ike_gate_closed")

    def _follow_gate(self, session: Session, now: float) -> None:
        """Do with a session as its gate says now, if that is not what was done before."""
        is_open = session.gate is not None and session.gate.is_open(now)
        if is_open and session.rule is CLOSED:
            self._end(session, EndReason.POLICY_DENY, now)  # the next packet opens another one
        elif not is_open and session.state is State.ACTIVE:
            session.rule = CLOSED
            self._discard(session, now)

    def _follow_gates(self, now: float) -> None:
        """The same for the next of those whose gate has opened or closed."""
        for session in self.gate.due(now):
            if self.table.live(session.id) is session:
                self._follow_gate(session, now)

    def _note_ike(self, packet: Packet, flow: Flow, indev: int, outdev: int, now: float) -> None:
        """An IKE message that passed may open the gate between its peers."""
        if packet.is_keepalive:
            self.counters.add("ike_keepalive")
        elif packet.ike is None:
            self.counters.add("ike_not_ike")
            return
        session = flow.session
        way = Way(indev, outdev, flow.zone, session.flow(flow is not session.c2s).zone)
        ports = (packet.sport, packet.dport)
        if not self.ike.note(packet.ike, packet.src, packet.dst, ports, way, session.id, now):
            return
        self.counters.add("ike_completed")
        if self.settings.pass_through is PassThrough.IKE_GATED:
            self.gate.open(packet.src, packet.dst, now + self.settings.ike_gate_s)
            self._follow_gates(now)

    def _pair_up(self, now: float) -> None:
        """Sessions of one SPI each become one session when it is proven that they are one tunnel."""
        for waiting in self.unpaired.due(now):
            self.fast_path.read_sessions(waiting)
            for first, second in proven_pairs(waiting, now):
                keys = second.keys
                first.client.port = second.c2s.uses[-1].spi  # each side's port is the SPI that it receives on
                self._absorb(second, first, turned=True)
                self.table.index(first, [(key, first.s2c) for key in keys])
                self.unpaired.leave(first)
                self.unpaired.leave(second)

    def _take_in(self, session: Session, entries: Mapping[Key, Flow]) -> None:
        self.table.add(session, entries.items())
        self.counters.add("session_allocated")
        self._events.append(SessionCreated(session))

    def _decide(self, session: Session, now: float) -> None:
        """Let the session's rule have its say."""
        if session.rule.action is Action.DENY:
            self.counters.add("flow_policy_deny")
            self._discard(session, now)
        else:
            session.move(Trigger.PERMIT)
            self._keep_alive(session, now)

    def _keep_alive(self, session: Session, now: float) -> None:
        session.refresh_s = session.timeout_s
        self.ager.arm(session, session.timeout_s, now)

    def _discard(self, session: Session, now: float) -> None:
        self.fast_path.withdraw(session.elements)
        session.move(Trigger.DENY)
        session.end_reason = EndReason.POLICY_DENY
        session.timeout_s = self.settings.discard_timeout_s
        session.refresh_s = 0  # PAN-OS: packets do not prolong a discard session
        self.ager.arm(session, session.timeout_s, now)
        self.counters.add("session_discard")
        self._events.append(SessionDiscarded(session))

    def _grace_over(self, session: Session, now: float) -> None:
        """No IKE daemon claimed the SPI of a provisional session in time: do as configured."""
        session.is_provisional = False
        session.rule = self._rule(session.client, session.server, session.application)
        if self.settings.unknown_spi is UnknownSpi.DISCARD or session.rule.action is Action.DENY:
            self.counters.add("flow_policy_deny")
            self._discard(session, now)
            return
        flows = self._flows_of(session)
        pair = self._pair_key(session)
        taken = self.table.lookup(pair)
        if taken is None:
            self.table.index(session, [(pair, session.c2s)])
            self._keep_alive(session, now)
            return
        generic = taken.session
        turned = generic.client.address != session.client.address
        self._absorb(session, generic, turned)
        own = {key: generic.flow((flow is session.c2s) != turned) for key, flow in flows.items()}
        self.table.index(generic, own.items())
        spi_keys = [key for key in generic.keys if not isinstance(key, FlowKey)]
        self._unindex(generic, spi_keys[:-UNKNOWN_SPI_KEYS])
        self._prolong(generic, session.last_seen_at)

    def _pair_key(self, session: Session) -> FlowKey:
        """The key of the one generic session that all unknown SPIs between two peers share in the end."""
        kind = next(kind for kind, name in GENERIC_APPLICATION.items() if name is session.application)
        ports = (0, 0) if session.application is Application.IPSEC_ESP else (session.client.port, session.server.port)
        return flow_key(Packet(kind, session.client.address, session.server.address, 0, None, None, *ports), None, None)

    def _flows_of(self, session: Session) -> dict[Key, Flow]:
        """The keys of a session, each with the flow that it leads to."""
        flows = {key: self.table.lookup(key) for key in session.keys}
        return {key: flow for key, flow in flows.items() if flow is not None}

    def _revive(self, found: Found, now: float) -> Flow:
        """The session and flow of an element that a former daemon left in the kernel. Raises TableFull."""
        indev, outdev, outer = found.key
        hook = Hook.FORWARD if indev and outdev else Hook.INPUT if indev else Hook.OUTPUT
        packet = packet_of(outer)
        ingress, egress = indev or outdev, outdev or indev
        key = self._key(packet, hook, ingress, egress)
        known = self.table.lookup(key)
        if known is not None:
            return known.session.flow_of(packet) if isinstance(key, FlowKey) else known
        session = self.table.live(found.session_id)
        if session is None or isinstance(key, FlowKey) or not session.is_provisional:
            return self._set_up(packet, key, hook, ingress, egress, now, found)
        flow = session.flow(found.is_c2s)
        self.table.index(session, [(key, flow)])
        return flow

    # --- sessions that the IKE daemon announces -------------------------------------------------------

    def _add_sa(self, sa: ChildSa, now: float) -> None:
        """Give a CHILD_SA its place: in the session of its tunnel, or in a new one."""
        session = self._tunnels.get(sa.tunnel)
        is_new = session is None
        if session is None:
            session = self._predict(sa, now)
        elif session.generation(sa) is None:
            if (before := session.sa) is not None:
                self._relocate(session, before, sa)
            session.add_generation(sa, now - sa.age_s)
        self._claim(session, sa, is_new, now)

    def _update_sa(self, old: ChildSa, new: ChildSa, now: float) -> None:
        """A CHILD_SA lives on, but is not what it was: its peer has moved, or its IKE_SA is another one."""
        session = self._tunnels.get(old.tunnel)
        generation = session.generation(old) if session and old.tunnel == new.tunnel else None
        if session is None or generation is None:
            self._remove_sa(old, SaEnd.VANISHED, now)
            self._add_sa(new, now)
            return
        generation.sa = new
        if (old.key_in, old.key_out) != (new.key_in, new.key_out):
            generation.moves += 1
            self.counters.add("sa_moved")
            self._relocate(session, old, new)
            self._lingering.append((now + SA_LINGER_S, session, old))
            self._claim(session, new, False, now)
        session.ports_of_sa()

    def _relocate(self, session: Session, old: ChildSa, new: ChildSa) -> None:
        """The tunnel runs between other addresses now: its session goes along, and meets the rules anew."""
        if (old.local, old.remote) == (new.local, new.remote):
            return
        session.outbound.address, session.inbound.address = new.local, new.remote
        name, zone = self._interface_of(new.local)
        session.ingress = session.egress = name
        session.client.zone = session.server.zone = zone
        session.rule = self._rule(session.client, session.server, session.application)

    def _claim(self, session: Session, sa: ChildSa, is_new: bool, now: float) -> None:
        """Let packets with the SPIs of a CHILD_SA be its tunnel's session's.

        What provisional sessions counted under them goes along; the first of them lends a new session its id and
        start time, so that an operator sees one session that became what it is.
        """
        flows: dict[Key, Flow] = {sa.key_in: session.inbound, sa.key_out: session.outbound}
        holders = self._holders(flows, session)
        if any(other.sas for other in holders.values()):
            self.counters.add("sa_spi_conflict")
            session.generations = tuple(generation for generation in session.generations if generation.sa != sa)
            return
        provisional = list(dict.fromkeys(other for other in holders.values() if other.is_provisional))
        if is_new and len(self.table) - len(provisional) >= self.table.capacity:
            return  # the first packet tries again, and is counted if there is still no place
        for key, other in holders.items():
            if not other.is_provisional:
                self._unindex(other, {key})
            elif self.table.live(other.id) is other:  # it may have had both keys
                is_c2s = self._flows_of(other)[key] is other.c2s
                self._absorb(other, session, turned=is_c2s != (flows[key] is session.c2s))
        if is_new:
            if provisional:
                session.id = min(other.id for other in provisional)
                session.created_at = min(other.created_at for other in provisional)
            else:
                session.id = self.table.allocate_id()
            self._take_in(session, flows)
            self._tunnels[sa.tunnel] = session
            self.counters.add("session_predicted")
            self.ager.arm(session, session.timeout_s, now)
        else:
            self.table.index(session, flows.items())
        if provisional:  # an older SPI that the IKE daemon has forgotten since goes its own way
            self.fast_path.withdraw(element for element in session.elements if element.spi_key not in session.keys)
        if provisional and session.state is State.OPENING:
            session.last_seen_at = max(other.last_seen_at for other in provisional)
            self._promote(session, provisional[0].ingress, provisional[0].client.zone, now)
        elif session.state is State.CLOSING:  # authenticated anew, or restarted: the tunnel is back
            session.move(Trigger.TUNNEL_UP)
            session.end_reason = EndReason.UNKNOWN
            self._keep_alive(session, now)
        if session.state is State.ACTIVE and session.rule.action is Action.DENY:  # where it is now, it may not be
            self.counters.add("flow_policy_deny")
            self._discard(session, now)
        session.ports_of_sa()

    def _predict(self, sa: ChildSa, now: float) -> Session:
        """The session of a tunnel that has just come up, not in the table yet.

        The client is the IKE initiator. Both sides lie in the zone of the interface that has the local address,
        as on PAN-OS, where traffic to the firewall itself stays within a zone.
        """
        name, zone = self._interface_of(sa.local)
        here, there = Flow(sa.local, zone, sa.spi_in), Flow(sa.remote, zone, sa.spi_out)
        client, server = (here, there) if sa.is_initiator else (there, here)
        application = Application.IPSEC_UDP
        return Session(
            0,
            application,
            client,
            server,
            self._rule(client, server, application),
            True,
            name,
            name,
            self.settings.timeouts_s[application],
            now,
            type=SessionType.PRED,
            generations=(Generation(sa, now - sa.age_s),),
            is_client_here=sa.is_initiator,
        )

    def _holders(self, keys: Mapping[Key, Flow], session: Session) -> dict[Key, Session]:
        """Which other sessions have these keys now."""
        flows = {key: self.table.lookup(key) for key in keys}
        return {key: flow.session for key, flow in flows.items() if flow is not None and flow.session is not session}

    def _absorb(self, provisional: Session, session: Session, turned: bool) -> None:
        """Move what a provisional session counted to another one; it leaves no trace but its counter.

        `turned`: what is c2s there is s2c here.
        """
        self.table.remove(provisional)
        self.gate.leave(provisional)
        flows = [session.flow((element.flow is provisional.c2s) != turned) for element in provisional.elements]
        for is_c2s in (True, False):
            session.flow(is_c2s != turned).absorb(provisional.flow(is_c2s))
        for element, flow in zip(provisional.elements, flows, strict=True):
            element.use = flow.note_spi(element.use.spi, element.seen_at)
        session.elements += provisional.elements
        self.counters.add("session_absorbed")

    def _promote(self, session: Session, interface: str, zone: str, now: float) -> None:
        """The first packet of an announced session: now the interface is certain, and the rule decides."""
        session.type = SessionType.FLOW
        session.ingress = session.egress = interface
        session.client.zone = session.server.zone = zone
        session.rule = self._rule(session.client, session.server, session.application)
        self.counters.add("session_promoted")
        self._decide(session, now)
        self._events.append(SessionPromoted(session))

    def _remove_sa(self, sa: ChildSa, end: SaEnd, now: float) -> None:
        """A CHILD_SA is gone. Its SPIs linger; with the last one the tunnel goes down."""
        session = self._tunnels.get(sa.tunnel)
        generation = session.generation(sa) if session else None
        if session is None or generation is None:
            return  # one that never got a session
        generation.removed_at, generation.end = now, end
        self.fast_path.withdraw(e for e in session.elements if e.spi_key in (sa.key_in, sa.key_out))
        if session.sas:
            session.ports_of_sa()
            self._lingering.append((now + SA_LINGER_S, session, sa))
        elif session.state is State.OPENING:
            self._end(session, EndReason.TUNNEL_DOWN, now)
        elif session.state is State.ACTIVE:
            session.move(Trigger.TUNNEL_DOWN)
            session.end_reason = EndReason.TUNNEL_DOWN
            session.refresh_s = 0
            self.ager.arm(session, SA_LINGER_S, now)
        else:
            del self._tunnels[sa.tunnel]

    def _predict_missing(self, now: float) -> None:
        """Give those SAs a session that could not get one when they came up."""
        for known in list(self.directory):
            if known.sa.tunnel not in self._tunnels:
                self._add_sa(known.sa, now)

    # --- control against data -----------------------------------------------------------------------

    def _compare(self, now: float) -> None:
        """Hold the packet counts that the last snapshot brought against ours."""
        self._is_to_compare = False
        for known in self.directory:
            session = self._tunnels.get(known.sa.tunnel)
            generation = session.generation(known.sa) if session else None
            if session is not None and generation is not None:
                generation.sa = known.sa  # with its newest counts
                compare(session, generation, now, is_older=generation.installed_at < self.started_at)

    def _watch(self, now: float) -> None:
        """Look at the next tunnels, and tell of troubles that come and go."""
        self._next_watch_at = now + WATCH_INTERVAL_S
        if not self._to_watch:
            self._to_watch.extend(self._tunnels.values())
            self._troubles = {key: known for key, known in self._troubles.items() if self.table.live(key) is not None}
        for _ in range(min(WATCH_SLICE, len(self._to_watch))):
            session = self._to_watch.popleft()
            if self.table.live(session.id) is not session:
                continue
            known = self._troubles.get(session.id, {})
            found = {finding.trouble: finding for finding in self.findings(session, now)}
            for trouble, finding in found.items():
                if trouble not in known:
                    self.counters.add(trouble.counter)
                    self._events.append(TunnelTrouble(session, finding))
            for trouble, finding in known.items():
                if trouble not in found:
                    self._events.append(TunnelTrouble(session, finding, is_over=True))
            if found:
                self._troubles[session.id] = found
            else:
                self._troubles.pop(session.id, None)

    # --- the end --------------------------------------------------------------------------------------

    def _expire(self, session: Session, now: float) -> None:
        """The ager says that a session's time is up, as far as the daemon knows."""
        is_asked = session.refresh_s and self.fast_path.read(session)
        if not self.ager.is_due(session, now):
            self.ager.resume(session)
        elif is_asked:
            self._asked.append(session)  # the kernel may have seen its packets
        else:
            self._time_is_up(session, now)

    def _time_is_up(self, session: Session, now: float) -> None:
        if session.state is State.OPENING:  # announced: it waits for its first packet while its SA lives
            self.ager.arm(session, session.timeout_s, now)
        elif session.is_provisional and session.state is State.ACTIVE:
            if session.elements and not self.directory.is_fresh:  # it was a tunnel's before fwd was started again
                self.ager.arm(session, self.settings.unknown_spi_grace_s, now)
            else:
                self._grace_over(session, now)
        else:
            self._end(session, EndReason.AGED_OUT, now)

    def _end(self, session: Session, reason: EndReason, now: float) -> None:
        """End a live session. A reason that stands already, such as the denial, is the one that is kept."""
        if session.end_reason is EndReason.UNKNOWN:
            session.end_reason = reason
        self.fast_path.withdraw(session.elements)
        self.table.end(session, now)
        self.gate.leave(session)
        self.unpaired.leave(session)
        self.counters.add("session_ended")
        if session.end_reason in _END_COUNTERS:
            self.counters.add(_END_COUNTERS[session.end_reason])
        self._events.append(SessionEnded(session))
        if session.sa and self._tunnels.get(session.sa.tunnel) is session:
            del self._tunnels[session.sa.tunnel]
            for sa in session.sas:  # the tunnel is still up: it waits for its next packet
                self._add_sa(sa, now)

    def _unindex(self, session: Session, keys: Iterable[Key]) -> None:
        """Let packets with these keys be the session's no more."""
        gone = set(keys)
        self.table.unindex(session, gone)
        self.fast_path.withdraw(element for element in session.elements if element.spi_key in gone)

    # --- where and under which rule -------------------------------------------------------------------

    def _rule(self, client: Flow, server: Flow, application: Application) -> Rule:
        return self.settings.policy.lookup(client.zone, server.zone, client.address, server.address, application)

    def _zone(self, index: int) -> str:
        zone = self._zone_of_index.get(index)
        if zone is None:
            zone = self.settings.zones.zone_of(self.interfaces.name_of(index))
            self._zone_of_index[index] = zone
        return zone

    def _zones_changed(self) -> None:
        """What was decided for an interface that lies in another zone now is to be decided anew."""
        before, self._zone_of_index = self._zone_of_index, {}
        moved = {index for index, zone in before.items() if self._zone(index) != zone}
        if moved:
            self.fast_path.retire(element for element in self.fast_path if moved.intersection(element.key[:2]))

    def _interface_of(self, address: bytes) -> tuple[str, str]:
        """Name and zone of the interface that has a local address."""
        index = self.interfaces.owner_of(address)
        if index is None:
            return "unknown", self.settings.zones.default
        return self.interfaces.name_of(index), self._zone(index)


def _spi_key(packet: Packet, spi: int) -> SpiKey:
    return (packet.dst, packet.sport != 0 or packet.dport != 0, spi)
