"""A source of UDP whose rate rises and falls, to be run on a lab host: `wave.py SOURCE DESTINATION --peak 500`.

Nobody answers it. The load is bounded: so many packets a second at most, for so many seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import socket
import time

_STEP_S = 0.05


def send(source: str, destination: str, *, peak: float, period: float, size: int, seconds: float) -> None:
    """Send datagrams of `size` bytes, from a tenth of `peak` a second to all of it, in waves of `period` seconds."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind((source, 0))
        started = time.monotonic()
        due = 0.0
        while (elapsed := time.monotonic() - started) < seconds:
            due += peak * _STEP_S * (0.55 + 0.45 * math.sin(2 * math.pi * elapsed / period))
            for _ in range(int(due)):
                with contextlib.suppress(OSError):  # what a rule of the lab drops
                    udp.sendto(bytes(size), (destination, 9))
            due %= 1
            time.sleep(_STEP_S)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("--peak", type=float, default=100, help="packets a second")
    parser.add_argument("--period", type=float, default=20, help="seconds from one peak to the next")
    parser.add_argument("--size", type=int, default=1000, help="bytes of UDP payload")
    parser.add_argument("--seconds", type=float, default=60, help="when it ends")
    send(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
