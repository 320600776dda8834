"""The dataplane without its I/O: packets, SA events and the time go in; verdicts and events come out.

    verdict = firewall.receive_packet(octets, hook, indev, outdev, now)
    while (work := firewall.take_work(now, is_drained)):  # what the kernel is to do, above all when the queue is empty
        firewall.apply_outcome(work, outcome, now)
    firewall.apply_sa(event, now)            # what the IKE daemon said
    firewall.apply_interface(event, now)     # what the kernel said
    firewall.handle_timer(now)               # at firewall.next_deadline() at the latest
    while (event := firewall.next_event()):  # what there is to tell

Every packet gets exactly one verdict, and is counted in exactly one place: a flow (`_account`), an element that
repeats the flow's verdict, in the daemon or in the kernel (`count` brings its counts to the flow), or a drop counter
(`_drop`).
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from itertools import chain, islice
from math import inf

from .ager import Ager
from .between import Between
from .changes import Changes
from .constants import (
    CLEAR_ELEMENTS,
    CLEAR_SLICE,
    CLOSE_WATCH_INTERVAL_S,
    CLOSE_WATCH_S,
    CLOSE_WATCH_SESSIONS,
    CLOSE_WATCH_SPIS,
    ELEMENT_IDLE_S,
    EXPIRE_SLICE,
    GATE_SLICE,
    GENERATIONS_KEPT,
    HALF_OPEN_IDLE_S,
    IKE_ROOM,
    LINGER_SLICE,
    LOOK_INTERVAL_S,
    LOOK_MAX_PACKETS,
    LOOK_MIN_PACKETS,
    LOOKS_PER_TURN,
    READS_PER_REQUEST,
    SA_LINGER_S,
    SA_SLICE,
    SWEEP_INTERVAL_S,
    UNKNOWN_SPI_KEYS,
    WATCH_INTERVAL_S,
    WATCH_SLICE,
)
from .counters import Counters
from .events import (
    CounterRose,
    Event,
    SessionAbsorbed,
    SessionCreated,
    SessionDiscarded,
    SessionEnded,
    SessionPromoted,
    SessionRekeyed,
    TunnelsStale,
    TunnelTrouble,
)
from .fast_path import FastPath, Found, Outcome, Reading, Work
from .flow_export import FlowExport
from .gate import CLOSED, IkeGate
from .health import Finding, Trouble, Watch, ask_for_counts, compare, note_counts
from .ike import IkeWatcher, Way
from .interfaces import InterfaceEvent, InterfaceTable
from .limits import HALF_OPEN, LimitReached, Limits
from .packet import Kind, Packet, PacketError, parse, peek
from .pairing import SpiSessions, proven_pairs
from .policy import Action, Rule, Verdict
from .rates import Rate, Rates
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
    SaReplaced,
    SaSnapshot,
    SaSourceLost,
    SaUpdated,
    SpiKey,
)
from .session import (
    GENERIC_APPLICATION,
    Application,
    Element,
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
from .table import Key, KeyInUse, SessionTable, TableFull
from .totals import Totals
from .traffic_log import LogRecord, Subtype, TrafficLog
from .tunnels import Tunnels


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
        self.totals = Totals(settings.tunnel_totals, now)
        self.limits = Limits(settings.limits)
        self.traffic_log = TrafficLog()
        self.changes = Changes(self.traffic_log)
        self._note = self.changes.note
        self.directory = SaDirectory()
        self.interfaces = InterfaceTable()
        # One element each way is what most sessions need.
        self.fast_path = FastPath(2 * settings.max_sessions, self._credit, self._note)
        self._element = self.fast_path.lookup
        self.rates = Rates()
        self.flow_export = FlowExport(self.table, self.interfaces, self.counters, self._note, self.fast_path.leaving)
        self.flow_export.set_active_timeout(settings.flow_active_timeout_s)
        self.started_at = now
        #: The live sessions of tunnels that end here, one for each.
        self.tunnels = Tunnels()
        #: What is still to be learned of the last thing that the IKE daemon said.
        self._learning: Iterator[int] | None = None
        self._lingering: deque[tuple[float, Session, ChildSa]] = deque()
        self._zone_of_index: dict[int, str] = {}
        #: IKE as it was seen between any two peers, and the gate that it opens for their ESP in transit.
        self.ike = IkeWatcher()
        self.gate = IkeGate(self.changes.note_gate)
        self.spi_sessions = SpiSessions()
        #: Sessions of this host that no tunnel claimed in time: its IKE daemon owns none of their SPIs.
        self.strangers = Between()
        self._health = Watch(self.directory, now)
        self._to_gate: deque[Session] = deque()
        self._to_watch: deque[Session] = deque()
        self._next_watch_at = 0.0
        self._no_looks_before = 0.0
        #: Sessions that are looked at closely because a new SPI came up, and until when.
        self._close_watch: dict[Session, float] = {}
        self._next_close_watch_at = 0.0
        self._events: deque[Event] = deque()
        self._to_clear: deque[Session] = deque()
        self._to_rematch: dict[Session, None] = {}
        #: Whether sessions leave records in the traffic log.
        self.keeps_log = False
        self._asked: list[Session] = []

    # --- what goes in --------------------------------------------------------------------------------

    def receive_packet(self, octets: bytes, hook: int, indev: int, outdev: int, now: float) -> Verdict:
        """Decide on one packet: its bytes from the IP header on, and the interface indices (0: none).

        A copy cut short after the headers will do. Never raises for what the bytes contain.
        """
        plain = peek(octets)
        if plain is not None:
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
                if plain[1] > element.mtu:  # the kernel put it together again
                    self._note_fragment(use.flow)
                return element.verdict
        self.counters.add("pkt_recv")
        try:
            packet = parse(octets)
        except PacketError as error:
            return self._drop(f"flow_parse_{error.reason}")
        # A packet to or from this host has one interface only; the session shows it on both sides.
        ingress, egress = indev or outdev, outdev or indev
        key = self.key_of(packet, hook, ingress, egress)
        flow = self.table.lookup(key)
        if flow is None and packet.spi is None:
            flow = self._flow_of_fragment(packet, hook)
        if flow is not None and flow.session.gate is not None:
            self._follow_gate(flow.session, now)
            flow = self.table.lookup(key)
        if flow is None:
            try:
                flow = self._set_up(packet, key, hook, ingress, egress, now)
            except TableFull:
                return self._drop("flow_table_full")
            except LimitReached as limit:
                return self._drop(limit.counter)
        session = flow.session
        if isinstance(key, FlowKey):  # of both directions
            flow = session.flow_of(packet)
        if session.state is State.OPENING:
            zone = self._zone(ingress)
            self._promote(session, self.interfaces.name_of(ingress), zone, now)
        elif session.type is SessionType.PRED:  # its tunnel went down before its first packet came
            session.begin_flow()
        if packet.kind is Kind.IKE and session.state is State.ACTIVE:
            self._note_ike(packet, flow, indev, outdev, now)
        counted = self._account(flow, packet, now)
        if flow is session.s2c and session.is_limited:
            self._note_answer(session, packet)
        mtu = self.interfaces.mtu_of(ingress)
        if packet.is_fragment or packet.length > mtu:
            self._note_fragment(flow)
        verdict = Verdict.DROP if session.state is State.DISCARD else Verdict.ACCEPT
        if counted is not None and session.is_decided:
            like_it = (indev, outdev, plain[0] if plain else packet.outer)
            if self._element(like_it) is None and not self.fast_path.learn(like_it, counted, verdict, now, mtu):
                self.counters.add("fast_path_full")
        return verdict

    def drop_unhandled(self) -> Verdict:
        """The verdict on a packet that `receive_packet` raised for: a defect of fwd, counted as such."""
        return self._drop("flow_internal_error")

    def apply_sa(self, event: SaEvent, now: float) -> None:
        """Learn what the IKE daemon says of its SAs; sessions follow, SA_SLICE at once and the others soon."""
        if counter := _SA_COUNTERS.get(type(event)):
            self.counters.add(counter)
        if isinstance(event, SaSourceLost):
            self._events.append(TunnelsStale(event.reason))
        elif isinstance(event, SaSnapshot) and self.directory.lost_reason:
            self._events.append(TunnelsStale(self.directory.lost_reason, is_over=True))
        self._learn_slice(inf)  # what was said before this
        self._learning = self._learn(event, now)
        self._learn_slice(SA_SLICE)

    @property
    def is_learning(self) -> bool:
        """Whether the last event is not learned in full yet: `handle_timer` goes on with it. The next one may wait."""
        return self._learning is not None

    def _learn(self, event: SaEvent, now: float) -> Iterator[int]:
        """Let the sessions follow, an SA at a time; gives what each took, an SA of a common tunnel being 1."""
        for change in self.directory.apply(event, now):
            match change:
                case SaAdded(sa):
                    self._add_sa(sa, now, is_news=True)
                case SaReplaced(_, sa):
                    if session := self.tunnels.get(sa.tunnel):
                        session.rekeys += 1
                        self._note(session)
                        self._events.append(SessionRekeyed(session, sa))
                case SaUpdated(old, sa):
                    self._update_sa(old, sa, now)
                case SaRemoved(sa, end):
                    self._remove_sa(sa, end, now)
            session = self.tunnels.get(sa.tunnel) if change else None
            yield 1 + (len(session.generations) // GENERATIONS_KEPT if session else 0)
        if isinstance(event, SaSnapshot):
            for known in list(self.directory):
                session = self.tunnels.get(known.sa.tunnel)
                if session is None:  # it could not get one when it came up
                    self._add_sa(known.sa, now)
                elif generation := session.generation(known.sa):
                    generation.sa = known.sa  # with its newest counts: `_watch` holds them against ours
                    note_counts(session, generation, now)
                yield 1 + (len(session.generations) // GENERATIONS_KEPT if session else 0)

    def _learn_slice(self, work: float) -> None:
        """Learn more of the last event, as `_learn` counts it."""
        while self._learning is not None and work > 0:
            cost = next(self._learning, None)
            if cost is None:
                self._learning = None
            else:
                work -= cost

    def apply_interface(self, event: InterfaceEvent) -> None:
        """Learn of interfaces and addresses of this host."""
        self.interfaces.apply(event)
        self._zones_changed()
        # Those that wait for their first packet show the interface that has their local address.
        self._to_rematch |= dict.fromkeys(tunnel for tunnel in self.tunnels if tunnel.state is State.OPENING)

    def reconfigure(self, settings: Settings) -> None:
        """Take new settings. The sessions that exist meet the new rules and timeouts soon, a slice at a time.

        If ESP in transit has to pass the IKE gate from now on, what exists opens it, once, as an exchange would.
        """
        if settings.pass_through is not self.settings.pass_through:
            self.gate.open_all()
            self._to_gate = deque(self.table if settings.pass_through is PassThrough.IKE_GATED else ())
        self.settings = settings
        self.limits.set_bounds(settings.limits)
        self.totals.capacity = settings.tunnel_totals
        self.table.capacity = settings.max_sessions
        self.table.keep_ended = settings.keep_ended
        self.flow_export.set_active_timeout(settings.flow_active_timeout_s)
        self._zones_changed()
        self._to_rematch = dict.fromkeys(self.table)

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
        self._to_clear.extend(sessions)
        self._clear_slice(now)

    def _clear_slice(self, now: float) -> None:
        elements = 0
        for _ in range(min(CLEAR_SLICE, len(self._to_clear))):
            session = self._to_clear.popleft()
            if self.table.live(session.id) is session:
                elements += len(session.elements)
                self._end(session, EndReason.CLEARED, now)
            if elements >= CLEAR_ELEMENTS:
                break

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
        if self.tunnels or self.strangers:
            deadlines.append(self._next_watch_at)
        if self._close_watch:
            deadlines.append(self._next_close_watch_at)
        if (pairing := self.spi_sessions.next_deadline()) is not None:
            deadlines.append(pairing)
        if self._to_clear or self._to_gate or self._to_rematch or self._learning:
            deadlines.append(0.0)
        if (save := self.changes.next_deadline()) is not None:
            deadlines.append(save)
        return min(deadlines)

    def handle_timer(self, now: float) -> None:
        """Do what is due, a bounded amount of it."""
        for counter, amount in self.counters.sample(now):
            value = self.counters.values[counter.name]
            self._events.append(CounterRose(counter.name, counter.description, amount, value))
            if (counter.severity, counter.aspect) == ("drop", "resource"):
                self._no_looks_before = now + LOOK_INTERVAL_S
                self.look_no_more(now)
        for count, session in enumerate(self.ager.due(now), 1):
            self._expire(session, now)
            if count == EXPIRE_SLICE or self.fast_path.asked_count >= READS_PER_REQUEST:
                break
        self._learn_slice(SA_SLICE)
        for _ in range(LINGER_SLICE):
            if not self._lingering or self._lingering[0][0] > now:
                break
            _, session, sa = self._lingering.popleft()
            in_use = {key for other in session.sas for key in (other.key_in, other.key_out)}
            if self.table.live(session.id) is session and sa not in session.sas:
                self._unindex(session, {sa.key_in, sa.key_out} - in_use)
        self._clear_slice(now)
        for session in [self._to_gate.popleft() for _ in range(min(GATE_SLICE, len(self._to_gate)))]:
            is_in_transit = not session.is_terminated and session.application is not Application.IKE
            if is_in_transit and session.state is State.ACTIVE and self.table.live(session.id) is session:
                self.gate.open(session.client.address, session.server.address, now + self.settings.ike_gate_s)
                self.gate.join(session)
                self._note(session)
        self._follow_gates(now)
        self._pair_up(now)
        if now >= self._next_watch_at:
            self._watch(now)
        if now >= self._next_close_watch_at:
            self._watch_closely(now)
        for session in list(islice(self._to_rematch, GATE_SLICE)):
            del self._to_rematch[session]
            if self.table.live(session.id) is session:
                self.rematch(session, now)
        idle_since = now - ELEMENT_IDLE_S
        self.fast_path.withdraw(element for element in self.fast_path.sweep(now) if element.seen_at < idle_since)
        for session in self.table.forget_ended(now - self.settings.keep_ended_s):
            self._note(session)
        is_pressed = self.table.utilisation >= self.settings.ageing_threshold
        factor = self.settings.ageing_factor if is_pressed else 1
        if factor != self.ager.factor:
            self.ager.set_factor(factor, now)
        self.rates.rest(now)

    def look_no_more(self, now: float) -> None:
        """What was to be looked at with its next packet goes back to the kernel.

        In a flood, and while nobody has the queue, that packet may be lost, and all after it until one is not.
        """
        for element in self.fast_path.take_looked_at():
            session = element.flow.session
            if self.table.live(session.id) is session:  # else another one has taken it over, or it has ended
                self.fast_path.learn(element.key, element.use, element.verdict, now, element.mtu)
        self.fast_path.install_soon(now)

    def next_event(self) -> Event | None:
        """What happened next, in order; None when all is told.

        While the kernel owes the last counts of elements that were removed, events wait: they would tell too little.
        """
        if not self._events or self.fast_path.is_owed_counts:
            return None
        event = self._events.popleft()
        if isinstance(event, SessionEnded) and event.session.id in self.traffic_log.owed:
            self.log_end(event.session)
        return event

    # --- what the kernel does and says ----------------------------------------------------------------

    def take_work(self, now: float, is_drained: bool) -> Work | None:
        """What the kernel is to do for the fast path; None if nothing. `is_drained`: no packet waits in the queue."""
        return self.fast_path.take_work(now, is_drained)

    def apply_outcome(self, work: Work, outcome: Outcome, now: float) -> None:
        """Hear what came of it: count what the kernel counted, and end the sessions that only waited for that."""
        self.fast_path.settle(work.installs, outcome.refused)
        self.counters.add("fast_path_refused", len(outcome.refused))
        idle_since = now - ELEMENT_IDLE_S
        to_look_at: list[Element] = []
        for element in work.removals:
            if (reading := outcome.removed.get(element.key)) is not None:
                self._credit_reading(element, reading, now)
                self.fast_path.note_removed(element)
            elif element.key not in outcome.unknown or not self.fast_path.remove_again(element):
                self._lose(element)
        for element in work.reads:
            if (reading := outcome.read.get(element.key)) is None:
                if element.key not in outcome.unknown:
                    self._lose(element)
            elif packets := reading[0] - element.kernel_packets:
                self._credit_reading(element, reading, now)
                is_fit = packets <= LOOK_MAX_PACKETS and reading[0] > LOOK_MIN_PACKETS
                if is_fit and now - element.looked_at >= LOOK_INTERVAL_S:
                    to_look_at.append(element)
            else:
                if element.is_unsaved:  # it has fallen silent
                    element.is_unsaved = False
                    self._note(element.flow.session)
                if element.seen_at < idle_since and element.place is Place.KERNEL:
                    self.fast_path.withdraw((element,))
        if now >= self._no_looks_before:
            self.fast_path.look_at(e for e in to_look_at[:LOOKS_PER_TURN] if e.place is Place.KERNEL)
        asked, self._asked = self._asked, []
        for session in asked:
            if self.table.live(session.id) is not session:
                continue
            if not self.ager.is_due(session, now):
                self.ager.resume(session)
            elif any(element.key in outcome.unknown for element in session.elements):
                self._arm(session, SWEEP_INTERVAL_S, now)  # nobody knows whether packets came
            else:
                self._time_is_up(session, now)

    # --- what is asked of it --------------------------------------------------------------------------

    def findings(self, session: Session, now: float) -> list[Finding]:
        """What is wrong with a session of this host, or of the strangers between the same addresses, now."""
        if not session.is_terminated or self.table.live(session.id) is not session:
            return []  # nobody tells what it should be, or it is over
        sessions = [session]
        if session.generations:
            sessions += self.strangers.of(session.client.address, session.server.address)
        for watched in sessions:
            self._look_at(watched, now)
        return [finding for watched in sessions for finding in self._health.found(watched)]

    def trouble_count(self, session: Session) -> int:
        """How many things were wrong with a session when it was last looked at; that it is discarded is one of them."""
        return self._health.count(session) + (session.state is State.DISCARD)

    def rate(self, flow: Flow, now: float) -> Rate | None:
        """How fast a flow is; None if that is not measured, or has been for too short a time."""
        return self.rates.of(flow, self.fast_path.round_s, now)

    def known_findings(self, session: Session) -> list[Finding]:
        """What was wrong with a session of this host when it was last looked at: within seconds."""
        return self._health.found(session)

    @property
    def trouble_counts(self) -> Mapping[Trouble, int]:
        """How many sessions of this host have each trouble, as of the last look at each."""
        return self._health.counts

    def tunnel_of(self, sa: ChildSa) -> Session | None:
        """The live session of the tunnel that this SA belongs to."""
        return self.tunnels.get(sa.tunnel)

    def retire(self, found: Iterable[Found], now: float) -> None:
        """The kernel decides nothing any more: count what is in its maps, which nobody will read again."""
        everything = list(self.fast_path)
        self.fast_path.is_on = False
        self.fast_path.withdraw(everything)
        last = {element.key: element.reading for element in found}
        while (work := self.take_work(now, is_drained=True)) is not None:
            self.apply_outcome(work, Outcome(removed=last), now)

    # --- one verdict, one place to count ------------------------------------------------------------

    def credit_all(self) -> None:
        """Count what the daemon answered from elements, instead of now and then."""
        for element in self.fast_path:
            self._credit(element)

    def _credit(self, element: Element) -> None:
        """Count what the daemon answered from an element."""
        if element.own_packets:
            self.count(element, element.own_packets, element.own_bytes)
            self._note(element.flow.session)
            element.own_packets = element.own_bytes = 0

    def _lose(self, element: Element) -> None:
        """The kernel has an element no more, and nobody knows its last counts."""
        self.fast_path.forget_lost(element)
        self.counters.add("fast_path_lost")

    def _credit_reading(self, element: Element, reading: Reading, now: float) -> None:
        """Count what the kernel counted under an element since it was read last."""
        packets, octets = reading[0] - element.kernel_packets, reading[1] - element.kernel_bytes
        if not packets:
            return
        self.fast_path.note_reading(element, reading)
        element.seen_at = now
        element.use.unseen_count += packets
        self.count(element, packets, octets)
        self.counters.add("pkt_fast_path", packets)

    def count(self, element: Element, packets: int, octets: int, news: int | None = None) -> None:
        """Packets that were decided like one before them; `news` of them were never counted before, if not all."""
        use, flow = element.use, element.use.flow
        flow.packet_count += packets
        flow.byte_count += octets
        use.packet_count += packets
        use.byte_count += octets
        use.last_seen_at = max(use.last_seen_at, element.seen_at)
        if flow.session.is_terminated:
            self._hold_against_control(use, packets if news is None else news, element.looked_at)
        for name, amount in (("pkt_recv", packets), ("pkt_session", packets), ("byte_session", octets)):
            self.counters.add(name, amount)
        self.totals.count(flow, packets, octets)
        self.rates.note(flow, element.seen_at)
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
        self.totals.count(flow, 1, packet.length)
        self._prolong(flow.session, now)
        self._note(flow.session)
        if packet.spi is None or packet.seq is None:
            return None
        known = flow.use(packet.spi)
        use = known or flow.add_spi(packet.spi, now)
        use.look(packet.seq)
        use.packet_count += 1
        use.byte_count += packet.length
        use.last_seen_at = now
        if flow.session.is_terminated:
            self._hold_against_control(use, 1, now)
        if known is None:
            if flow.session.generations:
                flow.session.ports_of_sa()
            self._begin_close_watch(flow.session, now)
        return use

    def _hold_against_control(self, use: SpiUse, packets: int, decided_at: float) -> None:
        """Count packets of this host that its IKE daemon has no SA for, or has deleted the SA of for good.

        Late ones are no news, nor are those that were decided before. What a provisional session counted is told when
        it is clear that nobody claims it.
        """
        session = use.flow.session
        generation = session.generation_of(use.spi)
        if generation is None and not session.is_provisional:
            self._count_strangers(use, packets)
        elif generation and generation.removed_at is not None and decided_at > generation.removed_at + SA_LINGER_S:
            self.counters.add("pkt_deleted_sa", packets)
            generation.after_end_count += packets
            self._note(session)

    def _count_strangers(self, use: SpiUse, packets: int) -> None:
        session = use.flow.session
        to = session.s2c if use.flow is session.c2s else session.c2s
        former = self.directory.former((to.address, session.application is Application.IPSEC_ESP_UDP, use.spi))
        self.counters.add("pkt_deleted_sa" if former else "pkt_unknown_spi", packets)

    def _note_fragment(self, flow: Flow) -> None:
        flow.fragment_count += 1
        self.counters.add("pkt_fragment")
        self._note(flow.session)

    def _arm(self, session: Session, timeout_s: float, now: float) -> None:
        """Let the session's time be up after so many seconds of the ager's time."""
        self._note(session)
        self.ager.arm(session, timeout_s, now)

    def _drop(self, counter: str) -> Verdict:
        self.counters.add(counter)
        return Verdict.DROP

    # --- the traffic log ------------------------------------------------------------------------------

    def take_log(self) -> list[LogRecord]:
        """Records that the traffic log is to write, in their order; `note_logged` says when it has."""
        return self.traffic_log.take()

    def left_to_log(self, now: float) -> list[LogRecord]:
        """A record of each session that has none yet, as it is: for the log, should nobody go on with it."""
        living = (session for session in self.table if session.rule.log_at_end) if self.keeps_log else ()
        return self.traffic_log.left(chain(self.traffic_log.owed.values(), living), now)

    def note_logged(self, number: int) -> None:
        """All records up to this one are written for good."""
        self.counters.add("log_written", self.traffic_log.note_written(number, is_saved=self.changes.is_on))

    def _log(self, session: Session, subtype: Subtype, at: float) -> None:
        """Leave a record of a session, as it is, in the traffic log."""
        is_made = self.traffic_log.add(session, subtype, at, is_saved_first=self.changes.is_on)
        self.counters.add("log_record" if is_made else "log_lost")
        if not is_made or not self.changes.is_on:
            self.traffic_log.owed.pop(session.id, None)
            self._note(session)

    def _log_start(self, session: Session, now: float) -> None:
        if self.keeps_log and session.rule.log_at_start:
            self._log(session, Subtype.START, now)

    def log_end(self, session: Session) -> None:
        """The last counts of a session that ended are in."""
        self._note(session)
        assert session.ended_at is not None
        self._log(session, Subtype.END, session.ended_at)

    # --- sessions that a packet opens ---------------------------------------------------------------

    def key_of(self, packet: Packet, hook: int, ingress: int, egress: int) -> Key:
        """Under which key a packet that takes this way finds its session; interfaces by index."""
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

    def _flow_of_fragment(self, packet: Packet, hook: int) -> Flow | None:
        """A later fragment of ESP to or from this host names no SPI: it is its tunnel's, if only one can be meant."""
        if hook == Hook.FORWARD or packet.kind is not Kind.ESP or packet.spi is not None:
            return None
        tunnels = self.tunnels.between(packet.src, packet.dst)
        if len(tunnels) != 1:
            return None
        (session,) = tunnels
        return session.outbound if packet.src == session.outbound.address else session.inbound

    def _set_up(self, packet: Packet, key: Key, hook: int, ingress: int, egress: int, now: float) -> Flow:
        """Open a session for a packet that belongs to none. Raises TableFull or LimitReached."""
        if not isinstance(key, FlowKey):
            sa = self.directory.lookup(key)
            if sa is not None:  # its session was refused or lost its place: make it now
                self._add_sa(sa, now)
                known = self.table.lookup(key)
                if known is not None:
                    return known
        is_limited, is_in_transit = hook != Hook.OUTPUT, hook == Hook.FORWARD
        if is_limited and (refusal := self.limits.admit(packet.src, packet.dst)) is not None:
            if refusal == HALF_OPEN:
                refusal = self._admit_all_the_same(packet, now)
            if refusal is not None:
                raise LimitReached(refusal)
        if len(self.table) >= self.table.capacity and not self._has_place_for(packet, now):
            if is_limited:
                self.limits.retract(packet.src, packet.dst)
            raise TableFull
        application = GENERIC_APPLICATION[packet.kind]
        is_provisional = not isinstance(key, FlowKey)
        # What may be a tunnel's of this host, although it cannot be told yet or ever, is judged as such.
        is_fragment = packet.spi is None and packet.kind is Kind.ESP and not is_in_transit
        is_maybe_tunnel = is_provisional or (is_fragment and bool(self.tunnels.between(packet.src, packet.dst)))
        sport, dport = ports_of(packet, key)
        client, server = Flow(packet.src, self._zone(ingress), sport), Flow(packet.dst, self._zone(egress), dport)
        session = Session(
            self.table.allocate_id(),
            application,
            client,
            server,
            self._rule(client, server, Application.IPSEC_UDP if is_maybe_tunnel else application),
            not is_in_transit,
            self.interfaces.name_of(ingress),
            self.interfaces.name_of(egress),
            self.settings.timeouts_s[application],
            now,
            is_provisional=is_provisional,
        )
        self._take_in(session, {key: client})
        if is_limited:
            self.limits.enter(session)
        if is_provisional:
            self.counters.add("session_provisional")
        elif is_in_transit and packet.kind is not Kind.IKE:
            if self.settings.pass_through is PassThrough.IKE_GATED:
                self._ask_gate(session, now)
            if isinstance(key, FlowKey) and key.low_port and packet.kind is Kind.ESP:
                self.spi_sessions.join(session)
        self._decide(session, now)
        if not is_provisional or session.state is State.DISCARD:
            self._log_start(session, now)
        if is_provisional and session.state is State.ACTIVE:
            session.refresh_s = 0
            self._arm(session, self.settings.unknown_spi_grace_s, now)
        return client

    def _admit_all_the_same(self, packet: Packet, now: float) -> str | None:
        """There are as many half-open sessions as strangers may have; gives the refusal, if it is one."""
        src, dst = packet.src, packet.dst
        room = inf if self.is_acquainted(src, dst) else IKE_ROOM if packet.kind is Kind.IKE else 1.0
        refusal = self.limits.admit(src, dst, room)
        if refusal == HALF_OPEN and self._make_room(now, now - HALF_OPEN_IDLE_S):
            refusal = self.limits.admit(src, dst, room)
        return refusal

    def is_acquainted(self, a: bytes, b: bytes) -> bool:
        """Whether these two have answered each other before, as far as anybody remembers, or have a tunnel here."""
        if self.limits.has_answered(a, b) or self.tunnels.between(a, b):
            return True
        record = self.ike.record(a, b)
        return record is not None and any(sa.completed_at is not None for sa in record.ike_sas.values())

    def _has_place_for(self, packet: Packet, now: float) -> bool:
        """Whether the table has a place for a session that this packet opens."""
        if self._has_place(now, now - HALF_OPEN_IDLE_S):
            return True
        return self.is_acquainted(packet.src, packet.dst) and self._has_place(now, inf)

    def _has_place(self, now: float, before: float) -> bool:
        """Whether the table has a place for another session, if need be that of one that was silent since then."""
        capacity = self.table.capacity
        return len(self.table) < capacity or (self._make_room(now, before) and len(self.table) < capacity)

    def _has_place_for_tunnel(self, now: float) -> bool:
        """The same for an announced tunnel, which is worth more than a session that nobody answered."""
        return self._has_place(now, now - HALF_OPEN_IDLE_S) or self._has_place(now, inf)

    def _make_room(self, now: float, before: float) -> bool:
        """Let the oldest session that nobody answered give way, if it was silent since then; whether one did."""
        session = self.limits.silent_since(before)
        if session is None:
            return False
        self.counters.add("session_gave_way")
        self._end(session, EndReason.AGED_OUT, now)
        return True

    def _ask_gate(self, session: Session, now: float) -> None:
        """Let the IKE gate between its peers have its say on a session in transit that a rule allows."""
        if session.rule.action is Action.DENY:
            return
        if not self.gate.join(session).is_open(now):
            session.rule = CLOSED
            self.counters.add("flow_ike_gate_closed")

    def open_gate_soon(self, session: Session) -> None:
        """Let a session in transit open the gate of its peers once, as an exchange would."""
        self._to_gate.append(session)

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

    def _note_answer(self, session: Session, packet: Packet) -> None:
        """The server sent something: a session is not half-open if that shows that both sides are there."""
        is_answer = session.c2s.packet_count and session.state is State.ACTIVE
        if is_answer and (packet.kind is not Kind.IKE or (packet.ike is not None and packet.ike.is_agreed)):
            self.limits.settle(session)

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
        for waiting in self.spi_sessions.due(now):
            self.fast_path.read_sessions(waiting)
            for first, second in proven_pairs(waiting, now):
                keys = second.keys
                first.client.port = second.c2s.uses[-1].spi  # each side's port is the SPI that it receives on
                self._absorb(second, first, turned=True)
                self.table.index(first, dict.fromkeys(keys, first.s2c))
                self._note(first)
                self.spi_sessions.pair(first)
                self.spi_sessions.leave(second)

    def _take_in(self, session: Session, entries: Mapping[Key, Flow]) -> None:
        self.table.add(session, entries)
        self._note(session)
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
        self._arm(session, session.timeout_s, now)

    def _discard(self, session: Session, now: float) -> None:
        self.fast_path.withdraw(session.elements)
        session.move(Trigger.DENY)
        session.end_reason = EndReason.POLICY_DENY
        session.timeout_s = self.settings.discard_timeout_s
        session.refresh_s = 0  # PAN-OS: packets do not prolong a discard session
        self._arm(session, session.timeout_s, now)
        self.counters.add("session_discard")
        self._events.append(SessionDiscarded(session))

    def _grace_over(self, session: Session, now: float) -> None:
        """No IKE daemon claimed the SPI of a provisional session in time: do as configured."""
        session.is_provisional = False
        for use in (*session.c2s.uses, *session.s2c.uses):
            self._count_strangers(use, use.packet_count)
        session.rule = self._rule(session.client, session.server, session.application)
        if self.settings.unknown_spi is UnknownSpi.DISCARD or session.rule.action is Action.DENY:
            self.counters.add("flow_policy_deny")
            self.strangers.add(session)
            self._discard(session, now)
            self._log_start(session, now)
            return
        flows = self.table.flows_of(session)
        pair = self._pair_key(session)
        taken = self.table.lookup(pair)
        if taken is None:
            self.table.index(session, {pair: session.c2s})
            self.strangers.add(session)
            self._keep_alive(session, now)
            self._log_start(session, now)
            return
        generic = taken.session
        turned = generic.client.address != session.client.address
        self._absorb(session, generic, turned)
        self.strangers.add(generic)
        own = {key: generic.flow((flow is session.c2s) != turned) for key, flow in flows.items()}
        self.table.index(generic, own)
        self._note(generic)
        spi_keys = [key for key in generic.keys if not isinstance(key, FlowKey)]
        self._unindex(generic, spi_keys[:-UNKNOWN_SPI_KEYS])
        self._prolong(generic, session.last_seen_at)

    def _pair_key(self, session: Session) -> FlowKey:
        """The key of the one generic session that all unknown SPIs between two peers share in the end."""
        kind = next(kind for kind, name in GENERIC_APPLICATION.items() if name is session.application)
        ports = (0, 0) if session.application is Application.IPSEC_ESP else (session.client.port, session.server.port)
        return flow_key(Packet(kind, session.client.address, session.server.address, 0, None, None, *ports), None, None)

    # --- sessions that the IKE daemon announces -------------------------------------------------------

    def _add_sa(self, sa: ChildSa, now: float, *, is_news: bool = False) -> None:
        """Give a CHILD_SA its place: in the session of its tunnel, or in a new one."""
        known = self.directory.known(sa)
        if known is None:  # what is learned next takes it away
            return
        is_whole = is_news and known.installed_at >= self.started_at and now - known.installed_at <= SA_LINGER_S
        generation = Generation(sa, known.installed_at, is_whole)
        session = self.tunnels.get(sa.tunnel)
        is_new = session is None
        if session is None:
            session = self._predict(generation, now)
        elif session.generation(sa) is None:
            if (before := session.sa) is not None:
                self._relocate(session, before, sa)
            session.add_generation(generation)
        self._claim(session, sa, is_new, now)

    def _update_sa(self, old: ChildSa, new: ChildSa, now: float) -> None:
        """A CHILD_SA lives on, but is not what it was: its peer has moved, or its IKE_SA is another one."""
        session = self.tunnels.get(old.tunnel)
        generation = session.generation(old) if session and old.tunnel == new.tunnel else None
        if session is None or generation is None:
            self._remove_sa(old, SaEnd.VANISHED, now)
            self._add_sa(new, now)
            return
        generation.sa = new
        self._note(session)
        if (old.key_in, old.key_out) != (new.key_in, new.key_out):
            generation.moves += 1
            self.counters.add("sa_moved")
            self._relocate(session, old, new)
            self.linger(session, old, now + SA_LINGER_S)
            self._claim(session, new, False, now)
        session.ports_of_sa()

    def _relocate(self, session: Session, old: ChildSa, new: ChildSa) -> None:
        """The tunnel runs between other addresses now: its session goes along, and meets the rules anew."""
        if (old.local, old.remote) == (new.local, new.remote):
            return
        self.tunnels.move(session, new.local, new.remote)
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
            if not is_new:
                self._refuse_sa(session, sa, now)
            return
        provisional = list(dict.fromkeys(other for other in holders.values() if other.is_provisional))
        has_place = len(self.table) - len(provisional) < self.table.capacity
        if is_new and not has_place and (provisional or not self._has_place_for_tunnel(now)):
            return  # the first packet tries again, and is counted if there is still no place
        if is_new and provisional:
            session.id = min(other.id for other in provisional)
            session.created_at = min(other.created_at for other in provisional)
        for key, other in holders.items():
            if not other.is_provisional:
                self._unindex(other, {key})
            elif self.table.live(other.id) is other:  # it may have had both keys
                is_c2s = self.table.flows_of(other)[key] is other.c2s
                self._absorb(other, session, turned=is_c2s != (flows[key] is session.c2s))
        if is_new:
            session.id = session.id or self.table.allocate_id()
            self._take_in(session, flows)
            self.tunnels.add(sa.tunnel, session)
            self.counters.add("session_predicted")
            self._arm(session, session.timeout_s, now)
        else:
            self.table.index(session, flows)
        if provisional:  # an older SPI that the IKE daemon has forgotten since goes its own way
            self.fast_path.withdraw(element for element in session.elements if element.spi_key not in session.keys)
        if session.state is State.CLOSING:  # authenticated anew, or restarted: the tunnel is back
            is_waiting = session.type is SessionType.PRED
            session.move(Trigger.TUNNEL_ANNOUNCED if is_waiting else Trigger.TUNNEL_UP)
            session.end_reason = EndReason.UNKNOWN
            session.refresh_s = 0 if is_waiting else session.timeout_s
            self._arm(session, session.timeout_s, now)
        if provisional and session.state is State.OPENING:
            session.last_seen_at = max(other.last_seen_at for other in provisional)
            self._promote(session, provisional[0].ingress, provisional[0].client.zone, now)
        self._note(session)
        if session.state is State.ACTIVE and session.rule.action is Action.DENY:  # where it is now, it may not be
            self.counters.add("flow_policy_deny")
            self._discard(session, now)
        session.ports_of_sa()

    def _refuse_sa(self, session: Session, sa: ChildSa, now: float) -> None:
        """Another tunnel has an SPI of a CHILD_SA: it gets no place in its own, which ends if there was no other SA."""
        refused = session.generation(sa)
        if session.generations == (refused,):
            self.tunnels.remove(sa.tunnel)
            self._end(session, EndReason.TUNNEL_DOWN, now)
            return
        session.generations = tuple(generation for generation in session.generations if generation is not refused)
        self._note(session)

    def _predict(self, generation: Generation, now: float) -> Session:
        """The session of a tunnel that has just come up, not in the table yet.

        The client is the IKE initiator. Both sides lie in the zone of the interface that has the local address,
        as on PAN-OS, where traffic to the firewall itself stays within a zone.
        """
        sa = generation.sa
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
            generations=(generation,),
            is_client_here=sa.is_initiator,
        )

    def _holders(self, keys: Mapping[Key, Flow], session: Session) -> dict[Key, Session]:
        """Which other sessions have these keys now."""
        flows = {key: self.table.lookup(key) for key in keys}
        return {key: flow.session for key, flow in flows.items() if flow is not None and flow.session is not session}

    def _absorb(self, provisional: Session, session: Session, turned: bool) -> None:
        """Move what a provisional session counted to another one.

        `turned`: what is c2s there is s2c here.
        """
        self.table.remove(provisional)
        self._note(provisional)
        self._note(session)
        self._health.forget(provisional)
        self.limits.leave(provisional)
        self.gate.leave(provisional)
        flows = [session.flow((element.flow is provisional.c2s) != turned) for element in provisional.elements]
        for is_c2s in (True, False):
            flow, other = session.flow(is_c2s != turned), provisional.flow(is_c2s)
            flow.absorb(other)
            self.totals.move(flow, other.packet_count, other.byte_count)
        for element, flow in zip(provisional.elements, flows, strict=True):
            element.use = flow.note_spi(element.use.spi, element.seen_at)
        session.elements += provisional.elements
        if session.c2s.packet_count and session.s2c.packet_count:
            self.limits.settle(session)
        self.counters.add("session_absorbed")
        if provisional.id != session.id:  # else it goes on under its id
            self._events.append(SessionAbsorbed(provisional, session.id))

    def _promote(self, session: Session, interface: str, zone: str, now: float) -> None:
        """The first packet of an announced session: now the interface is certain, and the rule decides."""
        self._note(session)
        session.begin_flow()
        session.ingress = session.egress = interface
        session.client.zone = session.server.zone = zone
        session.rule = self._rule(session.client, session.server, session.application)
        self.counters.add("session_promoted")
        self._decide(session, now)
        self._log_start(session, now)
        self._events.append(SessionPromoted(session))

    def _remove_sa(self, sa: ChildSa, end: SaEnd, now: float) -> None:
        """A CHILD_SA is gone. Its SPIs linger; with the last one the tunnel goes down."""
        session = self.tunnels.get(sa.tunnel)
        generation = session.generation(sa) if session else None
        if session is None or generation is None:
            return  # one that never got a session
        generation.removed_at, generation.end = now, end
        self._note(session)
        self.fast_path.withdraw(e for e in session.elements if e.spi_key in (sa.key_in, sa.key_out))
        self.linger(session, sa, now + SA_LINGER_S)
        if session.sas:
            session.ports_of_sa()
        elif session.state in (State.OPENING, State.ACTIVE):
            session.move(Trigger.TUNNEL_DOWN)
            session.end_reason = EndReason.TUNNEL_DOWN
            session.refresh_s = 0
            self._arm(session, SA_LINGER_S, now)
        else:
            self.tunnels.remove(sa.tunnel)

    def linger(self, session: Session, sa: ChildSa, until: float) -> None:
        """Until then, SPIs of an SA that is gone are still its tunnel's; no earlier than what lingers already."""
        self._lingering.append((until, session, sa))

    # --- control against data -----------------------------------------------------------------------

    def _watch(self, now: float) -> None:
        """Look at the next sessions of this host, and tell of troubles that come and go."""
        self._next_watch_at = now + WATCH_INTERVAL_S
        if not self._to_watch:
            self._to_watch.extend((*self.tunnels, *self.strangers))
        for _ in range(min(WATCH_SLICE, len(self._to_watch))):
            session = self._to_watch.popleft()
            if self.table.live(session.id) is session:
                self._look_at(session, now)
                compare(session)
                if ask_for_counts(session):
                    self.fast_path.read(session)

    def _look_at(self, session: Session, now: float) -> None:
        if session.generations:
            self.totals.look(session, now)
        begun, over = self._health.look(session, self.settings.tunnel_silent_s, now)
        for finding in begun:
            self.counters.add(finding.trouble.counter)
            self._events.append(TunnelTrouble(session, finding))
        self._events.extend(TunnelTrouble(session, finding, is_over=True) for finding in over)

    def _begin_close_watch(self, session: Session, now: float) -> None:
        """A new SPI has come up in a session: for a while it matters when the others were last seen."""
        is_rekey = len(session.c2s.uses) + len(session.s2c.uses) > 2 and len(session.elements) <= CLOSE_WATCH_SPIS
        if is_rekey and len(self._close_watch) < CLOSE_WATCH_SESSIONS:
            if session not in self._close_watch:
                self.fast_path.read(session)
            self._close_watch[session] = now + CLOSE_WATCH_S

    def _watch_closely(self, now: float) -> None:
        self._next_close_watch_at = now + CLOSE_WATCH_INTERVAL_S
        self._close_watch = {
            s: until for s, until in self._close_watch.items() if until > now and s.state is State.ACTIVE
        }
        self.fast_path.read_sessions(self._close_watch)

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
            self._arm(session, session.timeout_s, now)
        elif session.is_provisional and session.state is State.ACTIVE:
            if session.elements and not self.directory.is_fresh:  # it was a tunnel's before fwd was started again
                self._arm(session, self.settings.unknown_spi_grace_s, now)
            else:
                self._grace_over(session, now)
        else:
            self._end(session, EndReason.AGED_OUT, now)

    def _end(self, session: Session, reason: EndReason, now: float) -> None:
        """End a live session. A reason that stands already, such as the denial, is the one that is kept."""
        if session.end_reason is EndReason.UNKNOWN:
            session.end_reason = reason
        self.fast_path.withdraw(session.elements)
        for forgotten in self.table.end(session, now):
            self._note(forgotten)
        self._note(session)
        if self.keeps_log and session.rule.log_at_end:
            self.traffic_log.owed[session.id] = session
        self.flow_export.end(session, now)
        self.limits.leave(session)
        self.gate.leave(session)
        self.spi_sessions.leave(session)
        if session.is_terminated:
            self.strangers.discard(session)
        self._health.forget(session)
        if session.generations:
            self.totals.look(session, now)
        self.counters.add("session_ended")
        if session.end_reason in _END_COUNTERS:
            self.counters.add(_END_COUNTERS[session.end_reason])
        self._events.append(SessionEnded(session))
        if session.sa and self.tunnels.get(session.sa.tunnel) is session:
            self.tunnels.remove(session.sa.tunnel)
            for sa in session.sas:  # the tunnel is still up: it waits for its next packet
                self._add_sa(sa, now)

    def _unindex(self, session: Session, keys: Iterable[Key]) -> None:
        """Let packets with these keys be the session's no more."""
        gone = set(keys)
        self.table.unindex(session, gone)
        self._note(session)
        self.fast_path.withdraw(element for element in session.elements if element.spi_key in gone)

    # --- where and under which rule -------------------------------------------------------------------

    def _rule(self, client: Flow, server: Flow, application: Application) -> Rule:
        return self.settings.policy.lookup(client.zone, server.zone, client.address, server.address, application)

    def rematch(self, session: Session, now: float) -> None:
        """Let a session meet the rules, zones and timeouts as they are now (PAN-OS: rematch)."""
        self._rezone(session)
        if self.settings.pass_through is PassThrough.ALWAYS and session.gate is not None:
            session.gate = None
            self._note(session)
        is_discarded = session.state is State.DISCARD
        wanted = self.settings.discard_timeout_s if is_discarded else self.settings.timeouts_s[session.application]
        if session.state in (State.ACTIVE, State.DISCARD, State.OPENING) and session.timeout_s != wanted:
            more, session.timeout_s = wanted - session.timeout_s, wanted
            if not session.is_provisional:
                session.refresh_s = wanted if session.refresh_s else 0
                self._arm(session, max(0.0, session.expires_at - self.ager.age(now) + more), now)
        before, rule = session.rule, self._rule(session.client, session.server, self._judged_as(session))
        if before is CLOSED and session.gate is not None and rule.action is Action.ALLOW:
            return  # its gate has the say
        session.rule = rule
        if rule == before:
            return
        self._note(session)
        self.counters.add("session_rematched")
        if rule.inspects_every_packet != before.inspects_every_packet:
            self.fast_path.withdraw(session.elements)
        if rule.action is Action.DENY and session.state is State.ACTIVE:
            self.counters.add("flow_policy_deny")
            self._discard(session, now)
        elif rule.action is Action.ALLOW and is_discarded and not self._is_unwanted_stranger(session):
            self._end(session, EndReason.POLICY_DENY, now)  # the next packet opens another one

    def _judged_as(self, session: Session) -> Application:
        """What may be a tunnel's of this host, although it cannot be told yet or ever, is judged as such."""
        is_fragments = session.application is Application.IPSEC_ESP and not (session.c2s.uses or session.s2c.uses)
        ends = (session.client.address, session.server.address)
        if session.is_provisional or (session.is_terminated and is_fragments and self.tunnels.between(*ends)):
            return Application.IPSEC_UDP
        return session.application

    def _is_unwanted_stranger(self, session: Session) -> bool:
        """Whether it was discarded because no tunnel claimed it, whatever the rules say."""
        return session in self.strangers and self.settings.unknown_spi is UnknownSpi.DISCARD

    def _rezone(self, session: Session) -> None:
        """Follow its interfaces into the zones that they lie in now."""
        if session.state is State.OPENING and (sa := session.sa) is not None:
            name, zone = self._interface_of(sa.local)
            zones = (zone, zone)
            session.ingress = session.egress = name
        else:
            zone_of = self.settings.zones.zone_of
            zones = (zone_of(session.ingress), zone_of(session.egress))
        if zones == (session.client.zone, session.server.zone):
            return
        self._note(session)
        renamed = dict(zip((session.client.zone, session.server.zone), zones, strict=True))
        session.client.zone, session.server.zone = zones
        keys = {
            key: key._replace(low_zone=renamed.get(key.low_zone), high_zone=renamed.get(key.high_zone))
            for key in session.keys
            if isinstance(key, FlowKey) and key.low_zone is not None and key.high_zone is not None
        }
        if not keys:
            return
        flows = self.table.flows_of(session)
        self._unindex(session, keys)
        with contextlib.suppress(KeyInUse):  # of two sessions that are one now, this one is found no more, and ages out
            self.table.index(session, {keys[key]: flow for key, flow in flows.items() if key in keys})

    def _zone(self, index: int) -> str:
        zone = self._zone_of_index.get(index)
        if zone is None:
            zone = self.settings.zones.zone_of(self.interfaces.name_of(index))
            self._zone_of_index[index] = zone
        return zone

    def _zones_changed(self) -> None:
        """What was decided for an interface that lies in another zone now is to be decided anew."""
        before, self._zone_of_index = self._zone_of_index, {}
        there = self.interfaces.indices
        moved = {index for index, zone in before.items() if index not in there or self._zone(index) != zone}
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
