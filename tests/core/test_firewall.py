"""The dataplane by its effects: packets, SA events and time go in; sessions, verdicts and counters are looked at.

`Bench` checks after every step that all packets are counted exactly once.
"""

import struct
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fwd.core.constants import GENERATIONS_KEPT, GENERIC_ESP_PORT, SA_LINGER_S, UNKNOWN_SPI_KEYS
from fwd.core.events import SessionCreated, SessionDiscarded, SessionEnded, SessionPromoted, SessionRekeyed
from fwd.core.interfaces import LinkPresent
from fwd.core.policy import Action, Prefix, Rule
from fwd.core.sa import SaDeleted, SaEnd, SaEstablished, SaRekeyed, SaSnapshot, SaSourceLost
from fwd.core.session import Application, SessionType
from fwd.core.settings import UnknownSpi
from fwd.core.state import EndReason, State
from tests.builders import (
    ALLOW_ALL,
    DENY_ALL,
    HERE,
    HERE6,
    LEFT,
    PEER,
    PEER6,
    RIGHT,
    TO_LEFT,
    Bench,
    child_sa,
    esp,
    esp_in_udp,
    ike,
    ipv4,
    packed,
    settings,
    udp,
)

SA = child_sa()
NEXT_SA = child_sa(0x1002, 0x2002, uniqueid=2)


@pytest.fixture
def bench():
    return Bench()


def counts(flow):
    return flow.packet_count, flow.byte_count


class TestTransit:
    def test_one_session_for_both_directions_with_generic_ports(self, bench):
        assert bench.forward(esp(LEFT, RIGHT, 0xAAAA, size=100))
        assert bench.forward(esp(RIGHT, LEFT, 0xBBBB, size=50), to_left=True)
        session = bench.session
        assert (session.application, session.state, session.type) == ("ipsec-esp", State.ACTIVE, SessionType.FLOW)
        assert (session.client.port, session.server.port) == (GENERIC_ESP_PORT, GENERIC_ESP_PORT)
        assert (session.client.zone, session.server.zone) == ("trust", "untrust")
        assert (session.ingress, session.egress) == ("left", "right")
        assert counts(session.c2s) == (1, 128) and counts(session.s2c) == (1, 78)
        assert (list(session.c2s.spis), list(session.s2c.spis)) == ([0xAAAA], [0xBBBB])
        assert not session.is_terminated

    def test_a_later_fragment_belongs_to_the_session_of_its_peers(self, bench):
        bench.forward(esp(LEFT, RIGHT, 0xAAAA))
        bench.forward(ipv4(LEFT, RIGHT, 50, bytes(64), fragment=9))
        assert bench.session.c2s.packet_count == 2

    def test_esp_in_udp_and_ike_of_one_flow_are_two_sessions(self, bench):
        bench.forward(ike(LEFT, RIGHT, 4500))
        bench.forward(esp_in_udp(LEFT, RIGHT, 5))
        bench.forward(esp_in_udp(RIGHT, LEFT, 6), to_left=True)
        bench.forward(udp(LEFT, RIGHT, 4500, 4500, b"\xff"))
        first, second = bench.sessions
        assert (first.application, first.client.port, first.server.port, first.packet_count) == ("ike", 4500, 4500, 2)
        assert (second.application, second.packet_count) == ("ipsec-esp-udp", 2)
        assert second.application.protocol == 17

    def test_other_zones_are_another_session(self, bench):
        bench.forward(esp(LEFT, RIGHT, 1))
        bench.forward(esp(LEFT, RIGHT, 1), to_left=True)
        assert len(bench.sessions) == 2

    def test_it_ends_after_its_timeout_and_packets_prolong_it(self, bench):
        bench.forward(esp(LEFT, RIGHT, 1))
        bench.wait(3599)
        bench.forward(esp(LEFT, RIGHT, 1))
        session = bench.session
        bench.wait(3599)
        assert bench.session is session
        bench.wait(1)
        assert not bench.sessions
        assert (session.state, session.end_reason) == (State.INIT, EndReason.AGED_OUT)
        assert bench.firewall.table.find(session.id) is session
        bench.wait(301)
        assert bench.firewall.table.find(session.id) is None


