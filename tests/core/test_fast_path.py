"""The decisions that the kernel repeats: which they are, that no count is lost, and what a successor finds."""

import struct
from contextlib import contextmanager

import pytest

from fwd.core.constants import (
    CLEAR_SLICE,
    ELEMENT_IDLE_S,
    ELEMENTS_PER_SESSION,
    INSTALL_WAIT_S,
    INSTALLS_WAITING,
)
from fwd.core.fast_path import Outcome
from fwd.core.firewall import Hook
from fwd.core.interfaces import LinkPresent
from fwd.core.policy import Action, Rule
from fwd.core.sa import SaDeleted, SaEstablished, SaRekeyed
from fwd.core.session import Application, Place
from fwd.core.state import EndReason
from tests.builders import (
    DENY_ALL,
    HERE,
    HERE6,
    LEFT,
    PEER,
    PEER6,
    RIGHT,
    TO_LEFT,
    TO_RIGHT,
    Bench,
    child_sa,
    esp,
    esp_in_udp,
    ike,
    ipv4,
    ipv6,
    packed,
    udp,
)

SA = child_sa()
NEXT_SA = child_sa(0x1002, 0x2002, uniqueid=2)


@pytest.fixture
def bench():
    return Bench(fast_path=True)


def handled(bench):
    """Packets that the daemon itself had in its hands."""
    return bench.count("pkt_recv") - bench.count("pkt_fast_path")


@pytest.mark.parametrize(
    "packet",
    [
        esp("10.0.0.1", "10.0.0.2", 7),
        esp("2001:db8::1", "2001:db8::2", 7),
        esp_in_udp("10.0.0.1", "10.0.0.2", 7),
        esp_in_udp("2001:db8::1", "2001:db8::2", 7, sport=1025),
    ],
)
def test_the_first_packet_decides_and_the_kernel_repeats(bench, packet):
    assert all(bench.forward(packet) for _ in range(5))
    assert handled(bench) == 1
    bench.read_all()
    assert bench.session.c2s.packet_count == 5 and bench.session.c2s.byte_count == 5 * len(packet)
    assert bench.count("pkt_fast_path") == 4


@pytest.fixture
def crowded():
    """A bench in whose queue packets wait behind each one."""
    bench = Bench(fast_path=True)
    bench.is_drained = False
    return bench


def test_what_waits_in_the_queue_is_not_overtaken(crowded):
    for _ in range(3):
        crowded.forward(esp(LEFT, RIGHT, 7))
    assert not crowded.kernel.elements and crowded.session.elements[0].place is Place.DAEMON
    crowded.is_drained = True
    for _ in range(4):
        crowded.forward(esp(LEFT, RIGHT, 7))
    assert len(crowded.kernel.elements) == 1
    assert handled(crowded) == 4 and crowded.session.c2s.packet_count == 7


def test_a_queue_that_is_never_empty_does_not_keep_a_decision_from_the_kernel(crowded):
    crowded.forward(esp(LEFT, RIGHT, 7))
    crowded.wait(INSTALL_WAIT_S / 2)
    crowded.forward(esp(LEFT, RIGHT, 8))
    assert not crowded.kernel.elements
    crowded.wait(INSTALL_WAIT_S)
    assert len(crowded.kernel.elements) == 2
    for spi in range(10, 10 + INSTALLS_WAITING):
        assert len(crowded.kernel.elements) == 2
        crowded.forward(esp(LEFT, RIGHT, spi))
    assert len(crowded.kernel.elements) == 2 + INSTALLS_WAITING


def test_what_ends_or_is_switched_off_while_it_waits_never_comes_to_the_kernel(crowded):
    crowded.forward(esp(LEFT, RIGHT, 7))
    crowded.clear(crowded.session)
    crowded.forward(esp(LEFT, RIGHT, 7))
    crowded.firewall.use_fast_path(False)
    crowded.is_drained = True
    crowded.serve_kernel()
    assert not crowded.kernel.elements and crowded.session.c2s.packet_count == 1


