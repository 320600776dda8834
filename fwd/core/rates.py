"""How fast flows are, measured only while somebody asks.

A rate is taken between two moments at which a flow's counts were brought up to date, so it is right however seldom that
is. Nothing is done for a packet; a flow that moves has a `Pace` meanwhile, some 200 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from .session import Flow

#: A rate is taken over so many seconds, at least.
WINDOW_S: Final = 0.9

#: So long after the last question nothing is measured any more, in seconds.
WATCH_S: Final = 30.0


class Rate(NamedTuple):
    """Packets and bytes a second, IP headers included."""

    packets: float
    octets: float


NOTHING: Final = Rate(0.0, 0.0)


@dataclass(slots=True, eq=False)
class Pace:
    """A flow's counts when its present window began, and what the one before carried; None before there was one.

    `counted_at` is when it was last seen to have moved.
    """

    since: float
    counted_at: float
    packets: int
    octets: int
    before: Rate | None = None


class Rates:
    """The rates of all flows. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._until = 0.0

    def watch(self, now: float) -> None:
        """Somebody wants to know: measure for the next WATCH_S."""
        if self._since is None:
            self._since = now
        self._until = now + WATCH_S

    def rest(self, now: float) -> None:
        """Measure no more if nobody asked for long."""
        if now >= self._until:
            self._since = None

    def measured_s(self, now: float) -> float:
        """For how long rates are being measured."""
        return 0.0 if self._since is None else now - self._since

    def note(self, flow: Flow, at: float) -> None:
        """The flow's counts are right as of that time."""
        if self._since is None:
            flow.pace = None
            return
        pace = flow.pace
        if pace is None or pace.since < self._since:
            flow.pace = Pace(at, at, flow.packet_count, flow.byte_count)
            return
        pace.counted_at = at
        if (elapsed := at - pace.since) >= WINDOW_S:
            packets, octets = flow.packet_count - pace.packets, flow.byte_count - pace.octets
            pace.before = Rate(packets / elapsed, octets / elapsed)
            pace.since, pace.packets, pace.octets = at, flow.packet_count, flow.byte_count

    def of(self, flow: Flow, round_s: float, now: float) -> Rate | None:
        """The flow's rate; None as long as it is not known. Its counts are brought up to date every `round_s`."""
        if not flow.session.elements:  # what the daemon counts packet by packet
            self.note(flow, now)
        if self._since is None:
            return None
        pace = flow.pace
        if pace is None or pace.since < self._since:  # not a packet since
            return NOTHING if now - self._since >= 2 * round_s else None
        return pace.before if now - pace.counted_at <= 2 * round_s else NOTHING
