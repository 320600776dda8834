"""What the kernel counts for a queue: /proc/net/netfilter/nfnetlink_queue (net/netfilter/nfnetlink_queue.c)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_PATH = Path("/proc/net/netfilter/nfnetlink_queue")

UNREADABLE = f"{_PATH} is root's; 'chgrp fwd {_PATH}' lets fwd's group read it"


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
    """The counts in the row of one queue."""
    fields = _row(text, queue)
    return QueueStats(fields[2], fields[5], fields[6], fields[7]) if fields else None


def queue_reader(queue: int) -> int | None:
    """The netlink port id of whoever has a queue of this namespace bound; None if nobody has. Raises OSError."""
    fields = _row(_PATH.read_text("ascii"), queue)
    return fields[1] if fields else None


def _row(text: str, queue: int) -> list[int] | None:
    """The row of one queue: number, port id, waiting, copy mode, copy range, queue and user drops, last id, 1."""
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 8 and all(field.lstrip("-").isdigit() for field in fields) and int(fields[0]) == queue:
            return [int(field) for field in fields]
    return None


def is_readable() -> bool:
    """Whether this user may read the kernel's counts: they are root's, and no capability of the network's helps."""
    return os.access(_PATH, os.R_OK)


def kernel_queue_stats(queue: int) -> QueueStats | None:
    """The kernel's counts for a queue of this namespace; None if nobody has it bound, or they are root's alone."""
    try:
        return parse_queue_stats(_PATH.read_text("ascii"), queue)
    except (OSError, UnicodeDecodeError):
        return None
