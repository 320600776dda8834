"""Which SPIs in transit belong together: what can be said from the outside, and what cannot.

ESP tells nobody which two SPIs are one tunnel, nor that a new SPI is an old one's successor (both are agreed under
encryption). But the wire shows when each was used. One SPI that falls silent just as another begins is a rekey; one
that goes on beside the other is another tunnel. SPIs that follow one another so are a line. Where there is one line in
each direction only, the two are a tunnel: `observed-unique`. Two tunnels that were there all the time stay
`ambiguous`.

All of it is observed, never negotiated; more packets can prove it wrong, and then it is said otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from math import inf

from .between import Between, ends_of
from .constants import PAIR_INTERVAL_S, PAIR_LINES, PAIR_PROOF_S, PAIRINGS_PER_TURN, SPIS_SEEN, TAKE_OVER_S
from .session import Session, SpiUse
from .state import State


class Relation(StrEnum):
    """What an SPI is to the one before it, in the same direction."""

    FIRST = "first"
    TAKES_OVER = "takes-over"  # the older one fell silent as this one began: a rekey
    FOLLOWS = "follows"  # the older one had been silent for long: a rekey, or another tunnel
    BESIDE = "beside"  # both go on: a second tunnel
    UNDECIDED = "undecided"  # too early to tell a rekey from a second tunnel


class Evidence(StrEnum):
    """What is known of an SPI's partner in the other direction."""

    OBSERVED_UNIQUE = "observed-unique"
    AMBIGUOUS = "ambiguous"
    ONE_WAY = "one-way"  # nothing that could be its partner was seen


@dataclass(frozen=True, slots=True)
class Observation:
    """What can be said of one SPI. `before` is the older SPI of `relation`, `partner` that of the other direction."""

    relation: Relation
    before: int | None
    evidence: Evidence
    partner: int | None


@dataclass(slots=True)
class _Line:
    """SPIs of one direction that follow one another: as far as can be seen, one tunnel."""

    uses: list[SpiUse] = field(default_factory=list)
    undecided: list[SpiUse] = field(default_factory=list)  # those of them that may be another tunnel's

    @property
    def begin(self) -> float:
        return self.uses[0].first_seen_at

    @property
    def end(self) -> float:
        return self.uses[-1].last_seen_at


def observe(one_way: Sequence[SpiUse], other_way: Sequence[SpiUse], now: float) -> dict[SpiUse, Observation]:
    """What can be said of the SPIs between two peers, given with both directions; times in monotonic seconds."""
    relations: dict[SpiUse, tuple[Relation, SpiUse | None]] = {}
    lines = [_lines(uses, now, relations) for uses in (one_way, other_way)]
    partners = _partners(*lines)
    found = {}
    for mine, others in (lines, reversed(lines)):
        for line in mine:
            for use in line.uses:
                relation, before = relations[use]
                evidence = Evidence.AMBIGUOUS
                if use in partners:
                    evidence = Evidence.OBSERVED_UNIQUE
                elif not any(_overlap(use, theirs) >= -TAKE_OVER_S for other in others for theirs in other.uses):
                    evidence = Evidence.ONE_WAY
                found[use] = Observation(relation, _spi(before), evidence, _spi(partners.get(use)))
    return found


class SpiSessions:
    """The sessions in transit that show an SPI each, by their peers. They wait until their partner is proven."""

    def __init__(self) -> None:
        self._all, self._waiting = Between(), Between()
        self._next_at = 0.0

    def __contains__(self, session: Session | None) -> bool:
        return session is not None and session in self._all

    @property
    def waiting_count(self) -> int:
        """How many have no partner."""
        return sum(1 for _ in self._waiting)

    def join(self, session: Session) -> None:
        """This one has no partner yet."""
        self._all.add(session)
        self._waiting.add(session)

    def pair(self, session: Session) -> None:
        """It has one."""
        self._waiting.discard(session)

    def leave(self, session: Session) -> None:
        """It has ended, or is part of another one."""
        self._waiting.discard(session)
        self._all.discard(session)

    def between(self, a: bytes, b: bytes) -> Iterator[Session]:
        """Those between two addresses; of very many only the first."""
        return islice(self._all.of(a, b), SPIS_SEEN)

    def next_deadline(self) -> float | None:
        """When `due` wants to be asked, in monotonic seconds; None if nobody waits."""
        return self._next_at if self._waiting else None

    def due(self, now: float) -> list[list[Session]]:
        """The sessions of the next peers to be looked at; those of any others come with the next turns."""
        if not self._waiting or now < self._next_at:
            return []
        self._next_at = now + PAIR_INTERVAL_S
        # Among more SPIs than a flow remembers nothing is looked for: it would be ambiguous.
        return [list(sessions) for sessions in self._waiting.turn(PAIRINGS_PER_TURN) if len(sessions) <= SPIS_SEEN]


