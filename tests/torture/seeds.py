"""Where a fuzzer begins: hostile packets and programs of our own making, one of each kind that we could think of.

`tests/torture/corpus/*.hex` is what fuzzing made of them, one input a line; `read_corpus` and `write_corpus` go there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from tests.builders import HERE, HERE6, LEFT, PEER, PEER6, RIGHT, esp, esp_in_udp, ike, ip, ipv4, ipv6, udp
from tests.torture.hostile import EVENTS, FAST_PATH, program

CORPUS = Path(__file__).parent / "corpus"

ESP_BODY = struct.pack("!II", 0x1001, 1) + bytes(24)
_HOP, _ROUTING, _FRAGMENT, _ESP, _AH, _DESTINATION, _MOBILITY = 0, 43, 44, 50, 51, 60, 135


def chain(*headers: tuple[int, bytes], payload: bytes, last: int = _ESP, src: str = PEER6, dst: str = HERE6) -> bytes:
    """IPv6 with extension headers: (its kind, what follows its first byte)."""
    kinds = [kind for kind, _ in headers] + [last]
    body = b"".join(bytes([following]) + rest for (_, rest), following in zip(headers, kinds[1:], strict=True))
    return ipv6(src, dst, kinds[0], body + payload)


def fragment6(offset: int, *, more: bool, number: int = 7) -> tuple[int, bytes]:
    """IPv6's fragment header; `offset` in units of 8 bytes."""
    return (_FRAGMENT, struct.pack("!BHI", 0, offset << 3 | more, number))


def ike_message(exchange: int, flags: int, message_id: int, *, responder: int = 9, version: int = 0x20) -> bytes:
    """An IKE message without a payload."""
    return struct.pack("!QQBBBBII", 7, responder, 33, version, exchange, flags, message_id, 28)


OPTIONS = (_DESTINATION, bytes(7))
HOP_BY_HOP = (_HOP, bytes(7))

PACKETS: tuple[bytes, ...] = (
    esp(PEER, HERE, 0x1001),
    esp(HERE, PEER, 0x2001),
    esp(PEER6, HERE6, 0x1001),
    esp(LEFT, RIGHT, 0xFFFFFFFF, seq=0xFFFFFFFF, size=0),
    esp(PEER, HERE, 0),
    esp(PEER, HERE, 1, seq=0),
    esp_in_udp(PEER, HERE, 0x1001),
    esp_in_udp(PEER6, HERE6, 0x1001, 61000, 4500),
    esp_in_udp(PEER, HERE, 0x1001, 500, 4500),
    udp(PEER, HERE, 4500, 4500, b"\xff"),
    udp(PEER, HERE, 4500, 4500, b"\xff" * 9),
    udp(PEER, HERE, 4500, 4500, b"\0\0\0"),
    ike(PEER, HERE),
    ike(PEER6, HERE6, 4500),
    udp(PEER, HERE, 500, 500, ike_message(34, 8, 0, responder=0)),
    udp(PEER, HERE, 500, 500, ike_message(32, 0, 5, version=0x10)),
    udp(PEER, HERE, 500, 500, ike_message(32, 0, 5, version=0x10)[:-1] + b"\x1b"),
    ike_message(35, 0x20, 1),
    # Fragments: first, in the middle, last; tiny, and overlapping the one before.
    ipv4(PEER, HERE, _ESP, ESP_BODY, fragment=0x2000),
    ipv4(PEER, HERE, _ESP, ESP_BODY, fragment=0x2001),
    ipv4(PEER, HERE, _ESP, ESP_BODY[:8], fragment=0x2000),
    ipv4(PEER, HERE, _ESP, ESP_BODY[:4], fragment=0x2000),
    ipv4(PEER, HERE, _ESP, b"", fragment=0x1FFF),
    ipv4(PEER, HERE, _ESP, ESP_BODY, fragment=0xC000),
    ipv4(PEER, HERE, 17, struct.pack("!HHHH", 4500, 4500, 40, 0), fragment=0x2000),
    ipv4(PEER, HERE, 17, ESP_BODY, fragment=1),
    chain(fragment6(0, more=True), last=_ESP, payload=ESP_BODY),
    chain(fragment6(0, more=False), last=_ESP, payload=ESP_BODY),
    chain(fragment6(1, more=True), last=_ESP, payload=ESP_BODY),
    chain(fragment6(0, more=True), OPTIONS, last=_ESP, payload=b""),
    chain(fragment6(3, more=False), OPTIONS, last=_ESP, payload=ESP_BODY),
    chain(fragment6(0, more=True), fragment6(2, more=True), last=_ESP, payload=ESP_BODY),
    # Chains of extension headers.
    chain(HOP_BY_HOP, (_ROUTING, bytes(7)), OPTIONS, last=_ESP, payload=ESP_BODY),
    chain((_AH, b"\x04" + bytes(22)), OPTIONS, (_MOBILITY, bytes(7)), last=17, payload=bytes(8)),
    chain(*[OPTIONS] * 9, last=_ESP, payload=ESP_BODY),
    chain(*[OPTIONS] * 7, last=_ESP, payload=ESP_BODY),
    chain((_DESTINATION, b"\xff" + bytes(6)), last=_ESP, payload=ESP_BODY),
    chain((_HOP, b"\x00\xc2\x04\x00\x01\x00\x00"), last=_ESP, payload=ESP_BODY),
    ipv6(PEER6, HERE6, _ESP, b"") + ESP_BODY,  # as a jumbogram has it: no length
    # Within other tunnels, which are not fwd's.
    ip(PEER, HERE, 47, b"\0\0\x08\0" + esp(LEFT, RIGHT, 7)),
    ip(PEER, HERE, 4, esp(LEFT, RIGHT, 7)),
    ip(PEER6, HERE6, 41, esp(PEER6, HERE6, 7)),
    # Lengths that are not so.
    esp(PEER, HERE, 7, size=1400)[:60],
    esp(PEER, HERE, 7)[:27],
    esp(PEER, HERE, 7) + bytes(9),
    b"\x45\x00\xff\xff" + esp(PEER, HERE, 7)[4:],
    b"\x45\x00\x00\x13" + esp(PEER, HERE, 7)[4:],
    b"\x44" + esp(PEER, HERE, 7)[1:],
    b"\x4f" + esp(PEER, HERE, 7)[1:],
    ipv4(PEER, HERE, _ESP, ESP_BODY, options=b"\x01" * 40),
    ipv4(PEER, HERE, 17, struct.pack("!HHHH", 4500, 4500, 8, 0) + ESP_BODY, options=bytes(4)),
    # To all, to many, to oneself.
    esp(PEER, "255.255.255.255", 7),
    esp(PEER, "224.0.0.1", 7),
    esp(PEER6, "ff02::1", 7),
    esp(HERE, HERE, 0x1001),
    esp(HERE6, HERE6, 0x1001),
    ipv4(HERE, HERE, _ESP, ESP_BODY, fragment=5),
    udp(HERE, HERE, 4500, 4500, ESP_BODY),
    udp(HERE, HERE, 500, 500, ike_message(35, 0x20, 1)),
    esp("127.0.0.1", "127.0.0.1", 7),
    esp("0.0.0.0", "0.0.0.0", 7),
)

