"""Control against data: what the IKE daemon says of a tunnel, beside what its packets say.

Each finding is a difference between the two that an operator wants to hear of, in a sentence that says where to look.
What happens now and then, such as a lost packet, is trouble while it goes on and for RECENT_S after; the totals stay
with the session.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from .constants import ONE_WAY_S, RECENT_S
from .sa import NOT_ASKED, SaDirectory
from .session import Application, Comparison, Generation, Session, SpiUse, spi_text
from .state import State


class Trouble(StrEnum):
    """What can be wrong with a tunnel; each is a counter, too: `tunnel_...`."""

    SILENT = "silent"
    ONE_WAY = "one-way"
    LOSS = "loss"
    OUT_OF_ORDER = "out-of-order"
    RESET = "reset"
    WRAP = "wrap"
    AFTER_DELETE = "after-delete"
    UNKNOWN_SPI = "unknown-spi"
    MISCOUNT = "miscount"
    FRAGMENTS = "fragments"
    STALE = "stale"

    @property
    def counter(self) -> str:
        """The name of its counter."""
        return f"tunnel_{self.replace('-', '_')}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One trouble of one tunnel, in words."""

    trouble: Trouble
    text: str


@dataclass(slots=True)
class _Figure:
    """A number that only grows, and when it grew last (monotonic seconds)."""

    value: int = 0
    grew_at: float = -RECENT_S


@dataclass(slots=True)
class _Record:
    """What was noticed of one session so far."""

    seen: tuple[int, int] = (0, 0)
    lone_way: int | None = None  # the only one of out (0) and in (1) that carried packets
    lone_since: float = 0.0
    lone_seen_at: float = 0.0
    figures: dict[str, _Figure] = field(default_factory=dict)
    figures_before: dict[str, _Figure] = field(default_factory=dict)
    found: dict[Trouble, Finding] = field(default_factory=dict)


class Watch:
    """Looks at sessions of this host again and again, and says what is wrong with each."""

    def __init__(self, directory: SaDirectory, started_at: float) -> None:
        self._directory = directory
        self._started_at = started_at
        self._records: dict[Session, _Record] = {}
        #: How many sessions have each trouble.
        self.counts: dict[Trouble, int] = dict.fromkeys(Trouble, 0)

    def __len__(self) -> int:
        return len(self._records)

    def found(self, session: Session) -> list[Finding]:
        """What was wrong with a session when it was last looked at."""
        record = self._records.get(session)
        return list(record.found.values()) if record else []

    def count(self, session: Session) -> int:
        """How much was wrong with a session when it was last looked at."""
        record = self._records.get(session)
        return len(record.found) if record else 0

    def forget(self, session: Session) -> None:
        """The session has ended."""
        for finding in self.found(session):
            self.counts[finding.trouble] -= 1
        self._records.pop(session, None)

    def look(self, session: Session, silent_s: float, now: float) -> tuple[list[Finding], list[Finding]]:
        """Look at a session; gives the troubles that have begun and those that are over."""
        record = self._records.setdefault(session, _Record())
        before = record.found
        # What is asked for no more, such as the figures of an SPI that is long gone, is forgotten.
        record.figures_before, record.figures = record.figures, {}
        record.found = {finding.trouble: finding for finding in self._findings(session, record, silent_s, now)}
        begun = [finding for trouble, finding in record.found.items() if trouble not in before]
        over = [finding for trouble, finding in before.items() if trouble not in record.found]
        for finding in begun:
            self.counts[finding.trouble] += 1
        for finding in over:
            self.counts[finding.trouble] -= 1
        return begun, over

    def _findings(self, session: Session, record: _Record, silent_s: float, now: float) -> Iterator[Finding]:
        if session.generations:
            if session.sas and session.state in (State.OPENING, State.ACTIVE):
                yield from self._of_ways(session, record, silent_s, now)
            for generation in session.generations:
                yield from self._of_generation(session, generation, record, now)
        else:
            yield from self._of_strangers(session, record, now)
        fragments = session.c2s.fragment_count + session.s2c.fragment_count
        if _grows(record, "fragments", fragments, now):
            yield Finding(
                Trouble.FRAGMENTS,
                f"{fragments} of the packets looked at came in fragments or larger than the link's MTU:"
                " lower the MTU or clamp the MSS inside",
            )
        stale = self._directory.stale_s(session.sas[-1], now) if session.sas else None
        if stale is not None and self._directory.lost_reason != NOT_ASKED:
            yield Finding(Trouble.STALE, f"strongSwan has not answered for {stale:.0f} s: its SAs may have changed")

    def _of_ways(self, session: Session, record: _Record, silent_s: float, now: float) -> Iterator[Finding]:
        """Whether packets flow, and both ways."""
        seen_at = max((use.last_seen_at for flow in (session.c2s, session.s2c) for use in flow.uses), default=None)
        since = max(session.generations[0].installed_at, self._started_at)
        if now - (since if seen_at is None else seen_at) >= silent_s:
            which = "the SA was installed" if since == session.generations[0].installed_at else "fwd was started"
            how_long = f"since {which}" if seen_at is None else f"for {now - seen_at:.0f} s"
            yield Finding(Trouble.SILENT, f"no packet {how_long}: nobody sends, or packets take another way")

        seen = (session.outbound.packet_count, session.inbound.packet_count)
        grown = [after > before for before, after in zip(record.seen, seen, strict=True)]
        record.seen = seen
        if all(grown) or now - record.lone_seen_at > ONE_WAY_S:
            record.lone_way = None
        if any(grown) and not all(grown):
            way = grown.index(True)
            if record.lone_way != way:
                record.lone_way, record.lone_since = way, now
            record.lone_seen_at = now
        if record.lone_way is not None and record.lone_seen_at - record.lone_since >= ONE_WAY_S:
            yield Finding(
                Trouble.ONE_WAY,
                (
                    "this host sends and nothing comes back: look at the peer, and at the way from it",
                    "packets come in and this host sends none: look at its routes and its policies",
                )[record.lone_way],
            )

    def _of_generation(
        self, session: Session, generation: Generation, record: _Record, now: float
    ) -> Iterator[Finding]:
        sa = generation.sa
        if _grows(record, f"after {sa.spi_in}", generation.after_end_count, now):
            yield Finding(
                Trouble.AFTER_DELETE,
                f"{generation.after_end_count} packets after strongSwan deleted SPIs {spi_text(sa.spi_in)} and"
                f" {spi_text(sa.spi_out)}:"
                " the peer still uses them",
            )
        if generation.removed_at is not None:
            return
        for use, way in zip(uses_of(session, generation), ("in", "out"), strict=True):
            if use is not None and use.sequence is not None:
                yield from _of_numbers(use, way, sa.esn, record, now)
        if (seen := generation.comparison) and seen.is_off and seen.was_off:
            into, out = seen.drift
            yield Finding(
                Trouble.MISCOUNT,
                f"fwd counted {into:+} packets in and {out:+} out against strongSwan: what IPsec drops (replay, ICV) or"
                " sends past fwd's rules",
            )

    def _of_strangers(self, session: Session, record: _Record, now: float) -> Iterator[Finding]:
        """A session of this host that is no tunnel's: nobody owns its SPIs, or nobody does any more."""
        if session.is_provisional:
            return
        is_in_udp = session.application is Application.IPSEC_ESP_UDP
        for flow, to in ((session.c2s, session.s2c), (session.s2c, session.c2s)):
            for use in flow.uses:
                if not _grows(record, f"stranger {use.spi}", use.packet_count, now):
                    continue
                if former := self._directory.former((to.address, is_in_udp, use.spi)):
                    yield Finding(
                        Trouble.AFTER_DELETE,
                        f"{use.packet_count} packets on SPI {spi_text(use.spi)} of"
                        f" {former.sa.ike_name}/{former.sa.child_name}, which strongSwan {former.end}"
                        f" {now - former.removed_at:.0f} s ago: the peer still uses it",
                    )
                else:
                    yield Finding(
                        Trouble.UNKNOWN_SPI,
                        f"{use.packet_count} packets on SPI {spi_text(use.spi)}, which strongSwan does not own:"
                        " a peer that kept its SA when this host lost it, or a forger",
                    )


