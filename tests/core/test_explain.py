"""`explain`: there is a sentence for every kind of session, in every state, and it is the right one."""

import pytest

from fwd.core.explain import explain_packet, explain_session
from fwd.core.interfaces import LinkPresent
from fwd.core.policy import Action, Prefix, Rule
from fwd.core.sa import SaDeleted, SaEstablished, SaRekeyed, SaSnapshot, SaSourceLost
from fwd.core.session import Application
from fwd.core.settings import PassThrough, TransitPorts, UnknownSpi
from tests.builders import (
    ALLOW_ALL,
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
)

SA, NEXT_SA = child_sa(), child_sa(0x1002, 0x2002)


def clock(at):
    return f"T{at:.0f}"


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
