"""Packets, SAs and firewalls for the tests, made by hand: no code of fwd's decoder is used to build them."""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

from msgspec.structs import replace as replace_fields

from fwd.core import records
from fwd.core.fast_path import Found, Outcome, Work
from fwd.core.firewall import Firewall, Hook
from fwd.core.interfaces import AddressPresent, InterfaceSnapshot, LinkPresent
from fwd.core.limits import source_of
from fwd.core.policy import Action, Policy, Rule, Verdict, Zones
from fwd.core.sa import ChildSa
from fwd.core.session import Place, Session
from fwd.core.settings import Settings
from fwd.core.succession import Succession

#: The hosts of the tests: fwd's own address, its peer, and two sites on both sides of it.
HERE, PEER, LEFT, RIGHT = "192.0.2.1", "192.0.2.2", "198.51.100.2", "203.0.113.2"
HERE6, PEER6 = "2001:db8:c::1", "2001:db8:c::2"
WAN, TO_LEFT, TO_RIGHT = 2, 3, 4

ALLOW_ALL = Rule("any-any", Action.ALLOW)
DENY_ALL = Rule("nothing", Action.DENY)


def packed(address: str) -> bytes:
    return ip_address(address).packed


def ipv4(src: str, dst: str, protocol: int, payload: bytes, *, fragment: int = 0, options: bytes = b"") -> bytes:
    header = 20 + len(options)
    return (
        struct.pack(
            "!BBHHHBBH4s4s",
            0x40 | header // 4,
            0,
            header + len(payload),
            7,
            fragment,
            64,
            protocol,
            0,
            packed(src),
            packed(dst),
        )
        + options
        + payload
    )


def ipv6(src: str, dst: str, next_header: int, payload: bytes) -> bytes:
    return struct.pack("!IHBB16s16s", 6 << 28, len(payload), next_header, 64, packed(src), packed(dst)) + payload


def ip(src: str, dst: str, protocol: int, payload: bytes) -> bytes:
    return (ipv6 if ":" in src else ipv4)(src, dst, protocol, payload)


def esp(src: str, dst: str, spi: int, seq: int = 1, size: int = 40) -> bytes:
    return ip(src, dst, 50, struct.pack("!II", spi, seq) + bytes(size))


def udp(src: str, dst: str, sport: int, dport: int, payload: bytes) -> bytes:
    return ip(src, dst, 17, struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload)


def ike(src: str, dst: str, port: int = 500) -> bytes:
    header = bytes(range(1, 17)) + bytes([33, 0x20, 34, 8]) + bytes(4) + struct.pack("!I", 28)
    return udp(src, dst, port, port, (bytes(4) if port == 4500 else b"") + header)


def esp_in_udp(src: str, dst: str, spi: int, sport: int = 4500, dport: int = 4500) -> bytes:
    return udp(src, dst, sport, dport, struct.pack("!II", spi, 1) + bytes(40))


def child_sa(spi_in: int = 0x1001, spi_out: int = 0x2001, **changes: Any) -> ChildSa:
    sa = ChildSa(
        ike_name="gw",
        child_name="net",
        uniqueid=1,
        reqid=1,
        local=packed(HERE),
        remote=packed(PEER),
        local_port=500,
        remote_port=500,
        spi_in=spi_in,
        spi_out=spi_out,
        encap=False,
        is_initiator=False,
        local_id="here",
        remote_id="there",
    )
    return replace(sa, **changes)


def settings(*rules: Rule, **changes: Any) -> Settings:
    zones = Zones([("wan", "untrust"), ("left", "trust"), ("right", "untrust")], "any")
    return replace(Settings(Policy(rules or (ALLOW_ALL,), Rule("default", Action.DENY)), zones), **changes)


