"""Control against data: each trouble of a tunnel is found, counted once, told once, and over when it is over."""

from dataclasses import replace

import pytest

from fwd.core.constants import ONE_WAY_S, RECENT_S
from fwd.core.events import CounterRose, TunnelsStale, TunnelTrouble
from fwd.core.health import Trouble
from fwd.core.interfaces import LinkPresent
from fwd.core.sa import SaDeleted, SaEstablished, SaRekeyed, SaSnapshot, SaSourceLost
from fwd.core.session import SessionType
from tests.builders import HERE, LEFT, PEER, RIGHT, TO_LEFT, WAN, Bench, child_sa, esp, ipv4

SILENT_S = 40
SA, NEXT_SA = child_sa(), child_sa(0x1002, 0x2002)


@pytest.fixture(params=[False, True], ids=["daemon", "fast path"])
def bench(request):
    bench = Bench(fast_path=request.param, tunnel_silent_s=SILENT_S)
    bench.sas(SaSnapshot((SA,)))
    return bench


def troubles(bench):
    bench.read_all()
    tunnel = bench.firewall.tunnel_of(SA)
    return [finding.trouble for finding in bench.firewall.findings(tunnel, bench.now)]


def told(bench, kind=TunnelTrouble):
    events = []
    while event := bench.firewall.next_event():
        events.append(event)
    return [event for event in events if isinstance(event, kind)]


def both_ways(bench, seq):
    bench.receive(esp(PEER, HERE, SA.spi_in, seq))
    bench.send(esp(HERE, PEER, SA.spi_out, seq))


def test_a_healthy_tunnel_has_none(bench):
    for seq in range(1, 100):
        both_ways(bench, seq)
        bench.wait(1)
    assert not troubles(bench) and not told(bench)


def test_a_tunnel_without_a_packet_is_silent_until_one_comes(bench):
    bench.wait(SILENT_S - 1)
    assert not troubles(bench)
    bench.wait(2)
    assert troubles(bench) == [Trouble.SILENT] and bench.count("tunnel_silent") == 1
    assert [event.is_over for event in told(bench)] == [False]
    both_ways(bench, 1)
    bench.wait(2)
    assert not troubles(bench) and [event.is_over for event in told(bench)] == [True]
    bench.wait(SILENT_S + 2)
    assert troubles(bench) == [Trouble.SILENT] and bench.count("tunnel_silent") == 2


@pytest.mark.parametrize("is_received", [True, False])
def test_a_tunnel_that_flows_one_way_is_found(bench, is_received):
    both_ways(bench, 1)
    for seq in range(2, int(ONE_WAY_S) + 5):
        bench.wait(1)
        if is_received:
            bench.receive(esp(PEER, HERE, SA.spi_in, seq))
        else:
            bench.send(esp(HERE, PEER, SA.spi_out, seq))
    assert troubles(bench) == [Trouble.ONE_WAY]
    (event,) = told(bench)
    assert ("packets come in" in event.finding.text) == is_received


def test_packets_on_an_sa_that_is_gone_are_told_from_strangers(bench):
    both_ways(bench, 1)
    bench.sas(SaRekeyed(SA, NEXT_SA))
    bench.receive(esp(PEER, HERE, SA.spi_in, 2))  # still in use: make before break
    bench.sas(SaDeleted(SA))
    assert bench.count("pkt_deleted_sa") == 0
    bench.wait(1)
    bench.receive(esp(PEER, HERE, SA.spi_in, 3))  # late: that happens at every rekey
    bench.wait(60)  # the SPI lingers no more
    assert bench.count("pkt_deleted_sa") == 0 and troubles(bench) == [Trouble.SILENT]
    for seq in range(4, 7):
        bench.receive(esp(PEER, HERE, SA.spi_in, seq))
        bench.receive(esp(PEER, HERE, 0x7777, seq))
        bench.wait(10)  # nobody claims them in time
    assert (bench.count("pkt_deleted_sa"), bench.count("pkt_unknown_spi")) == (3, 3)
    found = troubles(bench)
    assert Trouble.AFTER_DELETE in found and Trouble.UNKNOWN_SPI in found
    assert bench.count("tunnel_after_delete") == bench.count("tunnel_unknown_spi") == 1
    bench.wait(RECENT_S)
    assert troubles(bench) == [Trouble.SILENT]


