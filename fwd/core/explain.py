"""Why a session is as it is, and what would happen to a packet: in plain sentences.

Sentences come in groups: (heading, sentences). `clock` turns monotonic seconds into the time of day as text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import product

from .constants import GENERIC_ESP_PORT
from .firewall import Firewall
from .gate import CLOSED
from .packet import Kind, Packet
from .policy import Action
from .session import Application, Flow, FlowKey, Place, Session, SessionType, flow_key, spi_flow_key
from .settings import PassThrough, UnknownSpi
from .state import State

Clock = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Group:
    """Sentences that answer one question."""

    heading: str
    sentences: list[str]


def spi_text(spi: int) -> str:
    """An SPI in decimal, as sessions show it, and in hex, as charon and tcpdump do."""
    return f"{spi} (0x{spi:08x})"


def explain_session(firewall: Firewall, session: Session, now: float, clock: Clock) -> list[Group]:
    """All that there is to say about one session."""
    groups = [
        Group("what it is", list(_what(firewall, session, clock))),
        Group("ports", list(_ports(firewall, session, now, clock))),
        Group("rule", list(_rule(firewall, session))),
        Group("timers", list(_timers(firewall, session, now, clock))),
        Group("next packet", list(_next_packet(firewall, session, now))),
    ]
    if troubles := firewall.findings(session, now):
        groups.append(Group("trouble", [_sentence(finding.text) for finding in troubles]))
    return groups


def explain_packet(
    firewall: Firewall, src: bytes, dst: bytes, spi: int, ports: tuple[int, int] | None, now: float, clock: Clock
) -> tuple[Session | None, list[Group]]:
    """What would happen to an ESP packet (with `ports`: in UDP), and the session that it belongs to, if any."""
    kind = Kind.ESP_IN_UDP if ports else Kind.ESP
    packet = Packet(kind, src, dst, 0, spi, None, *(ports or (0, 0)))
    session = _find(firewall, packet, spi)
    about = f"{_host(src)} to {_host(dst)}, SPI {spi_text(spi)}"
    if session is not None:
        first = Group("packet", [f"A packet from {about} belongs to session {session.id}."])
        return session, [first, *explain_session(firewall, session, now, clock)]
    sentences = [f"No session has packets from {about}."]
    local = [address for address in (dst, src) if firewall.interfaces.owner_of(address) is not None]
    for address in local:
        former = firewall.directory.former((dst, ports is not None, spi))
        if former is not None:
            sentences.append(
                f"Its SPI belonged to CHILD_SA {former.sa.child_name} of {former.sa.ike_name}, which strongSwan"
                f" {former.end} at {clock(former.removed_at)}."
            )
        else:
            sentences.append(f"strongSwan owns no such SPI on this host ({_host(address)}).")
        break
    sentences.append(_would_open(firewall, bool(local)))
    policy = firewall.settings.policy
    listed = ", ".join(f"'{rule.name}' ({rule.action})" for rule in (*policy.rules, policy.default))
    return None, [Group("packet", sentences), Group("rule", [f"The rules, in this order, would decide: {listed}."])]


def _find(firewall: Firewall, packet: Packet, spi: int) -> Session | None:
    keys: list[FlowKey | tuple[bytes, bool, int]] = [(packet.dst, packet.kind is Kind.ESP_IN_UDP, spi)]
    zones = {firewall.settings.zones.default, *(zone for _, zone in firewall.settings.zones.patterns)}
    for src_zone, dst_zone in product(zones, repeat=2):
        keys += [spi_flow_key(packet, spi, src_zone, dst_zone), flow_key(packet, src_zone, dst_zone)]
    keys.append(flow_key(packet, None, None))
    flows = (firewall.table.lookup(key) for key in keys)
    return next((flow.session for flow in flows if flow is not None), None)


def _would_open(firewall: Firewall, is_local: bool) -> str:
    if not is_local:
        return "If it came by, it would open a session in transit, under the first rule that matches its zones."
    grace = firewall.settings.unknown_spi_grace_s
    after = "be discarded" if firewall.settings.unknown_spi is UnknownSpi.DISCARD else "stay a generic one"
    return (
        f"If it came by, it would open a provisional session; should strongSwan not claim the SPI within {grace} s,"
        f" that would {after} (unknown-spi = '{firewall.settings.unknown_spi}')."
    )


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
            yield f"Its SPIs have changed {session.rekeys} time(s) by a rekey; {count} pairs are remembered."
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
    for ike in firewall.ike_sas(session)[:1]:
        answered = f"answered at {clock(ike.completed_at)}" if ike.completed_at else "not seen to complete"
        floated = f", on port 4500 since {clock(ike.floated_at)}" if ike.floated_at else ""
        yield (
            f"IKEv{ike.major} between the two was seen on the wire (initiator SPI {ike.initiator_spi:016x}{floated});"
            f" the last exchange was {ike.last_exchange}, an exchange that makes a CHILD_SA was {answered}."
        )
    if others := firewall.linked(session):
        yield "Of the same tunnel or peers: " + ", ".join(f"session {o.id} ({o.application})" for o in others) + "."


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
        shown = next((g for g in session.generations if client.port in (g.sa.spi_in, g.sa.spi_out)), None)
        if shown is not None:
            fresh = firewall.directory.stale_s(shown.sa, now)
            trust = "and it still says so" if fresh is None else f"but it has been away for {fresh:.0f} s"
            since = clock(shown.installed_at)
            yield f"They come from strongSwan over VICI: it installed this pair at {since}, {trust}."
        if len(session.sas) > 1:
            yield f"{len(session.sas)} pairs are installed; the newest that carries traffic is shown."
        if session.udp_ports:
            yield f"The packets are in UDP (NAT-T), ports {session.udp_ports[0]} and {session.udp_ports[1]}."
    elif session.application in (Application.IKE, Application.IPSEC_ESP_UDP):
        yield f"The ports {client.port} and {server.port} are those of the UDP header."
    elif session.generations:
        yield "The ports are the SPIs of the last pair; strongSwan has deleted it."
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
    if session.state is State.OPENING:
        yield "It is decided anew with the first packet, when the interface is certain."
    if session.rule.action is Action.ALLOW and _is_gated(firewall, session):
        yield "The IKE gate between the two is open."


def _is_gated(firewall: Firewall, session: Session) -> bool:
    is_esp_in_transit = not session.is_terminated and session.application is not Application.IKE
    return is_esp_in_transit and firewall.settings.pass_through is PassThrough.IKE_GATED


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
    if session.state is State.ACTIVE and _is_gated(firewall, session):
        until = firewall.gate.open_until(session.client.address, session.server.address)
        if until > now:
            yield f"The IKE gate closes at {clock(until)} unless another exchange completes."


def _next_packet(firewall: Firewall, session: Session, now: float) -> Iterator[str]:
    if session.state is State.INIT:
        yield "It would open a new session, if the rules allow it."
        return
    verdict = "dropped" if session.state is State.DISCARD else "accepted"
    for name, flow, other in (("c2s", session.c2s, session.s2c), ("s2c", session.s2c, session.c2s)):
        spi = flow.uses[-1].spi if flow.uses else None
        about = f"from {_host(flow.address)} to {_host(other.address)}" + (f" with SPI {spi_text(spi)}" if spi else "")
        yield f"{name}: a packet {about} would be {verdict} {_by(session, flow)} and counted here."
    if session.application is not Application.IKE:
        yield "One with another SPI would come to the daemon once, which finds its session."


def _by(session: Session, flow: Flow) -> str:
    newest = flow.uses[-1] if flow.uses else None
    places = {element.place for element in session.elements if element.use is newest}
    if Place.KERNEL in places:
        return "by the kernel (fast path)"
    if session.rule.inspects_every_packet:
        return "by the daemon, which sees every packet (inspect = 'every-packet')"
    return "by the daemon"


def _decision(action: Action) -> str:
    return "it allows" if action is Action.ALLOW else "it denies"


def _host(address: bytes) -> str:
    return str(ip_address(address))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
