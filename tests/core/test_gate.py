"""ipsec-pass-through = "ike-gated": ESP in transit only after IKE between the same peers, and only for a while."""

import struct

import pytest

from fwd.core.constants import GATE_SLICE
from fwd.core.firewall import Hook
from fwd.core.policy import Action, Rule
from fwd.core.session import Application
from fwd.core.settings import PassThrough, TransitPorts
from fwd.core.state import EndReason, State
from tests.builders import ALLOW_ALL, HERE, LEFT, PEER, RIGHT, TO_LEFT, TO_RIGHT, Bench, esp, packed, settings, udp

GATE_S = 100
GATED = {"pass_through": PassThrough.IKE_GATED, "ike_gate_s": GATE_S}


@pytest.fixture(params=[False, True], ids=["daemon", "fast path"])
def bench(request):
    return Bench(fast_path=request.param, **GATED)


def say(bench, message_id, *, is_answer, spi=7, port=500):
    """One message of a CREATE_CHILD_SA exchange between the two sites."""
    octets = struct.pack("!QQBBBBII", spi, 9, 33, 0x20, 36, 0x20 if is_answer else 0x08, message_id, 28)
    ends = (RIGHT, LEFT) if is_answer else (LEFT, RIGHT)
    assert bench.forward(udp(*ends, port, port, octets), to_left=is_answer)


def negotiate(bench, message_id=1):
    say(bench, message_id, is_answer=False)
    say(bench, message_id, is_answer=True)


def sessions(bench):
    return [session for session in bench.sessions if session.application is Application.IPSEC_ESP]


def test_nobody_passes_who_did_not_negotiate(bench):
    assert not bench.forward(esp(LEFT, RIGHT, 1))
    say(bench, 1, is_answer=False)  # a request alone proves nothing
    assert not bench.forward(esp(LEFT, RIGHT, 1, seq=2))
    (session,) = sessions(bench)
    assert (session.state, session.rule.name, session.c2s.packet_count) == (State.DISCARD, "ike-gate", 2)
    assert bench.count("flow_ike_gate_closed") == 1


def test_a_completed_exchange_opens_the_gate_at_once_even_for_one_that_was_denied(bench):
    assert not bench.forward(esp(LEFT, RIGHT, 1))
    (denied,) = sessions(bench)
    negotiate(bench)
    assert bench.forward(esp(LEFT, RIGHT, 1, seq=2)) and bench.forward(esp(RIGHT, LEFT, 2), to_left=True)
    assert denied.end_reason is EndReason.POLICY_DENY
    (session,) = sessions(bench)
    assert (session.state, session.rule.name, session.packet_count) == (State.ACTIVE, "any-any", 2)


def test_it_is_open_between_these_two_only(bench):
    negotiate(bench)
    assert not bench.forward(esp("10.0.0.1", RIGHT, 1)) and not bench.forward(esp(LEFT, "10.0.0.2", 1))


def test_it_closes_in_time_under_traffic(bench):
    negotiate(bench)
    for seq in range(1, 11):
        assert bench.forward(esp(LEFT, RIGHT, 1, seq=seq))
        bench.wait(GATE_S / 20)
    bench.wait(GATE_S / 2)
    assert not bench.forward(esp(LEFT, RIGHT, 1, seq=11))
    (session,) = sessions(bench)
    assert session.state is State.DISCARD and session.c2s.packet_count == 11
    negotiate(bench, 2)
    assert bench.forward(esp(LEFT, RIGHT, 3))


def test_a_rekey_keeps_it_open(bench):
    negotiate(bench)
    assert bench.forward(esp(LEFT, RIGHT, 1))
    bench.wait(GATE_S * 0.9)
    negotiate(bench, 2)
    bench.wait(GATE_S * 0.9)
    assert bench.forward(esp(LEFT, RIGHT, 1, seq=2)) and len(sessions(bench)) == 1


def test_tunnels_that_end_here_need_no_gate(bench):
    assert bench.receive(esp(PEER, HERE, 5)) and bench.send(esp(HERE, PEER, 6))


def test_it_forgets_everybody(bench):
    negotiate(bench)
    for number in range(20):
        bench.forward(esp(f"10.0.0.{number + 1}", RIGHT, 1))
    bench.forward(esp(LEFT, RIGHT, 1))
    assert len(bench.firewall.gate) == 21
    bench.wait(GATE_S + 61)
    assert not sessions(bench) and not len(bench.firewall.gate)
    assert bench.firewall.gate.next_deadline() is None


