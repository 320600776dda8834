"""Why a session is as it is, and what would happen to a packet: in plain sentences.

Sentences come in groups: (heading, sentences). `clock` turns monotonic seconds into the time of day as text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import permutations, product
from typing import TypeAlias

from .constants import GENERIC_ESP_PORT
from .firewall import Firewall
from .gate import CLOSED
from .limits import BY_PEERS, BY_SOURCE, HALF_OPEN
from .packet import Kind, Packet
from .policy import Action, Rule
from .related import ike_sas_of, linked_sessions
from .sa import FormerSa, SaDirectory, SaEnd
from .session import (
    GENERIC_APPLICATION,
    Application,
    Flow,
    FlowKey,
    Generation,
    Place,
    Session,
    SessionType,
    SpiUse,
    flow_key,
    spi_flow_key,
    spi_text,
)
from .settings import PassThrough, TransitPorts, UnknownSpi
from .state import EndReason, State

Clock = Callable[[float], str]


#: (zone of the source, zone of the destination, source, destination, application): what rules look at.
_Facts: TypeAlias = tuple[str, str, bytes, bytes, str]

#: What strongSwan did to a CHILD_SA that is gone.
_DID: Mapping[SaEnd, str] = {SaEnd.REKEYED: "replaced", SaEnd.DELETED: "deleted", SaEnd.VANISHED: "lost"}


@dataclass(frozen=True, slots=True)
class Group:
    """Sentences that answer one question."""

    heading: str
    sentences: list[str]


def removal(directory: SaDirectory, generation: Generation) -> FormerSa | None:
    """Why and when a CHILD_SA went, even if its session had ended before; None if it is still there."""
    sa = generation.sa
    if generation.end is not None and generation.removed_at is not None:
        return FormerSa(sa, generation.end, generation.removed_at)
    former = None if directory.lookup(sa.key_in) == sa else directory.former(sa.key_in)
    return former if former is not None and former.sa.key == sa.key else None


def explain_session(firewall: Firewall, session: Session, now: float, clock: Clock) -> list[Group]:
    """All that there is to say about one session."""
    next_packet = Group("next packet", list(_next_packet(firewall, session)))
    return [*_about(firewall, session, now, clock), next_packet, *_troubles(firewall, session, now)]


def explain_packet(
    firewall: Firewall, src: bytes, dst: bytes, spi: int, ports: tuple[int, int] | None, now: float, clock: Clock
) -> tuple[Session | None, list[Group]]:
    """What would happen to an ESP packet (with `ports`: in UDP), and the session that it belongs to, if any."""
    kind = Kind.ESP_IN_UDP if ports else Kind.ESP
    packet = Packet(kind, src, dst, 0, spi, None, *(ports or (0, 0)))
    if (flow := _find(firewall, packet, spi)) is not None:
        session = flow.session
        first = Group("packet", list(_of_session(flow, spi, _name(packet), clock)))
        return session, [first, *_about(firewall, session, now, clock), *_troubles(firewall, session, now)]
    local = next((address for address in (dst, src) if firewall.interfaces.owner_of(address) is not None), None)
    if local is None:
        sentences = [
            f"No session has packets {_name(packet)}.",
            "If it came by, it would open a session in transit.",
        ]
        rules = Group("rule", list(_transit_rules(firewall, packet, now, clock)))
        return None, [Group("packet", sentences), rules, *_limits(firewall, packet)]
    return None, [
        Group("packet", list(_to_nobody(firewall, packet, spi, local, clock))),
        Group("rule", list(_local_rules(firewall, packet, local))),
        *_limits(firewall, packet),
    ]


def _about(firewall: Firewall, session: Session, now: float, clock: Clock) -> list[Group]:
    return [
        Group("what it is", list(_what(firewall, session, clock))),
        Group("ports", list(_ports(firewall, session, now, clock))),
        Group("rule", list(_rule(firewall, session))),
        Group("timers", list(_timers(firewall, session, now, clock))),
    ]


def _troubles(firewall: Firewall, session: Session, now: float) -> Iterator[Group]:
    if troubles := firewall.findings(session, now):
        yield Group("trouble", [_sentence(finding.text) for finding in troubles])


# --- a packet ---------------------------------------------------------------------------------------------


def _name(packet: Packet) -> str:
    return f"from {_host(packet.src)} to {_host(packet.dst)} with SPI {spi_text(packet.spi or 0)}"


def _find(firewall: Firewall, packet: Packet, spi: int) -> Flow | None:
    """The flow of a packet, whichever interfaces it would come and go by."""
    is_by_spi = packet.kind is Kind.ESP and firewall.settings.transit_ports is TransitPorts.SPI
    keys: list[FlowKey | tuple[bytes, bool, int]] = [(packet.dst, packet.kind is Kind.ESP_IN_UDP, spi)]
    zones = {firewall.settings.zones.default, *(zone for _, zone in firewall.settings.zones.patterns)}
    for pair in product(zones, repeat=2):
        keys.append(spi_flow_key(packet, spi, *pair) if is_by_spi else flow_key(packet, *pair))
    for key in keys:
        if (flow := firewall.table.lookup(key)) is not None:
            return flow.session.flow_of(packet) if isinstance(key, FlowKey) else flow
    return None


def _of_session(flow: Flow, spi: int, about: str, clock: Clock) -> Iterator[str]:
    """A packet of a session: whether its SPI was seen there, and what becomes of the packet."""
    session = flow.session
    yield f"A packet {about} belongs to session {session.id}."
    use, generation = flow.use(spi), session.generation_of(spi)
    if use is None:
        yield "None with this SPI was seen there yet."
    else:
        yield f"{_count(use.packet_count, 'packet')} with this SPI came there, the last at {clock(use.last_seen_at)}."
    if generation is not None and generation.end is not None and generation.removed_at is not None:
        at = clock(generation.removed_at)
        yield f"strongSwan {_DID[generation.end]} its SA at {at}; late packets still belong there for a while."
    yield f"It would be {_verdict(session)} {_by(session, use)} and counted there."


def _to_nobody(firewall: Firewall, packet: Packet, spi: int, local: bytes, clock: Clock) -> Iterator[str]:
    """A packet to or from this host that no session has."""
    yield f"No session has packets {_name(packet)}."
    key = (packet.dst, packet.kind is Kind.ESP_IN_UDP, spi)
    if (sa := firewall.directory.lookup(key)) is not None:
        yield (
            f"Its SPI is that of CHILD_SA {sa.child_name} of {sa.ike_name}, which has no session yet: the packet would"
            " make one."
        )
        return
    if (former := firewall.directory.former(key)) is not None:
        tunnel = firewall.tunnel_of(former.sa)
        today = f" Its tunnel goes on in session {tunnel.id}." if tunnel else ""
        yield (
            f"Its SPI belonged to CHILD_SA {former.sa.child_name} of {former.sa.ike_name}, which strongSwan"
            f" {_DID[former.end]} at {clock(former.removed_at)}.{today}"
        )
    else:
        yield f"strongSwan owns no such SPI on this host ({_host(local)})."
    if not firewall.directory.is_fresh:
        yield f"But strongSwan does not answer ({firewall.directory.lost_reason}): this may be out of date."


def _local_rules(firewall: Firewall, packet: Packet, local: bytes) -> Iterator[str]:
    settings = firewall.settings
    index = firewall.interfaces.owner_of(local)
    zone = settings.zones.default if index is None else settings.zones.zone_of(firewall.interfaces.name_of(index))
    yield f"It would open a provisional session in zone {zone}, judged as the tunnel that it may turn out to be."
    facts = (zone, zone, packet.src, packet.dst, Application.IPSEC_UDP)
    rule = settings.policy.lookup(*facts)
    yield _sentence(f"{_would_decide(firewall, facts)}: the packet would be {_outcome(rule)}")
    if rule.action is Action.DENY:
        return
    unless = f"Should strongSwan not claim the SPI within {settings.unknown_spi_grace_s} s"
    if settings.unknown_spi is UnknownSpi.DISCARD:
        yield f"{unless}, the session would be discarded (unknown-spi = '{settings.unknown_spi}')."
        return
    generic = (*facts[:4], GENERIC_APPLICATION[packet.kind])
    known = firewall.table.lookup(flow_key(packet, None, None))
    into = f"become part of session {known.session.id}" if known else f"be {generic[4]}"
    yield f"{unless}, it would {into} (unknown-spi = '{settings.unknown_spi}')."
    later = _outcome(settings.policy.lookup(*generic))
    yield f"For that, {_would_decide(firewall, generic)}: its packets would be {later}."


def _transit_rules(firewall: Firewall, packet: Packet, now: float, clock: Clock) -> Iterator[str]:
    """What the rules say of a packet in transit, for any way that the interfaces allow."""
    settings = firewall.settings
    zones = [settings.zones.zone_of(name) for name in firewall.interfaces.names if name != "lo"]
    ways: dict[tuple[str, Rule], list[str]] = {}
    for pair in sorted({*permutations(zones, 2)} or {(settings.zones.default, settings.zones.default)}):
        facts = (*pair, packet.src, packet.dst, GENERIC_APPLICATION[packet.kind])
        decision = (_would_decide(firewall, facts), settings.policy.lookup(*facts))
        ways.setdefault(decision, []).append("from zone {} to {}".format(*pair))
    is_gated = settings.pass_through is PassThrough.IKE_GATED
    until = firewall.gate.open_until(packet.src, packet.dst)
    for (text, rule), pairs in ways.items():
        is_stopped = is_gated and until <= now and rule.action is Action.ALLOW
        outcome = f"{_outcome(rule)}, were the IKE gate not closed" if is_stopped else _outcome(rule)
        yield _sentence(f"{', or '.join(pairs)}: {text}: it would be {outcome}")
    if not is_gated:
        return
    if until > now:
        yield f"The IKE gate between the two is open until {clock(until)} (ipsec-pass-through = 'ike-gated')."
    else:
        yield (
            "The IKE gate between the two is closed, for no IKE exchange between them was seen to complete within the"
            f" last {settings.ike_gate_s} s: it would be dropped by rule '{CLOSED.name}'"
            " (ipsec-pass-through = 'ike-gated')."
        )


def _limits(firewall: Firewall, packet: Packet) -> Iterator[Group]:
    """Whether there is room for a session that this packet would open; nothing if it would be a tunnel's."""
    if firewall.directory.lookup((packet.dst, packet.kind is Kind.ESP_IN_UDP, packet.spi or 0)) is not None:
        return
    limits, bounds, table = firewall.limits, firewall.limits.bounds, firewall.table
    of_source, of_peers = limits.counts(packet.src, packet.dst)
    reached = None
    if firewall.interfaces.owner_of(packet.src) is None:  # what this host itself sends is under no limit
        room = math.inf if firewall.is_acquainted(packet.src, packet.dst) else 1.0
        reached = limits.refusal(packet.src, packet.dst, room)
    is_full = len(table) >= table.capacity
    yes = "gives way, if it was silent for a while; else it would be dropped"
    sentences = {
        None: f"The table has {len(table)} of {table.capacity} sessions, {limits.half_open_count} of them half-open.",
        BY_SOURCE: f"Its source has {_count(of_source, 'session')}, the limit is {bounds.source}: it would be dropped"
        f" ([limits] source, counter {BY_SOURCE}).",
        BY_PEERS: f"Its two peers have {_count(of_peers, 'session')}, the limit is {bounds.peers}: it would be dropped"
        f" ([limits] peers, counter {BY_PEERS}).",
        HALF_OPEN: f"{limits.half_open_count} sessions are half-open, the limit is {bounds.half_open}: the oldest of"
        f" them {yes} ([limits] half-open, counter {HALF_OPEN}).",
    }
    group = Group("limits", [sentences[reached]])
    if is_full and reached is None:
        group.sentences.append(f"It is full: the oldest half-open one {yes} (counter flow_table_full).")
    yield group