def test_who_is_killed_while_it_waits_has_lost_nothing(crowded):
    for _ in range(3):
        crowded.forward(esp(LEFT, RIGHT, 7))
    crowded.restart()
    assert crowded.count("fast_path_lost") == crowded.count("pkt_unseen") == crowded.count("pkt_fast_path") == 0
    assert crowded.session.c2s.packet_count == 3


def test_both_directions_of_a_tunnel_that_ends_here(bench):
    sa = child_sa(local=packed(HERE6), remote=packed(PEER6))
    bench.sas(SaEstablished(sa))
    for _ in range(3):
        assert bench.receive(esp(PEER6, HERE6, sa.spi_in)) and bench.send(esp(HERE6, PEER6, sa.spi_out))
    assert handled(bench) == 2
    bench.read_all()
    assert bench.session.packet_count == 6


def test_discarded_packets_are_counted_in_the_kernel_too():
    bench = Bench(DENY_ALL, fast_path=True)
    assert not any(bench.forward(esp(LEFT, RIGHT, 7)) for _ in range(5))
    assert handled(bench) == 1
    bench.wait(61)
    (ended,) = bench.firewall.table.ended
    assert (ended.packet_count, ended.end_reason) == (5, EndReason.POLICY_DENY)
    assert not bench.kernel.elements


def test_every_spi_comes_to_the_daemon_once(bench):
    bench.sas(SaEstablished(SA))
    bench.receive(esp(PEER, HERE, SA.spi_in))
    bench.sas(SaRekeyed(SA, NEXT_SA))
    for _ in range(4):
        bench.receive(esp(PEER, HERE, NEXT_SA.spi_in))
    assert handled(bench) == 2 and bench.session.server.port == NEXT_SA.spi_in
    bench.read_all()
    assert bench.session.packet_count == 5


def test_what_is_no_plain_esp_stays_with_the_daemon(bench):
    for packet in (
        ike(LEFT, RIGHT),
        ike(LEFT, RIGHT, 4500),
        udp(LEFT, RIGHT, 4500, 4500, b"\xff"),
        esp(LEFT, RIGHT, 7, seq=0),
    ):
        for _ in range(3):
            bench.forward(packet)
    bench.receive(esp(PEER, HERE, 5))  # an SPI that nobody knows yet
    bench.receive(esp(PEER, HERE, 5))
    assert handled(bench) == bench.offered == 14


def _unlike_plain_ones():
    """Packets of one SPI each that take the long way through the daemon each time, whatever was decided."""
    body = struct.pack("!II", 7, 1) + bytes(40)
    left, right = "2001:db8::1", "2001:db8::2"
    return {
        "IPv4 options": ipv4(LEFT, RIGHT, 50, body, options=bytes([1] * 4)),
        "IPv4 first fragment": ipv4(LEFT, RIGHT, 50, body, fragment=0x2000),
        "IPv6 destination options": ipv6(left, right, 60, bytes([50, 0, 1, 4, 0, 0, 0, 0]) + body),
        "IPv6 first fragment": ipv6(left, right, 44, bytes([50, 0, 0, 1, 0, 0, 0, 9]) + body),
    }


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("kind", _unlike_plain_ones())
def test_what_the_daemon_looks_at_in_full_has_one_element_like_any_other(kind, is_on):
    bench = Bench(fast_path=is_on)
    packet = _unlike_plain_ones()[kind]
    for _ in range(3):
        for _ in range(4):  # in one turn
            bench.offered += 1
            bench.firewall.receive_packet(packet, Hook.FORWARD, TO_LEFT, TO_RIGHT, bench.now)
        bench.serve_kernel()
        bench.forward(esp(LEFT, RIGHT, 7) if packet[0] >> 4 == 4 else esp("2001:db8::1", "2001:db8::2", 7))
    bench.wait(3)
    assert bench.session.packet_count == 15 == bench.count("pkt_recv")
    (element,) = bench.firewall.fast_path
    assert bench.session.elements == (element,) and (bench.count("pkt_fast_path") == 3) == is_on