class TestTerminated:
    def test_the_session_is_there_before_the_first_packet(self, bench):
        bench.sas(SaEstablished(SA))
        session = bench.session
        assert (session.application, session.state, session.type) == ("ipsec-udp", State.OPENING, SessionType.PRED)
        assert (session.client.address, session.server.address) == (packed(PEER), packed(HERE))
        assert (session.client.zone, session.server.zone, session.ingress) == ("untrust", "untrust", "wan")
        assert session.is_terminated

    @pytest.mark.parametrize("is_initiator", [True, False])
    def test_each_side_shows_the_spi_that_it_receives_on(self, bench, is_initiator):
        bench.sas(SaEstablished(child_sa(is_initiator=is_initiator)))
        session = bench.session
        client = (HERE, 0x1001) if is_initiator else (PEER, 0x2001)
        server = (PEER, 0x2001) if is_initiator else (HERE, 0x1001)
        assert (session.client.address, session.client.port) == (packed(client[0]), client[1])
        assert (session.server.address, session.server.port) == (packed(server[0]), server[1])

    def test_the_first_packet_makes_it_a_flow(self, bench):
        bench.sas(SaEstablished(SA))
        assert bench.receive(esp(PEER, HERE, SA.spi_in, size=100))
        session = bench.session
        assert (session.state, session.type) == (State.ACTIVE, SessionType.FLOW)
        assert bench.send(esp(HERE, PEER, SA.spi_out, size=20))
        assert counts(session.c2s) == (1, 128) and counts(session.s2c) == (1, 48)
        assert bench.count("session_promoted") == 1

    def test_nat_t_has_the_spis_as_ports_and_the_udp_ports_beside(self, bench):
        sa = child_sa(encap=True, local_port=4500, remote_port=61000)
        bench.sas(SaEstablished(sa))
        bench.receive(esp_in_udp(PEER, HERE, sa.spi_in, 61000, 4500))
        session = bench.session
        assert (session.application, session.application.protocol) == ("ipsec-udp", 50)
        assert (session.client.port, session.udp_ports) == (sa.spi_out, (61000, 4500))
        assert session.packet_count == 1
        bench.receive(esp(PEER, HERE, sa.spi_in))  # without UDP it is not this SA's
        assert len(bench.sessions) == 2

    def test_it_waits_for_its_first_packet_as_long_as_its_sa_lives(self, bench):
        bench.sas(SaEstablished(SA))
        bench.wait(10_000)
        assert bench.session.type is SessionType.PRED
        bench.sas(SaDeleted(SA))
        assert (bench.session.state, bench.session.end_reason) == (State.CLOSING, EndReason.TUNNEL_DOWN)
        bench.wait(SA_LINGER_S)
        assert not bench.sessions
        (ended,) = bench.firewall.table.ended
        assert ended.end_reason is EndReason.TUNNEL_DOWN

    def test_an_idle_tunnel_ages_out_and_waits_for_its_next_packet(self, bench):
        bench.sas(SaEstablished(SA))
        bench.receive(esp(PEER, HERE, SA.spi_in))
        first = bench.session
        bench.wait(3601)
        assert first.end_reason is EndReason.AGED_OUT
        assert bench.session.type is SessionType.PRED and bench.session.id > first.id

    def test_a_tunnel_that_goes_down_ends_after_a_linger(self, bench):
        bench.sas(SaEstablished(SA))
        bench.receive(esp(PEER, HERE, SA.spi_in))
        bench.sas(SaDeleted(SA))
        session = bench.session
        assert (session.state, session.end_reason) == (State.CLOSING, EndReason.TUNNEL_DOWN)
        bench.receive(esp(PEER, HERE, SA.spi_in))  # sent before
        assert session.packet_count == 2
        bench.wait(SA_LINGER_S)
        assert not bench.sessions and session.state is State.INIT
        assert (bench.count("session_tunnel_down"), bench.count("session_aged_out")) == (1, 0)

    def test_a_tunnel_that_comes_up_again_at_once_goes_on_in_its_session(self, bench):
        bench.sas(SaEstablished(SA))
        bench.receive(esp(PEER, HERE, SA.spi_in))
        bench.sas(SaDeleted(SA))
        assert (bench.session.state, bench.session.end_reason) == (State.CLOSING, EndReason.TUNNEL_DOWN)
        bench.wait(1)
        bench.sas(SaEstablished(NEXT_SA))  # as when a peer authenticates anew (RFC 7296 section 2.8.3)
        bench.receive(esp(PEER, HERE, NEXT_SA.spi_in))
        session = bench.session
        assert (session.state, session.end_reason, session.packet_count) == (State.ACTIVE, EndReason.UNKNOWN, 2)
        assert [g.end for g in session.generations] == [SaEnd.DELETED, None]
        bench.wait(2 * SA_LINGER_S)
        assert bench.session is session and not bench.count("session_ended")

    def test_one_that_comes_up_again_later_has_a_new_session(self, bench):
        bench.sas(SaEstablished(SA))
        bench.receive(esp(PEER, HERE, SA.spi_in))
        old = bench.session
        bench.sas(SaDeleted(SA))
        bench.wait(SA_LINGER_S)
        bench.sas(SaEstablished(NEXT_SA))
        bench.receive(esp(PEER, HERE, NEXT_SA.spi_in))
        assert bench.session is not old and (old.packet_count, bench.session.packet_count) == (1, 1)

    def test_clearing_leaves_a_tunnel_that_waits(self, bench):
        bench.sas(SaEstablished(SA))
        bench.receive(esp(PEER, HERE, SA.spi_in))
        cleared = bench.session
        bench.clear(cleared)
        assert (cleared.end_reason, bench.session.type) == (EndReason.CLEARED, SessionType.PRED)
        bench.receive(esp(PEER, HERE, SA.spi_in))
        assert (cleared.packet_count, bench.session.packet_count) == (1, 1)

    def test_ipv6(self, bench):
        sa = child_sa(local=packed(HERE6), remote=packed(PEER6))
        bench.sas(SaEstablished(sa))
        bench.receive(esp(PEER6, HERE6, sa.spi_in))
        bench.send(esp(HERE6, PEER6, sa.spi_out))
        assert bench.session.packet_count == 2

    def test_its_ike_session_does_not_depend_on_the_interface(self, bench):
        bench.receive(ike(PEER, HERE))
        bench.firewall.receive_packet(ike(HERE, PEER), 3, 0, TO_LEFT, bench.now)
        assert counts(bench.session.s2c)[0] == 1