def _would_decide(firewall: Firewall, facts: _Facts) -> str:
    """Which rule would decide, and which ones before it do not match, by the field that does not."""
    policy = firewall.settings.policy
    passed = []
    for number, rule in enumerate(policy.rules, 1):
        field = rule.mismatch(*facts)
        if field is None:
            text = f"rule {number}, '{rule.name}', would decide"
            break
        passed.append(f"'{rule.name}' ({field})")
    else:
        text = f"the default rule '{policy.default.name}' would decide"
    return f"{text}, for {', '.join(passed)} would not match" if passed else text


def _outcome(rule: Rule) -> str:
    return "accepted" if rule.action is Action.ALLOW else "dropped"


# --- a session --------------------------------------------------------------------------------------------


def _what(firewall: Firewall, session: Session, clock: Clock) -> Iterator[str]:
    client, server = _host(session.client.address), _host(session.server.address)
    sa = session.sa
    if sa is not None:
        role = "client" if session.is_client_here else "server"
        yield (
            f"Session {session.id} is a tunnel that ends on this host, the {role}: CHILD_SA"
            f" {sa.child_name} of IKE_SA {sa.ike_name} (reqid {sa.reqid}) between {client}"
            f" ({_identity(session, session.client)}) and {server} ({_identity(session, session.server)})."
        )
        count = len(session.generations)
        if count > 1:
            yield f"Its SPIs have changed {_count(session.rekeys, 'time')} by a rekey; {count} pairs are remembered."
    elif session.application is Application.IKE:
        yield f"Session {session.id} is IKE between {client} and {server}, seen on the wire."
    elif session.is_terminated:
        yield f"Session {session.id} is ESP to or from this host ({client}, {server}) that no tunnel claims."
    else:
        yield f"Session {session.id} is ESP in transit from {client} to {server}: its tunnel ends elsewhere."
    if session.type is SessionType.PRED:
        yield f"strongSwan announced it at {clock(session.created_at)}; no packet has come yet (type PRED)."
    else:
        yield f"It began at {clock(session.created_at)} and last saw a packet at {clock(session.last_seen_at)}."
    if firewall.limits.is_half_open(session):
        yield "It is half-open, for nobody has answered it: should there be no place, it gives way once it is silent."
    yield from _ike(firewall, session, clock)
    if others := linked_sessions(firewall, session):
        named = (f"session {o.id} ({o.application}{', ended' if o.state is State.INIT else ''})" for o in others)
        yield f"Of the same tunnel or peers: {', '.join(named)}."


