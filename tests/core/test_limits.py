"""How many sessions anybody may open; `Bench.check` holds the counts against the table after each step."""

import random

import pytest

from fwd.core.explain import explain_packet
from fwd.core.limits import Bounds
from fwd.core.policy import Action, Rule
from fwd.core.sa import SaEstablished
from fwd.core.session import Application, SessionType
from fwd.core.settings import PassThrough, TransitPorts
from fwd.core.state import State
from tests.builders import (
    DENY_ALL,
    HERE,
    LEFT,
    PEER,
    RIGHT,
    Bench,
    child_sa,
    esp,
    esp_in_udp,
    ike,
    packed,
    settings,
    udp,
)

SA = child_sa()


def bench_of(*rules: Rule, **bounds: int) -> Bench:
    return Bench(*rules, limits=Bounds(**bounds), transit_ports=TransitPorts.SPI)


def ike_message(src: str, dst: str, exchange: int, flags: int, responder: int) -> bytes:
    header = (0x1111).to_bytes(8) + responder.to_bytes(8) + bytes([46, 0x20, exchange, flags]) + bytes(4)
    return udp(src, dst, 500, 500, header + (28).to_bytes(4))


def sentences(bench: Bench, src: str, dst: str, spi: int) -> list[str]:
    _, groups = explain_packet(bench.firewall, packed(src), packed(dst), spi, None, bench.now, lambda at: f"{at:.0f}")
    return next(group.sentences for group in groups if group.heading == "limits")


class TestSource:
    def test_one_source_has_no_more_than_its_share_and_others_theirs(self):
        bench = bench_of(source=3)
        assert [bench.forward(esp(LEFT, RIGHT, spi)) for spi in range(1, 6)] == [True] * 3 + [False] * 2
        assert bench.forward(esp("198.51.100.9", RIGHT, 1))
        assert bench.forward(esp(LEFT, RIGHT, 2, seq=2))  # what exists goes on
        assert bench.count("flow_limit_source") == 2 and len(bench.sessions) == 4

    def test_a_session_that_ends_makes_room(self):
        bench = bench_of(source=1)
        bench.forward(esp(LEFT, RIGHT, 1))
        bench.clear(bench.session)
        assert bench.forward(esp(LEFT, RIGHT, 2))

    def test_an_ipv6_source_is_a_whole_64(self):
        bench = bench_of(source=2)
        hosts = [f"2001:db8:1::{host}" for host in range(1, 5)]
        assert [bench.forward(esp(host, "2001:db8:2::1", 1)) for host in hosts] == [True, True, False, False]
        assert bench.forward(esp("2001:db8:1:1::1", "2001:db8:2::1", 1))

    def test_what_this_host_sends_is_under_no_limit(self):
        bench = bench_of(source=1, peers=1, half_open=1)
        assert all(bench.send(esp(HERE, PEER, spi)) for spi in range(1, 9))
        assert bench.firewall.limits.most() == (0, 0)

    def test_it_says_so(self):
        bench = bench_of(source=1)
        bench.forward(esp(LEFT, RIGHT, 1))
        (text,) = sentences(bench, LEFT, RIGHT, 2)
        assert text.startswith("Its source has 1 session, the limit is 1: it would be dropped ([limits] source,")
        (text,) = sentences(bench, RIGHT, LEFT, 2)
        assert text == "The table has 1 of 65536 sessions, 1 of them half-open."


class TestPeers:
    def test_two_peers_have_no_more_than_their_share_whoever_began(self):
        bench = bench_of(peers=2)
        assert bench.forward(esp(LEFT, RIGHT, 1)) and bench.forward(esp(RIGHT, LEFT, 2), to_left=True)
        assert not bench.forward(esp(LEFT, RIGHT, 3)) and not bench.forward(esp(RIGHT, LEFT, 4), to_left=True)
        assert bench.forward(esp(LEFT, "203.0.113.9", 1))
        assert bench.count("flow_limit_peers") == 2
        assert "[limits] peers" in sentences(bench, LEFT, RIGHT, 9)[0]

    def test_an_announced_tunnel_is_under_no_limit_even_if_strangers_used_it_up_in_its_name(self):
        bench = bench_of(source=2, peers=2)
        assert [bench.receive(esp(PEER, HERE, spi)) for spi in (1, 2, 3)] == [True, True, False]
        bench.sas(SaEstablished(SA))
        assert bench.receive(esp(PEER, HERE, SA.spi_in))
        assert bench.firewall.tunnel_of(SA).state is State.ACTIVE

    def test_an_spi_that_is_claimed_does_not_count_any_more(self):
        bench = bench_of(peers=1)
        bench.receive(esp(PEER, HERE, SA.spi_in))
        assert not bench.receive(esp(PEER, HERE, 77))
        bench.sas(SaEstablished(SA))
        assert bench.receive(esp(PEER, HERE, 77))

    def test_a_spray_of_spis_ends_in_one_session(self):
        bench = Bench(max_sessions=100, limits=Bounds(peers=20))
        bench.sas(SaEstablished(SA))
        for spi in range(5000, 5500):
            bench.receive(esp(PEER, HERE, spi))
        assert len(bench.sessions) == 21 and bench.count("flow_limit_peers") == 480
        bench.wait(6)
        assert len(bench.sessions) == 2
        assert bench.receive(esp(PEER, HERE, SA.spi_in))


