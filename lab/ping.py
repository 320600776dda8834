"""Pings that wait for each answer, by fping.

The usual ping, once it has had an answer, ends two round trips or one interval after its last packet: on a busy
machine it calls answers lost that come 20 ms later.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .sandbox import PATIENCE, LabError, Process

#: How long an answer may take, before it counts as lost.
ANSWER_S = 4.0 * PATIENCE


class Tally(NamedTuple):
    """How many pings were sent, and how many of them were answered."""

    sent: int
    received: int


def command(source: str, destination: str, count: int, interval_s: float = 0.02, size: int = 56) -> list[str]:
    """What sends `count` pings of `size` octets of data, and in the end prints their tally to stderr."""
    options = {"-S": source, "-c": count, "-p": f"{interval_s * 1000:g}", "-t": f"{ANSWER_S * 1000:g}", "-b": size}
    return ["fping", "-q", "-i", "1", *(f"{word}" for option in options.items() for word in option), destination]


def tally(said: str) -> Tally:
    """What a ping printed. Raises LabError with its words if that is no tally."""
    found = re.search(r"xmt/rcv/%loss = (\d+)/(\d+)/", said)
    if found is None:
        raise LabError(f"ping: {said.strip()}")
    return Tally(int(found[1]), int(found[2]))


def outcome(ping: Process, timeout_s: float = 60) -> Tally:
    """The tally of one in the background, when it is over. Raises subprocess.TimeoutExpired."""
    return tally(ping.popen.communicate(timeout=timeout_s * PATIENCE)[0])