def _ike(firewall: Firewall, session: Session, clock: Clock) -> Iterator[str]:
    ike_sas = ike_sas_of(firewall, session)
    record = firewall.ike.record(session.client.address, session.server.address)
    if not ike_sas or record is None:
        return
    newest = ike_sas[0]
    floated = f", on port 4500 since {clock(newest.floated_at)}" if newest.floated_at else ""
    yield (
        f"IKEv{newest.major} between the two was seen on the wire: the IKE_SA used last has initiator SPI"
        f" {newest.initiator_spi:016x}{floated}, and its last exchange was {newest.last_exchange}."
    )
    answered = max((sa.completed_at for sa in record.ike_sas.values() if sa.completed_at is not None), default=None)
    if answered is not None:
        yield f"An exchange that makes a CHILD_SA was answered last at {clock(answered)}."
    elif sender := firewall.ike.only_sender(session.client.address, session.server.address):
        yield f"Only {_host(sender)} was heard: its answers do not come by here, or there are none."
    else:
        yield "No exchange that makes a CHILD_SA was seen to be answered."


def _identity(session: Session, side: Flow) -> str:
    sa = session.sas[-1] if session.sas else session.sa
    assert sa is not None
    return f"'{sa.local_id if side is session.outbound else sa.remote_id}'"