def test_a_key_that_is_known_is_not_learnt_twice(bench):
    bench.forward(esp(LEFT, RIGHT, 7))
    (element,) = bench.firewall.fast_path
    assert bench.firewall.fast_path.learn(element.key, element.use, element.verdict, bench.now)
    assert bench.session.elements == (element,) and len(bench.firewall.fast_path) == 1
    bench.check()


def test_another_interface_is_another_decision(bench):
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.forward(esp(LEFT, RIGHT, 7), to_left=True)
    assert handled(bench) == 2 and len(bench.sessions) == 2


def test_a_rule_keeps_its_sessions_off_the_fast_path():
    bench = Bench(Rule("watched", Action.ALLOW, inspects_every_packet=True), fast_path=True)
    for _ in range(3):
        assert bench.forward(esp(LEFT, RIGHT, 7))
    assert handled(bench) == 3 and bench.session.packet_count == 3


def test_turned_off_and_on_again(bench):
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.firewall.use_fast_path(False)
    bench.wait(1)
    assert not bench.kernel.elements
    for _ in range(2):
        bench.forward(esp(LEFT, RIGHT, 7))
    assert handled(bench) == 3
    bench.firewall.use_fast_path(True)
    for _ in range(2):
        bench.forward(esp(LEFT, RIGHT, 7))
    assert handled(bench) == 4
    bench.read_all()
    assert bench.session.packet_count == 5


def test_the_time_to_live_follows_the_kernels_counts(bench):
    bench.forward(esp(LEFT, RIGHT, 7))
    for _ in range(5):
        bench.wait(250)
        bench.forward(esp(LEFT, RIGHT, 7))
    assert handled(bench) == 1
    bench.wait(3599)
    assert bench.session.packet_count == 6  # last seen in the kernel, within a second
    bench.wait(2)
    assert not bench.sessions


def test_a_session_that_is_due_asks_the_kernel_first(bench, monkeypatch):
    monkeypatch.setattr("fwd.core.fast_path.SWEEP_INTERVAL_S", 10_000)
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.wait(3599)
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.wait(2)
    assert bench.session.packet_count == 2 and handled(bench) == 1