def message(ends, exchange, flags, message_id, *, version=0x20, payload=46, size=28):
    header = struct.pack("!QQBBBBII", 7, 9, payload, version, exchange, flags, message_id, size)
    return udp(*ends, 500, 500, header)


def is_open(bench):
    return bench.forward(esp(LEFT, RIGHT, 7))


def test_one_side_alone_does_not_open_it(bench):
    for size in (180, 170, 60):
        bench.forward(message((LEFT, RIGHT), 32, 1, 5, version=0x10, size=size))
    bench.forward(message((LEFT, RIGHT), 35, 0x08, 1))
    forged = message((RIGHT, LEFT), 35, 0x20, 1)
    bench._packet(forged, Hook.FORWARD, TO_LEFT, TO_LEFT)
    bench._packet(forged, Hook.FORWARD, TO_LEFT, TO_RIGHT)
    assert not is_open(bench)
    bench.forward(forged, to_left=True)
    assert is_open(bench)


def test_both_versions_open_it_in_fragments_too(bench):
    for _ in range(2):
        bench.forward(message((LEFT, RIGHT), 35, 0x08, 1, payload=53))
    for _ in range(2):
        bench.forward(message((RIGHT, LEFT), 35, 0x20, 1, payload=53), to_left=True)
    assert is_open(bench) and bench.count("ike_completed") == 1
    bench.wait(GATE_S + 61)
    assert not is_open(bench)
    for ends, size in (((LEFT, RIGHT), 180), ((RIGHT, LEFT), 170), ((LEFT, RIGHT), 60)):
        bench.forward(message(ends, 32, 1, 5, version=0x10, size=size), to_left=ends[0] == RIGHT)
    assert is_open(bench)


def test_a_rule_that_denies_is_the_one_that_is_shown(bench):
    bench = Bench(Rule("no-esp", Action.DENY, applications=frozenset({"ipsec-esp"})), ALLOW_ALL, **GATED)
    assert not is_open(bench)
    (session,) = sessions(bench)
    assert session.rule.name == "no-esp" and not bench.count("flow_ike_gate_closed") and not len(bench.firewall.gate)


def test_without_the_gate_nothing_closes_and_what_waited_passes(bench):
    negotiate(bench)
    assert is_open(bench) and not bench.forward(esp("10.0.0.1", RIGHT, 1))
    bench.firewall.reconfigure(settings())
    bench.wait(2)
    assert bench.forward(esp("10.0.0.1", RIGHT, 1))
    bench.wait(GATE_S + 1)
    assert is_open(bench) and not len(bench.firewall.gate)
    assert [session.state for session in sessions(bench)] == [State.ACTIVE, State.ACTIVE]


def test_what_exists_when_the_gate_comes_has_so_long_to_negotiate(bench):
    bench = Bench(fast_path=bench.firewall.fast_path.is_on)
    assert is_open(bench)
    bench.firewall.reconfigure(settings(**GATED))
    bench.wait(GATE_S - 1)
    assert is_open(bench) and not bench.forward(esp("10.0.0.1", RIGHT, 1))
    bench.wait(1)
    assert not is_open(bench)


class TestRestart:
    """What the gate knew has been saved."""

    @pytest.fixture
    def bench(self):
        return Bench(fast_path=True, **GATED)

    def test_a_gate_closes_when_it_would_have_closed(self, bench):
        negotiate(bench)
        for seq in range(1, 4):
            assert bench.forward(esp(LEFT, RIGHT, 7, seq=seq))
            bench.wait(GATE_S * 0.3)
            bench.restart(**GATED)
        bench.wait(GATE_S * 0.09)
        assert is_open(bench)
        bench.wait(GATE_S * 0.02)
        assert not is_open(bench)

    def test_a_tunnel_older_than_that_is_not_cut(self, bench):
        for number in range(1, 6):
            negotiate(bench, number)
            assert bench.forward(esp(LEFT, RIGHT, number)) and bench.forward(esp(RIGHT, LEFT, number), to_left=True)
            bench.wait(GATE_S * 0.9)
        assert bench.forward(esp(LEFT, RIGHT, 5, seq=2))
        bench.restart(**GATED)
        assert bench.forward(esp(LEFT, RIGHT, 5, seq=3))
        bench.wait(GATE_S * 0.2)
        assert not bench.forward(esp(LEFT, RIGHT, 5, seq=4))

    def test_what_had_no_gate_gets_one_once(self, bench):
        bench = Bench(fast_path=True)
        assert is_open(bench)
        for seq in range(2, 5):
            bench.restart(**GATED)
            assert bench.forward(esp(LEFT, RIGHT, 7, seq=seq))
            bench.wait(GATE_S * 0.3)
        bench.wait(GATE_S * 0.11)
        assert not is_open(bench)

    def test_a_denied_session_opens_nothing(self, bench):
        assert not is_open(bench)
        bench.restart(**GATED)
        assert not is_open(bench)


