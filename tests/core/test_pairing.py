"""Pairing of SPIs in transit, by when each was used: (SPI, first seen, last seen)."""

from types import SimpleNamespace

import pytest

from fwd.core.constants import PAIR_PROOF_S, PAIRINGS_PER_TURN
from fwd.core.pairing import observe
from fwd.core.session import SpiUse
from fwd.core.settings import TransitPorts
from tests.builders import DENY_ALL, LEFT, RIGHT, Bench, esp


def told(one_way, other_way, now=1000.0):
    flow = SimpleNamespace()
    sides = [[SpiUse(spi, flow, first, last) for spi, first, last in uses] for uses in (one_way, other_way)]
    return {
        use.spi: (seen.relation.value, seen.before, seen.evidence.value, seen.partner)
        for use, seen in observe(*sides, now).items()
    }


def test_one_each_way_is_a_pair():
    assert {story[2] for story in told([(1, 0, 5)], [(2, 0.1, 5)]).values()} == {"ambiguous"}  # too little was seen
    assert told([(1, 0, 15)], [(2, 0.1, 15)]) == {
        1: ("first", None, "observed-unique", 2),
        2: ("first", None, "observed-unique", 1),
    }


def test_one_way_only():
    assert told([(1, 0, 5)], []) == {1: ("first", None, "one-way", None)}


def test_a_rekey_is_a_new_pair_of_the_same_tunnel():
    seen = told([(1, 0, 100), (3, 100, 200)], [(2, 0.1, 101), (4, 99, 200)])
    assert seen[1][2:] == ("observed-unique", 2) and seen[3] == ("takes-over", 1, "observed-unique", 4)
    assert seen[4] == ("takes-over", 2, "observed-unique", 3)


def test_it_is_too_early_to_tell_while_both_are_in_use():
    assert told([(1, 0, 102), (3, 100, 102)], [(2, 0, 102)], now=102)[3][:2] == ("undecided", 1)
    assert told([(1, 0, 102), (3, 100, 112)], [(2, 0, 112)], now=112)[3][:2] == ("takes-over", 1)
    assert told([(1, 0, 112), (3, 100, 112)], [(2, 0, 112)], now=112)[3][:2] == ("beside", 1)


def test_two_tunnels_that_began_together_are_never_paired_by_chance():
    for seconds in range(1, 40):
        both_ways = [(1, 0, seconds), (3, 0.2, seconds)], [(2, 0.1, seconds), (4, 0.3, seconds)]
        assert {story[2] for story in told(*both_ways, now=seconds).values()} == {"ambiguous"}, seconds


def test_a_rekey_that_is_just_going_on_leaves_the_old_pair_proven_and_the_new_one_open():
    seen = told([(1, 0, 101), (3, 100, 103)], [(2, 0.1, 101), (4, 100, 103)], now=103)
    assert [seen[spi][2:] for spi in (1, 3)] == [("observed-unique", 2), ("ambiguous", None)]


def test_one_that_was_silent_for_long_may_be_another_tunnels():
    assert told([(1, 0, 100), (3, 500, 600)], [(2, 0, 100)])[3][:2] == ("follows", 1)


def test_two_tunnels_that_were_always_there_are_ambiguous():
    seen = told([(1, 0, 100), (3, 1, 100)], [(2, 0.1, 100), (4, 1.1, 100)])
    assert {spi: story[2:] for spi, story in seen.items()} == dict.fromkeys((1, 2, 3, 4), ("ambiguous", None))


def test_a_second_tunnel_that_came_later_does_not_hide_the_first():
    seen = told([(1, 0, 200), (3, 100, 200)], [(2, 0.1, 200), (4, 100.1, 200)])
    assert seen[1][2:] == ("observed-unique", 2) and seen[3] == ("beside", 1, "observed-unique", 4)


@pytest.mark.parametrize("turned", [False, True])
def test_a_third_spi_one_way_makes_both_that_could_be_its_tunnel_ambiguous(turned):
    sides = [(1, 0, 100), (3, 0.2, 100)], [(2, 0.1, 100)]
    seen = told(*(reversed(sides) if turned else sides))
    assert {story[2] for story in seen.values()} == {"ambiguous"}


# --- transit-ports = "spi": sessions of one SPI become one when their pair is proven -------------------------------


@pytest.fixture(params=[False, True], ids=["daemon", "fast path"])
def bench(request):
    return Bench(fast_path=request.param, transit_ports=TransitPorts.SPI)


def flow(bench, seconds, there=(), back=(), seq=1):
    """A packet a second of each of these SPIs."""
    for number in range(seconds):
        for spi in there:
            assert bench.forward(esp(LEFT, RIGHT, spi, seq + number))
        for spi in back:
            assert bench.forward(esp(RIGHT, LEFT, spi, seq + number), to_left=True)
        bench.wait(1)


def ports(bench):
    return [(s.client.port, s.server.port, s.c2s.packet_count, s.s2c.packet_count) for s in bench.sessions]


def test_each_spi_has_a_session_until_its_partner_is_proven(bench):
    flow(bench, 3, [5], [6])
    assert ports(bench) == [(5, 5, 3, 0), (6, 6, 3, 0)]
    first = bench.sessions[0]
    flow(bench, int(PAIR_PROOF_S) + 2, [5], [6], seq=4)
    assert bench.session is first and not bench.firewall.spi_sessions.waiting_count
    count = 3 + int(PAIR_PROOF_S) + 2
    assert ports(bench) == [(6, 5, count, count)]  # each side's port is the SPI that it receives on
    flow(bench, 2, [5], [6], seq=100)
    assert ports(bench) == [(6, 5, count + 2, count + 2)]


def test_what_is_ambiguous_stays_apart(bench):
    flow(bench, 3 * int(PAIR_PROOF_S), [5, 7], [6, 8])
    assert len(bench.sessions) == 4 and bench.firewall.spi_sessions.waiting_count == 4


def test_one_way_stays_alone(bench):
    flow(bench, 3 * int(PAIR_PROOF_S), [5])
    assert ports(bench) == [(5, 5, 3 * int(PAIR_PROOF_S), 0)]


def test_sessions_that_ended_wait_no_more():
    bench = Bench(DENY_ALL, transit_ports=TransitPorts.SPI)
    for number in range(2 * PAIRINGS_PER_TURN):
        bench.forward(esp(f"10.0.0.{number + 1}", RIGHT, 5))
        bench.forward(esp(LEFT, RIGHT, number + 1))
    assert bench.firewall.spi_sessions.waiting_count == 4 * PAIRINGS_PER_TURN
    bench.wait(70)
    assert not bench.sessions and not bench.firewall.spi_sessions.waiting_count
    assert bench.firewall.spi_sessions.next_deadline() is None


def test_what_an_address_sends_to_itself_has_no_partner(bench):
    for _ in range(3):
        bench.forward(esp(LEFT, LEFT, 7))
        bench.wait(PAIR_PROOF_S)
    assert (bench.session.c2s.port, bench.session.c2s.packet_count) == (7, 3)