class Kernel:
    """What the kernel's maps do, as far as fwd uses them: [packets, bytes, drops?] by element, and its comment."""

    def __init__(self) -> None:
        self.elements: dict[Any, list[Any]] = {}
        #: Packets that no element stood for.
        self.undecided = 0

    def decide(self, octets: bytes, indev: int, outdev: int) -> bool | None:
        """Whether a packet that an element stands for passes; None: it goes to the queue."""
        passes = self._decide(octets, indev, outdev)
        self.undecided += passes is None
        return passes

    def _decide(self, octets: bytes, indev: int, outdev: int) -> bool | None:
        octets, length = octets + bytes(48), len(octets)
        start, protocol = (40, octets[6]) if octets[0] >> 4 == 6 else ((octets[0] & 15) * 4, octets[9])
        addresses = octets[8:40] if octets[0] >> 4 == 6 else octets[12:20]
        is_udp = protocol == 17
        esp = octets[start + 8 * is_udp : start + 8 * is_udp + 8]
        is_whole = length >= start + 8 * is_udp + 8 and not (start < 40 and octets[6:8] != bytes(2))
        if protocol not in (17, 50) or esp[4:] == bytes(4) or not is_whole:
            return None
        ports = octets[start : start + 4] if is_udp else b""
        element = self.elements.get((indev, outdev, addresses + ports + esp[:4]))
        if element is None:
            return None
        element[0] += 1
        element[1] += length
        return not element[2]

    def carry_out(self, work: Work) -> Outcome:
        removed = {}
        for element in work.removals:
            if found := self.elements.pop(element.key, None):
                removed[element.key] = (found[0], found[1])
        for element in work.installs:
            assert element.key not in self.elements
            self.elements[element.key] = [element.kernel_packets, element.kernel_bytes, element.verdict is Verdict.DROP]
        there = [element.key for element in work.reads if element.key in self.elements]
        return Outcome(removed, {key: (self.elements[key][0], self.elements[key][1]) for key in there})

    def find_all(self) -> list[Found]:
        return [
            Found(key, Verdict.DROP if is_drop else Verdict.ACCEPT, (packets, octets))
            for key, (packets, octets, is_drop) in self.elements.items()
        ]