class TestRekey:
    def test_the_session_goes_on_with_the_new_spis_once_they_carry_traffic(self, bench):
        bench.sas(SaEstablished(SA))
        bench.receive(esp(PEER, HERE, SA.spi_in))
        session = bench.session
        bench.sas(SaRekeyed(SA, NEXT_SA))
        assert session.server.port == SA.spi_in
        bench.receive(esp(PEER, HERE, NEXT_SA.spi_in))
        bench.receive(esp(PEER, HERE, SA.spi_in))
        assert (session.client.port, session.server.port) == (NEXT_SA.spi_out, NEXT_SA.spi_in)
        assert bench.session is session and session.packet_count == 3 and session.rekeys == 1

    def test_packets_on_the_old_spi_count_until_the_linger_is_over(self, bench):
        bench.sas(SaEstablished(SA))
        bench.receive(esp(PEER, HERE, SA.spi_in))
        bench.sas(SaRekeyed(SA, NEXT_SA))
        bench.sas(SaSnapshot((NEXT_SA,)))
        bench.receive(esp(PEER, HERE, SA.spi_in))
        session = bench.session
        assert session.packet_count == 2 and session.server.port == NEXT_SA.spi_in
        bench.wait(SA_LINGER_S)
        bench.receive(esp(PEER, HERE, SA.spi_in))
        assert session.packet_count == 2 and len(bench.sessions) == 2

    def test_packets_that_are_faster_than_the_news_join_the_tunnel(self, bench):
        bench.sas(SaEstablished(SA))
        bench.receive(esp(PEER, HERE, SA.spi_in))
        bench.receive(esp(PEER, HERE, NEXT_SA.spi_in))
        bench.send(esp(HERE, PEER, NEXT_SA.spi_out))
        assert len(bench.sessions) == 3
        bench.sas(SaRekeyed(SA, NEXT_SA))
        session = bench.session
        assert counts(session.c2s)[0] == 2 and counts(session.s2c)[0] == 1
        assert session.server.port == NEXT_SA.spi_in

    def test_a_rekeyed_sa_does_not_keep_its_tunnel_up(self, bench):
        bench.sas(SaEstablished(SA))
        bench.receive(esp(PEER, HERE, SA.spi_in))
        bench.sas(SaRekeyed(SA, NEXT_SA))
        bench.sas(SaDeleted(NEXT_SA))  # charon never says that SA is gone
        assert bench.session.state is State.CLOSING

    def test_a_redundant_delete_changes_nothing(self, bench):
        bench.sas(SaEstablished(SA))
        bench.sas(SaRekeyed(SA, NEXT_SA))
        bench.sas(SaDeleted(SA))
        bench.sas(SaDeleted(SA))
        bench.sas(SaDeleted(child_sa(9, 9)))
        assert bench.session.sas == (NEXT_SA,)

    def test_each_generation_tells_its_own_story(self, bench):
        bench.sas(SaEstablished(SA))
        bench.receive(esp(PEER, HERE, SA.spi_in))
        bench.wait(10)
        bench.sas(SaRekeyed(SA, NEXT_SA))
        bench.wait(1)
        bench.receive(esp(PEER, HERE, NEXT_SA.spi_in))
        bench.receive(esp(PEER, HERE, SA.spi_in, seq=2))  # make before break: both run side by side
        bench.wait(1)
        bench.sas(SaDeleted(SA))
        old, new = bench.session.generations
        assert (old.sa, old.end, old.removed_at - old.installed_at) == (SA, SaEnd.REKEYED, 12)
        assert (new.sa, new.end, new.installed_at - old.installed_at) == (NEXT_SA, None, 10)
        uses = bench.session.inbound.uses
        assert [(use.spi, use.packet_count, use.byte_count) for use in uses] == [
            (SA.spi_in, 2, 136),
            (NEXT_SA.spi_in, 1, 68),
        ]
        assert [use.last_seen_at - old.installed_at for use in uses] == [11, 11]
        assert (bench.session.client.port, bench.session.server.port) == (NEXT_SA.spi_out, NEXT_SA.spi_in)

    def test_of_very_many_generations_the_oldest_are_forgotten(self, bench):
        sas = [child_sa(spi, 10_000 + spi) for spi in range(1000, 1000 + GENERATIONS_KEPT + 5)]
        bench.sas(SaEstablished(sas[0]))
        for old, new in pairwise(sas):
            bench.sas(SaRekeyed(old, new))
            bench.sas(SaDeleted(old))
        assert [g.sa for g in bench.session.generations] == sas[5:] and bench.session.rekeys == len(sas) - 1

    def test_a_peer_that_moves_keeps_its_session(self, bench):
        bench.sas(SaEstablished(SA))
        bench.receive(esp(PEER, HERE, SA.spi_in))
        session = bench.session
        moved = replace(SA, remote=packed(LEFT))
        bench.receive(esp(LEFT, HERE, SA.spi_in, seq=2))  # in is looked up by this host's address
        bench.send(esp(HERE, LEFT, SA.spi_out))  # and this one is nobody's yet
        assert len(bench.sessions) == 2
        bench.sas(SaSnapshot((moved,)))
        assert bench.session is session and session.packet_count == 3
        assert (session.inbound.packet_count, session.generations[0].moves) == (2, 1)
        bench.send(esp(HERE, PEER, SA.spi_out, seq=2))  # sent before charon told
        bench.receive(esp(LEFT, HERE, SA.spi_in, seq=3))
        assert bench.session.packet_count == 5 and bench.count("sa_moved") == 1
        bench.wait(2 * SA_LINGER_S)
        bench.send(esp(HERE, PEER, SA.spi_out, seq=3))
        assert len(bench.sessions) == 2 and session.packet_count == 5

    def test_an_ike_rekey_changes_nothing(self, bench):
        bench.sas(SaEstablished(SA))
        bench.receive(esp(PEER, HERE, SA.spi_in))
        session, client = bench.session, bench.session.client.address
        bench.sas(SaSnapshot((replace(SA, is_initiator=True),)))  # the other side initiated the new IKE_SA
        bench.receive(esp(PEER, HERE, SA.spi_in, seq=2))
        assert bench.session is session and session.packet_count == 2 and session.client.address == client
        assert len(session.generations) == 1 and not session.generations[0].moves

    def test_of_two_that_came_up_at_once_the_one_that_goes_was_not_rekeyed(self, bench):
        bench.sas(SaSnapshot((SA,)))
        bench.wait(10)
        other = child_sa(0x1003, 0x2003)
        bench.sas(SaRekeyed(SA, NEXT_SA))
        bench.sas(SaEstablished(other))
        bench.wait(6)
        bench.sas(SaSnapshot((NEXT_SA,)))
        assert [g.end for g in bench.session.generations] == [SaEnd.REKEYED, None, SaEnd.VANISHED]
        assert bench.session.rekeys == 1

    def test_a_rekey_that_no_event_told_of_shows_when_the_old_sa_has_gone(self, bench):
        bench.sas(SaSnapshot((SA,)))
        bench.wait(10)
        bench.sas(SaSnapshot((SA, NEXT_SA)))
        bench.wait(10)
        bench.sas(SaSnapshot((NEXT_SA,)))
        assert [g.end for g in bench.session.generations] == [SaEnd.REKEYED, None] and bench.session.rekeys == 1

    def test_what_a_snapshot_with_a_gap_lacks_is_gone_only_if_its_ike_sa_was_told_of(self, bench):
        other = child_sa(0x1003, 0x2003, ike_name="other", child_name="other", reqid=2)
        beside = child_sa(0x1004, 0x2004, ike_name="other", child_name="beside", reqid=3)
        bench.sas(SaSnapshot((SA, other, beside)))
        bench.sas(SaRekeyed(SA, NEXT_SA))
        bench.wait(6)
        bench.sas(SaSnapshot((beside,), is_whole=False))
        assert {known.sa for known in bench.firewall.directory} == {NEXT_SA, beside}
        bench.sas(SaSnapshot((beside,)))
        assert {known.sa for known in bench.firewall.directory} == {beside}

    def test_news_that_come_twice_or_late_change_nothing(self, bench):
        bench.sas(SaSnapshot((SA, NEXT_SA)))
        bench.sas(SaEstablished(SA))
        bench.sas(SaRekeyed(SA, NEXT_SA))
        assert bench.session.sas == (SA, NEXT_SA) and bench.session.rekeys == 1


