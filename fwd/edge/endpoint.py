"""Where things are sent, as the configuration has it, and how much of them has yet to arrive."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from typing import NamedTuple


class Endpoint(NamedTuple):
    """`udp`, `tcp`, or `tls` over TCP; an IPv4 or IPv6 address; a port."""

    transport: str
    address: str
    port: int

    def __str__(self) -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.transport}:{address}:{self.port}"

    def socket(self) -> socket.socket:
        """A new socket of that kind, which blocks and is not connected. Raises OSError."""
        return socket.socket(
            socket.AF_INET6 if ":" in self.address else socket.AF_INET,
            socket.SOCK_DGRAM if self.transport == "udp" else socket.SOCK_STREAM,
        )


def unacknowledged_bytes(connection: socket.socket) -> int:
    """What was sent over TCP and the other host has not acknowledged (tcp(7), SIOCOUTQ). Raises OSError.

    Of a connection that was reset that is nothing, too.
    """
    count = fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4))
    return int(struct.unpack("i", count)[0])