class TestHalfOpen:
    def test_nobody_answers_a_forged_source(self):
        bench = Bench(limits=Bounds(half_open=3))
        passed = [bench.forward(esp(f"10.0.0.{host}", RIGHT, 1)) for host in range(5)]
        assert passed == [True] * 3 + [False] * 2
        assert bench.count("flow_limit_half_open") == 2
        assert "3 sessions are half-open, the limit is 3" in sentences(bench, LEFT, RIGHT, 1)[0]

    def test_an_answer_makes_room_and_is_never_pushed_out(self):
        bench = Bench(limits=Bounds(half_open=1), max_sessions=2)
        bench.forward(esp("10.0.0.1", RIGHT, 1))
        bench.forward(esp(RIGHT, "10.0.0.1", 2), to_left=True)
        answered = bench.session
        for host in range(2, 100):
            bench.now += 31
            bench.forward(esp(f"10.0.0.{host}", RIGHT, 1))
        assert answered in bench.sessions and len(bench.sessions) == 2
        assert bench.count("session_gave_way") == 97

    def test_the_oldest_silent_one_gives_way_and_one_that_speaks_does_not(self):
        bench = Bench(limits=Bounds(half_open=2))
        bench.forward(esp("10.0.0.1", RIGHT, 1))
        bench.forward(esp("10.0.0.2", RIGHT, 1))
        bench.now += 29
        bench.forward(esp("10.0.0.1", RIGHT, 1))
        assert not bench.forward(esp("10.0.0.3", RIGHT, 1))
        bench.now += 2
        assert bench.forward(esp("10.0.0.3", RIGHT, 1))
        assert [session.client.address for session in bench.sessions] == [packed("10.0.0.1"), packed("10.0.0.3")]
        assert bench.count("session_gave_way") == 1 and bench.count("session_aged_out") == 1

    def test_one_that_the_kernel_hears_does_not_give_way(self):
        bench = Bench(fast_path=True, limits=Bounds(half_open=1))
        for _ in range(70):
            bench.forward(esp("10.0.0.1", RIGHT, 1))
            bench.wait(1)
        assert not bench.forward(esp("10.0.0.2", RIGHT, 1))

    def test_peers_that_know_each_other_rekey_while_strangers_are_refused(self):
        bench = bench_of(half_open=2)
        bench.forward(esp(LEFT, RIGHT, 1))
        bench.forward(esp(RIGHT, LEFT, 2), to_left=True)
        for message in (0x08, 0x20):
            a, b = (LEFT, RIGHT) if message == 0x08 else (RIGHT, LEFT)
            bench.forward(ike_message(a, b, 35, message, 0x2222), to_left=message == 0x20)
        for host in range(20):
            bench.forward(esp(f"10.0.0.{host}", RIGHT, 1))
        assert bench.forward(esp(LEFT, RIGHT, 11)) and bench.forward(esp(RIGHT, LEFT, 12), to_left=True)
        assert bench.forward(ike(LEFT, RIGHT))

    def test_of_a_tunnel_that_ends_here_ike_goes_on_too(self):
        bench = Bench(limits=Bounds(half_open=1), max_sessions=3)
        bench.sas(SaEstablished(SA))
        for host in range(5):
            bench.receive(esp(f"10.0.0.{host}", HERE, 1 + host))
        assert bench.count("flow_limit_half_open") == 4 and bench.receive(ike(PEER, HERE))
        bench.forward(esp(LEFT, RIGHT, 1))
        assert bench.receive(ike(PEER, HERE, 4500))  # in the place of a stranger, for the table is full

    def test_a_flood_of_esp_leaves_room_for_ike(self):
        bench = Bench(limits=Bounds(half_open=2))
        for host in range(5):
            bench.forward(esp(f"10.0.0.{host}", RIGHT, 1))
        assert [bench.forward(ike(f"10.0.1.{host}", RIGHT)) for host in range(3)] == [True, False, False]

    def test_ike_that_only_begins_proves_nothing(self):
        bench = Bench(limits=Bounds(half_open=1))
        half_open = lambda: bench.firewall.limits.half_open_count  # noqa: E731
        bench.receive(ike_message(PEER, HERE, 34, 0x08, 0))
        bench.send(ike_message(HERE, PEER, 34, 0x20, 0x2222))  # a forged source's answer goes to somebody else
        bench.receive(ike_message(PEER, HERE, 37, 0x08, 0x3333))  # and cannot know the responder's SPI
        assert half_open() == 1
        bench.receive(ike_message(PEER, HERE, 35, 0x08, 0x2222))
        bench.send(ike_message(HERE, PEER, 35, 0x20, 0x2222))
        assert half_open() == 0

    def test_an_announced_tunnel_takes_a_strangers_place_at_once(self):
        bench = Bench(max_sessions=2)
        bench.forward(esp("10.0.0.1", RIGHT, 1))
        bench.forward(esp("10.0.0.2", RIGHT, 1))
        bench.sas(SaEstablished(SA))
        assert {session.type for session in bench.sessions} == {SessionType.PRED, SessionType.FLOW}
        assert bench.receive(esp(PEER, HERE, SA.spi_in))

    def test_what_a_rule_denied_gives_way_too(self):
        bench = Bench(DENY_ALL, limits=Bounds(half_open=1))
        bench.forward(esp("10.0.0.1", RIGHT, 1))
        bench.now += 31
        bench.forward(esp("10.0.0.2", RIGHT, 1))
        assert bench.session.client.address == packed("10.0.0.2")

    def test_a_pair_of_spis_that_is_proven_was_answered(self):
        bench = bench_of(half_open=5)
        for _ in range(120):
            bench.forward(esp(LEFT, RIGHT, 1))
            bench.forward(esp(RIGHT, LEFT, 2), to_left=True)
            bench.wait(0.1)
        assert len(bench.sessions) == 1 and bench.firewall.limits.half_open_count == 0

    def test_the_generic_session_of_two_peers_is_answered_by_this_host(self):
        bench = Bench(limits=Bounds(half_open=5))
        bench.receive(esp(PEER, HERE, 1))
        bench.send(esp(HERE, PEER, 2))
        assert bench.firewall.limits.half_open_count == 1
        bench.wait(6)
        assert bench.session.application is Application.IPSEC_ESP and bench.firewall.limits.half_open_count == 0