_WAYS = ("receive", "send", "forward", "forward back")


def _programs() -> Iterable[bytes]:
    for number, packet in enumerate(PACKETS):
        way = _WAYS[number % 4]
        yield program(number, (way, packet), "again", (way, packet), "wait 1", "again")
    here, there = esp(PEER, HERE, 0x1001), esp(HERE, PEER, 0x2001)
    for options in range(32):
        yield program(options, ("receive", here), "established", ("send", there), "again", "rekeyed", "wait 6", "again")
        yield program(options, ("receive", here), *EVENTS, "again", ("send", there), *EVENTS, "again")
        asked, said = ike_message(35, 8, 1), ike_message(35, 0x20, 1)
        across, back = esp(LEFT, RIGHT, 7), esp(RIGHT, LEFT, 9)
        yield program(
            options,
            ("forward", across),
            ("forward", udp(LEFT, RIGHT, 500, 500, asked)),
            ("forward back", udp(RIGHT, LEFT, 500, 500, said)),
            ("forward", across),
            ("forward back", back),
            "wait 6",
            "again",
            "late 61",
            "again",
        )
        many = [("forward", esp(LEFT, RIGHT, spi)) for spi in range(1, 9)]
        yield program(options | FAST_PATH, *many, "wait 6", *many[:4], "late 61", *many[4:6])


PROGRAMS: tuple[bytes, ...] = tuple(dict.fromkeys(_programs()))


def read_corpus(name: str) -> list[bytes]:
    """The inputs that are kept in the repository."""
    lines = (CORPUS / f"{name}.hex").read_text().splitlines()
    return [bytes.fromhex(line) for line in lines if not line.startswith("#")]


def write_corpus(name: str, inputs: Iterable[bytes]) -> None:
    """Keep these inputs, the short ones first, so that a change of a few shows as such."""
    lines = [octets.hex() for octets in sorted(set(inputs), key=lambda octets: (len(octets), octets))]
    head = f"# Made by `python -m tests.torture.fuzz {name} --keep` from the seeds in seeds.py; one input a line.\n"
    (CORPUS / f"{name}.hex").write_text(head + "\n".join(lines) + "\n")
