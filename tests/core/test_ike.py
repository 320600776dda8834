"""IKE's cleartext header, and what can be seen of an exchange from outside."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.isakmp import ISAKMP

from fwd.core.constants import IKE_SAS_PER_PEERS, OPEN_EXCHANGES_KEPT, PEERS_KEPT
from fwd.core.ike import IkeWatcher, Way, parse_header
from fwd.core.packet import Kind, PacketError, parse
from tests.builders import LEFT, RIGHT, packed, udp

A, B = packed(LEFT), packed(RIGHT)
PORTS = (500, 500)
THERE = Way(3, 4, "trust", "untrust")
BACK = Way(4, 3, "untrust", "trust")
SA, NOTIFY, SKF, FRAGMENT_V1 = 33, 41, 53, 132
INIT, AUTH, CHILD, INFORMATIONAL, QUICK = (2, 34), (2, 35), (2, 36), (2, 37), (1, 32)


def message(kind, message_id=0, *, response=False, initiator=True, spis=(7, 9), length=28, payload=SA):
    major, exchange = kind
    flags = (0x20 * response | 0x08 * initiator) if major == 2 else 1
    return struct.pack("!QQBBBBII", *spis, payload, major << 4, exchange, flags, message_id, length)


def header(*args, **kwargs):
    return parse_header(message(*args, **kwargs), 0, 28)


def test_the_header_is_what_scapy_reads():
    octets = message(CHILD, 5, response=True, initiator=False, spis=(0x1122334455667788, 0x99AABBCCDDEEFF00))
    ours, theirs = parse_header(octets, 0, len(octets)), ISAKMP(octets)
    assert ours.initiator_spi.to_bytes(8) == theirs.init_cookie and ours.responder_spi.to_bytes(8) == theirs.resp_cookie
    assert (ours.major << 4 | ours.minor, ours.exchange_type) == (theirs.version, theirs.exch_type)
    assert ours.next_payload == theirs.next_payload
    assert (ours.message_id, ours.length) == (theirs.id, theirs.length)
    assert ours.exchange == "CREATE_CHILD_SA" and ours.is_response and not ours.is_from_initiator


@pytest.mark.parametrize(
    "octets",
    [b"", message(INIT)[:27], message((3, 34)), message(INIT, spis=(0, 9)), message(INIT, length=27)],
    ids=["nothing", "short", "version 3", "no SPI", "length"],
)
def test_what_is_no_ike_header_is_none(octets):
    assert parse_header(octets, 0, len(octets)) is None


@given(st.binary(max_size=80), st.sampled_from([500, 4500]))
def test_no_payload_of_a_udp_port_makes_it_raise_anything_but_the_declared_error(payload, port):
    try:
        packet = parse(udp(LEFT, RIGHT, port, port, payload))
    except PacketError:
        return
    assert packet.kind is not Kind.ESP and (packet.ike is None or packet.kind is Kind.IKE)


def test_marker_keepalive_and_esp_on_the_nat_t_port_are_told_apart():
    marked = parse(udp(LEFT, RIGHT, 4500, 4500, bytes(4) + message(AUTH, 1)))
    alive = parse(udp(LEFT, RIGHT, 4500, 4500, b"\xff"))
    esp = parse(udp(LEFT, RIGHT, 4500, 4500, struct.pack("!II", 5, 1)))
    assert marked.ike.exchange == "IKE_AUTH" and not marked.is_keepalive
    assert alive.is_keepalive and alive.ike is None
    assert esp.kind is Kind.ESP_IN_UDP and esp.spi == 5


class Wire:
    def __init__(self):
        self.watcher = IkeWatcher()
        self.now = 100.0

    def pass_by(self, src, dst, *args, ports=PORTS, way=None, **kwargs):
        self.now += 1
        way = way or (THERE if src == A else BACK)
        return self.watcher.note(header(*args, **kwargs), src, dst, ports, way, 1, self.now)

    def ask(self, *args, **kwargs):
        """A, the initiator, says something."""
        return self.pass_by(A, B, *args, **kwargs)

    def answer(self, *args, **kwargs):
        """B answers."""
        return self.pass_by(B, A, *args, **{"response": True, "initiator": False, **kwargs})

    @property
    def sa(self):
        (sa,) = self.watcher.ike_sas(B, A)
        return sa


@pytest.fixture
def wire():
    return Wire()


def test_an_exchange_is_complete_with_its_answer(wire):
    assert not wire.pass_by(A, B, INIT, spis=(7, 0))
    assert not wire.pass_by(B, A, INIT, response=True, initiator=False)
    assert not wire.pass_by(A, B, AUTH, 1)
    assert wire.pass_by(B, A, AUTH, 1, response=True, initiator=False)
    assert (wire.sa.initiator, wire.sa.responder_spi, wire.sa.completed_at) == (A, 9, wire.now)
    assert not wire.pass_by(A, B, INFORMATIONAL, 2)
    assert not wire.pass_by(B, A, INFORMATIONAL, 2, response=True, initiator=False)


def test_an_answer_that_nobody_asked_for_completes_nothing(wire):
    assert not wire.pass_by(B, A, AUTH, 1, response=True, initiator=False)
    wire.pass_by(A, B, AUTH, 1)
    assert not wire.pass_by(A, B, AUTH, 1, response=True)  # from the one who asked
    wire.pass_by(A, B, AUTH, 2)
    assert not wire.pass_by(B, A, AUTH, 3, response=True, initiator=False)


def test_the_responder_may_ask_as_well(wire):
    wire.ask(INIT, spis=(7, 0))
    wire.answer(INIT)
    wire.pass_by(B, A, CHILD, 0, initiator=False)
    assert wire.pass_by(A, B, CHILD, 0, response=True)


def test_what_is_sent_again_is_counted_as_such(wire):
    for _ in range(3):
        wire.pass_by(A, B, AUTH, 1)
    assert wire.pass_by(B, A, AUTH, 1, response=True, initiator=False)
    assert not wire.pass_by(B, A, AUTH, 1, response=True, initiator=False)
    assert (wire.sa.message_count, wire.sa.retransmit_count) == (5, 3)


def test_an_ike_sa_that_was_seen_to_begin_has_the_spis_that_its_first_answer_gave_it(wire):
    wire.ask(INIT, spis=(7, 0))
    wire.ask(AUTH, 1, spis=(7, 8))
    assert not wire.answer(AUTH, 1, spis=(7, 8))  # nobody has agreed to begin one
    wire.answer(INIT, spis=(7, 0), payload=NOTIFY)  # a cookie, or another group is wanted: RFC 7296 section 2.6
    wire.ask(AUTH, 1, spis=(7, 8))
    assert not wire.answer(AUTH, 1, spis=(7, 8))
    wire.ask(INIT, spis=(7, 0), length=60)
    wire.answer(INIT)
    assert not wire.answer(AUTH, 1, spis=(7, 8))
    wire.ask(AUTH, 1)
    assert not wire.answer(AUTH, 1, spis=(7, 10))
    assert wire.answer(AUTH, 1) and wire.sa.responder_spi == 9


def test_a_first_request_that_is_sent_again_changes_nothing_later_on(wire):
    wire.ask(INIT, spis=(7, 0))
    wire.answer(INIT)
    wire.ask(AUTH, 1)
    assert wire.answer(AUTH, 1)
    wire.ask(INIT, spis=(7, 0))
    wire.answer(INIT, spis=(7, 10))
    wire.ask(CHILD, 2)
    assert wire.answer(CHILD, 2)


def test_an_ike_sa_that_is_older_than_fwd_has_the_spis_of_its_first_answered_exchange(wire):
    wire.ask(CHILD, 5, spis=(7, 8))
    assert not wire.answer(CHILD, 5, spis=(7, 8), payload=NOTIFY)  # in the clear: there is no such IKE_SA
    wire.ask(INFORMATIONAL, 5)
    assert not wire.answer(INFORMATIONAL, 5)
    wire.ask(CHILD, 6, spis=(7, 8))
    assert not wire.answer(CHILD, 6, spis=(7, 8))
    wire.ask(CHILD, 6)
    assert wire.answer(CHILD, 6)


ONE_ZONE = [Way(way.ingress, way.egress, "any", "any") for way in (THERE, BACK)]


@pytest.mark.parametrize(
    ("asked", "answered", "counts"),
    [
        (THERE, Way(3, 3, "trust", "trust"), False),  # from where the request came
        (THERE, THERE, False),
        (THERE, Way(5, 3, "dmz", "trust"), False),
        (THERE, Way(5, 6, "untrust", "trust"), True),  # routes may be asymmetric between the same zones
        (Way(3, 3, "trust", "trust"), Way(3, 4, "trust", "untrust"), False),
        (Way(3, 3, "any", "any"), Way(3, 3, "any", "any"), True),  # both sides by one interface
        (ONE_ZONE[0], ONE_ZONE[1], True),
        (ONE_ZONE[0], Way(3, 3, "any", "any"), False),
        (Way(3, 3, "any", "any"), ONE_ZONE[0], False),
        (Way(2, 0, "untrust", "untrust"), Way(0, 2, "untrust", "untrust"), True),  # to this host, and from it
        (Way(2, 0, "untrust", "untrust"), Way(0, 3, "trust", "trust"), True),
        (Way(2, 0, "untrust", "untrust"), Way(2, 0, "untrust", "untrust"), False),
    ],
)
def test_an_answer_goes_the_opposite_way(wire, asked, answered, counts):
    wire.ask(AUTH, 1, way=asked)
    assert wire.answer(AUTH, 1, way=answered) is counts
    if not counts:  # it does not take the place of the true one either
        assert wire.answer(AUTH, 1, way=Way(asked.egress, asked.ingress, asked.to_zone, asked.from_zone))


def test_both_sides_may_ask_at_once(wire):
    wire.ask(CHILD, 5)
    wire.pass_by(B, A, CHILD, 2, initiator=False)
    assert wire.answer(CHILD, 5)
    assert wire.pass_by(A, B, CHILD, 2, response=True)


def test_exchanges_that_wait_for_their_answer_are_bounded(wire):
    for number in range(OPEN_EXCHANGES_KEPT + 1):
        wire.ask(CHILD, number)
    assert not wire.answer(CHILD, 0)
    assert wire.answer(CHILD, OPEN_EXCHANGES_KEPT)
    for number in range(OPEN_EXCHANGES_KEPT + 1):
        wire.ask(QUICK, number, spis=(8, 9))
    (sa,) = (sa for sa in wire.watcher.ike_sas(A, B) if sa.initiator_spi == 8)
    assert len(sa._quick_modes) == OPEN_EXCHANGES_KEPT


def test_an_exchange_is_complete_once_however_often_it_is_sent_again(wire):
    wire.ask(CHILD, 1)
    assert wire.answer(CHILD, 1)
    wire.ask(INFORMATIONAL, 2)
    wire.answer(INFORMATIONAL, 2)
    wire.ask(CHILD, 1)
    assert not wire.answer(CHILD, 1)
    assert wire.sa.completed_at == 102


def test_fragments_are_no_retransmits_and_complete_an_exchange_once(wire):
    for _ in range(3):
        wire.ask(AUTH, 1, payload=SKF)
    answers = [wire.answer(AUTH, 1, payload=SKF) for _ in range(3)]
    assert answers == [True, False, False]
    assert (wire.sa.message_count, wire.sa.retransmit_count) == (6, 0)
    wire.ask((1, 2), payload=FRAGMENT_V1, spis=(8, 9))
    wire.ask((1, 2), payload=FRAGMENT_V1, spis=(8, 9))
    assert next(wire.watcher.ike_sas(A, B)).retransmit_count == 0


def test_what_each_side_sends_again_is_counted_even_if_the_other_spoke_meanwhile(wire):
    wire.ask(CHILD, 5)
    wire.pass_by(A, B, CHILD, 2, response=True)
    wire.pass_by(B, A, CHILD, 2, initiator=False)
    wire.ask(CHILD, 5)
    assert wire.sa.retransmit_count == 1


def test_ikev1_is_complete_with_the_third_message_of_quick_mode(wire):
    assert not wire.ask((1, 2), spis=(7, 0))
    assert not wire.ask(QUICK, 77, length=180)
    assert not wire.pass_by(B, A, QUICK, 77, length=170)
    assert not wire.ask(QUICK, 77, length=180)  # the first one again
    assert wire.ask(QUICK, 77, length=60)
    assert not wire.ask(QUICK, 77, length=60)


@pytest.mark.parametrize(
    "messages",
    [
        [(A, 180), (A, 170), (A, 60)],
        [(A, 180), (B, 170), (A, 180)],
        [(A, 180), (B, 170), (B, 60)],
        [(A, 180), (A, 60), (B, 170)],
    ],
    ids=["one side alone", "sent again", "the answer twice", "out of order"],
)
def test_ikev1_needs_both_sides_in_turn(wire, messages):
    for src, length in messages:
        assert not wire.pass_by(src, B if src == A else A, QUICK, 77, length=length)


def test_ikev1_messages_go_to_and_fro_with_the_same_spis(wire):
    wire.ask(QUICK, 77, length=180)
    wire.pass_by(B, A, QUICK, 77, length=170, way=THERE)
    assert not wire.ask(QUICK, 77, length=60)
    wire.pass_by(B, A, QUICK, 77, length=170, spis=(7, 10))
    assert not wire.ask(QUICK, 77, length=60)
    wire.pass_by(B, A, QUICK, 77, length=170)
    assert not wire.ask(QUICK, 77, length=60, way=BACK)
    assert wire.ask(QUICK, 77, length=60)


def test_who_spoke_is_known_and_how_often_a_mapping_was_kept_alive(wire):
    assert wire.watcher.only_sender(A, B) is None and wire.watcher.keepalives(A, B) == 0
    wire.watcher.note(None, B, A, (4500, 4500), BACK, 1, 100.0)
    assert wire.watcher.only_sender(A, B) is None and wire.watcher.keepalives(B, A) == 1
    wire.ask(INIT, spis=(7, 0))
    assert wire.watcher.only_sender(A, B) == wire.watcher.only_sender(B, A) == A
    wire.answer(INIT)
    assert wire.watcher.only_sender(A, B) is None


def test_a_float_to_the_nat_t_port_is_noted_once(wire):
    wire.pass_by(A, B, INIT, spis=(7, 0))
    assert wire.sa.floated_at is None
    wire.pass_by(A, B, AUTH, 1, ports=(4500, 4500))
    wire.pass_by(B, A, AUTH, 1, response=True, initiator=False, ports=(4500, 61000))
    assert wire.sa.floated_at == 102 and wire.sa.ports == (61000, 4500)


def test_memory_is_bounded(wire):
    for spi in range(1, IKE_SAS_PER_PEERS + 5):
        wire.pass_by(A, B, INIT, spis=(spi, 0))
    assert [sa.initiator_spi for sa in wire.watcher.ike_sas(A, B)] == list(range(IKE_SAS_PER_PEERS + 4, 4, -1))
    for number in range(PEERS_KEPT):
        wire.pass_by(number.to_bytes(4), B, INIT, spis=(1, 0))
    assert len(wire.watcher) == PEERS_KEPT and not list(wire.watcher.ike_sas(A, B))