class TestUnknownSpi:
    def test_it_is_shown_with_generic_ports_and_becomes_its_tunnel(self, bench):
        bench.receive(esp(PEER, HERE, SA.spi_in, size=10))
        bench.now += 1
        bench.send(esp(HERE, PEER, SA.spi_out, size=20))
        first, second = bench.sessions
        assert (first.application, first.server.port, second.server.port) == ("ipsec-esp", 20033, 20033)
        bench.sas(SaEstablished(SA))
        session = bench.session
        assert (session.id, session.created_at) == (first.id, 1000.0)
        assert (session.application, session.state, session.type) == ("ipsec-udp", State.ACTIVE, SessionType.FLOW)
        assert counts(session.c2s) == (1, 38) and counts(session.s2c) == (1, 48)
        assert session.server.port == SA.spi_in

    def test_the_initiator_is_the_client_whoever_sent_first(self, bench):
        bench.receive(esp(PEER, HERE, SA.spi_in))
        bench.sas(SaEstablished(child_sa(is_initiator=True)))
        assert bench.session.client.address == packed(HERE)
        assert (bench.session.c2s.packet_count, bench.session.s2c.packet_count) == (0, 1)

    def test_after_the_grace_time_one_generic_session_has_both_directions(self, bench):
        bench.receive(esp(PEER, HERE, 5))
        bench.send(esp(HERE, PEER, 6))
        bench.receive(esp(PEER, HERE, 7))
        bench.wait(5)
        session = bench.session
        assert (session.application, session.state) == ("ipsec-esp", State.ACTIVE)
        assert counts(session.c2s)[0] == 2 and counts(session.s2c)[0] == 1
        bench.receive(esp(PEER, HERE, 5))
        bench.send(esp(HERE, PEER, 6))
        assert bench.session.packet_count == 5
        bench.wait(3600)
        assert not bench.sessions

    def test_packets_within_the_grace_time_prolong_the_generic_session(self, bench):
        bench.receive(esp(PEER, HERE, 5))
        bench.wait(3500)
        bench.receive(esp(PEER, HERE, 6))
        bench.wait(3595)
        assert bench.session.packet_count == 2
        bench.wait(10)
        assert not bench.sessions

    def test_news_after_the_grace_time_begin_a_session_of_their_own(self, bench):
        bench.receive(esp(PEER, HERE, SA.spi_in))
        bench.wait(5)
        bench.sas(SaEstablished(SA))
        bench.receive(esp(PEER, HERE, SA.spi_in))
        generic, tunnel = bench.sessions
        assert (generic.packet_count, tunnel.packet_count, tunnel.state) == (1, 1, State.ACTIVE)

    def test_discard_drops_after_the_grace_time(self):
        bench = Bench(unknown_spi=UnknownSpi.DISCARD)
        assert bench.receive(esp(PEER, HERE, 5))
        bench.wait(5)
        assert not bench.receive(esp(PEER, HERE, 5))
        session = bench.session
        assert (session.state, session.end_reason) == (State.DISCARD, EndReason.POLICY_DENY)
        bench.sas(SaEstablished(child_sa(spi_in=5)))
        assert bench.receive(esp(PEER, HERE, 5))

    def test_the_grace_time_is_not_prolonged_by_packets(self):
        bench = Bench(unknown_spi=UnknownSpi.DISCARD)
        assert bench.receive(esp(PEER, HERE, 5))
        bench.wait(3)
        assert bench.receive(esp(PEER, HERE, 5))
        bench.wait(2)
        assert not bench.receive(esp(PEER, HERE, 5))

    def test_keys_of_unknown_spis_do_not_pile_up(self, bench):
        for _ in range(3):
            for spi in range(1, 60):
                bench.receive(esp(PEER, HERE, spi))
            bench.wait(5)
        assert len(bench.session.keys) <= UNKNOWN_SPI_KEYS + 2
        assert bench.session.packet_count == 3 * 59

    def test_a_rule_for_tunnels_lets_packets_pass_that_are_faster_than_the_news(self):
        bench = Bench(Rule("tunnels", Action.ALLOW, applications=frozenset({"ipsec-udp"})))
        assert bench.receive(esp(PEER, HERE, SA.spi_in))
        bench.sas(SaEstablished(SA))
        assert bench.session.rule.name == "tunnels" and bench.session.state is State.ACTIVE
        assert bench.receive(esp(PEER, HERE, 99))
        bench.wait(5)
        assert not bench.receive(esp(PEER, HERE, 99))

    def test_a_fragment_to_this_host_is_counted_with_its_peers(self, bench):
        assert bench.receive(ipv4(PEER, HERE, 50, bytes(64), fragment=9))
        assert bench.session.server.port == GENERIC_ESP_PORT


