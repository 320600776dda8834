"""`explain`: there is a sentence for every kind of session, in every state, and it is the right one."""

import struct

import pytest

from fwd.core.explain import explain_packet, explain_session
from fwd.core.interfaces import LinkPresent
from fwd.core.policy import Action, Prefix, Rule
from fwd.core.sa import SaDeleted, SaEstablished, SaRekeyed, SaSnapshot, SaSourceLost
from fwd.core.session import Application
from fwd.core.settings import PassThrough, TransitPorts, UnknownSpi
from tests.builders import (
    ALLOW_ALL,
    DENY_ALL,
    HERE,
    LEFT,
    PEER,
    RIGHT,
    WAN,
    Bench,
    child_sa,
    esp,
    esp_in_udp,
    ike,
    packed,
    settings,
    udp,
)

SA, NEXT_SA = child_sa(), child_sa(0x1002, 0x2002)


def clock(at):
    return f"T{at:.0f}"


def ike_message(src, dst, exchange, flags, spi=1):
    header = struct.pack("!QQBBBBII", spi, 2, 33, 0x20, exchange, flags, 1, 28)
    return udp(src, dst, 500, 500, header)


def explained(bench, session=None):
    session = session or bench.session
    bench.read_all()
    groups = explain_session(bench.firewall, session, bench.now, clock)
    assert [group.heading for group in groups][:5] == ["what it is", "ports", "rule", "timers", "next packet"]
    assert all(group.sentences for group in groups)
    return {group.heading: " ".join(group.sentences) for group in groups}


def asked(bench, src, dst, spi, ports=None):
    _, groups = explain_packet(bench.firewall, packed(src), packed(dst), spi, ports, bench.now, clock)
    return " ".join(sentence for group in groups for sentence in group.sentences)


def test_an_announced_tunnel_and_one_that_flows():
    bench = Bench()
    bench.sas(SaSnapshot((SA,)))
    text = explained(bench)
    assert "strongSwan announced it at T1000; no packet has come yet (type PRED)" in text["what it is"]
    assert "decided anew with the first packet" in text["rule"] and "as long as its SA lives" in text["timers"]
    bench.receive(esp(PEER, HERE, SA.spi_in))
    text = explained(bench)
    assert "CHILD_SA net of IKE_SA gw (reqid 1)" in text["what it is"] and "the server" in text["what it is"]
    assert f"sport {SA.spi_out} (0x00002001) is the one that the client {PEER} receives on" in text["ports"]
    assert "over VICI: it installed this pair at T1000, and it still says so" in text["ports"]
    assert "Rule 1, 'any-any', matched first: it allows" in text["rule"]
    assert "each packet sets that to 3600 s again" in text["timers"] and "accepted by the daemon" in text["next packet"]


def test_a_rekey_a_lost_strongswan_and_the_end():
    bench = Bench()
    bench.sas(SaEstablished(SA))
    bench.receive(esp(PEER, HERE, SA.spi_in))
    bench.sas(SaRekeyed(SA, NEXT_SA))
    session = bench.session
    assert "2 pairs are installed" in explained(bench)["ports"]
    bench.sas(SaSourceLost("gone"))
    bench.wait(7)
    assert "it has been away for 7 s" in explained(bench)["ports"]
    bench.sas(SaDeleted(NEXT_SA))
    assert "Its tunnel is down; late packets may come" in explained(bench)["timers"]
    bench.wait(10)
    text = explained(bench, session)
    assert "ended (tunnel-down)" in text["timers"] and "would open a new session" in text["next packet"]
    assert "strongSwan has deleted it" in text["ports"]


def test_transit_says_why_20033_and_by_whom_it_is_decided():
    bench = Bench(fast_path=True)
    bench.forward(esp(LEFT, RIGHT, 5))
    text = explained(bench)
    assert "20033 is generic: ESP has no ports" in text["ports"] and "in transit" in text["what it is"]
    assert "accepted by the kernel (fast path)" in text["next packet"]


