"""A fast source of raw ESP packets: live XDP frames, made and sent by the kernel itself (BPF_PROG_TEST_RUN).

To be run on a lab host, on the interface that the packets leave by:

    xdp_source.py INTERFACE DESTINATION_MAC DESTINATION --count N [--sources M] [--spis M]

A few instructions of BPF give each frame its sequence number and, in turn, one of M source addresses (from 10.1.0.0 on)
or SPIs. The packets are processed on the CPU that sends them, up to where they are dropped or queued: the time that the
whole took, divided by their number, is what one packet costs. Printed is that time, in seconds. IPv4 only.
"""

from __future__ import annotations

import argparse
import ctypes
import ipaddress
import os
import platform
import socket
import struct
import time

FIRST_SPI = 4096
FIRST_SOURCE = int(ipaddress.IPv4Address("10.1.0.0"))

_SYSCALL = {"x86_64": 321, "aarch64": 280}[platform.machine()]  # bpf(2)
_MAP_CREATE, _PROG_LOAD, _PROG_TEST_RUN = 0, 5, 10  # linux/bpf.h
_MAP_TYPE_ARRAY, _PROG_TYPE_XDP = 2, 6
_LIVE_FRAMES = 2
_XDP_DROP, _XDP_TX = 1, 3
_BATCH = 64  # below the 256 frames that a veth's ring holds

_ETHERNET, _IPV4 = 14, 20
_SOURCE_AT = _ETHERNET + 12
_CHECKSUM_AT = _ETHERNET + 10
_SPI_AT = _ETHERNET + _IPV4


