"""How long packets wait: raw ESP that bears the time at which it was sent, and who takes the time at the other end.

Inside a lab: `prober.py send DESTINATION`, and `prober.py receive SOURCE`, which prints what it saw as JSON when the
last packet has come. Both live on one machine, so they share a clock.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import time
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # inside the lab this file is run by itself
    from lab import Lab
    from lab.sandbox import Process

_PROBE = struct.Struct("!IId8x")
_SPI = 0x7E570000
_SPIS = 16


def prefer(pid: int, *, is_strict: bool = False) -> None:
    """Let the machine's other work wait for this process: only what it keeps waiting by itself is to be measured.

    `is_strict`: all of it, for as long as the process has something to do (SCHED_FIFO, sched(7)).
    """
    for task in os.listdir(f"/proc/{pid}/task"):
        if is_strict:
            os.sched_setscheduler(int(task), os.SCHED_FIFO, os.sched_param(1))
        else:
            os.setpriority(os.PRIO_PROCESS, int(task), -19)


class Prober:
    """Probes from one host of a lab to another through fwd, one every `interval_s`, until `stop`."""

    def __init__(self, lab: Lab, source: str, destination: str, interval_s: float = 0.004) -> None:
        ends = {"site-a": "198.51.100.2", "site-b": "203.0.113.2", "peer": "192.0.2.2", "fwd": "192.0.2.1"}
        run = [sys.executable, __file__]
        self._receiver = lab.hosts[destination].start([*run, "receive", ends[source]], stdout=PIPE)
        self._wait_for(self._receiver)
        self._sender = lab.hosts[source].start([*run, "send", ends[destination], f"{interval_s}"], stdout=PIPE)
        self._wait_for(self._sender)

    @staticmethod
    def _wait_for(process: Process) -> None:
        assert process.popen.stdout is not None
        assert process.popen.stdout.readline() == "ready\n"

    def stop(self) -> dict[str, Any]:
        """What was seen: `sent`, `received`, and how long the packets took, `median_ms` and `worst_ms`.

        `stalled_ms` is how late the sender itself was woken up at worst: so long the machine did nothing at all.
        """
        self._sender.send(signal.SIGINT)
        self._sender.wait(60)
        out, _ = self._receiver.popen.communicate(timeout=60)
        return dict(json.loads(out))


def _send(destination: str, interval_s: float) -> None:
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, 50)
    raw.connect((destination, 0))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it comes between two packets
    print("ready", flush=True)
    number, stalled, slept_at = 0, 0.0, time.monotonic()
    while signal.sigtimedwait({signal.SIGINT}, interval_s) is None:
        stalled = max(stalled, time.monotonic() - slept_at - interval_s)
        number += 1
        raw.send(_PROBE.pack(_SPI + number % _SPIS, 1 + number // _SPIS, time.monotonic()))
        slept_at = time.monotonic()
    for _ in range(3):
        raw.send(_PROBE.pack(_SPI + _SPIS, number, stalled))


def _receive(source: str) -> None:
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, 50)
    print("ready", flush=True)
    took: list[float] = []
    while True:
        octets, (sender, _) = raw.recvfrom(200)
        if sender != source or len(octets) != 20 + _PROBE.size:
            continue
        spi, number, sent_at = _PROBE.unpack_from(octets, 20)
        if spi == _SPI + _SPIS:
            stalled = sent_at
            break
        if spi & ~0xFF == _SPI:
            took.append(1000 * (time.monotonic() - sent_at))
    took.sort()
    seen = {"sent": number, "received": len(took), "median_ms": took[len(took) // 2], "worst_ms": took[-1]}
    seen |= {"p99_ms": took[len(took) * 99 // 100], "stalled_ms": 1000 * stalled}
    print(json.dumps(seen))


if __name__ == "__main__":
    prefer(os.getpid(), is_strict=True)
    if sys.argv[1] == "send":
        _send(sys.argv[2], float(sys.argv[3]))
    else:
        _receive(sys.argv[2])