def test_new_limits_hold_at_once():
    bench = bench_of(source=1)
    bench.forward(esp(LEFT, RIGHT, 1))
    bench.firewall.reconfigure(settings(limits=Bounds(source=2), transit_ports=TransitPorts.SPI))
    assert bench.forward(esp(LEFT, RIGHT, 2)) and not bench.forward(esp(LEFT, RIGHT, 3))


def test_what_a_former_daemon_left_is_taken_over_whatever_the_limits_are():
    bench = Bench(fast_path=True)
    for host in range(5):
        bench.forward(esp(f"10.0.0.{host}", RIGHT, 1))
    bench.restart(limits=Bounds(source=1, peers=1, half_open=1))
    assert len(bench.sessions) == 5


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_all_is_counted(seed):
    """`Bench.check` is the test: the books balance and the limits' counts are the table's, after every step."""
    dice = random.Random(seed)
    denied = Rule("no-nat-t", Action.DENY, applications=frozenset({"ipsec-esp-udp"}))
    rules = [denied, *settings().policy.rules] if seed % 2 else []
    bench = Bench(
        *rules,
        fast_path=bool(seed % 2),
        max_sessions=12,
        limits=Bounds(source=4, peers=3, half_open=6),
        transit_ports=dice.choice(list(TransitPorts)),
        pass_through=dice.choice(list(PassThrough)),
    )
    hosts = [f"10.0.0.{host}" for host in range(6)]
    for _ in range(400):
        other, spi = dice.choice(hosts), dice.randrange(1, 9)
        match dice.randrange(8):
            case 0:
                bench.receive(esp(other, HERE, spi))
            case 1:
                bench.send(esp(HERE, other, spi))
            case 2:
                bench.forward(esp(other, dice.choice(hosts), spi))
            case 3:
                bench.forward(esp(dice.choice(hosts), other, spi), to_left=True)
            case 4:
                bench.forward(esp_in_udp(other, dice.choice(hosts), spi))
            case 5:
                bench.receive(ike(other, HERE))
            case 6:
                bench.sas(SaEstablished(child_sa(spi, 100 + spi, reqid=spi, remote=packed(other))))
            case _:
                bench.wait(dice.choice((0.1, 1, 6, 35)))
    for session in bench.sessions:
        bench.clear(session)
    assert bench.firewall.limits.half_open_count == sum(map(bench.firewall.limits.is_half_open, bench.sessions))