def _ports(firewall: Firewall, session: Session, now: float, clock: Clock) -> Iterator[str]:
    client, server = session.client, session.server
    if session.sas:
        yield (
            f"The ports are SPIs in decimal. sport {spi_text(client.port)} is the one that the client"
            f" {_host(client.address)} receives on, dport {spi_text(server.port)} the one that the server"
            f" {_host(server.address)} receives on."
        )
        shown = session.generation_of(client.port)
        if shown is not None:
            since = clock(shown.installed_at)
            trust = _trust(firewall.directory, shown, now, clock)
            yield f"They come from strongSwan over VICI: it installed this pair at {since}, {trust}."
        if len(session.sas) > 1:
            yield f"{len(session.sas)} pairs are installed; the newest that carries traffic is shown."
        if session.udp_ports:
            yield f"The packets are in UDP (NAT-T), ports {session.udp_ports[0]} and {session.udp_ports[1]}."
    elif session.application in (Application.IKE, Application.IPSEC_ESP_UDP):
        yield f"The ports {client.port} and {server.port} are those of the UDP header."
    elif session.generations:
        last = session.generations[-1]
        gone = removal(firewall.directory, last)
        yield "The ports are the SPIs of the last pair; strongSwan " + (
            f"has {_DID[gone.end]} it, at {clock(gone.removed_at)}." if gone else "has it no more."
        )
    elif client.port == GENERIC_ESP_PORT:
        if session.is_provisional:
            left = firewall.ager.time_to_live_s(session, now)
            yield (
                f"{GENERIC_ESP_PORT} is provisional: strongSwan owns no such SPI (yet). Within {left:.0f} s it may"
                f" claim it, else unknown-spi = '{firewall.settings.unknown_spi}' applies."
            )
        elif session.is_terminated:
            yield f"{GENERIC_ESP_PORT} is generic: strongSwan never claimed these SPIs."
        else:
            yield (
                f"{GENERIC_ESP_PORT} is generic: ESP has no ports, and the SPIs are agreed upon under encryption, so"
                " that nobody in the middle knows which two belong together."
            )
    else:
        yield "The ports are the SPI that was seen on the wire (transit-ports = 'spi'); nobody negotiated it with us."
        if session.s2c.packet_count:
            yield "That both directions are one tunnel was observed: no other SPI could have been the partner."