def test_rules_that_did_not_match_say_which_field():
    rules = (
        Rule("zone", Action.ALLOW, from_zones=frozenset({"dmz"})),
        Rule("net", Action.ALLOW, sources=(Prefix(packed("10.0.0.0"), 8),)),
        Rule("app", Action.ALLOW, applications=frozenset({"ike"})),
        Rule("no", Action.DENY),
    )
    bench = Bench(*rules)
    bench.forward(esp(LEFT, RIGHT, 5))
    text = explained(bench)
    assert "'zone', did not: 'from' does not match: its zone is trust" in text["rule"]
    assert f"'net', did not: 'source' does not match: its source is {LEFT}" in text["rule"]
    assert "'app', did not: 'application' does not match: its application is ipsec-esp" in text["rule"]
    assert "Rule 4, 'no', matched first: it denies" in text["rule"]
    assert "packets do not prolong that" in text["timers"] and "dropped" in text["next packet"]
    bench.firewall.reconfigure(settings(ALLOW_ALL))
    assert "not in the configuration any more" in explained(bench)["rule"]


def test_the_default_rule_has_its_sentence():
    bench = Bench(Rule("app", Action.ALLOW, applications=frozenset({"ike"})))
    bench.forward(esp(LEFT, RIGHT, 5))
    assert "So the default rule 'default' applied: it denies" in explained(bench)["rule"]


def test_an_spi_that_nobody_owns_yet_or_ever():
    bench = Bench()
    bench.receive(esp(PEER, HERE, 5))
    assert "is provisional: strongSwan owns no such SPI (yet). Within 5 s" in explained(bench)["ports"]
    bench.wait(6)
    assert "strongSwan never claimed these SPIs" in explained(bench)["ports"]


def test_udp_and_ike_show_their_own_ports_and_each_other():
    bench = Bench()
    bench.forward(ike(LEFT, RIGHT, 4500))
    bench.forward(esp_in_udp(LEFT, RIGHT, 5))
    one, other = bench.sessions
    assert "those of the UDP header" in explained(bench, one)["ports"]
    text = explained(bench, other)
    assert f"session {one.id} (ike)" in text["what it is"] and "IKEv2 between the two" in text["what it is"]


def test_ports_that_are_seen_spis():
    bench = Bench(transit_ports=TransitPorts.SPI)
    bench.forward(esp(LEFT, RIGHT, 5))
    assert "(transit-ports = 'spi'); nobody negotiated it with us" in explained(bench)["ports"]


def test_the_gate_has_its_sentences():
    bench = Bench(pass_through=PassThrough.IKE_GATED)
    bench.forward(esp(LEFT, RIGHT, 5))
    assert "The IKE gate denied it" in explained(bench)["rule"]


def test_trouble_is_told_too():
    bench = Bench(tunnel_silent_s=10)
    bench.sas(SaEstablished(SA))
    bench.wait(12)
    assert "No packet since the SA was installed" in explained(bench)["trouble"]


@pytest.mark.parametrize("unknown", list(UnknownSpi))
def test_a_packet_that_nobody_saw(unknown):
    bench = Bench(unknown_spi=unknown)
    bench.firewall.apply_interface(LinkPresent(WAN, "wan", 1500))
    assert "strongSwan owns no such SPI on this host" in asked(bench, PEER, HERE, 9)
    assert f"unknown-spi = '{unknown}'" in asked(bench, PEER, HERE, 9)
    assert "would open a session in transit" in asked(bench, LEFT, RIGHT, 9)


