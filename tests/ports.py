"""Ports of this machine that nobody else takes before a test does."""

import itertools
import os
import socket

#: Each worker of pytest-xdist has its own, and the kernel gives away none below 32768 by itself.
_PORTS = itertools.count(20_000 + 1_500 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 8))


def free_port(kind=socket.SOCK_STREAM, address="127.0.0.1"):
    """One on which nobody listens; another one each time."""
    for port in _PORTS:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")