def _trust(directory: SaDirectory, generation: Generation, now: float, clock: Clock) -> str:
    """What strongSwan says of an SA today."""
    if (gone := removal(directory, generation)) is not None:
        return f"and has {_DID[gone.end]} it at {clock(gone.removed_at)}"
    stale = directory.stale_s(generation.sa, now)
    return "and it still says so" if stale is None else f"but it has been away for {stale:.0f} s"


def _rule(firewall: Firewall, session: Session) -> Iterator[str]:
    if session.rule is CLOSED:
        yield (
            "The IKE gate denied it: no IKE exchange between the two was seen to complete within the last"
            f" {firewall.settings.ike_gate_s} s (ipsec-pass-through = 'ike-gated')."
        )
        return
    policy = firewall.settings.policy
    facts = (
        session.client.zone,
        session.server.zone,
        session.client.address,
        session.server.address,
        Application.IPSEC_UDP if session.is_provisional else session.application,
    )
    shown = {
        "from": f"its zone is {facts[0]}",
        "to": f"its destination's zone is {facts[1]}",
        "application": f"its application is {facts[4]}",
        "source": f"its source is {_host(facts[2])}",
        "destination": f"its destination is {_host(facts[3])}",
    }
    for number, rule in enumerate(policy.rules, 1):
        if rule.name == session.rule.name:
            yield f"Rule {number}, '{rule.name}', matched first: {_decision(rule.action)}."
            break
        field = rule.mismatch(*facts)
        why = f"'{field}' does not match: {shown[field]}" if field else "it would match today, but did not exist then"
        yield f"Rule {number}, '{rule.name}', did not: {why}."
    else:
        if session.rule.name == policy.default.name:
            yield f"So the default rule '{policy.default.name}' applied: {_decision(policy.default.action)}."
        else:
            yield f"Rule '{session.rule.name}', which is not in the configuration any more, decided at its beginning."
    if session.end_reason is EndReason.POLICY_DENY and session.rule.action is Action.ALLOW:
        yield (
            "But strongSwan did not claim its SPI within the grace time: then it is discarded, whatever the rule says"
            f" (unknown-spi = '{UnknownSpi.DISCARD}')."
        )
    if session.state is State.OPENING:
        yield "It is decided anew with the first packet, when the interface is certain."
    if session.rule.action is Action.ALLOW and session.gate is not None:
        yield "The IKE gate between the two is open."


