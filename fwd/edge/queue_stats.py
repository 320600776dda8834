"""What the kernel counts for a queue: /proc/net/netfilter/nfnetlink_queue (net/netfilter/nfnetlink_queue.c)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_PATH = Path("/proc/net/netfilter/nfnetlink_queue")


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Packets waiting now; packets dropped because the queue, or the reader's socket, was full; packets ever queued."""

    waiting: int
    queue_dropped: int
    socket_dropped: int
    queued: int

    @property
    def offered(self) -> int:
        """Packets that came to the queue since its reader bound it."""
        return self.queued + self.queue_dropped


def parse_queue_stats(text: str, queue: int) -> QueueStats | None:
    """The row of one queue: number, port id, waiting, copy mode, copy range, queue and user drops, last id, 1."""
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 8 and all(field.lstrip("-").isdigit() for field in fields) and int(fields[0]) == queue:
            return QueueStats(int(fields[2]), int(fields[5]), int(fields[6]), int(fields[7]))
    return None


def kernel_queue_stats(queue: int) -> QueueStats | None:
    """The kernel's counts for a queue of this network namespace; None while nobody has it bound."""
    try:
        return parse_queue_stats(_PATH.read_text("ascii"), queue)
    except (OSError, UnicodeDecodeError):
        return None
