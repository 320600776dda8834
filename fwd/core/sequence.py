"""What ESP sequence numbers tell of an SPI's health: lost, late, doubled, begun anew (RFC 4303 sections 3.3.3, 3.4.3).

The numbers are read from the wire and not authenticated, for only the SA's owner can check the ICV: all of this is
labelled as observed, and nothing is ever dropped for it.

Most packets are decided in the kernel, and only one now and then is looked at; how many there were is known exactly.
So what is lost is a balance: numbers that went by, less packets that came by. It is exact whether or not all packets
are looked at. Late ones and duplicates are told one by one only among those that are.
"""

from __future__ import annotations

from dataclasses import dataclass

from .constants import REPLAY_WINDOW

_MODULUS = 2**32
_ALL_SEEN = 2**REPLAY_WINDOW - 1

#: A number further ahead than this, and than so many for each packet that was not looked at, is not believed at once.
_LEAP = 2**16
_LEAP_PER_PACKET = 16


@dataclass(slots=True)
class Sequence:
    """The numbers of one SPI; `top` is the highest so far, of which `known` and those below were looked at.

    Counted are packets: `late` ones that others overtook, by `depth` numbers at most; `duplicates`; `outliers` far from
    all others, which were not believed. `resets`: the count began anew under the same SPI, which no sender may do.
    `wraps`: it went past 2^32 - 1, which is normal with extended sequence numbers only.
    """

    top: int
    known: int = 1
    late: int = 0
    depth: int = 0
    duplicates: int = 0
    outliers: int = 0
    resets: int = 0
    wraps: int = 0
    #: Packets of which only the number is known that was told to `observe`, so far.
    unseen: int = 0
    _missing: int = 0
    _span: int = 1  # numbers up to `top` that the balance is of: it knows of none below the first that was looked at
    _waiting: int = 0  # packets that were not looked at since `top`
    _window: int = _ALL_SEEN  # bit n: number `top` - n was seen
    _suspect: int | None = None
    _checked_at: int = 0  # the highest number when the balance was last kept, and that balance
    _checked: int = 0
    _settled: int = 0

    def __post_init__(self) -> None:
        self._checked_at = self.top
        self._span = self.known

    @property
    def settled(self) -> int:
        """Of those lost, how many will not be found late any more: they were missing a whole window ago."""
        return max(0, self._settled)

    @property
    def lost(self) -> int:
        """Numbers that went by without their packet, before here, as of the last look."""
        return max(0, self._missing)

    @property
    def surplus(self) -> int:
        """Packets that came by in excess of numbers: duplicates among those not looked at."""
        return max(0, -self._missing)

    def run_to(self, top: int) -> None:
        """Packets came by in order up to this number."""
        run = top - self.top
        if run > 0:
            self._window = ((self._window + 1 << min(run, REPLAY_WINDOW)) - 1) & _ALL_SEEN
            self.known = min(self.known + run, REPLAY_WINDOW)
            self._span += run
            self.top = top

    def resume(self, seq: int, unseen_total: int) -> None:
        """Go on at this number after a while in which nobody counted: nothing of it is lost, nor late."""
        self._begin_at(seq)
        self._span = 1
        self.unseen = unseen_total
        self._checked_at, self._checked = seq, self._missing

    def observe(self, seq: int, unseen_total: int) -> None:
        """A packet with this number came by; `unseen_total` packets in all were not looked at."""
        if unseen_total != self.unseen:
            self._waiting += unseen_total - self.unseen
            self.unseen = unseen_total
        ahead = (seq - self.top) % _MODULUS
        leap = _LEAP + _LEAP_PER_PACKET * self._waiting
        if 0 < ahead <= leap:
            self._advance(seq, ahead)
        elif (behind := -ahead % _MODULUS) < REPLAY_WINDOW:
            self._fill(behind)
        elif self._suspect is not None and 0 < (seq - self._suspect) % _MODULUS <= leap:
            self.resets += 1  # two that agree: it is so
            self._begin_at(seq)
            self._span = 1
        else:
            self._suspect = seq
            self.outliers += 1
        if (self.top - self._checked_at) % _MODULUS >= REPLAY_WINDOW:
            # What lateness explains is less than a window, and what is still open in it may be explained so.
            still_open = self.known - (self._window & (1 << self.known) - 1).bit_count()
            self._settled = max(min(self._checked, self._missing - still_open), self._missing - REPLAY_WINDOW)
            self._checked_at, self._checked = self.top, self._missing - still_open

    def _advance(self, seq: int, ahead: int) -> None:
        if seq < self.top:
            self.wraps += 1
        self._missing += ahead - 1 - self._waiting
        self._span += ahead
        if self._waiting:
            self._begin_at(seq)
            return
        self._window = (self._window << ahead | 1) & _ALL_SEEN if ahead < REPLAY_WINDOW else 1
        self.known += ahead
        if self.known > REPLAY_WINDOW:
            self.known = REPLAY_WINDOW
        self.top, self._suspect = seq, None

    def _fill(self, behind: int) -> None:
        """One within the window: late, or a duplicate."""
        if behind < self.known and self._window >> behind & 1:
            self.duplicates += 1
            return
        self._window |= 1 << behind
        self._missing -= behind < self._span
        self.late += 1
        self.depth = max(self.depth, behind)

    def _begin_at(self, seq: int) -> None:
        """Of the numbers below this one nothing is known."""
        self._window, self.known, self.top = 1, 1, seq
        self._waiting, self._suspect = 0, None
