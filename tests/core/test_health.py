"""Control against data: each trouble of a tunnel is found, counted once, told once, and over when it is over."""

from dataclasses import replace

import pytest

from fwd.core.constants import ONE_WAY_S
from fwd.core.events import CounterRose, TunnelsStale, TunnelTrouble
from fwd.core.health import Trouble
from fwd.core.interfaces import LinkPresent
from fwd.core.sa import SaDeleted, SaEstablished, SaRekeyed, SaSnapshot, SaSourceLost
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
    bench.receive(esp(PEER, HERE, SA.spi_in, 3))
    bench.wait(60)  # the SPI lingers no more
    bench.receive(esp(PEER, HERE, SA.spi_in, 4))
    bench.receive(esp(PEER, HERE, 0x7777, 1))
    assert (bench.count("pkt_deleted_sa"), bench.count("pkt_unknown_spi")) == (2, 1)
    assert bench.firewall.tunnel_of(NEXT_SA).generations[0].after_end_count == 2
    assert Trouble.AFTER_DELETE in troubles(bench)


def test_strongswans_counts_and_ours_are_compared_from_the_first_reading_on(bench):
    for seq in range(1, 31):
        both_ways(bench, seq)
    bench.sas(SaSnapshot((replace(SA, packets_in=30, packets_out=30),)))
    comparison = bench.firewall.tunnel_of(SA).generations[0].comparison
    assert (comparison.drift, comparison.is_off) == ((0, 0), False)
    for seq in range(31, 131):
        both_ways(bench, seq)
    for _ in range(2):  # once may be packets under way
        assert Trouble.MISCOUNT not in troubles(bench)
        bench.sas(SaSnapshot((replace(SA, packets_in=50, packets_out=130),)))
    assert bench.firewall.tunnel_of(SA).generations[0].comparison.drift == (80, 0)
    assert Trouble.MISCOUNT in troubles(bench)


def test_what_strongswan_counted_before_fwd_began_is_no_difference(bench):
    old = child_sa(0x1003, 0x2003, reqid=3, remote=bytes(4), age_s=500, packets_in=900, packets_out=700)
    bench.sas(SaSnapshot((SA, old)))
    assert bench.firewall.tunnel_of(old).generations[0].comparison.drift == (0, 0)


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
