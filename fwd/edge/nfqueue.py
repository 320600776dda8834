"""The kernel's packet queue: every packet that comes out of it goes back with one verdict.

The `netfilterqueue` package reads until the queue is empty, which a flood never lets happen. An exception that is
raised behind the verdict on a turn's last packet ends its loop; nothing is left without a verdict by that.
Packets that the kernel drops because the queue or the socket is full stand in queue_stats.py.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from time import monotonic, perf_counter
from typing import TypeAlias

from netfilterqueue import NetfilterQueue, Packet

from ..core.histogram import Histogram
from ..core.policy import Verdict

log = logging.getLogger(__name__)

#: octets from the IP header on (cut at COPY_BYTES), netfilter hook, indices of the interfaces in and out, the time.
Decide: TypeAlias = Callable[[bytes, int, int, int, float], Verdict]

#: A name of its own: to look it up in the enumeration takes as long as to look up a packet's decision.
_ACCEPT = Verdict.ACCEPT

#: Room for a whole queue of packets on the netlink socket, in bytes; the kernel doubles it.
_SOCKET_BYTES = 8 * 2**20


#: How much of each packet the kernel copies: any headers that make sense. The package reads messages into 4096 bytes,
#: and asks for copies of 4016 unless told otherwise; but what the kernel says of a packet in transit takes more than
#: the 80 between. The package would lose the message, and so a large packet, and its place in the queue for good.
COPY_BYTES = 2048

#: One packet in so many is timed, a power of two: to time each would cost as much as to look up its decision. Each turn
#: begins with one that is.
TIMED_EVERY = 64
_NOT_TIMED = TIMED_EVERY - 1

#: A decision takes some microseconds if it repeats another, a hundred if it opens a session.
_DECISION_BOUNDS_S = (
    *(1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4),
    *(1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1),
)


class QueueError(Exception):
    """The queue cannot be had; the message says what to do."""


class _TurnIsOver(Exception):
    """Raised behind a packet's verdict, to leave the package's loop."""


class PacketQueue:
    """One NFQUEUE of this network namespace.

    `decide` gives the verdict; should it raise, `decide_failed` does, so that no packet is left without one
    (the kernel would keep it, and its place in the queue, for good).
    """

    def __init__(
        self,
        number: int,
        length: int,
        decide: Decide,
        decide_failed: Callable[[], Verdict],
    ) -> None:
        self.number = number
        self._length = length
        self._decide = decide
        self._decide_failed = decide_failed
        #: How long `decide` took, of the packets that are timed.
        self.decisions = Histogram(_DECISION_BOUNDS_S)
        self._queue: NetfilterQueue | None = None
        self._left = 0
        self._now = 0.0

    def open(self) -> int:
        """Bind the queue; gives the file descriptor to wait on. Raises QueueError."""
        try:
            self._queue = NetfilterQueue()
            with warnings.catch_warnings():  # a smaller buffer than asked for shows in the overruns
                warnings.simplefilter("ignore", RuntimeWarning)
                self._queue.bind(
                    self.number, self._handle, max_len=self._length, range=COPY_BYTES, sock_len=_SOCKET_BYTES
                )
        except OSError as error:
            self._queue = None
            raise QueueError(
                f"cannot bind NFQUEUE {self.number} ({error}): run as root or with CAP_NET_ADMIN, and see in"
                " /proc/net/netfilter/nfnetlink_queue that no other program has this queue"
                " ([dataplane] queue chooses another)"
            ) from None
        return self._queue.get_fd()

    def turn(self, budget: int) -> bool:
        """Handle at most so many packets, a multiple of TIMED_EVERY, without waiting; whether it is empty now."""
        if self._queue is None:
            return True
        self._left, self._now = budget, monotonic()
        with contextlib.suppress(_TurnIsOver):
            self._queue.run(block=False)
        return self._left > 0

    def close(self) -> None:
        """Give the queue back. The kernel drops what is still in it."""
        if self._queue is not None:
            self._queue.unbind()
            self._queue = None

    def _handle(self, packet: Packet) -> None:
        left = self._left
        decide = self._decide if left & _NOT_TIMED else self._decide_timed
        try:
            verdict = decide(packet.get_payload(), packet.hook, packet.indev, packet.outdev, self._now)
        except Exception:
            log.exception("a packet met a defect of fwd and was dropped")
            verdict = self._decide_failed()
        if verdict is _ACCEPT:
            packet.accept()
        else:
            packet.drop()
        self._left = left - 1
        if left == 1:
            raise _TurnIsOver

    def _decide_timed(self, octets: bytes, hook: int, indev: int, outdev: int, now: float) -> Verdict:
        begun = perf_counter()
        verdict = self._decide(octets, hook, indev, outdev, now)
        self.decisions.note(perf_counter() - begun)
        return verdict