def _of_numbers(use: SpiUse, way: str, is_esn: bool, record: _Record, now: float) -> Iterator[Finding]:
    """What the sequence numbers of one SPI tell."""
    numbers = use.sequence
    assert numbers is not None
    where = "before they came here" if way == "in" else "between this host's IPsec and fwd's rules"
    for trouble, value, text in (
        (Trouble.LOSS, numbers.settled, f"packets were lost {where}"),
        (Trouble.OUT_OF_ORDER, numbers.late, f"packets came late, by up to {numbers.depth} numbers"),
        (Trouble.RESET, numbers.resets, "times the sequence numbers began anew: the sender reuses them"),
        (
            Trouble.WRAP,
            0 if is_esn else numbers.wraps,
            "times the sequence numbers wrapped, but the SA has no ESN",
        ),
    ):
        if _grows(record, f"{trouble} {use.spi}", value, now):
            yield Finding(trouble, f"SPI {spi_text(use.spi)} {way}: {value} {text}")


def _grows(record: _Record, name: str, value: int, now: float) -> bool:
    """Whether a figure grew within RECENT_S."""
    if not value:
        return False
    figure = record.figures[name] = record.figures_before.get(name) or _Figure()
    if value > figure.value:
        figure.value, figure.grew_at = value, now
    return now - figure.grew_at < RECENT_S


def uses_of(session: Session, generation: Generation) -> tuple[SpiUse | None, SpiUse | None]:
    """What was seen of a generation's two SPIs: in and out."""
    return session.inbound.use(generation.sa.spi_in), session.outbound.use(generation.sa.spi_out)


def counts_of(session: Session, generation: Generation) -> tuple[int, int]:
    """The packets that fwd counted under a generation's SPIs, in and out."""
    into, out = (use.packet_count if use else 0 for use in uses_of(session, generation))
    return into, out


def note_counts(session: Session, generation: Generation, now: float) -> None:
    """The IKE daemon has just told its packet counts; if earlier ones still wait to be compared, those come first."""
    sa = generation.sa
    if generation.told is None and sa.packets_in >= 0 and sa.packets_out >= 0:
        counts = counts_of(session, generation)
        generation.told = Comparison(now, (sa.packets_in, sa.packets_out), counts, counts, (0, 0))


def ask_for_counts(session: Session) -> bool:
    """Whether our counts of a session are to be read, so that `compare` can do its work at the next look."""
    told = [generation.told for generation in session.generations if generation.told is not None]
    for comparison in told:
        comparison.is_asked = True
    return bool(told)


def compare(session: Session) -> None:
    """Hold what the IKE daemon told against our counts, which have been read since."""
    for generation in session.generations:
        seen, before = generation.told, generation.comparison
        if seen is None or not seen.is_asked:
            continue
        generation.told, generation.comparison = None, seen
        seen.most = counts_of(session, generation)
        if before is not None:
            seen.base, seen.was_off = before.base, before.is_off
        elif not generation.is_whole:  # there were packets that fwd did not count under this generation
            seen.base = (seen.theirs[0] - seen.most[0], seen.theirs[1] - seen.most[1])