class TestPolicy:
    def test_a_denied_session_discards_until_its_own_timeout(self):
        bench = Bench(DENY_ALL)
        assert not bench.forward(esp(LEFT, RIGHT, 1))
        session = bench.session
        assert (session.state, session.timeout_s, session.rule.name) == (State.DISCARD, 60, "nothing")
        bench.wait(59)
        assert not bench.forward(esp(LEFT, RIGHT, 1))
        assert session.packet_count == 2
        bench.wait(1)
        assert not bench.sessions and session.end_reason is EndReason.POLICY_DENY

    def test_the_first_rule_that_matches_wins_and_the_default_stands_last(self):
        left = Rule("left", Action.ALLOW, sources=(Prefix(packed("198.51.100.0"), 24),))
        bench = Bench(left, Rule("trust", Action.DENY, from_zones=frozenset({"trust"})))
        assert bench.forward(esp(LEFT, RIGHT, 1))
        assert not bench.forward(esp("198.51.101.2", RIGHT, 1))
        assert not bench.forward(esp("203.0.113.9", LEFT, 1), to_left=True)
        assert [session.rule.name for session in bench.sessions] == ["left", "trust", "default"]

    def test_the_s2c_flow_follows_its_sessions_rule(self):
        bench = Bench(Rule("out", Action.ALLOW, from_zones=frozenset({"trust"})))
        assert bench.forward(esp(LEFT, RIGHT, 1))
        assert bench.forward(esp(RIGHT, LEFT, 1), to_left=True)

    def test_a_denied_tunnel_is_announced_and_discards_its_packets(self):
        bench = Bench(DENY_ALL)
        bench.sas(SaEstablished(SA))
        assert bench.session.type is SessionType.PRED
        assert not bench.receive(esp(PEER, HERE, SA.spi_in))
        assert bench.session.state is State.DISCARD
        bench.sas(SaDeleted(SA))
        bench.wait(60)
        assert not bench.sessions

    def test_new_settings_hold_for_new_sessions(self, bench):
        bench.forward(esp(LEFT, RIGHT, 1))
        bench.firewall.reconfigure(settings(DENY_ALL))
        assert bench.forward(esp(LEFT, RIGHT, 1))
        bench.clear(bench.session)
        assert not bench.forward(esp(LEFT, RIGHT, 1))

    def test_a_renamed_interface_changes_its_zone(self, bench):
        bench.firewall.apply_interface(LinkPresent(TO_LEFT, "right"))
        bench.forward(esp(LEFT, RIGHT, 1))
        assert bench.session.client.zone == "untrust" and bench.session.ingress == "right"


