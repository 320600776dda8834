import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, IPOption_NOP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting
from scapy.layers.ipsec import AH, ESP, SecurityAssociation
from scapy.packet import Raw

from fwd.core.packet import Kind, Malformation, PacketError, parse
from tests.builders import HERE, HERE6, PEER, PEER6, esp, esp_in_udp, ike, ip, ipv4, ipv6, packed, udp

SPI = st.integers(1, 2**32 - 1)


def refusal(octets: bytes) -> Malformation:
    with pytest.raises(PacketError) as caught:
        parse(octets)
    return caught.value.reason


@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_packet_or_the_declared_error(octets):
    try:
        packet = parse(octets)
    except PacketError:
        return
    assert len(packet.src) == len(packet.dst) in (4, 16)
    assert packet.spi is None or 0 < packet.spi < 2**32


@given(
    st.sampled_from([esp(PEER, HERE, 7), esp(PEER6, HERE6, 7), ike(PEER6, HERE6, 4500), esp_in_udp(PEER, HERE, 7)]),
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 255)), max_size=6),
    st.integers(0, 120),
)
def test_damaged_packets_give_a_packet_or_the_declared_error(octets, damage, length):
    damaged = bytearray(octets)
    for position, value in damage:
        damaged[position % len(damaged)] = value
    try:
        parse(bytes(damaged[:length]))
    except PacketError:
        pass


@given(SPI, st.integers(0, 2**32 - 1), st.integers(0, 1400))
def test_plain_esp_in_both_families(spi, seq, size):
    for source, destination, header in ((PEER, HERE, 20), (PEER6, HERE6, 40)):
        packet = parse(esp(source, destination, spi, seq, size))
        assert (packet.kind, packet.src, packet.dst) == (Kind.ESP, packed(source), packed(destination))
        assert (packet.spi, packet.seq, packet.length) == (spi, seq, header + 8 + size)


@given(SPI, st.integers(0, 2**32 - 1), st.booleans(), st.binary(min_size=1, max_size=60))
def test_scapys_own_esp_is_read_as_scapy_reads_it(spi, seq, is_nat_t, text):
    nat_t = UDP(sport=4500, dport=61000) if is_nat_t else None
    association = SecurityAssociation(ESP, spi=spi, seq_num=seq, crypt_algo="NULL", nat_t_header=nat_t)
    octets = bytes(association.encrypt(IP(src="10.0.0.1", dst="10.0.0.2") / UDP() / Raw(text)))
    packet = parse(octets)
    oracle = IP(octets)
    assert (packet.spi, packet.seq, packet.length) == (spi, seq, oracle.len)
    assert packet.kind is (Kind.ESP_IN_UDP if is_nat_t else Kind.ESP)


def test_the_length_is_the_headers_not_the_copys():
    assert parse(esp(PEER, HERE, 7, size=1400)[:60]).length == 1428


def test_ipv4_options_are_skipped():
    octets = bytes(IP(src=PEER, dst=HERE, proto=50, options=[IPOption_NOP()] * 4) / Raw(struct.pack("!II", 99, 5)))
    assert (parse(octets).spi, parse(octets).seq) == (99, 5)


def test_ipv6_extension_headers_are_walked():
    chain = IPv6(src=PEER6, dst=HERE6) / IPv6ExtHdrHopByHop() / IPv6ExtHdrRouting() / IPv6ExtHdrDestOpt()
    octets = bytes(chain / AH(nh=50, spi=1, payloadlen=4, icv=b"0" * 12) / ESP(spi=77, seq=3, data=b"x" * 16))
    packet = parse(octets)
    assert (packet.spi, packet.seq, packet.length) == (77, 3, len(octets))


def test_too_many_ipv6_extension_headers_are_refused():
    chain = IPv6(src=PEER6, dst=HERE6)
    for _ in range(9):
        chain = chain / IPv6ExtHdrDestOpt()
    assert refusal(bytes(chain / ESP(spi=77, seq=3, data=b"x" * 16))) is Malformation.IPV6_EXTENSION


def test_a_first_fragment_has_its_spi_and_a_later_one_has_none():
    body = struct.pack("!II", 99, 5) + bytes(8)
    assert parse(ipv4(PEER, HERE, 50, body, fragment=0x2000)).spi == 99
    later = parse(ipv4(PEER, HERE, 50, body, fragment=0x2003))
    assert (later.kind, later.spi, later.seq) == (Kind.ESP, None, None)
    for offset, spi in ((0, 99), (3, None)):
        octets = bytes(IPv6(src=PEER6, dst=HERE6) / IPv6ExtHdrFragment(nh=50, offset=offset, m=1) / Raw(body))
        assert parse(octets).spi == spi


def test_a_later_fragment_of_udp_is_not_taken_for_ike():
    assert refusal(ipv4(PEER, HERE, 17, udp(PEER, HERE, 500, 500, b"")[20:], fragment=5)) is Malformation.NOT_IPSEC


def test_ike_and_esp_on_the_nat_t_port_are_told_apart():
    assert parse(ike(PEER, HERE)).kind is Kind.IKE
    assert parse(ike(PEER, HERE, 4500)).kind is Kind.IKE
    assert parse(udp(PEER, HERE, 61000, 4500, b"\xff")).kind is Kind.IKE  # a keepalive
    packet = parse(esp_in_udp(PEER, HERE, 0xABCD, 61000, 4500))
    assert (packet.kind, packet.spi, packet.sport, packet.dport) == (Kind.ESP_IN_UDP, 0xABCD, 61000, 4500)
    assert refusal(udp(PEER, HERE, 4500, 4500, b"\xff\xff")) is Malformation.UDP
    assert refusal(udp(PEER, HERE, 4500, 4500, b"\0\0\0")) is Malformation.UDP


def test_bytes_beyond_the_ip_length_are_not_read():
    marker_is_padding = udp(PEER, HERE, 4500, 4500, b"\0\0\0") + b"\0"
    assert refusal(marker_is_padding) is Malformation.UDP


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (b"", Malformation.TRUNCATED),
        (b"\x50" * 40, Malformation.IP_VERSION),
        (esp(PEER, HERE, 7)[:19], Malformation.TRUNCATED),
        (b"\x44" + esp(PEER, HERE, 7)[1:], Malformation.IP_HEADER),
        (ipv4(PEER, HERE, 50, bytes(7)), Malformation.TRUNCATED),
        (esp(PEER6, HERE6, 7)[:39], Malformation.TRUNCATED),
        (ipv6(PEER6, HERE6, 50, b""), Malformation.IP_HEADER),
        (ipv6(PEER6, HERE6, 60, b"\x32\xff" + bytes(6)), Malformation.IPV6_EXTENSION),
        (ipv6(PEER6, HERE6, 44, b"\x32"), Malformation.TRUNCATED),
        (esp(PEER, HERE, 0), Malformation.ESP),
        (ip(PEER, HERE, 17, b"\x01\xf4"), Malformation.TRUNCATED),
        (udp(PEER, HERE, 53, 53, b"x"), Malformation.NOT_IPSEC),
        (ip(PEER6, HERE6, 6, bytes(20)), Malformation.NOT_IPSEC),
    ],
)
def test_absurd_packets_are_refused_with_their_reason(octets, reason):
    assert refusal(octets) is reason