def test_packets_of_a_tunnel_that_is_gone_are_found_without_it(bench):
    both_ways(bench, 1)
    bench.sas(SaDeleted(SA))
    bench.wait(60)
    assert not bench.sessions
    for seq in range(2, 50):
        bench.receive(esp(PEER, HERE, SA.spi_in, seq))
        bench.wait(1)
    assert bench.count("pkt_deleted_sa") == 48 and bench.count("tunnel_after_delete") == 1
    (finding,) = bench.firewall.findings(bench.session, bench.now)
    assert "of gw/net, which strongSwan deleted" in finding.text


def test_a_packet_that_is_faster_than_the_news_of_its_sa_is_no_strangers(bench):
    bench.receive(esp(PEER, HERE, NEXT_SA.spi_in, 1))
    bench.wait(1)
    bench.sas(SaRekeyed(SA, NEXT_SA))
    bench.wait(20)
    assert bench.count("pkt_unknown_spi") == 0


def test_strongswans_counts_and_ours_are_compared_from_the_first_reading_on(bench):
    for seq in range(1, 31):
        both_ways(bench, seq)
    bench.sas(SaSnapshot((replace(SA, packets_in=30, packets_out=30),)))
    bench.wait(3)
    comparison = bench.firewall.tunnel_of(SA).generations[0].comparison
    assert (comparison.drift, comparison.is_off) == ((0, 0), False)
    for seq in range(31, 131):
        both_ways(bench, seq)
    for _ in range(2):  # once may be packets under way
        assert Trouble.MISCOUNT not in troubles(bench)
        bench.sas(SaSnapshot((replace(SA, packets_in=50, packets_out=130),)))
        bench.wait(3)
    assert bench.firewall.tunnel_of(SA).generations[0].comparison.drift == (80, 0)
    assert Trouble.MISCOUNT in troubles(bench)


def test_packets_that_come_while_strongswan_is_asked_are_no_difference(bench):
    bench.sas(SaSnapshot((replace(SA, packets_in=0, packets_out=0),)))
    bench.wait(3)
    for number in range(1, 4):
        both_ways(bench, 1000 * number)
        bench.read_all()
        bench.sas(SaSnapshot((replace(SA, packets_in=500 * number - 300, packets_out=0),)))
        for seq in range(500):
            bench.receive(esp(PEER, HERE, SA.spi_in, 1000 * number + seq + 1))
        bench.wait(3)
    assert bench.firewall.tunnel_of(SA).generations[0].comparison.drift[0] == 0


@pytest.mark.parametrize("is_cleared", [True, False])
def test_a_session_that_was_cleared_or_aged_out_begins_to_compare_anew(bench, is_cleared):
    told = replace(SA, packets_in=0, packets_out=0)
    bench.sas(SaSnapshot((told,)))
    for seq in range(1, 201):
        both_ways(bench, seq)
    if is_cleared:
        bench.clear(bench.session)
    else:
        bench.wait(3700)
    assert bench.session.type is SessionType.PRED
    assert bench.session.generations[0].installed_at == 1000
    for _ in range(3):
        bench.sas(SaSnapshot((replace(SA, packets_in=200, packets_out=200),)))
        bench.wait(3)
    assert Trouble.MISCOUNT not in troubles(bench)


def test_what_strongswan_counted_before_fwd_began_is_no_difference(bench):
    old = child_sa(0x1003, 0x2003, reqid=3, remote=bytes(4), age_s=500, packets_in=900, packets_out=700)
    bench.sas(SaSnapshot((SA, old)))
    bench.wait(3)
    assert bench.firewall.tunnel_of(old).generations[0].comparison.drift == (0, 0)