class TestBounds:
    def test_a_full_table_refuses_new_sessions_and_keeps_the_old(self):
        bench = Bench(max_sessions=2)
        assert bench.forward(esp("10.0.0.1", RIGHT, 1)) and bench.forward(esp("10.0.0.2", RIGHT, 1))
        assert not bench.forward(esp("10.0.0.3", RIGHT, 1))
        assert bench.forward(esp("10.0.0.1", RIGHT, 1))
        assert bench.count("flow_table_full") == 1

    def test_a_tunnel_without_a_place_gets_one_later(self):
        bench = Bench(max_sessions=1)
        bench.forward(esp(LEFT, RIGHT, 1))
        bench.forward(esp(RIGHT, LEFT, 2), to_left=True)
        bench.sas(SaEstablished(SA))
        assert not bench.receive(esp(PEER, HERE, SA.spi_in))
        bench.clear(bench.session)
        assert bench.receive(esp(PEER, HERE, SA.spi_in))
        assert bench.session.application is Application.IPSEC_UDP

    def test_a_snapshot_gives_a_tunnel_its_missing_session(self):
        bench = Bench(max_sessions=1)
        bench.forward(esp(LEFT, RIGHT, 1))
        bench.forward(esp(RIGHT, LEFT, 2), to_left=True)
        bench.sas(SaEstablished(SA))
        bench.clear(bench.session)
        bench.sas(SaSnapshot((SA,)))
        assert bench.session.type is SessionType.PRED

    def test_ageing_is_accelerated_from_the_threshold_on(self):
        bench = Bench(max_sessions=10)
        for host in range(8):
            bench.forward(esp(f"10.0.0.{host}", RIGHT, 1))
        bench.wait(1802)
        assert not bench.sessions
        assert bench.firewall.ager.factor == 1

    def test_an_spi_that_another_tunnel_has_is_a_conflict_that_hurts_nobody(self, bench):
        bench.sas(SaEstablished(SA))
        bench.sas(SaEstablished(child_sa(spi_out=0x9999, reqid=2)))
        assert bench.session.sas == (SA,) and bench.count("sa_spi_conflict") == 1
        assert bench.receive(esp(PEER, HERE, SA.spi_in))

    def test_a_tunnel_whose_peer_moves_to_where_another_has_its_spi_ends_and_comes_back_with_another(self, bench):
        other = child_sa(0x1002, SA.spi_out, reqid=2, uniqueid=2, remote=packed("192.0.2.9"))
        bench.sas(SaSnapshot((SA, other)))
        bench.sas(SaSnapshot((SA, replace(other, remote=SA.remote))))
        assert bench.session.sas == (SA,) and list(bench.firewall.tunnels) == [bench.session]
        (ended,) = bench.firewall.table.ended
        assert ended.end_reason is EndReason.TUNNEL_DOWN and ended.sa.tunnel == other.tunnel
        renewed = child_sa(0x1003, 0x2003, reqid=2, uniqueid=3)
        bench.sas(SaSnapshot((SA, renewed)))
        assert [session.sas for session in bench.sessions] == [(SA,), (renewed,)]
        assert bench.receive(esp(PEER, HERE, renewed.spi_in)) and bench.sessions[1].packet_count == 1
        bench.clear(*bench.sessions)  # both are up: each gets another session
        bench.wait(bench.firewall.settings.keep_ended_s + 2)
        assert [session.sas for session in bench.firewall.table.tunnels_after(0)] == [(SA,), (renewed,)]

    def test_an_sa_that_comes_back_when_another_tunnel_has_its_spi_leaves_its_tunnel_as_it_was(self, bench):
        bench.sas(SaEstablished(SA))
        bench.sas(SaDeleted(SA))
        thief = child_sa(SA.spi_in, 0x9999, reqid=2)
        bench.sas(SaEstablished(thief))
        bench.sas(SaEstablished(SA))
        gone, there = bench.sessions
        assert (len(gone.generations), gone.sas, there.sas) == (1, (), (thief,))
        bench.wait(SA_LINGER_S + 1)
        assert list(bench.firewall.tunnels) == [bench.session] and bench.session is there