def test_a_packet_of_a_session_that_is_there_and_of_one_that_was():
    bench = Bench()
    bench.sas(SaEstablished(SA))
    bench.receive(esp(PEER, HERE, SA.spi_in))
    bench.forward(esp(LEFT, RIGHT, 5))
    tunnel, transit = bench.sessions
    assert tunnel.application is Application.IPSEC_UDP
    assert f"belongs to session {tunnel.id}" in asked(bench, PEER, HERE, SA.spi_in)
    assert f"belongs to session {transit.id}" in asked(bench, RIGHT, LEFT, 77)
    bench.forward(esp_in_udp(LEFT, RIGHT, 5))
    assert f"belongs to session {bench.sessions[2].id}" in asked(bench, LEFT, RIGHT, 5, (4500, 4500))
    bench.sas(SaDeleted(SA))
    bench.wait(10)
    assert "belonged to CHILD_SA net of gw, which strongSwan deleted at T1000" in asked(bench, PEER, HERE, SA.spi_in)


def test_an_announced_tunnel_that_a_rule_denies_is_not_said_to_pass():
    bench = Bench(DENY_ALL)
    bench.sas(SaEstablished(SA))
    text = explained(bench)
    assert "it denies" in text["rule"]
    assert f"SPI {SA.spi_in} (0x00001001) would be dropped by the daemon" in text["next packet"]
    assert "accepted" not in text["next packet"]


def test_an_sa_that_went_after_its_session_had_ended_is_not_said_to_be_there():
    bench = Bench()
    bench.sas(SaSnapshot((SA,)))
    bench.receive(esp(PEER, HERE, SA.spi_in))
    session = bench.session
    bench.clear(session)
    assert "it still says so" in explained(bench, session)["ports"]
    assert "belong to session 2, which its tunnel has now" in explained(bench, session)["next packet"]
    bench.wait(3)
    bench.sas(SaDeleted(SA))
    assert "installed this pair at T1000, and has deleted it at T1003" in explained(bench, session)["ports"]


def test_discarded_for_an_unknown_spi_is_told_from_denied_by_a_rule():
    bench = Bench(unknown_spi=UnknownSpi.DISCARD)
    bench.receive(esp(PEER, HERE, 5))
    bench.wait(6)
    text = explained(bench)
    assert "it allows" in text["rule"] and "(unknown-spi = 'discard')" in text["rule"]
    bench = Bench(DENY_ALL, unknown_spi=UnknownSpi.DISCARD)
    bench.receive(esp(PEER, HERE, 5))
    assert "unknown-spi" not in explained(bench)["rule"]


def test_an_exchange_that_completed_is_known_after_the_ike_sa_was_rekeyed():
    bench = Bench()
    bench.sas(SaEstablished(SA))
    bench.receive(esp(PEER, HERE, SA.spi_in))
    bench.receive(ike_message(PEER, HERE, 34, 8))
    tunnel = bench.sessions[0]
    assert f"Only {PEER} was heard" in explained(bench, tunnel)["what it is"]
    bench.send(ike_message(HERE, PEER, 34, 0x20))
    for message in (35, 36):
        bench.receive(ike_message(PEER, HERE, message, 8))
        bench.send(ike_message(HERE, PEER, message, 0x20))
    bench.receive(ike_message(PEER, HERE, 37, 8, spi=9))
    text = explained(bench, tunnel)["what it is"]
    assert "initiator SPI 0000000000000009, and its last exchange was INFORMATIONAL." in text
    assert "An exchange that makes a CHILD_SA was answered last at T1000." in text


def test_a_session_that_ended_is_still_named_beside_the_other():
    bench = Bench()
    bench.forward(ike(LEFT, RIGHT))
    bench.forward(esp(LEFT, RIGHT, 7))
    one, other = bench.sessions
    bench.clear(one)
    assert f"session {one.id} (ike, ended)." in explained(bench, other)["what it is"]
    bench.clear(other)
    assert f"session {other.id} (ipsec-esp, ended)." in explained(bench, one)["what it is"]