def test_lost_packets_are_trouble_while_it_goes_on(bench):
    seq = 0
    for _ in range(60):
        for _ in range(20):
            seq += 1
            if seq % 10:
                bench.receive(esp(PEER, HERE, SA.spi_in, seq))
        bench.send(esp(HERE, PEER, SA.spi_out, 1 + seq // 20))
        bench.wait(1)
    assert troubles(bench) == [Trouble.LOSS] and bench.count("tunnel_loss") == 1
    bench.wait(RECENT_S + 20)
    assert troubles(bench) == [Trouble.SILENT]


def test_packets_out_of_order_are_not_lost(bench):
    for first in range(1, 3000, 3):
        for seq in (first + 2, first, first + 1):
            bench.receive(esp(PEER, HERE, SA.spi_in, seq))
        bench.send(esp(HERE, PEER, SA.spi_out, 1 + first // 3))
        bench.wait(0.5)
        assert Trouble.LOSS not in troubles(bench)


@pytest.mark.parametrize("is_esn", [True, False])
def test_a_wrap_is_trouble_without_esn_only(is_esn):
    bench = Bench(tunnel_silent_s=SILENT_S)
    bench.sas(SaSnapshot((replace(SA, esn=is_esn),)))
    for seq in (2**32 - 2, 2**32 - 1, 0, 1, 2):
        bench.receive(esp(PEER, HERE, SA.spi_in, seq))
        bench.send(esp(HERE, PEER, SA.spi_out, seq))
    assert troubles(bench) == ([] if is_esn else [Trouble.WRAP])


def test_a_tunnel_that_was_up_before_fwd_is_not_silent_at_once():
    bench = Bench(tunnel_silent_s=SILENT_S)
    bench.sas(SaSnapshot((replace(SA, age_s=5000),)))
    bench.wait(2)
    assert not troubles(bench)
    bench.receive(esp(PEER, HERE, SA.spi_in, 1))
    bench.wait(2)
    assert not troubles(bench)  # one packet is no one-way traffic
    bench.wait(SILENT_S)
    assert troubles(bench) == [Trouble.SILENT]


def test_a_rekey_does_not_end_silence(bench):
    both_ways(bench, 1)
    bench.wait(SILENT_S + 2)
    bench.sas(SaRekeyed(SA, NEXT_SA))
    bench.sas(SaDeleted(SA))
    bench.wait(5)
    assert troubles(bench) == [Trouble.SILENT]
    assert [event.is_over for event in told(bench)] == [False]


def test_fragments_and_packets_that_are_too_large_for_the_link_are_found(bench):
    bench.firewall.apply_interface(LinkPresent(WAN, "wan", 1400))
    bench.receive(esp(PEER, HERE, SA.spi_in, 1, size=1600))  # put together again by the kernel
    whole = esp(PEER, HERE, SA.spi_in, 2)
    bench.receive(ipv4(PEER, HERE, 50, whole[20:], fragment=0x2000))
    assert troubles(bench) == [Trouble.FRAGMENTS] and bench.count("pkt_fragment") == 2


def test_fragments_in_transit_are_counted_too():
    bench = Bench()
    bench.firewall.apply_interface(LinkPresent(TO_LEFT, "left", 1500))
    bench.forward(ipv4(LEFT, RIGHT, 50, bytes(64), fragment=100))
    assert (bench.session.c2s.fragment_count, bench.count("pkt_fragment")) == (1, 1)


def test_staleness_is_told_once_and_so_is_its_end(bench):
    both_ways(bench, 1)
    bench.sas(SaSourceLost("it is gone"))
    bench.wait(2)
    assert troubles(bench) == [Trouble.STALE]
    bench.sas(SaSnapshot((SA,)))
    bench.wait(2)
    assert not troubles(bench)
    assert [(event.reason, event.is_over) for event in told(bench, TunnelsStale)][-2:] == [
        ("it is gone", False),
        ("it is gone", True),
    ]


def test_counters_of_warnings_and_drops_are_told_as_they_rise(bench):
    bench.wait(2)
    told(bench)
    bench.receive(b"\x45" + bytes(10))
    bench.wait(2)
    (event,) = told(bench, CounterRose)
    assert (event.name, event.amount, event.value) == ("flow_parse_truncated", 1, 1)


def test_troubles_end_with_their_tunnel(bench):
    bench.wait(SILENT_S + 2)
    told(bench)
    bench.sas(SaDeleted(SA))
    bench.wait(10)
    assert not bench.sessions
    bench.sas(SaEstablished(SA))
    bench.wait(2)
    assert not troubles(bench)


def test_a_session_in_transit_has_no_trouble_of_this_host():
    bench = Bench()
    bench.forward(ipv4(LEFT, RIGHT, 50, esp(LEFT, RIGHT, 7)[20:], options=bytes(4)))
    assert not bench.firewall.findings(bench.session, bench.now) and bench.count("tunnel_unknown_spi") == 0


def test_what_ended_is_watched_no_more(bench):
    both_ways(bench, 1)
    session = bench.session
    bench.wait(2)
    bench.sas(SaDeleted(SA))
    bench.wait(20)
    assert not bench.firewall.findings(session, bench.now) and not len(bench.firewall._health)
