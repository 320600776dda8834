"""Totals by zones and by tunnel. `Bench` checks after each packet that they are what sessions and counters say."""

from dataclasses import replace

import pytest

from fwd.core.constants import REPLAY_WINDOW, TOTALS_KEPT_S
from fwd.core.interfaces import LinkPresent
from fwd.core.policy import Zones
from fwd.core.sa import SaDeleted, SaEstablished, SaSnapshot
from fwd.core.totals import OTHERS, TunnelName
from tests.builders import HERE, LEFT, PEER, RIGHT, TO_LEFT, Bench, child_sa, esp, settings

SA = child_sa()
GW = TunnelName("gw", "net", "there")


@pytest.fixture(params=[False, True], ids=["daemon", "kernel"])
def bench(request):
    return Bench(fast_path=request.param)


def tunnel(number, **changes):
    return child_sa(0x1000 + number, 0x2000 + number, ike_name=f"gw{number}", reqid=number, uniqueid=number, **changes)


def of_tunnels(bench):
    bench.read_all()
    return {
        name.connection or "other": (totals.inbound.packets, totals.outbound.packets)
        for name, totals in bench.firewall.totals.by_tunnel.items()
    }


def test_by_the_zones_of_client_and_server_and_they_outlive_the_session(bench):
    for number in range(3):
        bench.forward(esp(LEFT, RIGHT, 7, number + 1, size=40))
    bench.forward(esp(RIGHT, LEFT, 8, 1, size=80), to_left=True)
    bench.clear(bench.session)
    bench.forward(esp(RIGHT, LEFT, 8, 2, size=40), to_left=True)
    bench.wait(301)
    assert {zones: (c.packets, c.octets) for zones, c in bench.firewall.totals.by_zones.items()} == {
        ("trust", "untrust", True): (3, 3 * 68),
        ("trust", "untrust", False): (1, 108),
        ("untrust", "trust", True): (1, 68),
    }


def test_what_was_counted_stays_in_the_zones_that_it_was_counted_in(bench):
    bench.forward(esp(LEFT, RIGHT, 7, 1))
    zones = Zones([("left", "guests"), ("right", "untrust")], "any")
    bench.firewall.reconfigure(replace(settings(), zones=zones))
    bench.firewall.apply_interface(LinkPresent(TO_LEFT, "left"))
    bench.wait(2)
    bench.forward(esp(LEFT, RIGHT, 7, 2))
    bench.read_all()
    assert {zones: c.packets for zones, c in bench.firewall.totals.by_zones.items()} == {
        ("trust", "untrust", True): 1,
        ("guests", "untrust", True): 1,
    }


def test_a_tunnels_totals_include_what_came_before_strongswan_told_of_it(bench):
    bench.receive(esp(PEER, HERE, SA.spi_in, 1))
    bench.sas(SaEstablished(SA))
    bench.receive(esp(PEER, HERE, SA.spi_in, 2))
    bench.send(esp(HERE, PEER, SA.spi_out, 1))
    assert of_tunnels(bench) == {"other": (0, 0), "gw": (2, 1)}


def test_a_rekey_and_a_return_with_another_reqid_go_on_in_the_same_totals(bench):
    bench.sas(SaEstablished(SA))
    bench.receive(esp(PEER, HERE, SA.spi_in, 1))
    bench.sas(SaDeleted(SA))
    bench.wait(20)
    again = child_sa(0x1002, 0x2002, reqid=9, uniqueid=2)
    bench.sas(SaEstablished(again))
    bench.receive(esp(PEER, HERE, again.spi_in, 1))
    assert of_tunnels(bench) == {"other": (0, 0), "gw": (2, 0)}


def test_tunnels_beyond_the_cap_are_others_and_stay_so_while_the_first_live():
    bench = Bench(tunnel_totals=2)
    bench.sas(SaSnapshot(tuple(tunnel(number) for number in range(4))))
    for _ in range(3):
        for number in range(4):
            bench.receive(esp(PEER, HERE, 0x1000 + number))
        bench.wait(TOTALS_KEPT_S / 2)
    assert of_tunnels(bench) == {"other": (6, 0), "gw0": (3, 0), "gw1": (3, 0)}


def test_a_place_is_free_again_an_hour_after_its_tunnel_went_if_another_wants_it():
    bench = Bench(tunnel_totals=2)
    bench.sas(SaSnapshot((tunnel(0), tunnel(1))))
    bench.receive(esp(PEER, HERE, 0x1000))
    bench.sas(SaSnapshot((tunnel(1),)))
    bench.wait(TOTALS_KEPT_S + 60)
    assert of_tunnels(bench) == {"other": (0, 0), "gw0": (1, 0), "gw1": (0, 0)}
    bench.sas(SaSnapshot((tunnel(1), tunnel(2))))
    bench.wait(2)
    assert of_tunnels(bench) == {"other": (0, 0), "gw1": (0, 0), "gw2": (0, 0)}


def test_no_place_at_all_is_a_cap_too():
    bench = Bench(tunnel_totals=0)
    bench.sas(SaEstablished(SA))
    bench.receive(esp(PEER, HERE, SA.spi_in, 1))
    assert of_tunnels(bench) == {"other": (1, 0)}


def test_a_reload_keeps_the_totals_and_may_raise_the_cap():
    bench = Bench(tunnel_totals=1)
    bench.sas(SaSnapshot((tunnel(0), tunnel(1))))
    for number in range(2):
        bench.receive(esp(PEER, HERE, 0x1000 + number))
    bench.firewall.reconfigure(settings(tunnel_totals=2))
    bench.receive(esp(PEER, HERE, 0x1001, 2))
    assert of_tunnels(bench) == {"other": (1, 0), "gw0": (1, 0), "gw1": (1, 0)}


def numbers(bench):
    way = bench.firewall.totals.by_tunnel[GW].inbound
    return way.lost, way.late, way.duplicates


def test_lost_late_and_duplicate_only_grow_and_are_not_told_twice():
    bench = Bench()
    bench.sas(SaEstablished(SA))
    seen = [(0, 0, 0)]
    window = range(30, 30 + 3 * REPLAY_WINDOW)
    for seq in (1, 2, 2, 5, 4, *window, *window[-3:], 1000, *range(1001, 1001 + 2 * REPLAY_WINDOW)):
        bench.receive(esp(PEER, HERE, SA.spi_in, seq))
        bench.wait(1)
        seen.append(numbers(bench))
        assert all(after >= before for before, after in zip(seen[-2], seen[-1], strict=True))
    (use,) = bench.session.inbound.uses
    assert numbers(bench) == (use.sequence.settled, use.sequence.late, use.sequence.duplicates)
    assert numbers(bench)[0] > 700 and numbers(bench)[1:] == (1, 4)
    bench.clear(bench.session)
    assert numbers(bench)[1:] == (1, 4)


def test_totals_begin_anew_with_a_restart_and_the_counters_go_on():
    bench = Bench(fast_path=True)
    bench.sas(SaEstablished(SA))
    for seq in (1, 3, 2, 2, 4):
        bench.receive(esp(PEER, HERE, SA.spi_in, seq))
    bench.wait(2)
    bench.restart()
    assert bench.count("pkt_session") == 5 and not bench.firewall.totals.by_zones
    bench.sas(SaSnapshot((SA,)))
    for seq in range(5, 9):
        bench.receive(esp(PEER, HERE, SA.spi_in, seq))
    bench.wait(2)
    assert of_tunnels(bench)["gw"] == (4, 0) and numbers(bench) == (0, 0, 0)
    assert OTHERS in bench.firewall.totals.by_tunnel
