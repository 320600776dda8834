"""Floods for the tests of overload: who sends how much, what arrives, and how long an answer takes meanwhile."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from fwd.cli.client import Client
from lab import Lab
from lab.lab import Fwd
from lab.sandbox import Process

_SOURCE = Path(__file__).parents[2] / "lab" / "xdp_source.py"

#: The flood stays on one CPU, fwd on the other, as far as there is another.
FLOOD_CPU, FWD_CPU = 0, min(1, (os.cpu_count() or 1) - 1)

#: Packets in one go: many, because each go costs some milliseconds.
_BURST = 8192

#: Forged packets end where they arrive, as do those of a steady stream from site-a (see esp_source.py).
_SINK = """
table ip sink {
  chain prerouting {
    type filter hook prerouting priority raw
    ip saddr 10.1.0.0/16 ip protocol esp counter drop
    ip saddr 198.51.100.2 ip protocol esp @th,0,32 4096 counter drop
  }
}
"""
_SENDER = """
table ip sender {
  chain output {
    type filter hook output priority raw
    ip saddr 198.51.100.2 ip protocol esp @th,0,32 4096 counter
  }
}
"""


class Flood:
    """A source of forged ESP on one link of fwd's host, in the demo's lab: `site-a` or `peer`."""

    def __init__(self, lab: Lab, host: str = "site-a") -> None:
        self._fwd, self._host = lab.hosts["fwd"], lab.hosts[host]
        link = "to-a" if host == "site-a" else "to-peer"
        self._fwd.run(["ethtool", "-K", link, "gro", "on"])  # gives the veth the NAPI that live frames need
        self._mac = self._fwd.run(["cat", f"/sys/class/net/{link}/address"]).stdout.strip()
        self._fwd.run(["ping", "-c", "1", "203.0.113.2"])  # forged packets wait for no ARP
        self._lab = lab
        for name, table in (("site-b", _SINK), ("site-a", _SENDER)):
            lab.hosts[name].path("/run/counts.nft").write_text(table)
            lab.hosts[name].run(["nft", "-f", "/run/counts.nft"])

    def start(
        self, count: int, *, rate: int = 0, sources: int = 1, spis: int = 1, destination: str = "203.0.113.2"
    ) -> Process:
        """Send; it ends by itself."""
        options = {"count": count, "rate": rate, "sources": sources, "spis": spis, "burst": _BURST, "cpu": FLOOD_CPU}
        words = [f"--{key}={value}" for key, value in options.items()]
        return self._host.start([sys.executable, str(_SOURCE), "wan", self._mac, destination, *words])

    def send(self, count: int, **options: int | str) -> None:
        """The same, to its end."""
        process = self.start(count, **options)  # type: ignore[arg-type]
        assert process.wait(120) == 0

    def streamed(self) -> tuple[int, int]:
        """How many packets of the steady stream were sent, and how many have arrived."""
        listed = (self._lab.hosts[host].run(["nft", "list", "ruleset"]).stdout for host in ("site-a", "site-b"))
        sent, arrived = (int(text.rpartition("packets")[2].split()[0]) for text in listed)
        return sent, arrived

    def stream(self, seconds: float) -> tuple[float, float]:
        """Packets a second of the steady stream: what arrives, what is sent."""
        (sent, arrived), began = self.streamed(), time.monotonic()
        time.sleep(seconds)
        (sent_now, arrived_now), elapsed = self.streamed(), time.monotonic() - began
        return (arrived_now - arrived) / elapsed, (sent_now - sent) / elapsed


def pin(fwd: Fwd) -> None:
    """Keep fwd on its CPU."""
    for task in Path(f"/proc/{fwd.pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {FWD_CPU})


def counters(client: Client) -> dict[str, int]:
    """The global counters."""
    return {counter["name"]: counter["value"] for counter in client.call("counter.list")["counters"]}


def timed(client: Client, method: str) -> float:
    """Seconds that an answer takes."""
    began = time.monotonic()
    client.call(method)
    return time.monotonic() - began
