"""The fast path: the decisions that the kernel repeats, and what it counted under them.

A session is decided once. What repeats the decision is an element: one SPI of a flow, as it is seen between one pair
of addresses and one pair of interfaces. The daemon answers from it by a look at the packet's header, and most elements
are handed on to the kernel, which then asks no more.

No I/O here: `take_work` says what the kernel is to do, and `Firewall.apply_outcome` hears what came of it. Three things
keep the counts exact: whoever decides on a packet counts it, the daemon or the kernel; an element is removed with its
last count in one step; and the kernel's counts are read as absolutes.

An element goes to the kernel when no packet waits in the queue: what waits there would be overtaken by what the kernel
then passes by itself, and what comes out of a tunnel too late is dropped by its replay window (RFC 4303 section 3.4.3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

from .constants import (
    ELEMENTS_PER_SESSION,
    INSTALL_WAIT_S,
    INSTALLS_WAITING,
    READS_PER_REQUEST,
    REMOVAL_TRIES,
    RETIRE_SLICE,
    SWEEP_INTERVAL_S,
    SWEEP_PAUSE_S,
    SWEEP_SLICE,
)
from .policy import Verdict
from .session import Element, ElementKey, Place, Session, SpiUse

#: Packets and bytes, as the kernel counted them since the element was made.
Reading: TypeAlias = tuple[int, int]


@dataclass(slots=True)
class Work:
    """What the kernel is to do, in this order: first two in one transaction, then the rest."""

    removals: list[Element] = field(default_factory=list)
    installs: list[Element] = field(default_factory=list)
    reads: list[Element] = field(default_factory=list)


@dataclass(slots=True)
class Outcome:
    """What the kernel said: the last counts of what was removed, and those that were read.

    An element that is missing in them was not there any more, unless it is in `unknown`: there was no answer for those,
    whatever was to be done with them. `refused` are new ones that are not in place.
    """

    removed: dict[ElementKey, Reading] = field(default_factory=dict)
    read: dict[ElementKey, Reading] = field(default_factory=dict)
    refused: set[ElementKey] = field(default_factory=set)
    unknown: set[ElementKey] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Found:
    """An element that a former daemon left in the kernel."""

    key: ElementKey
    verdict: Verdict
    reading: Reading


class FastPath:
    """All elements, and what is to be done about them. `capacity` is the most that the kernel's maps hold.

    `credit` is called to count what an element has in `own_packets`: now and then, and before anybody asks. `changed`
    is told of sessions whose elements in the kernel are others now.
    """

    def __init__(
        self, capacity: int, credit: Callable[[Element], None], changed: Callable[[Session], None] = lambda _: None
    ) -> None:
        self.capacity = capacity
        self._credit = credit
        self._changed = changed
        #: Whether new elements are handed on to the kernel.
        self.is_on = False
        #: Elements that are to go to the kernel when the queue is empty, or at that time.
        self._waiting: list[Element] = []
        self._install_by = 0.0
        #: How many elements the kernel has.
        self.in_kernel = 0
        #: What the elements that are in the kernel, or on their way in or out, had counted when they were read last.
        self.kernel_packets = self.kernel_bytes = 0
        self._leaving: dict[Session, dict[Element, None]] = {}
        self._removals: list[Element] = []
        #: Removals that the kernel did not answer, to be asked for again.
        self._unanswered: list[Element] = []
        self._reads: list[Element] = []
        self._retiring: deque[Element] = deque()
        self._elements: dict[ElementKey, Element] = {}
        self._looked_at: dict[ElementKey, Element] = {}
        #: All elements, the one whose counts were read longest ago first; some that are gone are among them.
        self._rounds: deque[Element] = deque()
        self._left_in_round = 0
        self._round_began_at: float | None = None
        #: How long it took of late until all counts had been read once, in seconds.
        self.round_s = SWEEP_INTERVAL_S
        self._next_round_at = 0.0
        self._next_slice_at = 0.0
        #: What a packet asks for: the element of a key, or None.
        self.lookup = self._elements.get

    def __len__(self) -> int:
        return len(self._elements)

    def __iter__(self) -> Iterator[Element]:
        return iter(self._elements.values())

    @property
    def is_owed_counts(self) -> bool:
        """Whether counts of removed elements have still to come."""
        return bool(self._removals or self._unanswered)

    @property
    def asked_count(self) -> int:
        """How many elements the kernel is to be asked for with the next work."""
        return len(self._reads)

    def learn(self, key: ElementKey, use: SpiUse, verdict: Verdict, now: float, mtu: int = 0x1_0000) -> bool:
        """Repeat the decision on the SPI's session for packets with this key from now on. False: there is no room.

        A key that is known stays as it is: packets like it may come here all the same, with IP options, say. One that
        the kernel may still have, for it did not answer when it was to remove it, waits until it has.
        """
        if key in self._elements or any(element.key == key for element in self._unanswered):
            return True
        session = use.flow.session
        if len(self._elements) >= self.capacity or len(session.elements) >= ELEMENTS_PER_SESSION:
            return False
        element = Element(key, use, verdict, 0, 0, now, looked_at=now, mtu=mtu)
        self._take_in(element)
        self._looked_at.pop(key, None)
        if self._is_for_kernel(element):
            if not self._waiting:
                self._install_by = now + INSTALL_WAIT_S
            self._waiting.append(element)
        return True

    def adopt(self, found: Found, use: SpiUse, now: float) -> Element:
        """Take over an element that is in the kernel already; what it counted has yet to be read."""
        element = Element(found.key, use, found.verdict, 0, 0, now, Place.KERNEL, looked_at=now)
        self._take_in(element)
        self.in_kernel += 1
        self._changed(element.flow.session)
        return element

    def leaving(self, session: Session) -> Collection[Element]:
        """Elements of a session that the kernel is to remove, of which it has not said the last counts."""
        return self._leaving.get(session, {}).keys()

    def note_reading(self, element: Element, reading: Reading) -> None:
        """The kernel's counter of an element, as it is now."""
        self.kernel_packets += reading[0] - element.kernel_packets
        self.kernel_bytes += reading[1] - element.kernel_bytes
        element.kernel_packets, element.kernel_bytes = reading
        element.is_unsaved = True

    def note_removed(self, element: Element) -> None:
        """The kernel has it no more, and its last counts are known, or never will be."""
        session = next((s for s in (element.flow.session, *self._leaving) if element in self.leaving(s)), None)
        if session is None:
            return
        del self._leaving[session][element]
        if not self._leaving[session]:
            del self._leaving[session]
        self.kernel_packets -= element.kernel_packets
        self.kernel_bytes -= element.kernel_bytes
        self._changed(element.flow.session)

    def settle(self, installs: Iterable[Element], refused: Collection[ElementKey]) -> None:
        """The kernel has taken these over, but for those that it refused.

        Where it did not answer, it is taken to have done it: the next reading tells.
        """
        for element in installs:
            if element.key not in refused:
                element.place = Place.KERNEL
                self.in_kernel += 1
                self._changed(element.flow.session)

    def remove_again(self, element: Element) -> bool:
        """The kernel did not answer when it was to remove this one: it is asked again. False: it was often enough."""
        element.tries += 1
        if element.tries >= REMOVAL_TRIES:
            return False
        self._unanswered.append(element)
        return True

    def _take_in(self, element: Element) -> None:
        self._elements[element.key] = element
        element.flow.session.elements += (element,)
        self._rounds.append(element)

    def withdraw(self, elements: Iterable[Element]) -> None:
        """Repeat these no more; what the kernel counted under them comes with the next outcome."""
        gone = list(elements)
        for element in gone:
            self._credit(element)
            if element.place is Place.KERNEL:
                self._removals.append(element)
                self._leaving.setdefault(element.flow.session, {})[element] = None
        self._forget(gone)

    def look_at(self, elements: Iterable[Element]) -> None:
        """Withdraw these for one packet each, so that the daemon sees its sequence number; it puts them back."""
        chosen = list(elements)
        self.withdraw(chosen)
        self._looked_at.update((element.key, element) for element in chosen)

    def install_soon(self, now: float) -> None:
        """Elements that wait do so no longer, although there are packets in the queue."""
        self._install_by = now

    def take_looked_at(self) -> list[Element]:
        """Those whose packet has not come yet, to be put back without it."""
        waiting = [element for element in self._looked_at.values() if element.flow.session.is_decided]
        self._looked_at.clear()
        return waiting

    def retire(self, elements: Iterable[Element]) -> None:
        """Withdraw these soon, a slice at a time: there may be many."""
        self._retiring.extend(elements)

    def read(self, session: Session) -> bool:
        """Bring the counts of a session up to date, and ask the kernel for its own; False if it has none."""
        for element in session.elements:
            self._credit(element)
        asked = [element for element in session.elements if element.place is Place.KERNEL]
        self._reads += asked
        return bool(asked)

    def read_sessions(self, sessions: Iterable[Session]) -> None:
        """The same for these sessions, with READS_PER_REQUEST questions at most: somebody waits for the answer."""
        for session in sessions:
            if len(self._reads) < READS_PER_REQUEST:
                self.read(session)

    def read_oldest(self) -> None:
        """The same for the elements that were looked at longest ago."""
        for element in islice(self._rounds, READS_PER_REQUEST):
            self._credit(element)
            if element.place is Place.KERNEL:
                self._reads.append(element)

    def forget_lost(self, element: Element) -> None:
        """The kernel says that it has this one no more."""
        if element.place is not Place.GONE:
            self._leaving.setdefault(element.flow.session, {})[element] = None
            self._forget([element])
        self.note_removed(element)

    def next_deadline(self) -> float | None:
        """When `sweep` wants to be called, or `take_work`; None if there is nothing to look at."""
        deadlines = [self._install_by] if self._waiting and self.is_on else []
        if self._retiring or self._left_in_round or self._unanswered:
            deadlines.append(self._next_slice_at)
        elif self._rounds:
            deadlines.append(max(self._next_round_at, self._next_slice_at))
        return min(deadlines, default=None)

    def sweep(self, now: float) -> list[Element]:
        """Look at the next slice of all elements, if it is time; gives those that only the daemon has."""
        if now < self._next_slice_at:
            return []
        self._next_slice_at = now + SWEEP_PAUSE_S
        self._removals += self._unanswered
        self._unanswered.clear()
        retiring = [self._retiring.popleft() for _ in range(min(RETIRE_SLICE, len(self._retiring)))]
        self.withdraw(element for element in retiring if element.place is not Place.GONE)
        if not self._left_in_round and now >= self._next_round_at:
            self._left_in_round = len(self._rounds)
            self._next_round_at = now + SWEEP_INTERVAL_S
            if self._round_began_at is not None:
                self.round_s = max(SWEEP_INTERVAL_S, now - self._round_began_at)
            self._round_began_at = now
        own = []
        for _ in range(min(SWEEP_SLICE, self._left_in_round)):
            self._left_in_round -= 1
            element = self._rounds.popleft()
            if element.place is Place.GONE:
                continue
            self._rounds.append(element)
            self._credit(element)
            if element.place is Place.KERNEL:
                self._reads.append(element)
            else:
                own.append(element)
        return own

    def take_work(self, now: float, is_drained: bool) -> Work | None:
        """What the kernel is to do now; None if nothing. `is_drained`: no packet waits in the queue."""
        installs = []
        if is_drained or now >= self._install_by or len(self._waiting) >= INSTALLS_WAITING:
            installs = [element for element in self._waiting if self._is_for_kernel(element)]
            self._waiting.clear()
        if not (installs or self._removals or self._reads):
            return None
        work = Work(self._removals, installs, [element for element in self._reads if element.place is Place.KERNEL])
        self._removals, self._reads = [], []
        return work

    def _is_for_kernel(self, element: Element) -> bool:
        return self.is_on and element.place is Place.DAEMON and not element.flow.session.rule.inspects_every_packet

    def _forget(self, elements: Iterable[Element]) -> None:
        sessions = set()
        for element in elements:
            self.in_kernel -= element.place is Place.KERNEL
            element.place = Place.GONE
            sessions.add(element.flow.session)
            if self._elements.get(element.key) is element:
                del self._elements[element.key]
        for session in sessions:
            session.elements = tuple(element for element in session.elements if element.place is not Place.GONE)
            self._changed(session)
