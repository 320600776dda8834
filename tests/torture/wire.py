"""Puts packets on the wire as they are, whatever they are: `wire.py INTERFACE MAC FILE` on a lab host.

The file has a packet a line, in hex, from its IP header on; MAC is that of the next host. What goes to many goes to
their MAC address, and an IPv4 header that is long enough has its checksum put right: the kernel looks at nothing else
before.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from pathlib import Path


def frame(packet: bytes, mac: bytes) -> bytes:
    """An Ethernet frame with one IPv4 or IPv6 packet."""
    if packet[0] >> 4 == 6:
        group = b"\x33\x33" + packet[36:40] if packet[24:25] == b"\xff" else mac
        return group + bytes(6) + b"\x86\xdd" + packet
    packet = _with_checksum(packet)
    to = packet[16:20]
    if to[:1] and 224 <= to[0] < 240:
        mac = b"\x01\x00\x5e" + bytes([to[1] & 0x7F]) + to[2:]
    elif to[3:] == b"\xff":  # the networks of the lab have 24 bits
        mac = b"\xff" * 6
    return mac + bytes(6) + b"\x08\x00" + packet


def _with_checksum(packet: bytes) -> bytes:
    header = (packet[0] & 15) * 4
    if header < 20 or len(packet) < header:
        return packet
    words = struct.unpack(f"!{header // 2}H", packet[:10] + bytes(2) + packet[12:header])
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return packet[:10] + (total ^ 0xFFFF).to_bytes(2) + packet[12:]


def main() -> None:
    """The command line."""
    interface, mac, path = sys.argv[1:]
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((interface, 0))
        for line in Path(path).read_text().split():
            raw.send(frame(bytes.fromhex(line), bytes.fromhex(mac)))
            time.sleep(0.001)


if __name__ == "__main__":
    main()