def test_who_keeps_no_records_remembers_no_changes():
    bench = Bench(**GATED)
    bench.firewall.changes.is_on = False
    bench.check = lambda: None
    bench.succession.take_changes(bench.now)
    negotiate(bench)
    assert is_open(bench)
    assert not bench.firewall.changes and not bench.firewall.changes.take_gates()


class TestBoundedWork:
    """However many sessions a gate has, one turn follows it with GATE_SLICE of them."""

    COUNT = 3 * GATE_SLICE

    def fill(self, bench):
        for port in range(self.COUNT):
            octets = udp(LEFT, RIGHT, 10000 + port, 4500, struct.pack("!II", 7, 1) + bytes(40))
            bench.firewall.receive_packet(octets, Hook.FORWARD, TO_LEFT, TO_RIGHT, bench.now)
            bench.offered += 1
        bench.serve_kernel()

    def esp(self, port, spi=7):
        return udp(LEFT, RIGHT, 10000 + port, 4500, struct.pack("!II", spi, 1) + bytes(40))

    def states(self, bench):
        found = [session.state for session in bench.firewall.table if session.application is not Application.IKE]
        return found.count(State.ACTIVE), found.count(State.DISCARD)

    def test_opening(self, bench):
        self.fill(bench)
        negotiate(bench)
        assert self.states(bench) == (0, self.COUNT - GATE_SLICE)
        last = self.COUNT - 1
        assert bench.forward(self.esp(last, spi=8))  # its turn has not come, but it came to the daemon
        bench.firewall.handle_timer(bench.now)
        assert self.states(bench) == (1, self.COUNT - 2 * GATE_SLICE - 1)
        bench.wait(0)
        assert self.states(bench) == (1, 0) and bench.forward(self.esp(0))

    def test_closing(self, bench):
        negotiate(bench)
        self.fill(bench)
        bench.now += GATE_S
        assert not bench.forward(self.esp(self.COUNT - 1, spi=8))
        assert self.states(bench) == (self.COUNT - 1, 1)
        bench.firewall.handle_timer(bench.now)
        assert self.states(bench) == (self.COUNT - 1 - GATE_SLICE, 1 + GATE_SLICE)
        bench.wait(0)
        assert self.states(bench) == (0, self.COUNT)
        assert not bench.forward(self.esp(0))

    def test_many_gates(self, bench):
        gate = bench.firewall.gate
        ends = [number.to_bytes(4) for number in range(1, self.COUNT + 1)]
        for end in ends:
            gate.open(end, packed(RIGHT), bench.now + 1)
        bench.now += 1
        gate.due(bench.now)
        assert len(gate) == self.COUNT - GATE_SLICE and gate.next_deadline() <= bench.now

    def test_a_later_gate_that_closes_earlier(self, bench):
        gate = bench.firewall.gate
        gate.open(packed(LEFT), packed(RIGHT), bench.now + 100)
        gate.open(packed(LEFT), packed(PEER), bench.now + 10)
        gate.due(bench.now + 10)
        assert len(gate) == 1

    def test_one_that_is_opened_again_before_its_turn(self, bench):
        negotiate(bench)
        assert bench.forward(esp(LEFT, RIGHT, 7))
        bench.now += GATE_S
        assert not bench.forward(esp(LEFT, RIGHT, 8))
        negotiate(bench, 2)
        bench.wait(0)
        assert bench.forward(esp(LEFT, RIGHT, 8, seq=2))


def test_a_session_that_became_part_of_another_one_leaves_its_gate():
    bench = Bench(transit_ports=TransitPorts.SPI, **GATED)
    negotiate(bench)
    for seq in range(1, 16):
        bench.forward(esp(LEFT, RIGHT, 7, seq=seq))
        bench.forward(esp(RIGHT, LEFT, 8, seq=seq), to_left=True)
        bench.wait(1)
    (session,) = sessions(bench)
    bench.wait(GATE_S)
    assert session.state is State.DISCARD and bench.count("session_discard") == 1