def proven_pairs(waiting: Iterable[Session], now: float) -> Iterator[tuple[Session, Session]]:
    """Those that are the two directions of one tunnel, the older session first: alone for PAIR_PROOF_S at least."""
    uses = {use: session for session in waiting if session.state is State.ACTIVE for use in session.c2s.uses}
    if not uses:
        return
    low, high = ends_of(next(iter(uses.values())))
    if low == high:  # what an address sends to itself goes one way only: an SPI would be its own partner
        return
    one_way = [use for use in uses if use.flow.address == low]
    other_way = {use.spi: use for use in uses if use.flow.address == high}
    seen = observe(one_way, list(other_way.values()), now)
    for use in one_way:
        partner = other_way.get(seen[use].partner or 0)
        if partner is not None and _overlap(use, partner) >= PAIR_PROOF_S:
            first, second = sorted((uses[use], uses[partner]), key=lambda session: session.id)
            yield first, second


def _lines(uses: Iterable[SpiUse], now: float, relations: dict[SpiUse, tuple[Relation, SpiUse | None]]) -> list[_Line]:
    lines: list[_Line] = []
    for use in sorted(uses, key=lambda use: use.first_seen_at):
        ended = [line for line in lines if line.end < use.first_seen_at + TAKE_OVER_S]
        if not ended:
            relations[use] = (Relation.BESIDE, lines[-1].uses[-1]) if lines else (Relation.FIRST, None)
            lines.append(_Line([use]))
            continue
        line = max(ended, key=lambda line: line.end)
        before = line.uses[-1]
        if now < before.last_seen_at + TAKE_OVER_S:
            relation = Relation.UNDECIDED
            line.undecided.append(use)
        elif before.last_seen_at < use.first_seen_at - TAKE_OVER_S:
            relation = Relation.FOLLOWS
        else:
            relation = Relation.TAKES_OVER
        relations[use] = (relation, before)
        line.uses.append(use)
    return lines


def _partners(one_way: Sequence[_Line], other_way: Sequence[_Line]) -> Mapping[SpiUse, SpiUse]:
    """The SPIs of lines that are one tunnel: the only ones, or the only ones for a while, or those that are left."""
    mine, theirs = list(one_way), list(other_way)
    partners: dict[SpiUse, SpiUse] = {}
    while mine and theirs and len(mine) <= PAIR_LINES and len(theirs) <= PAIR_LINES:
        if len(mine) == len(theirs) == 1:
            pair = (mine[0], theirs[0])
        else:
            alone = [(a, b) for a in mine for b in theirs if _was_alone(a, b, [*mine, *theirs])]
            if not alone:
                break
            pair = alone[0]
        partners |= _pairs(*pair)
        mine.remove(pair[0])
        theirs.remove(pair[1])
    return partners


def _was_alone(a: _Line, b: _Line, everything: Iterable[_Line]) -> bool:
    """Whether the two carried packets for a while in which no other line did."""
    begin = max(a.begin, b.begin)
    if min(a.end, b.end) < begin + PAIR_PROOF_S:
        return False
    others = [line for line in everything if line is not a and line is not b]
    return all(line.begin >= begin + PAIR_PROOF_S or line.end < min(a.begin, b.begin) for line in others)


def _pairs(a: _Line, b: _Line) -> dict[SpiUse, SpiUse]:
    """Those of two lines that ran at the same time: each is the best match of the other, and nothing speaks against it.

    Lines have to run for PAIR_PROOF_S side by side. One that may be another tunnel's has no partner yet, nor has one
    that was not alone for long before that began.
    """
    if min(a.end, b.end) < max(a.begin, b.begin) + PAIR_PROOF_S:
        return {}
    best_of_a = {use: max(b.uses, key=lambda other: _overlap(use, other)) for use in a.uses}
    best_of_b = {use: max(a.uses, key=lambda other: _overlap(use, other)) for use in b.uses}
    undecided = [*a.undecided, *b.undecided]
    open_since = min((use.first_seen_at for use in undecided), default=inf)
    pairs = {}
    for use, other in best_of_a.items():
        if use in undecided or other in undecided:
            continue
        if max(use.first_seen_at, other.first_seen_at) + PAIR_PROOF_S > open_since:
            continue
        if best_of_b[other] is use and _overlap(use, other) >= -TAKE_OVER_S:
            pairs[use], pairs[other] = other, use
    return pairs


def _spi(use: SpiUse | None) -> int | None:
    return use.spi if use else None


def _overlap(a: SpiUse, b: SpiUse) -> float:
    """How long both were in use, in seconds; less than nothing if there was a pause between them."""
    return min(a.last_seen_at, b.last_seen_at) - max(a.first_seen_at, b.first_seen_at)