def test_names_keep_their_small_letter_and_numbers_their_plural():
    bench = Bench()
    bench.sas(SaSnapshot((SA,)))
    bench.receive(esp(PEER, HERE, SA.spi_in))
    bench.sas(SaRekeyed(SA, NEXT_SA))
    bench.sas(SaSourceLost("gone"))
    text = explained(bench)
    assert "changed 1 time by a rekey" in text["what it is"]
    assert text["trouble"].startswith("strongSwan has not answered")


# --- packets ----------------------------------------------------------------------------------------------------


def test_a_packet_in_transit_meets_the_rules_for_every_way_it_may_take():
    bench = Bench(
        Rule("ike", Action.ALLOW, applications=frozenset({"ike"})),
        Rule("out", Action.ALLOW, from_zones=frozenset({"trust"})),
        Rule("right", Action.DENY, destinations=(Prefix(packed(RIGHT), 32),)),
    )
    text = asked(bench, LEFT, RIGHT, 7)
    assert (
        "From zone trust to untrust: rule 2, 'out', would decide, for 'ike' (application) would not match:"
        " it would be accepted." in text
    )
    assert (
        "From zone untrust to trust, or from zone untrust to untrust: rule 3, 'right', would decide, for"
        " 'ike' (application), 'out' (from) would not match: it would be dropped." in text
    )
    assert "the default rule 'default' would decide" in asked(bench, RIGHT, LEFT, 7)


def test_a_packet_in_transit_is_told_of_the_gate():
    bench = Bench(pass_through=PassThrough.IKE_GATED, ike_gate_s=100)
    text = asked(bench, LEFT, RIGHT, 7)
    assert "it would be accepted, were the IKE gate not closed" in text and "dropped by rule 'ike-gate'" in text
    bench.firewall.gate.open(packed(LEFT), packed(RIGHT), bench.now + 100)
    assert "The IKE gate between the two is open until T1100" in asked(bench, LEFT, RIGHT, 7)


def test_a_packet_to_this_host_meets_the_rules_of_its_interfaces_zone():
    bench = Bench(Rule("tunnels", Action.ALLOW, to_zones=frozenset({"untrust"}), applications=frozenset({"ipsec-udp"})))
    text = asked(bench, PEER, HERE, 9)
    assert "provisional session in zone untrust" in text
    assert "Rule 1, 'tunnels', would decide: the packet would be accepted." in text
    assert "For that, the default rule 'default' would decide, for 'tunnels' (application) would not match" in text
    bench.firewall.reconfigure(settings(DENY_ALL))
    assert "Rule 1, 'nothing', would decide: the packet would be dropped." in asked(bench, HERE, PEER, 9)


def test_a_packet_of_a_session_is_about_its_own_spi():
    bench = Bench(fast_path=True)
    bench.forward(esp(LEFT, RIGHT, 5))
    bench.forward(esp(LEFT, RIGHT, 6))
    bench.read_all()
    text = asked(bench, LEFT, RIGHT, 5)
    assert "1 packet with this SPI came there, the last at T1000." in text
    assert "would be accepted by the kernel (fast path)" in text and "SPI 6 " not in text
    text = asked(bench, LEFT, RIGHT, 77)
    assert "None with this SPI was seen there yet." in text and "would be accepted by the daemon" in text


def test_a_packet_on_the_spi_of_a_pair_that_was_replaced():
    bench = Bench()
    bench.sas(SaSnapshot((SA,)))
    bench.receive(esp(PEER, HERE, SA.spi_in))
    bench.sas(SaRekeyed(SA, NEXT_SA))
    bench.sas(SaDeleted(SA))
    assert "strongSwan replaced its SA at T1000; late packets" in asked(bench, PEER, HERE, SA.spi_in)
    bench.receive(esp(PEER, HERE, NEXT_SA.spi_in))
    bench.wait(10)
    text = asked(bench, PEER, HERE, SA.spi_in)
    assert f"strongSwan replaced at T1000. Its tunnel goes on in session {bench.session.id}." in text