def _instruction(code: int, to: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    """struct bpf_insn (linux/bpf.h)."""
    return struct.pack("<BBhi", code, to | source << 4, offset, immediate)


def _program(counter: int, headers: bytes, modulus: int, by_source: bool, base_sum: int) -> bytes:
    """XDP: write the headers, number the frame, give it its source address or SPI, and send it.

    The kernel uses its frames again as the last receiver left them, hence the headers. r6 = context, r7 = data,
    r8 = number.
    """
    i = _instruction
    load32, load64, store32, store16, store64 = 0x61, 0x79, 0x63, 0x6B, 0x7B
    body = [
        i(0xBF, 6, 1),  # r6 = r1
        i(0x62, 10, 0, -4, 0),  # key 0 on the stack
        i(0x18, 1, 1, 0, counter),  # r1 = the map
        i(0x00),
        i(0xBF, 2, 10),
        i(0x07, 2, immediate=-4),  # r2 = &key
        i(0x85, immediate=1),  # r0 = map_lookup_elem(r1, r2)
        i(0x55, 0, 0, 2, 0),  # there is one
        i(0xB7, 0, immediate=_XDP_DROP),
        i(0x95),
        i(load64, 8, 0, 0),  # r8 = number
        i(0xBF, 1, 8),
        i(0x07, 1, immediate=1),
        i(store64, 0, 1, 0),
        i(load32, 7, 6, 0),  # r7 = data
        i(load32, 2, 6, 4),  # r2 = data_end
        i(0xBF, 3, 7),
        i(0x07, 3, immediate=_SPI_AT + 8),
        i(0xBD, 3, 2, 2),  # the headers are there
        i(0xB7, 0, immediate=_XDP_DROP),
        i(0x95),
        *(
            i(0x62, 7, 0, at, word)
            for at, word in zip(range(0, 32, 4), struct.unpack("<8i", headers[:32]), strict=True)
        ),
        i(0x6A, 7, 0, 32, int.from_bytes(headers[32:34], "little")),
        i(0xBC, 1, 8),  # sequence number = number + 1, in network order
        i(0x04, 1, immediate=1),
        i(0xDC, 1, immediate=32),
        i(store32, 7, 1, _SPI_AT + 4),
        i(0x97, 8, immediate=modulus),
    ]
    if by_source:
        body += [
            i(0xBC, 1, 8),
            i(0x04, 1, immediate=FIRST_SOURCE),
            i(0xBC, 3, 1),
            i(0xDC, 3, immediate=32),
            i(store32, 7, 3, _SOURCE_AT),
            i(0xBF, 3, 1),  # the header's checksum: RFC 1071
            i(0x77, 3, immediate=16),
            i(0x57, 1, immediate=0xFFFF),
            i(0x0F, 1, 3),
            i(0x07, 1, immediate=base_sum),
            *[i(0xBF, 3, 1), i(0x77, 3, immediate=16), i(0x57, 1, immediate=0xFFFF), i(0x0F, 1, 3)] * 2,
            i(0xA7, 1, immediate=0xFFFF),
            i(0xDC, 1, immediate=16),
            i(store16, 7, 1, _CHECKSUM_AT),
            i(0x62, 7, 0, _SPI_AT, int.from_bytes(FIRST_SPI.to_bytes(4), "little")),
        ]
    else:
        body += [
            i(0x04, 8, immediate=FIRST_SPI),
            i(0xDC, 8, immediate=32),
            i(store32, 7, 8, _SPI_AT),
        ]
    return b"".join([*body, i(0xB7, 0, immediate=_XDP_TX), i(0x95)])


def _bpf(command: int, attributes: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(attributes, max(len(attributes), 128))
    result = int(libc.syscall(_SYSCALL, command, buffer, len(buffer)))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"bpf({command}): {os.strerror(number)}")
    return result


def _address(octets: bytes) -> tuple[int, object]:
    """Where these bytes are, and what keeps them there."""
    buffer = ctypes.create_string_buffer(octets, len(octets))
    return ctypes.addressof(buffer), buffer


def _sum16(octets: bytes) -> int:
    return sum(struct.unpack(f"!{len(octets) // 2}H", octets))


def send(
    interface: str,
    mac: str,
    destination: str,
    *,
    count: int,
    sources: int,
    spis: int,
    size: int,
    rate: int,
    burst: int,
    cpu: int,
) -> float:
    """Send `count` packets, in whole bursts if there is a rate; gives the seconds it took. Raises OSError."""
    chunk = min(count, burst) if rate else count
    if cpu >= 0:
        os.sched_setaffinity(0, {cpu})
    index = socket.if_nametoindex(interface)
    with open(f"/sys/class/net/{interface}/address", encoding="ascii") as file:
        own_mac = bytes.fromhex(file.read().strip().replace(":", ""))
    source = ipaddress.IPv4Address(FIRST_SOURCE).packed
    header = struct.pack("!BBHHHBBH", 0x45, 0, _IPV4 + size, 0, 0, 64, 50, 0)
    header += source + ipaddress.IPv4Address(destination).packed
    base_sum = _sum16(header) - _sum16(source)
    total = _sum16(header)
    for _ in range(2):
        total = (total & 0xFFFF) + (total >> 16)
    header = header[:10] + struct.pack("!H", total ^ 0xFFFF) + header[12:]
    frame = bytes.fromhex(mac.replace(":", "")) + own_mac + b"\x08\x00" + header
    frame += struct.pack("!II", FIRST_SPI, 1) + bytes(size - 8)

    counter = _bpf(_MAP_CREATE, struct.pack("=IIII", _MAP_TYPE_ARRAY, 4, 8, 1))
    program = _program(counter, frame[: _ETHERNET + _IPV4], max(sources, spis), sources > 1, base_sum)
    instructions, keep_program = _address(program)
    licence, keep_licence = _address(b"GPL\0")
    attributes = struct.pack("=IIQQ", _PROG_TYPE_XDP, len(program) // 8, instructions, licence)
    loaded = _bpf(_PROG_LOAD, attributes)
    data, keep_data = _address(frame)
    context, keep_context = _address(struct.pack("=IIIIII", 0, len(frame), 0, index, 0, 0))
    run = struct.pack(
        "=IIIIQQIIIIQQIII", loaded, 0, len(frame), 0, data, 0, chunk, 0, 24, 0, context, 0, _LIVE_FRAMES, 0, _BATCH
    )
    started = time.perf_counter()
    for sent in range(0, count, chunk):
        _bpf(_PROG_TEST_RUN, run)
        if rate and (ahead := (sent + chunk) / rate - (time.perf_counter() - started)) > 0:
            time.sleep(ahead)
    elapsed = time.perf_counter() - started
    del keep_program, keep_licence, keep_data, keep_context
    return elapsed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("interface")
    parser.add_argument("mac")
    parser.add_argument("destination")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--sources", type=int, default=1, help="source addresses, in turn")
    parser.add_argument("--spis", type=int, default=1, help="SPIs, in turn, if there is one source address only")
    parser.add_argument("--size", type=int, default=84, help="bytes of ESP a packet, header included")
    parser.add_argument("--rate", type=int, default=0, help="packets a second, in bursts; 0: as fast as can be")
    parser.add_argument("--burst", type=int, default=1024, help="packets in one go, if there is a rate")
    parser.add_argument("--cpu", type=int, default=-1, help="the CPU to stay on")
    print(send(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
