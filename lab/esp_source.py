"""A source of raw ESP packets, to be run on a lab host: `esp_source.py SOURCE DESTINATION --count N --spis M`.

What it sends is real protocol 50 with running sequence numbers, but encrypted by nobody: in transit that is the same.
About 100,000 packets a second at most; the load is bounded in count, and so in time.
"""

from __future__ import annotations

import argparse
import socket
import struct
import time

#: SPIs below 256 are reserved (RFC 4303 section 2.1).
FIRST_SPI = 4096


def send(source: str, destination: str, *, count: int, spis: int, rate: float, size: int, first_spi: int) -> None:
    """Send `count` packets, round robin over `spis` SPIs, at `rate` packets a second; `size` counts the ESP header."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    with socket.socket(family, socket.SOCK_RAW, 50) as raw:
        raw.bind((source, 0))
        raw.connect((destination, 0))
        raw.settimeout(10)
        payload = bytes(size - 8)
        started = time.monotonic()
        for number in range(count):
            raw.send(struct.pack("!II", first_spi + number % spis, number // spis + 1) + payload)
            if number % 64 == 63 and (ahead := number / rate - (time.monotonic() - started)) > 0:
                time.sleep(ahead)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--spis", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e9, help="packets a second")
    parser.add_argument("--size", type=int, default=64, help="bytes of ESP a packet, header included")
    parser.add_argument("--first-spi", type=int, default=FIRST_SPI)
    send(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
