"""Pairing of SPIs in transit, by when each was used: (SPI, first seen, last seen)."""

from types import SimpleNamespace

import pytest

from fwd.core.pairing import observe
from fwd.core.session import SpiUse


def told(one_way, other_way, now=1000.0):
    flow = SimpleNamespace()
    sides = [[SpiUse(spi, flow, first, last) for spi, first, last in uses] for uses in (one_way, other_way)]
    return {
        use.spi: (seen.relation.value, seen.before, seen.evidence.value, seen.partner)
        for use, seen in observe(*sides, now).items()
    }


def test_one_each_way_is_a_pair():
    assert told([(1, 0, 5)], [(2, 0.1, 5)]) == {
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
