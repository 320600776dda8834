"""A charon that does what a real one cannot be made to: 10,000 SAs, storms of events, garbage, lists without end.

It speaks VICI as README_PROTOCOL of strongSwan's vici plugin has it: packets behind a length of 32 bits, their type in
the first byte, and messages of named sections and values.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

COMMAND, ANSWER, UNKNOWN_COMMAND, REGISTER, UNREGISTER, CONFIRM, UNKNOWN_EVENT, EVENT = range(8)


def encoded(message: dict[str, Any]) -> bytes:
    """A message as VICI has it."""
    octets = bytearray()
    for key, value in message.items():
        name = bytes([len(key)]) + key.encode()
        if isinstance(value, dict):
            octets += b"\x01" + name + encoded(value) + b"\x02"
        else:
            octets += b"\x03" + name + struct.pack("!H", len(f"{value}")) + f"{value}".encode()
    return bytes(octets)


def packet(kind: int, name: str = "", message: bytes = b"") -> bytes:
    """A packet with its length."""
    named = bytes([len(name)]) + name.encode() if name else b""
    return struct.pack("!IB", 1 + len(named) + len(message), kind) + named + message


def child(number: int, base: int = 0, **changes: Any) -> dict[str, Any]:
    """An installed CHILD_SA; its SPIs follow from `number` and `base`."""
    return {
        "name": f"net{number}",
        "uniqueid": base + number + 1,
        "reqid": number + 1,
        "state": "INSTALLED",
        "mode": "TUNNEL",
        "protocol": "ESP",
        "spi-in": f"{0x10000000 + base + number:08x}",
        "spi-out": f"{0x20000000 + base + number:08x}",
        "install-time": "3",
        "packets-in": "0",
        "packets-out": "0",
        **changes,
    }


def ike_sa(number: int, children: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The IKE_SA of peer `number` with these CHILD_SAs, as the messages about SAs have it."""
    return {
        f"gw{number}": {
            "uniqueid": number + 1,
            "version": "2",
            "state": "ESTABLISHED",
            "local-host": "192.0.2.1",
            "local-port": "500",
            "local-id": "fwd.lab",
            "remote-host": str(ip_address(0x0A800000 + number)),
            "remote-port": "500",
            "remote-id": f"peer{number}.lab",
            "initiator": "yes",
            "child-sas": children,
            **changes,
        }
    }


def sas(count: int, base: int = 0) -> list[bytes]:
    """What `list-sas` says of so many tunnels, a message each."""
    return [encoded(ike_sa(n, {f"net{n}-{base + n + 1}": child(n, base)})) for n in range(count)]


def up(number: int, base: int = 0) -> bytes:
    """The event's message that says that a CHILD_SA came up."""
    return encoded({"up": "yes", **ike_sa(number, {f"net{number}": child(number, base)})})


def down(number: int, base: int = 0) -> bytes:
    """That it went down."""
    return encoded(ike_sa(number, {f"net{number}": child(number, base, state="DELETING")}))


def rekey(number: int, old: int, new: int) -> bytes:
    """That one took over from another."""
    return encoded(ike_sa(number, {f"net{number}": {"old": child(number, old), "new": child(number, new)}}))


class FakeCharon:
    """Listens on a path. `sas` are the messages that it answers `list-sas` with.

    `answer`, if it is set, is given each packet that comes, and its connection, and says whether it has dealt with it.
    """

    def __init__(self, path: Path, sas: Iterable[bytes] = ()) -> None:
        self.sas = list(sas)
        self.answer: Callable[[socket.socket, bytes], bool] | None = None
        self.accepted = 0
        self._path = path
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._hearing: dict[socket.socket, set[bytes]] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def listeners(self) -> int:
        """How many connections have registered for events of SAs."""
        with self._lock:
            return sum(b"child-updown" in names for names in self._hearing.values())

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    def tell(self, name: str, messages: Iterable[bytes]) -> None:
        """Send events to all who registered for them, as fast as they read."""
        with self._lock:
            hearing = [connection for connection, names in self._hearing.items() if name.encode() in names]
        octets = b"".join(packet(EVENT, name, message) for message in messages)
        for connection in hearing:
            connection.sendall(octets)

    def hang_up(self) -> None:
        """Close all connections; new ones are taken."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self, *, leaves_socket: bool = False) -> None:
        """End, and take the socket away, as charon does unless it is killed."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()
        self.hang_up()
        if not leaves_socket:
            self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            stream = connection.makefile("rb")
            while len(header := stream.read(4)) == 4:
                body = stream.read(struct.unpack("!I", header)[0])
                if self.answer is None or not self.answer(connection, body):
                    self._reply(connection, body)
        self._open.discard(connection)
        with self._lock:
            self._hearing.pop(connection, None)

    def _reply(self, connection: socket.socket, body: bytes) -> None:
        kind, name = body[0], body[2 : 2 + body[1]]
        if kind in (REGISTER, UNREGISTER):
            with self._lock:
                names = self._hearing.setdefault(connection, set())
                (names.add if kind == REGISTER else names.discard)(name)
                connection.sendall(packet(CONFIRM))
        elif name == b"list-sas":
            for message in self.sas:
                connection.sendall(packet(EVENT, "list-sa", message))
            connection.sendall(packet(ANSWER))
        else:
            connection.sendall(packet(ANSWER, "", encoded({"daemon": "fake", "version": "6"})))
