"""ipsec-pass-through = "ike-gated": ESP in transit only after IKE between the same peers, and only for a while."""

import struct

import pytest

from fwd.core.session import Application
from fwd.core.settings import PassThrough
from fwd.core.state import EndReason, State
from tests.builders import HERE, LEFT, PEER, RIGHT, Bench, esp, udp

GATE_S = 100


@pytest.fixture(params=[False, True], ids=["daemon", "fast path"])
def bench(request):
    return Bench(fast_path=request.param, pass_through=PassThrough.IKE_GATED, ike_gate_s=GATE_S)


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
