"""tcpdump on a host's interface: the independent witness of what was on the wire."""

from __future__ import annotations

import re
import signal
import struct
import subprocess
import time
from dataclasses import dataclass
from ipaddress import ip_address
from types import TracebackType

from .sandbox import PATIENCE, LabError, Process, enter, outside_path

_PCAP_HEADER = struct.Struct("<IHHiIII")
_RECORD = struct.Struct("<IIII")
_ETHERNET = 14

#: What tcpdump prints when it gets SIGUSR1.
_FIGURES = re.compile(r"(\d+) packets? captured, (\d+) packets? received by filter, (\d+) packets? dropped by kernel")
_CATCH_UP_S = 30.0 * PATIENCE
#: It answers, and its figures stay as they are for so long: the rest is not for it. That came before its filter was in
#: place, or is, on loopback, what libpcap takes only as it comes in and not as it goes out.
_SAME_S = 1.0 * PATIENCE


@dataclass(frozen=True, slots=True)
class Captured:
    """One packet: when (Unix seconds), from where to where (text), its length by the IP header, its bytes."""

    at: float
    source: str
    destination: str
    length: int
    octets: bytes


class Capture:
    """A running tcpdump. As a context manager it stops at the end; then `packets` has them all."""

    def __init__(self, first_pid: int, host: str, interface: str, expression: str) -> None:
        self._path = outside_path(first_pid, f"/run/hosts/{host}/{interface}.pcap")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        command = ["tcpdump", "-i", interface, "-U", "--immediate-mode", "-Z", "root", "-s", "0", "-B", "16384", "-w"]
        self._process = Process(
            [*enter(first_pid, host), *command, f"/run/hosts/{host}/{interface}.pcap", expression],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert self._process.popen.stderr is not None
        for line in self._process.popen.stderr:
            if "listening on" in line:
                break
        else:
            self._process.end()
            raise LabError(f"tcpdump on {host}:{interface} did not start: is it installed?")
        self.summary = ""
        self.packets: list[Captured] = []

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop and read what was captured."""
        if not self._process.is_running():
            return
        try:
            self._catch_up()
            self._process.send(signal.SIGINT)
            _, self.summary = self._process.popen.communicate(timeout=_CATCH_UP_S)
        finally:
            self._process.end()
        self.packets = read_pcap(self._path.read_bytes())

    def _catch_up(self) -> None:
        """Until tcpdump has read all that the kernel has for it: what it has not when it stops is lost."""
        assert self._process.popen.stderr is not None
        deadline = time.monotonic() + _CATCH_UP_S
        before: tuple[int, ...] = ()
        same_since = time.monotonic()
        while time.monotonic() < deadline:
            self._process.send(signal.SIGUSR1)
            line = self._process.popen.stderr.readline()
            figures = _FIGURES.search(line)
            if figures is None:
                raise LabError(f"tcpdump does not say how far it is: {line.strip()}")
            captured, received, dropped = now = tuple(map(int, figures.groups()))
            if captured + dropped >= received:
                return
            if now != before:
                before, same_since = now, time.monotonic()
            elif time.monotonic() - same_since > _SAME_S:
                return
            time.sleep(0.01)
        raise LabError(f"tcpdump does not keep up: {line.strip()}")

    def printed(self) -> list[str]:
        """The packets as tcpdump prints them, a line each."""
        command = ["tcpdump", "-nn", "-r", str(self._path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()

    def total(self, source: str, destination: str) -> tuple[int, int]:
        """Packets and bytes (by the IP header) from one address to another."""
        lengths = [
            packet.length for packet in self.packets if (packet.source, packet.destination) == (source, destination)
        ]
        return len(lengths), sum(lengths)

    def by_spi(self, source: str, destination: str) -> dict[int, tuple[int, int]]:
        """Packets and bytes of each SPI from one address to another; plain IP headers only."""
        counts: dict[int, tuple[int, int]] = {}
        header = 40 if ":" in source else 20
        for packet in self.packets:
            if (packet.source, packet.destination) == (source, destination):
                spi = int.from_bytes(packet.octets[header : header + 4])
                packets, octets = counts.get(spi, (0, 0))
                counts[spi] = (packets + 1, octets + packet.length)
        return counts

    def behind(self) -> list[int]:
        """How many numbers each ESP packet came behind the newest before it; one SPI, plain IPv4 headers only."""
        newest, found = 0, []
        for packet in self.packets:
            number = int.from_bytes(packet.octets[24:28])
            newest = max(newest, number)
            found.append(newest - number)
        return found

    def spis(self, source: str, destination: str) -> set[int]:
        """The SPIs of the ESP packets from one address to another (RFC 4303 section 2)."""
        return set(self.by_spi(source, destination))


def read_pcap(octets: bytes) -> list[Captured]:
    """The IP packets of a pcap file of an Ethernet interface (pcap-savefile(5))."""
    _PCAP_HEADER.unpack_from(octets)
    packets, offset = [], _PCAP_HEADER.size
    while offset + _RECORD.size <= len(octets):
        second, micro, captured, _ = _RECORD.unpack_from(octets, offset)
        frame = octets[offset + _RECORD.size :][:captured]
        offset += _RECORD.size + captured
        octets_of_ip = frame[_ETHERNET:]
        if octets_of_ip[0] >> 4 == 4:
            (length,) = struct.unpack_from("!H", octets_of_ip, 2)
            ends = octets_of_ip[12:16], octets_of_ip[16:20]
        else:
            (payload,) = struct.unpack_from("!H", octets_of_ip, 4)
            length = 40 + payload
            ends = octets_of_ip[8:24], octets_of_ip[24:40]
        source, destination = (str(ip_address(end)) for end in ends)
        packets.append(Captured(second + micro / 1e6, source, destination, length, octets_of_ip[:length]))
    return packets