def _timers(firewall: Firewall, session: Session, now: float, clock: Clock) -> Iterator[str]:
    left = firewall.ager.time_to_live_s(session, now)
    if session.state is State.INIT:
        yield f"None: the session has ended ({session.end_reason}). It stays readable for a while."
    elif session.state is State.OPENING:
        yield "It waits for its first packet as long as its SA lives."
    elif session.state is State.CLOSING:
        yield f"Its tunnel is down; late packets may come for another {left:.0f} s. Should it come back, it goes on."
    elif session.state is State.DISCARD:
        yield f"It is discarded for another {left:.0f} s; packets do not prolong that (timeout {session.timeout_s} s)."
    else:
        yield f"Without a packet it ends in {left:.0f} s; each packet sets that to {session.timeout_s} s again."
    if firewall.ager.factor > 1:
        yield f"The table is nearly full: time runs {firewall.ager.factor} times as fast."
    if session.state is State.ACTIVE and session.gate is not None:
        until = firewall.gate.open_until(session.client.address, session.server.address)
        if until > now:
            yield f"The IKE gate closes at {clock(until)} unless another exchange completes."


def _next_packet(firewall: Firewall, session: Session) -> Iterator[str]:
    if session.state is State.INIT:
        today = firewall.tunnel_of(session.sa) if session.sa else None
        if today:
            yield f"It would belong to session {today.id}, which its tunnel has now."
        else:
            yield "It would open a new session, if the rules allow it."
        return
    for name, flow, other in (("c2s", session.c2s, session.s2c), ("s2c", session.s2c, session.c2s)):
        use = flow.uses[-1] if flow.uses else None
        spi = use.spi if use else other.port if session.sas else None
        about = f"from {_host(flow.address)} to {_host(other.address)}" + (f" with SPI {spi_text(spi)}" if spi else "")
        yield f"{name}: a packet {about} would be {_verdict(session)} {_by(session, use)} and counted here."
    if session.application is not Application.IKE:
        yield "One with another SPI would come to the daemon once, which finds its session."


def _verdict(session: Session) -> str:
    """What becomes of its packets; one that waits for its first packet is decided then, by the same rule."""
    is_denied = session.state is State.DISCARD or (
        session.state is State.OPENING and session.rule.action is Action.DENY
    )
    return "dropped" if is_denied else "accepted"


def _by(session: Session, use: SpiUse | None) -> str:
    if any(element.use is use and element.place is Place.KERNEL for element in session.elements):
        return "by the kernel (fast path)"
    if session.rule.inspects_every_packet:
        return "by the daemon, which sees every packet (inspect = 'every-packet')"
    return "by the daemon"


def _decision(action: Action) -> str:
    return "it allows" if action is Action.ALLOW else "it denies"


def _host(address: bytes) -> str:
    return str(ip_address(address))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _sentence(text: str) -> str:
    """With a capital letter, unless it begins with a name that has none."""
    return (text if text.startswith("strongSwan") else text[0].upper() + text[1:]) + "."
