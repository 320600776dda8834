"""The testbed of the bench: a source, fwd's host, a sink, and readers of fwd's queue to compare with."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fwd.cli.client import Client
from lab.lab import Fwd, Lab, default_config
from lab.sandbox import LabError, Process

QUEUE = 20
_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER.parent / "lab" / "xdp_source.py"
SINK = "203.0.113.2"

#: The source and all that its packets go through on the way run on one CPU, whoever reads the queue on the other.
SOURCE_CPU, READER_CPU = 0, 1

_COUNT_AND_DROP = """
table ip sink {
  chain prerouting {
    type filter hook prerouting priority raw
    ip protocol esp counter drop
  }
}
"""

#: Up to 120,000 sources, which nobody answers, and room in the maps for one SPI of each.
FWD_CONFIG = """
[limits]
half-open = 0
[dataplane]
max-sessions = 131072
queue-length = 65536
"""


class Rig(Lab):
    """The bench's lab: what is sent, what arrives."""

    def __init__(self) -> None:
        super().__init__("bench")
        self.source, self.middle, self.sink = (self.hosts[name] for name in ("source", "fwd", "sink"))
        self.sink.path("/run/sink.nft").write_text(_COUNT_AND_DROP)
        self.sink.run(["nft", "-f", "/run/sink.nft"])
        for host, interface in ((self.middle, "to-source"), (self.sink, "wan")):
            host.run(["ethtool", "-K", interface, "gro", "on"])  # gives the veth the NAPI that live frames need
        self._mac = self.middle.run(["cat", "/sys/class/net/to-source/address"]).stdout.strip()
        self.middle.run(["ping", "-c", "1", SINK])  # ARP is none of the bench's business
        self.middle.run(["ping", "-c", "1", "10.0.0.1"])

    def command(self, count: int, sources: int = 1, spis: int = 1, rate: int = 0) -> list[str]:
        """How to send."""
        options = {"count": count, "sources": sources, "spis": spis, "rate": rate, "cpu": SOURCE_CPU}
        words = [f"--{key}={value}" for key, value in options.items()]
        return [sys.executable, str(_SOURCE), "wan", self._mac, SINK, *words]

    def send(self, count: int, **options: int) -> float:
        """Send; gives the seconds it took. Raises LabError if the kernel cannot."""
        return float(self.source.run(self.command(count, **options), timeout=120).stdout)

    @property
    def arrived(self) -> int:
        """Packets that the sink got, since the rig was built."""
        listed = self.sink.run(["nft", "list", "table", "ip", "sink"]).stdout
        return int(listed.split("packets")[1].split()[0])

    def settled(self, pause_s: float = 0.3) -> int:
        """The same, once no more come."""
        before = -1
        while (now := self.arrived) != before:
            before = now
            time.sleep(pause_s)
        return now

    def start(self, extra: str = "") -> Fwd:
        """Start fwd, on the readers' CPU."""
        fwd = self.start_fwd(default_config() + FWD_CONFIG + extra)
        for task in Path(f"/proc/{fwd.process.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {READER_CPU})
        return fwd

    def client(self) -> Client:
        """Ask fwd."""
        return Client(str(self.middle.path("/run/fwd/control.sock")))

    @contextmanager
    def reader(self, command: Sequence[str], ready: str) -> Iterator[Process]:
        """Run another reader of the queue, with the rule that feeds it; `ready` is what it says when it is."""
        log = self.middle.path("/run/reader.log")
        with log.open("w") as output:
            process = self.middle.start(
                ["taskset", "-c", str(READER_CPU), *command], stdout=output, stderr=subprocess.STDOUT
            )
        rule = ["iptables-nft", "-t", "mangle", "-A", "FORWARD", "-p", "esp", "-j", "NFQUEUE", f"--queue-num={QUEUE}"]
        try:
            deadline = time.monotonic() + 60
            while ready not in log.read_text(errors="replace"):
                if not process.is_running() or time.monotonic() > deadline:
                    raise LabError(f"{' '.join(command)} did not start: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.1)
            self.middle.run(rule)
            yield process
        finally:
            self.middle.run(["iptables-nft", "-t", "mangle", "-F", "FORWARD"], check=False)
            process.end()


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, user and system (proc(5), stat fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Memory that a process has in use (proc(5), statm)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
