"""What outlives the daemon: a successor knows every session, counts every packet once, and applies its own rules."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fwd.core import records
from fwd.core.constants import SA_LINGER_S
from fwd.core.firewall import Firewall
from fwd.core.policy import Action, Prefix, Rule
from fwd.core.sa import SaDeleted, SaEnd, SaEstablished, SaRekeyed, SaSnapshot
from fwd.core.session import Application, SessionType
from fwd.core.settings import PassThrough, TransitPorts, UnknownSpi
from fwd.core.state import EndReason, State
from fwd.core.succession import Succession
from tests.builders import (
    ALLOW_ALL,
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
    ipv4,
    packed,
    settings,
)

SA = child_sa()
NEXT_SA = child_sa(0x1002, 0x2002, uniqueid=2)


@pytest.fixture(params=[True, False], ids=["kernel", "daemon"])
def bench(request):
    return Bench(fast_path=request.param)


def restart(bench, *rules, **changes):
    bench.restart(*rules, fast_path=bench.firewall.fast_path.is_on, **changes)


def handled(bench):
    """Packets that a daemon itself had in its hands."""
    return bench.count("pkt_recv") - bench.count("pkt_fast_path")


def sequence_of(use):
    return use.sequence and (use.sequence.lost, use.sequence.duplicates, use.sequence.late)


def seen(session):
    """All of a session that an operator sees."""
    return (
        session.id,
        session.application,
        session.state,
        session.type,
        session.end_reason,
        session.rule.name,
        session.timeout_s,
        session.created_at,
        session.is_terminated,
        session.is_client_here,
        session.is_provisional,
        session.ingress,
        session.egress,
        session.udp_ports,
        session.rekeys,
        [(g.sa, g.installed_at, g.removed_at, g.end, g.moves, g.after_end_count) for g in session.generations],
        [
            (flow.address, flow.zone, flow.port, flow.packet_count, flow.byte_count, flow.fragment_count)
            for flow in (session.c2s, session.s2c)
        ],
        [
            (use.spi, use.first_seen_at, use.packet_count, use.byte_count, sequence_of(use))
            for flow in (session.c2s, session.s2c)
            for use in flow.uses
        ],
    )


def everything(bench):
    bench.read_all()
    firewall = bench.firewall
    sessions = sorted((*firewall.table, *firewall.table.ended), key=lambda session: session.id)
    lives = {session.id: firewall.ager.time_to_live_s(session, bench.now) for session in firewall.table}
    counters = {name: value for name, value in firewall.counters.values.items() if name != "fast_path_lost"}
    return [seen(session) for session in sessions], {key: round(life, 3) for key, life in lives.items()}, counters


def a_bit_of_everything(bench):
    bench.forward(ike(LEFT, RIGHT))
    for seq in (1, 2, 5, 4, 4):
        bench.forward(esp(LEFT, RIGHT, 7, seq))
        bench.forward(esp(RIGHT, LEFT, 8, seq), to_left=True)
    bench.forward(esp_in_udp(LEFT, RIGHT, 9, sport=1025))
    bench.forward(ipv4(LEFT, RIGHT, 50, bytes(40), fragment=0x2004))
    bench.sas(SaEstablished(SA))
    bench.send(esp(HERE, PEER, SA.spi_out))
    bench.receive(esp(PEER, HERE, SA.spi_in))
    bench.sas(SaRekeyed(SA, NEXT_SA))
    bench.receive(esp(PEER, HERE, NEXT_SA.spi_in))
    bench.sas(SaEstablished(child_sa(0x1003, 0x2003, uniqueid=3, reqid=3)))
    other = child_sa(0x1004, 0x2004, uniqueid=4, reqid=4)
    bench.sas(SaEstablished(other))
    bench.receive(esp(PEER, HERE, other.spi_in))
    bench.sas(SaDeleted(other))
    bench.receive(esp(PEER, HERE, 99))
    bench.wait(1)
    bench.forward(esp("10.0.0.9", RIGHT, 7))
    bench.clear(bench.sessions[-1])


def test_everything_is_as_it_was(bench):
    a_bit_of_everything(bench)
    bench.wait(2.5)
    before = everything(bench)
    for _ in range(3):
        restart(bench)
        assert everything(bench) == before
    assert bench.count("pkt_unseen") == 0
    bench.wait(SA_LINGER_S + 1)
    bench.sas(SaSnapshot((NEXT_SA,)))
    tunnel = next(session for session in bench.sessions if len(session.generations) == 2)
    assert [(g.sa.spi_in, g.end) for g in tunnel.generations] == [(SA.spi_in, SaEnd.REKEYED), (NEXT_SA.spi_in, None)]
    assert tunnel.rekeys == 1


@pytest.mark.parametrize("transit_ports", TransitPorts)
def test_transit_sessions_go_on(bench, transit_ports):
    bench = Bench(fast_path=bench.firewall.fast_path.is_on, transit_ports=transit_ports)
    for seq in range(1, 200):
        bench.forward(esp(LEFT, RIGHT, 7, seq))
        bench.forward(esp(RIGHT, LEFT, 8, seq), to_left=True)
        if seq % 50 == 0:
            bench.wait(6)
            restart(bench, transit_ports=transit_ports)
    bench.forward(esp(RIGHT, LEFT, 8, 200), to_left=True)
    session = bench.session
    ports = (session.client.port, session.server.port)
    assert ports == ((20033, 20033) if transit_ports is TransitPorts.GENERIC else (8, 7))
    assert (session.c2s.packet_count, session.s2c.packet_count) == (199, 200)
    assert (session.c2s.spis, session.s2c.spis) == ((7,), (8,))
    assert sequence_of(session.c2s.uses[0]) in (None, (0, 0, 0))
    if bench.firewall.fast_path.is_on:
        assert handled(bench) == 2


def test_what_went_by_meanwhile_is_told(bench):
    for seq in range(1, 11):
        bench.forward(esp(LEFT, RIGHT, 7, seq))
    bench.save()
    saved = dict(bench.saved)
    for seq in range(11, 15):  # the daemon's last words, which were not saved
        bench.forward(esp(LEFT, RIGHT, 8, seq))
        bench.forward(esp("10.0.0.9", RIGHT, 9, seq))
    for _spi in range(100, 103):  # and what nobody handled: the kernel let it pass
        bench.offered += 1
        bench.kernel.undecided += 1
    restart(bench, saved=saved)
    is_on = bench.firewall.fast_path.is_on
    (session,) = bench.sessions
    # An element tells of the packets of an SPI that no record names, but not of a session that no record names.
    assert session.packet_count == (13 if is_on else 10)  # the first of them was the daemon's
    assert bench.count("pkt_unseen") == 3 + (5 if is_on else 8)
    assert len(bench.kernel.elements) == (2 if is_on else 0)
    restart(bench)
    assert bench.count("pkt_unseen") == 3 + (5 if is_on else 8)


@pytest.mark.parametrize("passed_by_the_kernel", [0, 5])
def test_killed_right_after_a_decision_went_to_the_kernel(passed_by_the_kernel):
    bench = Bench(fast_path=True)
    bench.is_drained = False
    for seq in range(1, 4):
        bench.forward(esp(LEFT, RIGHT, 7, seq))
    bench.firewall.credit_all()
    bench.save()
    saved = dict(bench.saved)
    bench.is_drained = True
    bench.serve_kernel()
    for seq in range(4, 4 + passed_by_the_kernel):
        bench.forward(esp(LEFT, RIGHT, 7, seq))
    bench.restart(saved=saved)
    assert bench.session.packet_count == bench.count("pkt_recv") == 3 + passed_by_the_kernel
    assert bench.count("pkt_unseen") == bench.count("fast_path_lost") == 0


def test_an_element_that_is_gone_has_left_what_was_read(bench):
    bench = Bench(fast_path=True)
    for seq in range(1, 11):
        bench.forward(esp(LEFT, RIGHT, 7, seq))
    assert bench.session.packet_count == 10
    bench.succession.take_changes(bench.now, [bench.session])
    bench.firewall._note(bench.session)
    bench.save()
    bench.kernel.elements.clear()
    bench.restart()
    assert bench.session.packet_count == 10 and bench.count("fast_path_lost") == 1


@pytest.mark.parametrize("is_done", [True, False])
def test_killed_while_elements_are_removed_and_made_again(is_done):
    """What the kernel was to do was saved before; whether it has done it, it says itself."""
    bench = Bench(fast_path=True)
    for seq in range(1, 101):
        bench.forward(esp(LEFT, RIGHT, 7, seq))
    session = bench.session
    bench.firewall.fast_path.withdraw(session.elements)
    bench.save()
    saved = dict(bench.saved)
    if is_done:
        bench.kernel.elements.clear()
    bench.restart(saved=saved)
    assert bench.session.packet_count == 100
    bench.forward(esp(LEFT, RIGHT, 7, 101))
    assert bench.session.packet_count == 101


@pytest.mark.parametrize("is_initiator", [True, False])
def test_a_tunnel_is_known_at_once_and_the_ike_daemon_is_asked_again(bench, is_initiator):
    sa = child_sa(is_initiator=is_initiator)
    new = child_sa(0x1002, 0x2002, uniqueid=2, is_initiator=is_initiator)
    bench.sas(SaEstablished(sa))
    bench.send(esp(HERE, PEER, sa.spi_out))
    bench.sas(SaRekeyed(sa, new))
    for _ in range(2):
        bench.receive(esp(PEER, HERE, new.spi_in))
        bench.send(esp(HERE, PEER, new.spi_out))
    restart(bench, unknown_spi=UnknownSpi.DISCARD)
    assert bench.session.application is Application.IPSEC_UDP and bench.session.state is State.ACTIVE
    assert not bench.firewall.directory.is_fresh and bench.count("tunnel_stale") == 0
    bench.wait(60)  # charon is away: what flowed goes on flowing
    assert bench.send(esp(HERE, PEER, new.spi_out)) and bench.receive(esp(PEER, HERE, sa.spi_in))
    bench.sas(SaSnapshot((new,)))
    session = bench.session
    assert (session.id, session.rekeys, session.state) == (1, 1, State.ACTIVE)
    assert session.client.address == packed(HERE if is_initiator else PEER)
    sent, received = (session.c2s, session.s2c) if is_initiator else (session.s2c, session.c2s)
    assert (sent.packet_count, received.packet_count) == (4, 3)
    assert {session.client.port, session.server.port} == {new.spi_in, new.spi_out}
    assert [generation.end for generation in session.generations] == [SaEnd.REKEYED, None]


def test_a_tunnel_that_went_down_meanwhile_ends_as_one_does(bench):
    bench.sas(SaEstablished(SA))
    bench.receive(esp(PEER, HERE, SA.spi_in))
    restart(bench)
    bench.sas(SaSnapshot(()))
    assert bench.session.state is State.CLOSING
    restart(bench)
    assert bench.session.state is State.CLOSING
    bench.receive(esp(PEER, HERE, SA.spi_in))
    bench.wait(SA_LINGER_S + 1)
    (ended,) = bench.firewall.table.ended
    assert (ended.id, ended.packet_count, ended.end_reason) == (1, 2, EndReason.TUNNEL_DOWN)


def test_a_tunnel_that_waited_for_its_first_packet_still_does(bench):
    bench.sas(SaEstablished(SA))
    restart(bench)
    assert (bench.session.type, bench.session.state) == (SessionType.PRED, State.OPENING)
    bench.receive(esp(PEER, HERE, SA.spi_in))
    assert (bench.session.type, bench.session.state, bench.session.id) == (SessionType.FLOW, State.ACTIVE, 1)


def test_an_spi_that_nobody_knew_is_claimed_by_its_tunnel(bench):
    bench.receive(esp(PEER, HERE, SA.spi_in))
    restart(bench)
    assert bench.session.is_provisional
    bench.sas(SaSnapshot((SA,)))
    assert (bench.session.id, bench.session.application) == (1, Application.IPSEC_UDP)
    assert bench.session.packet_count == 1


@pytest.mark.parametrize("unknown_spi", UnknownSpi)
def test_an_spi_that_nobody_claims_is_treated_as_configured(bench, unknown_spi):
    bench.receive(esp(PEER, HERE, SA.spi_in))
    restart(bench, unknown_spi=unknown_spi)
    bench.sas(SaSnapshot(()))
    bench.wait(6)
    is_generic = unknown_spi is UnknownSpi.GENERIC
    assert bench.receive(esp(PEER, HERE, SA.spi_in)) == is_generic
    restart(bench, unknown_spi=unknown_spi)
    assert bench.session.state is (State.ACTIVE if is_generic else State.DISCARD)
    assert bench.receive(esp(PEER, HERE, SA.spi_in)) == is_generic
    assert bench.session.packet_count == 3 and list(bench.firewall.strangers) == [bench.session]


def test_time_goes_on_while_no_daemon_runs(bench):
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.forward(ike(LEFT, RIGHT))
    bench.firewall.credit_all()
    bench.save()
    bench.now += 31
    restart(bench)
    bench.wait(1)
    (session,) = bench.sessions
    assert session.application is Application.IPSEC_ESP
    assert bench.firewall.ager.time_to_live_s(session, bench.now) == pytest.approx(3600 - 32)
    assert next(bench.firewall.table.ended).end_reason is EndReason.AGED_OUT


def test_ended_sessions_stay_readable_and_their_ids_are_not_given_again(bench):
    for number in range(3):
        bench.forward(esp(f"10.0.0.{number}", RIGHT, 7))
    bench.clear(*bench.sessions)
    restart(bench)
    assert [session.id for session in bench.firewall.table.ended] == [1, 2, 3] and not bench.sessions
    bench.forward(esp(LEFT, RIGHT, 7))
    assert bench.session.id == 4
    bench.wait(310)
    restart(bench)
    assert not list(bench.firewall.table.ended) and bench.firewall.table.allocate_id() == 5


def test_a_smaller_table_pushes_nobody_out(bench):
    for number in range(5):
        bench.forward(esp(f"10.0.0.{number}", RIGHT, 7))
    restart(bench, max_sessions=3)
    assert len(bench.sessions) == 5
    assert not bench.forward(esp(LEFT, RIGHT, 7)) and bench.count("flow_table_full") == 1
    assert bench.forward(esp("10.0.0.1", RIGHT, 7))


def test_packets_of_what_nobody_knows_are_unseen_until_it_is_taken_out():
    bench = Bench(fast_path=True)
    bench.save()
    saved = dict(bench.saved)
    for sequence in range(1, 4):
        bench.forward(esp(LEFT, RIGHT, 1, sequence))
    bench.late_packets = 2
    bench.restart(saved=saved)
    assert bench.count("pkt_unseen") == 5 and not bench.kernel.elements


def test_without_records_the_kernel_is_rid_of_what_nobody_knows():
    bench = Bench(fast_path=True)
    for seq in range(1, 5):
        bench.forward(esp(LEFT, RIGHT, 7, seq))
    bench.offered = bench.kernel.undecided = 0
    bench.restart(saved={})
    assert not bench.kernel.elements and not bench.sessions
    bench.forward(esp(LEFT, RIGHT, 7, 5))
    assert bench.session.packet_count == 1 and bench.count("pkt_unseen") == 0


# --- other rules, now or after a restart --------------------------------------------------------------------------


def reload_(bench, *rules, **changes):
    bench.firewall.reconfigure(settings(*rules, **changes))
    bench.wait(1)


@pytest.fixture(params=[restart, reload_], ids=["restart", "reload"])
def change(request, bench):
    return lambda *rules, **changes: request.param(bench, *rules, **changes)


def test_what_is_denied_now_is_discarded(bench, change):
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.forward(esp(RIGHT, LEFT, 8), to_left=True)
    change(DENY_ALL)
    session = bench.session
    assert (session.state, session.rule, session.end_reason) == (State.DISCARD, DENY_ALL, EndReason.POLICY_DENY)
    assert not bench.forward(esp(LEFT, RIGHT, 7)) and not bench.forward(esp(RIGHT, LEFT, 8), to_left=True)
    assert bench.session.packet_count == 4 and bench.session.timeout_s == 60
    assert bench.count("session_rematched") == 1


def test_what_is_allowed_now_gets_a_session_of_its_own(bench, change):
    bench = bench
    reload_(bench, DENY_ALL)
    assert not bench.forward(esp(LEFT, RIGHT, 7))
    change(ALLOW_ALL)
    assert bench.forward(esp(LEFT, RIGHT, 7))
    assert (bench.session.id, bench.session.state) == (2, State.ACTIVE)


def test_a_tunnel_of_this_host_is_judged_as_one(bench, change):
    bench.sas(SaEstablished(SA))
    bench.receive(esp(PEER, HERE, SA.spi_in))
    only = Rule("tunnels", Action.ALLOW, applications=frozenset({"ipsec-udp"}))
    change(only)
    assert bench.session.rule == only and bench.session.state is State.ACTIVE
    change(DENY_ALL)
    assert bench.session.state is State.DISCARD and not bench.receive(esp(PEER, HERE, SA.spi_in))


def test_rules_by_address_and_by_name_are_followed(bench, change):
    for number in (1, 2):
        bench.forward(esp(f"10.0.0.{number}", RIGHT, 7))
    first = Rule("first", Action.DENY, sources=(Prefix(packed("10.0.0.1"), 32),))
    change(first, Rule("second", Action.ALLOW))
    assert [(s.rule.name, s.state) for s in bench.sessions] == [("first", State.DISCARD), ("second", State.ACTIVE)]


def test_timeouts_are_followed(bench, change):
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.wait(100)
    change(timeouts_s=dict.fromkeys(Application, 150))
    life = bench.firewall.ager.time_to_live_s(bench.session, bench.now)
    assert bench.session.timeout_s == 150 and 45 <= life <= 50
    bench.forward(esp(LEFT, RIGHT, 7, 2))
    bench.wait(149)
    assert bench.sessions
    bench.wait(4)
    assert not bench.sessions


def test_a_rule_that_wants_every_packet_gets_every_packet(bench, change):
    for seq in range(1, 11):
        bench.forward(esp(LEFT, RIGHT, 7, seq))
    change(Rule("watched", Action.ALLOW, inspects_every_packet=True))
    assert not bench.kernel.elements and bench.session.packet_count == 10
    for seq in range(11, 21):
        bench.forward(esp(LEFT, RIGHT, 7, seq))
    assert not bench.kernel.elements and bench.session.packet_count == 20


def zones(*pairs):
    from fwd.core.policy import Zones

    return Zones(pairs, "any")


def test_other_zones_are_followed_by_sessions_in_transit(bench, change):
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.forward(esp(RIGHT, LEFT, 8), to_left=True)
    rule = Rule("dmz", Action.ALLOW, from_zones=frozenset({"dmz"}))
    changed = zones(("left", "dmz"), ("right", "untrust"))
    if bench.firewall.settings.zones == changed:
        return
    reconfigured = {"policy": settings(rule).policy, "zones": changed}
    change(**reconfigured)
    session = bench.session
    assert (session.client.zone, session.server.zone, session.rule) == ("dmz", "untrust", rule)
    assert bench.forward(esp(LEFT, RIGHT, 7, 2)) and bench.forward(esp(RIGHT, LEFT, 8, 2), to_left=True)
    assert (bench.session.id, bench.session.packet_count) == (1, 4)


def test_the_gate_of_a_session_keeps_its_say(bench, change):
    reload_(bench, pass_through=PassThrough.IKE_GATED)
    assert not bench.forward(esp(LEFT, RIGHT, 7))
    change(Rule("other", Action.ALLOW), pass_through=PassThrough.IKE_GATED)
    assert bench.session.rule.name == "ike-gate" and not bench.forward(esp(LEFT, RIGHT, 7))
    change(pass_through=PassThrough.ALWAYS)
    assert bench.forward(esp(LEFT, RIGHT, 7))


# --- damage -----------------------------------------------------------------------------------------------------------


def fresh():
    firewall = Firewall(settings(flow_active_timeout_s=1), 1000.0)
    firewall.changes.is_on = True
    return firewall


ROWS = Bench(fast_path=True, flow_active_timeout_s=1)
a_bit_of_everything(ROWS)
ROWS.firewall.flow_export.take_back(ROWS.firewall.flow_export.take(ROWS.now)[0])
ROWS.save()
SAVED = ROWS.saved


@given(
    st.sampled_from(sorted(SAVED)),
    st.one_of(
        st.binary(max_size=300),
        st.tuples(st.integers(0, 400), st.integers(0, 255)),
        st.recursive(st.none() | st.integers(-(2**63), 2**63) | st.binary() | st.text(), st.lists, max_leaves=20).map(
            msgspec.msgpack.encode
        ),
    ),
)
@hypothesis_settings(max_examples=400, deadline=None)
def test_a_damaged_record_is_told_and_changes_nothing_or_is_a_record(key, damage):
    row = SAVED[key]
    if isinstance(damage, tuple):
        octets = bytearray(row)
        octets[damage[0] % len(octets)] = damage[1]
        damage = bytes(octets)
    firewall = fresh()
    try:
        Succession(firewall).restore({**SAVED, key: damage}, [], None, 1000.0)
    except records.RecordError:
        assert not len(firewall.table) and firewall.counters.values == fresh().counters.values
    firewall.handle_timer(1001.0)
    firewall.flow_export.take(1001.0)


@pytest.mark.parametrize("key", [b"", b"session", b"session \x00", b"gate ", b"other"])
def test_a_record_that_nobody_knows_is_told(key):
    with pytest.raises(records.RecordError):
        Succession(fresh()).restore({**SAVED, key: b"\x00"}, [], None, 1000.0)


# --- a walk -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(16))
def test_whatever_happens_between_restarts_no_packet_is_lost_or_counted_twice(number):
    """`Bench.check` looks after each step; here the steps are as they come."""
    chance = random.Random(number)
    changes = {
        "transit_ports": chance.choice(list(TransitPorts)),
        "pass_through": chance.choice(list(PassThrough)),
        "unknown_spi": chance.choice(list(UnknownSpi)),
    }
    bench = Bench(fast_path=True, **changes)
    sas = [child_sa(0x1000 + n, 0x2000 + n, uniqueid=n, reqid=n % 3 + 1) for n in range(12)]
    up = []
    for seq in range(1, 251):
        spi = chance.randrange(1, 6)
        bench.is_drained = chance.random() < 0.5
        match chance.randrange(12):
            case 0 | 1:
                bench.forward(esp(LEFT, RIGHT, spi, seq))
            case 2 | 3:
                bench.forward(esp(RIGHT, LEFT, 10 + spi, seq), to_left=True)
            case 4:
                bench.receive(esp(PEER, HERE, 0x1000 + chance.randrange(14), seq))
            case 5:
                bench.send(esp(HERE, PEER, 0x2000 + chance.randrange(14), seq))
            case 6:
                bench.forward(ike(LEFT, RIGHT), to_left=False)
            case 7 if len(up) < len(sas):
                up.append(sas[len(up)])
                bench.sas(SaEstablished(up[-1]))
            case 8 if up:
                bench.sas(SaDeleted(chance.choice(up)))
            case 9:
                bench.wait(chance.choice((0.1, 1, 7, 70)))
            case 10 if bench.sessions:
                bench.clear(chance.choice(bench.sessions))
            case 11:
                bench.restart(chance.choice((ALLOW_ALL, ALLOW_ALL, DENY_ALL)), **changes)
    assert bench.count("pkt_unseen") == 0