class TestStaleness:
    def test_the_last_known_sas_stay_in_use_and_show_their_age(self, bench):
        bench.sas(SaSnapshot((SA,)))
        directory = bench.firewall.directory
        assert directory.stale_s(SA, bench.now) is None
        bench.now += 7
        bench.sas(SaSourceLost("gone"))
        assert (directory.is_fresh, directory.lost_reason, directory.stale_s(SA, bench.now)) == (False, "gone", 7)
        assert bench.receive(esp(PEER, HERE, SA.spi_in))
        assert bench.session.type is SessionType.FLOW
        bench.sas(SaSnapshot(()))
        assert directory.is_fresh and bench.session.state is State.CLOSING


def test_events_tell_what_happened(bench):
    bench.sas(SaEstablished(SA))
    bench.receive(esp(PEER, HERE, SA.spi_in))
    bench.sas(SaRekeyed(SA, NEXT_SA))
    bench.firewall.reconfigure(settings(DENY_ALL))
    bench.forward(esp(LEFT, RIGHT, 1))
    bench.clear(bench.sessions[-1])
    kinds = []
    while (event := bench.firewall.next_event()) is not None:
        kinds.append(type(event))
    assert kinds == [SessionCreated, SessionPromoted, SessionRekeyed, SessionCreated, SessionDiscarded, SessionEnded]


