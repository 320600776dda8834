"""IKE's cleartext header, and what can be seen of an exchange from outside."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.isakmp import ISAKMP

from fwd.core.constants import IKE_SAS_PER_PEERS, PEERS_KEPT
from fwd.core.ike import IkeWatcher, parse_header
from fwd.core.packet import Kind, PacketError, parse
from tests.builders import LEFT, RIGHT, packed, udp

A, B = packed(LEFT), packed(RIGHT)
PORTS = (500, 500)
INIT, AUTH, CHILD, INFORMATIONAL, QUICK = (2, 34), (2, 35), (2, 36), (2, 37), (1, 32)


def message(kind, message_id=0, *, response=False, initiator=True, spis=(7, 9), length=28):
    major, exchange = kind
    flags = (0x20 * response | 0x08 * initiator) if major == 2 else 1
    return struct.pack("!QQBBBBII", *spis, 33, major << 4, exchange, flags, message_id, length)


def header(*args, **kwargs):
    return parse_header(message(*args, **kwargs), 0, 28)


def test_the_header_is_what_scapy_reads():
    octets = message(CHILD, 5, response=True, initiator=False, spis=(0x1122334455667788, 0x99AABBCCDDEEFF00))
    ours, theirs = parse_header(octets, 0, len(octets)), ISAKMP(octets)
    assert ours.initiator_spi.to_bytes(8) == theirs.init_cookie and ours.responder_spi.to_bytes(8) == theirs.resp_cookie
    assert (ours.major << 4 | ours.minor, ours.exchange_type) == (theirs.version, theirs.exch_type)
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

    def pass_by(self, src, dst, *args, ports=PORTS, **kwargs):
        self.now += 1
        return self.watcher.note(header(*args, **kwargs), src, dst, ports, 1, self.now)

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
    wire.pass_by(A, B, INIT, spis=(7, 0))
    wire.pass_by(B, A, CHILD, 0, initiator=False)
    assert wire.pass_by(A, B, CHILD, 0, response=True)


def test_what_is_sent_again_is_counted_as_such(wire):
    for _ in range(3):
        wire.pass_by(A, B, AUTH, 1)
    assert wire.pass_by(B, A, AUTH, 1, response=True, initiator=False)
    assert not wire.pass_by(B, A, AUTH, 1, response=True, initiator=False)
    assert (wire.sa.message_count, wire.sa.retransmit_count) == (5, 3)


def test_ikev1_is_complete_with_the_third_message_of_quick_mode(wire):
    assert not wire.pass_by(A, B, (1, 2), spis=(7, 0))
    assert not wire.pass_by(A, B, QUICK, 77)
    assert not wire.pass_by(B, A, QUICK, 77)
    assert wire.pass_by(A, B, QUICK, 77)


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