def test_an_idle_spi_is_given_up_and_comes_back(bench):
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.forward(esp(LEFT, RIGHT, 8))
    for _ in range(int(ELEMENT_IDLE_S) // 100 + 1):
        bench.wait(100)
        bench.forward(esp(LEFT, RIGHT, 8))
    assert len(bench.kernel.elements) == 1
    bench.forward(esp(LEFT, RIGHT, 7))
    assert len(bench.kernel.elements) == 2 and handled(bench) == 3


def test_one_session_cannot_fill_the_maps(bench):
    for spi in range(1, ELEMENTS_PER_SESSION + 10):
        assert bench.forward(esp(LEFT, RIGHT, spi))
    assert len(bench.kernel.elements) == ELEMENTS_PER_SESSION and bench.count("fast_path_full") == 9
    assert len(bench.session.elements) == ELEMENTS_PER_SESSION


def test_clearing_many_is_done_bit_by_bit(bench):
    for number in range(3 * CLEAR_SLICE):
        bench.forward(esp(f"10.0.{number // 256}.{number % 256}", RIGHT, 7))
    bench.clear(*bench.sessions)
    assert len(bench.sessions) == 2 * CLEAR_SLICE == len(bench.kernel.elements)
    bench.wait(0.1)
    assert not bench.sessions and not bench.kernel.elements


def test_events_wait_for_the_last_counts(bench):
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.forward(esp(LEFT, RIGHT, 7))
    while bench.firewall.next_event():
        pass
    bench.firewall.clear(bench.sessions, bench.now)
    assert bench.firewall.next_event() is None
    bench.serve_kernel()
    assert bench.firewall.next_event().session.packet_count == 2


def test_an_interface_that_changes_its_zone_is_decided_anew(bench):
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.firewall.apply_interface(LinkPresent(TO_RIGHT, "wan"))  # still untrust: nothing changes
    bench.wait(0.1)
    assert bench.kernel.elements
    bench.firewall.apply_interface(LinkPresent(TO_RIGHT, "left"))
    bench.wait(0.1)
    assert not bench.kernel.elements
    bench.forward(esp(LEFT, RIGHT, 7))
    assert [session.server.zone for session in bench.sessions] == ["untrust", "trust"]


def test_what_the_kernel_refuses_stays_with_the_daemon(bench, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(bench.kernel, "carry_out", lambda work: Outcome(refused={e.key for e in work.installs}))
        bench.forward(esp(LEFT, RIGHT, 7))
    assert bench.forward(esp(LEFT, RIGHT, 7))
    assert handled(bench) == 2 and bench.count("fast_path_refused") == 1
    assert [element.place for element in bench.firewall.fast_path] == [Place.DAEMON]


def test_what_vanished_from_the_kernel_is_counted_and_decided_anew(bench):
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.kernel.elements.clear()
    bench.wait(1)
    assert bench.count("fast_path_lost") == 1
    assert bench.forward(esp(LEFT, RIGHT, 7)) and bench.kernel.elements
    bench.clear(bench.session)
    assert next(bench.firewall.table.ended).packet_count == 2


def test_a_deleted_tunnel_ends_with_all_its_packets(bench):
    bench.sas(SaEstablished(SA))
    for _ in range(3):
        bench.receive(esp(PEER, HERE, SA.spi_in))
    bench.sas(SaDeleted(SA))
    bench.receive(esp(PEER, HERE, SA.spi_in))
    bench.wait(6)
    (ended,) = bench.firewall.table.ended
    assert (ended.packet_count, ended.end_reason) == (4, EndReason.TUNNEL_DOWN)
    assert not bench.kernel.elements


# --- the kernel does not answer --------------------------------------------------------------------------------------


def silent(bench, *, does_it):
    """A kernel that gives no answer, whether or not it did what it was told."""

    def carry_out(work):
        if does_it:
            type(bench.kernel).carry_out(bench.kernel, work)
        return Outcome(unknown={e.key for elements in (work.removals, work.installs, work.reads) for e in elements})

    return carry_out


@contextmanager
def without_answers(bench, *, does_it=False):
    answering, bench.kernel.carry_out = bench.kernel.carry_out, silent(bench, does_it=does_it)
    yield
    bench.kernel.carry_out = answering


def test_counts_that_are_not_read_are_read_later():
    bench = Bench(fast_path=True)
    for seq in range(1, 51):
        bench.forward(esp(LEFT, RIGHT, 7, seq))
    with without_answers(bench):
        bench.wait(5)
    assert bench.kernel.elements and bench.session.packet_count == 50 and not bench.count("fast_path_lost")


def test_what_could_not_be_removed_is_removed_later_with_its_last_counts():
    bench = Bench(fast_path=True)
    for seq in range(1, 51):
        bench.forward(esp(LEFT, RIGHT, 7, seq))
    session = bench.session
    with without_answers(bench):
        bench.firewall.clear([session], bench.now)
        bench.serve_kernel()
    assert bench.kernel.elements
    bench.wait(1)
    assert not bench.kernel.elements and session.packet_count == 50
    assert bench.forward(esp(LEFT, RIGHT, 7, 51)) and bench.session is not session
    bench.check()


@pytest.mark.parametrize("does_it", [True, False])
def test_an_element_of_which_nobody_knows_whether_it_is_there_is_found_out(does_it):
    bench = Bench(fast_path=True)
    with without_answers(bench, does_it=does_it):
        bench.firewall.receive_packet(esp(LEFT, RIGHT, 7), Hook.FORWARD, TO_LEFT, TO_RIGHT, bench.now)
        bench.serve_kernel()
    bench.offered += 1
    bench.wait(2)
    for seq in range(2, 52):
        assert bench.forward(esp(LEFT, RIGHT, 7, seq))
    assert bench.session.packet_count == 51 and len(bench.kernel.elements) == 1


@pytest.mark.parametrize("does_it", [True, False])
def test_a_key_that_the_kernel_may_still_have_is_not_learnt_anew(does_it):
    bench = Bench(fast_path=True)
    for seq in range(1, 21):
        bench.forward(esp(LEFT, RIGHT, 7, seq))
    bench.read_all()
    (element,) = bench.session.elements
    with without_answers(bench, does_it=does_it):
        bench.firewall.fast_path.withdraw([element])
        bench.serve_kernel()
    packet = esp(LEFT, RIGHT, 7, 21)
    bench.offered += 1
    if bench.kernel.decide(packet, TO_LEFT, TO_RIGHT) is None:
        bench.firewall.receive_packet(packet, Hook.FORWARD, TO_LEFT, TO_RIGHT, bench.now)
    bench.wait(2)
    for seq in range(22, 31):
        bench.forward(esp(LEFT, RIGHT, 7, seq))
    assert bench.session.packet_count == 30 and bench.count("fast_path_lost") == does_it
    assert len(bench.kernel.elements) == len(bench.session.elements) == 1
    assert not bench.firewall.fast_path.leaving(bench.session)


def test_a_session_does_not_end_while_nobody_knows_whether_packets_came():
    bench = Bench(fast_path=True, timeouts_s=dict.fromkeys(Application, 20))
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.wait(15)
    with without_answers(bench):
        assert bench.forward(esp(LEFT, RIGHT, 7, 2))  # by the kernel
        bench.wait(10)
    bench.wait(2)
    assert bench.session.packet_count == 2
    bench.wait(30)
    assert not bench.sessions


def test_a_kernel_that_never_answers_again_holds_up_no_events_for_ever():
    bench = Bench(fast_path=True)
    bench.forward(esp(LEFT, RIGHT, 7))
    with without_answers(bench):
        bench.firewall.clear([bench.firewall.table.live(1)], bench.now)
        bench.serve_kernel()
        while bench.firewall.next_event():
            pass
        assert bench.firewall.fast_path.is_owed_counts
        for _ in range(100):
            bench.now += 1
            bench.firewall.handle_timer(bench.now)
            bench.serve_kernel()
        assert not bench.firewall.fast_path.is_owed_counts and bench.count("fast_path_lost") == 1


def test_very_many_elements_of_few_sessions_are_cleared_in_slices():
    bench = Bench(fast_path=True)
    bench.check = lambda: None  # which looks at all elements, for each packet
    for number in range(4):
        for spi in range(1, 601):
            bench.forward(esp(f"10.0.0.{number + 1}", RIGHT, spi))
    del bench.check
    bench.check()
    bench.firewall.clear(bench.sessions, bench.now)
    work = bench.firewall.take_work(bench.now, is_drained=True)
    assert len(work.removals) == 1200
    bench.firewall.apply_outcome(work, bench.kernel.carry_out(work), bench.now)
    bench.wait(1)
    assert not bench.sessions and not bench.kernel.elements


def looks(floods: bool) -> int:
    """How many packets of one SPI come to the daemon within a minute, with a flood from the 15th second on."""
    bench = Bench(fast_path=True, max_sessions=1)
    for tenth in range(600):
        bench.forward(esp(LEFT, RIGHT, 1, 1 + tenth))
        bench.wait(0.1)
        if floods and tenth >= 150:
            bench.forward(esp("10.0.0.1", RIGHT, 1))
    return 600 - bench.count("pkt_fast_path")


def test_in_a_flood_no_packet_is_sent_to_the_daemon_to_be_looked_at():
    assert looks(floods=False) >= 5
    assert looks(floods=True) <= 3


def test_an_spi_that_waits_to_be_looked_at_goes_back_to_the_kernel_when_a_flood_begins():
    bench = Bench(fast_path=True, max_sessions=1)
    for seq in range(1, 20):
        bench.forward(esp(LEFT, RIGHT, 1, seq))
    bench.read_all()
    bench.firewall.fast_path.look_at(bench.session.elements)
    bench.serve_kernel()
    assert not bench.kernel.elements
    bench.forward(esp("10.0.0.1", RIGHT, 1))
    bench.wait(1.5)
    assert len(bench.kernel.elements) == 1
    for seq in range(20, 40):
        bench.forward(esp(LEFT, RIGHT, 1, seq))
    bench.read_all()
    bench.check()
    assert bench.session.c2s.packet_count == 39