def test_what_cannot_be_decoded_is_dropped_and_counted_by_reason(bench):
    assert not bench.receive(b"")
    assert not bench.receive(esp(PEER, HERE, 0))
    assert (bench.count("flow_parse_truncated"), bench.count("flow_parse_esp")) == (1, 1)
    assert not bench.sessions


SPIS = st.integers(1, 6)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["receive", "send", "forward"]), SPIS),
        st.tuples(st.sampled_from(["up", "down", "rekey"]), SPIS),
        st.tuples(st.just("wait"), st.sampled_from([0.1, 1, 5, 61, 3605])),
        st.tuples(st.sampled_from(["clear", "lost", "snapshot", "garbage", "deny", "allow"]), SPIS),
    ),
    max_size=60,
)


def drive(bench, steps, **changes):
    """Let things happen in this order. Bench.check after every step: all packets are accounted for."""
    up = {}

    def sa(number):
        return child_sa(number, number + 10, uniqueid=number, reqid=number % 2)

    for what, value in steps:
        if what == "receive":
            yield bench.receive(esp(PEER, HERE, value))
        elif what == "send":
            yield bench.send(esp(HERE, PEER, value + 10))
        elif what == "forward":
            yield bench.forward(esp(f"10.0.0.{value}", RIGHT, value))
        elif what == "up":
            up[value] = sa(value)
            bench.sas(SaEstablished(up[value]))
        elif what == "down":
            up.pop(value, None)
            bench.sas(SaDeleted(sa(value)))
        elif what == "rekey":
            new = sa(value)
            up[value] = new
            bench.sas(SaRekeyed(sa((value + 1) % 6 + 1), new))
        elif what == "wait":
            bench.wait(value)
        elif what == "clear" and bench.sessions:
            bench.clear(bench.sessions[value % len(bench.sessions)])
        elif what == "lost":
            bench.sas(SaSourceLost("away"))
        elif what == "snapshot":
            bench.sas(SaSnapshot(tuple(up.values())))
        elif what == "garbage":
            bench.receive(struct.pack("!B", value) * 30)
        elif what in ("deny", "allow"):
            rule = DENY_ALL if what == "deny" else ALLOW_ALL
            bench.firewall.reconfigure(settings(rule, **changes))
        bench.check()
        for session in bench.sessions:
            assert session.type is SessionType.FLOW or (
                session.state in (State.OPENING, State.CLOSING) and not session.packet_count
            )
            assert session.state is not State.OPENING or session.type is SessionType.PRED
            assert all(bench.firewall.table.lookup(key).session is session for key in session.keys)


def shown(bench):
    """What a user sees of every session that can be read, and of the counters."""
    bench.read_all()
    sessions = {
        s.id: (s.application, s.state, s.end_reason, s.client.port, s.server.port, counts(s.c2s), counts(s.s2c))
        for s in (*bench.firewall.table, *bench.firewall.table.ended)
    }
    offloaded = ("pkt_fast_path", "fast_path_full")
    return sessions, {k: v for k, v in bench.firewall.counters.values.items() if k not in offloaded}


@example([("receive", 1), ("up", 3), ("down", 3), ("up", 1)], UnknownSpi.GENERIC, 4)  # back, and used before it is told
@given(STEPS, st.sampled_from(UnknownSpi), st.integers(4, 5))
@pytest.mark.timeout(180)
@hypothesis_settings(max_examples=150, deadline=None)
def test_any_order_of_things_looks_the_same_with_and_without_the_fast_path(steps, unknown_spi, max_sessions):
    changes = {"unknown_spi": unknown_spi, "max_sessions": max_sessions}
    slow, fast = Bench(**changes), Bench(fast_path=True, **changes)
    verdicts = [list(drive(bench, steps, **changes)) for bench in (slow, fast)]
    assert verdicts[0] == verdicts[1] and shown(slow) == shown(fast)