class Bench:
    """A firewall on a host with three interfaces, a clock that tests move, and short words for packets.

    With `fast_path`, there is a kernel that repeats what the firewall decided.
    """

    def __init__(self, *rules: Rule, fast_path: bool = False, **changes: Any) -> None:
        self.now = 1000.0
        self.firewall = Firewall(settings(*rules, **changes), self.now)
        self.succession = Succession(self.firewall)
        self.firewall.use_fast_path(fast_path)
        self.firewall.changes.is_on = True
        self.kernel = Kernel()
        self.saved: dict[bytes, bytes] = {}
        self._checks = 0
        #: Whether no packet waits in the queue behind the one that is handled.
        self.is_drained = True
        #: What had been counted when the firewall began its totals.
        self.base = dict.fromkeys(("pkt_session", "byte_session"), 0)
        self.offered = 0
        #: Packets of an element that nobody knows, between its being found and its being taken out.
        self.late_packets = 0
        self._know_interfaces()

    def _know_interfaces(self) -> None:
        self.firewall.apply_interface(
            InterfaceSnapshot(
                (LinkPresent(WAN, "wan"), LinkPresent(TO_LEFT, "left"), LinkPresent(TO_RIGHT, "right")),
                (AddressPresent(WAN, packed(HERE)), AddressPresent(WAN, packed(HERE6))),
            )
        )

    def restart(
        self, *rules: Rule, saved: dict[bytes, bytes] | None = None, fast_path: bool = True, **changes: Any
    ) -> None:
        """Another firewall goes on with what was saved and what is in the kernel.

        `saved` is what a killed one had saved, if that is not all until now.
        """
        if saved is None:
            self.firewall.credit_all()
            self.save()
        else:
            self.saved = saved
        self.firewall = Firewall(settings(*rules, **changes), self.now)
        self.succession = Succession(self.firewall)
        self.firewall.changes.is_on = True
        self._know_interfaces()
        found = self.kernel.find_all()
        orphans = self.succession.restore(self.saved, found, self.kernel.undecided, self.now)
        last = {}
        for orphan in orphans:
            packets, octets, _ = self.kernel.elements.pop(orphan.key)
            last[orphan.key] = (packets + self.late_packets, octets)
            self.offered += self.late_packets
        self.succession.note_orphans_removed(orphans, last)
        self.base = {name: self.firewall.counters.values[name] for name in self.base}
        self.firewall.use_fast_path(fast_path)
        self.serve_kernel()
        self.check()

    def save(self) -> None:
        """Write down what changed, as the daemon does now and then."""
        while True:
            for key, row in self.succession.take_changes(self.now).items():
                if row is None:
                    self.saved.pop(key, None)
                else:
                    self.saved[key] = row
            if not self.firewall.changes:
                return

    def check_saved(self) -> None:
        """What was saved is what there is, but for times that come with packets and what their numbers tell."""
        firewall = self.firewall
        if len(firewall.fast_path) > 256:
            return
        self.save()
        sessions = {session.id: session for session in firewall.flow_export.waiting}
        sessions |= {session.id: session for session in (*firewall.table, *firewall.table.ended)}
        sessions |= firewall.traffic_log.owed
        kept = records.read(self.saved)
        assert kept.totals is not None and {record.id for record in kept.sessions} == sessions.keys()
        for record in kept.sessions:
            assert _timeless(record) == _timeless(self.succession.record(sessions[record.id], self.now))
        charged = [e for e in firewall.fast_path if e.place is Place.KERNEL]
        charged += [e for session in sessions.values() for e in firewall.fast_path.leaving(session)]
        assert firewall.fast_path.kernel_packets == sum(element.kernel_packets for element in charged)
        assert firewall.fast_path.kernel_bytes == sum(element.kernel_bytes for element in charged)
        for gate in kept.gates:
            assert firewall.gate.open_until(gate.low, gate.high) == gate.open_until

    def receive(self, octets: bytes) -> bool:
        return self._packet(octets, Hook.INPUT, WAN, 0)

    def send(self, octets: bytes) -> bool:
        return self._packet(octets, Hook.OUTPUT, 0, WAN)

    def forward(self, octets: bytes, *, to_left: bool = False) -> bool:
        indev, outdev = (TO_RIGHT, TO_LEFT) if to_left else (TO_LEFT, TO_RIGHT)
        return self._packet(octets, Hook.FORWARD, indev, outdev)

    def sas(self, event: Any) -> None:
        self.firewall.apply_sa(event, self.now)
        self.serve_kernel()
        self.check()

    def wait(self, seconds: float) -> None:
        """Let time pass as the daemon does: from deadline to deadline."""
        end = self.now + seconds
        while self.firewall.next_deadline() <= end:
            self.now = max(self.now, self.firewall.next_deadline())
            self.firewall.handle_timer(self.now)
            self.serve_kernel()
            if self.firewall.changes.is_due(self.now):
                self.save()
        self.now = end
        self.check()

    @property
    def sessions(self) -> list[Session]:
        self.read_all()
        return sorted(self.firewall.table, key=lambda session: session.id)

    @property
    def session(self) -> Session:
        (session,) = self.sessions
        return session

    def count(self, name: str) -> int:
        self.read_all()
        return self.firewall.counters.values[name]

    def clear(self, *sessions: Session) -> None:
        self.firewall.clear(sessions, self.now)
        self.serve_kernel()
        self.check()

    def read_all(self) -> None:
        """Bring all counts up to date, as the daemon does before it shows any."""
        for session in self.firewall.table:
            self.firewall.fast_path.read(session)
        self.serve_kernel()

    def serve_kernel(self) -> None:
        while (work := self.firewall.take_work(self.now, self.is_drained)) is not None:
            self.firewall.apply_outcome(work, self.kernel.carry_out(work), self.now)

    def _packet(self, octets: bytes, hook: Hook, indev: int, outdev: int) -> bool:
        self.offered += 1
        passes = self.kernel.decide(octets, indev, outdev)
        if passes is None:
            verdict = self.firewall.receive_packet(octets, hook, indev, outdev, self.now)
            self.serve_kernel()
            passes = verdict.value == "accept"
        if not self.firewall.fast_path.is_on:
            self.read_all()  # so that most tests need not think of it
        self.check()
        return passes

    def check(self) -> None:
        """What must hold at every instant."""
        values = self.firewall.counters.values
        drops = sum(value for name, value in values.items() if name.startswith("flow_parse_"))
        drops += sum(value for name, value in values.items() if name.startswith("flow_limit_"))
        drops += values["flow_table_full"] + values["flow_internal_error"]
        assert values["pkt_recv"] == values["pkt_session"] + drops
        in_kernel = {e.key: e for e in self.firewall.fast_path if e.place is Place.KERNEL}
        assert in_kernel.keys() == self.kernel.elements.keys()
        assert len(in_kernel) == self.firewall.fast_path.in_kernel
        unread = sum(element.own_packets for element in self.firewall.fast_path)
        for key, (packets, _, is_drop) in self.kernel.elements.items():
            element = in_kernel[key]
            session = element.flow.session
            assert element in session.elements and (element.verdict is Verdict.DROP) == is_drop
            assert self.firewall.table.live(session.id) is session
            unread += packets - element.kernel_packets
        assert self.offered == values["pkt_recv"] + values["pkt_unseen"] + unread
        self._check_limits()
        kinds = Counter((session.application, session.state, session.type) for session in self.firewall.table)
        assert kinds == +Counter(self.firewall.table.tally) and min(self.firewall.table.tally.values()) == 0
        readable = [session for session in (*self.firewall.table, *self.firewall.table.ended) if session.generations]
        assert list(self.firewall.table.tunnels_after(0)) == sorted(readable, key=lambda session: session.id)
        known = list(self.firewall.directory)
        assert list(self.firewall.directory.after(0)) == sorted(known, key=lambda known: known.number)
        self._check_totals()
        allocated = values["session_allocated"]
        gone = values["session_ended"] + values["session_absorbed"] + values["session_not_restored"]
        assert allocated == len(self.firewall.table) + gone
        is_all_there = not values["session_not_restored"] and self.now < 1000 + 300
        if is_all_there and values["session_ended"] <= self.firewall.settings.keep_ended:
            everything = [*self.firewall.table, *self.firewall.table.ended]
            assert values["pkt_session"] == sum(session.packet_count for session in everything)
            assert values["byte_session"] == sum(session.byte_count for session in everything)
        self._checks += 1
        if len(self.firewall.table) + len(self.firewall.fast_path) <= 8 or self._checks % 16 == 0:
            self.check_saved()  # which takes a while for each

    def _check_totals(self) -> None:
        """The totals by zones are what was counted in sessions, and those by tunnel what their sessions have."""
        totals, values = self.firewall.totals, self.firewall.counters.values
        zones = totals.by_zones.values()
        assert sum(carried.packets for carried in zones) == values["pkt_session"] - self.base["pkt_session"]
        assert sum(carried.octets for carried in zones) == values["byte_session"] - self.base["byte_session"]
        if not any(self.base.values()) and values["session_ended"] <= self.firewall.settings.keep_ended:
            ways = [way for tunnel in totals.by_tunnel.values() for way in (tunnel.inbound, tunnel.outbound)]
            sessions = [*self.firewall.table, *self.firewall.table.ended]
            of_tunnels = [session for session in sessions if session.generations]
            if self.now < 1000 + 300:
                assert sum(way.packets for way in ways) == sum(session.packet_count for session in of_tunnels)
                assert sum(way.octets for way in ways) == sum(session.byte_count for session in of_tunnels)

    def _check_limits(self) -> None:
        """What the limits counted one by one is what a look through the table gives, and nothing is left behind."""
        limits = self.firewall.limits
        counted = [session for session in self.firewall.table if session.is_limited]
        sources = Counter(source_of(session.client.address) for session in counted)
        peers = Counter(frozenset((session.client.address, session.server.address)) for session in counted)
        assert limits.most() == (max(sources.values(), default=0), max(peers.values(), default=0))
        for session in counted:
            client, server = session.client.address, session.server.address
            wanted = (sources[source_of(client)], peers[frozenset((client, server))])
            assert limits.counts(client, server) == wanted
        assert limits.half_open_count == sum(map(limits.is_half_open, counted))


def _timeless(record: records.SessionRecord) -> records.SessionRecord:
    """A record without what is not written anew for each packet."""
    flows = [
        replace_fields(flow, uses=tuple(replace_fields(use, last_seen_at=0.0, sequence=None) for use in flow.uses))
        for flow in (record.c2s, record.s2c)
    ]
    elements = tuple(replace_fields(element, packets=0, octets=0) for element in record.elements)
    times = {"last_seen_at": 0.0, "ends_at": 0.0, "exported_at": 0.0}
    return replace_fields(record, c2s=flows[0], s2c=flows[1], elements=elements, **times)
