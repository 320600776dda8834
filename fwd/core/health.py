"""Control against data: what the IKE daemon says of a tunnel, beside what its packets say.

Each finding is a difference between the two that an operator wants to hear of, in a sentence that says where to look.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from .constants import ONE_WAY_S
from .sa import Comparison, SaDirectory
from .session import Flow, Generation, Session, SpiUse
from .state import State


class Trouble(StrEnum):
    """What can be wrong with a tunnel; each is a counter, too: `tunnel_...`."""

    SILENT = "silent"
    ONE_WAY = "one-way"
    LOSS = "loss"
    OUT_OF_ORDER = "out-of-order"
    RESET = "reset"
    AFTER_DELETE = "after-delete"
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


def uses_of(session: Session, generation: Generation) -> tuple[SpiUse | None, SpiUse | None]:
    """What was seen of a generation's two SPIs: in and out."""
    return session.inbound.use(generation.sa.spi_in), session.outbound.use(generation.sa.spi_out)


def compare(session: Session, generation: Generation, now: float, is_older: bool) -> None:
    """Hold the IKE daemon's counts of an SA pair against fwd's. `is_older`: it was there before fwd."""
    sa = generation.sa
    if sa.packets_in < 0 or sa.packets_out < 0:
        return
    theirs = (sa.packets_in, sa.packets_out)
    into, out = (use.packet_count if use else 0 for use in uses_of(session, generation))
    before = generation.comparison
    if before is None:
        base = (theirs[0] - into, theirs[1] - out) if is_older else (0, 0)
        generation.comparison = Comparison(now, theirs, (into, out), base)
    else:
        generation.comparison = Comparison(now, theirs, (into, out), before.base, before.is_off)


def last_seen_at(flow: Flow) -> float | None:
    """When a packet of the flow was last seen; None if none ever was."""
    return max((use.last_seen_at for use in flow.uses), default=None)


def findings(session: Session, directory: SaDirectory, silent_s: float, now: float) -> Iterator[Finding]:
    """What is wrong with the tunnel of a session that ends on this host, if anything."""
    sas = session.sas
    if not sas or session.state not in (State.OPENING, State.ACTIVE):
        return
    sa = sas[-1]
    sent_at, received_at = last_seen_at(session.outbound), last_seen_at(session.inbound)
    seen_at = max((at for at in (sent_at, received_at) if at is not None), default=None)
    installed_at = next(g.installed_at for g in session.generations if g.removed_at is None)
    if (idle := now - (installed_at if seen_at is None else max(seen_at, installed_at))) >= silent_s:
        since = "since the SA was installed" if seen_at is None else f"for {idle:.0f} s"
        yield Finding(Trouble.SILENT, f"no packet {since}: nobody sends, or packets take another way")
    for mine, other, text in (
        (sent_at, received_at, "this host sends and nothing comes back: look at the peer, and at the way from it"),
        (received_at, sent_at, "packets come in and this host sends none: look at its routes and its policies"),
    ):
        if (
            mine is not None
            and now - mine < ONE_WAY_S
            and mine - (installed_at if other is None else other) > ONE_WAY_S
        ):
            yield Finding(Trouble.ONE_WAY, text)
    for generation in session.generations:
        yield from _of_generation(session, generation)
    if fragments := session.c2s.fragment_count + session.s2c.fragment_count:
        yield Finding(
            Trouble.FRAGMENTS,
            f"{fragments} packets in fragments or larger than the link's MTU: lower the MTU or clamp the MSS inside",
        )
    if (stale := directory.stale_s(sa, now)) is not None:
        yield Finding(Trouble.STALE, f"strongSwan has not answered for {stale:.0f} s: its SAs may have changed")


def _of_generation(session: Session, generation: Generation) -> Iterator[Finding]:
    if generation.after_end_count:
        yield Finding(
            Trouble.AFTER_DELETE,
            f"{generation.after_end_count} packets after strongSwan deleted SPIs"
            f" {generation.sa.spi_in} and {generation.sa.spi_out}: the peer still uses them",
        )
    if generation.removed_at is not None:
        return
    for use, way in zip(uses_of(session, generation), ("in", "out"), strict=True):
        if use is None or use.sequence is None:
            continue
        numbers = use.sequence
        if numbers.lost:
            where = "before they came here" if way == "in" else "between this host's IPsec and fwd's rules"
            yield Finding(Trouble.LOSS, f"SPI {use.spi} ({way}): {numbers.lost} packets were lost {where}")
        if numbers.late:
            yield Finding(
                Trouble.OUT_OF_ORDER,
                f"SPI {use.spi} ({way}): {numbers.late} packets came late, by up to {numbers.depth} numbers",
            )
        if numbers.resets:
            yield Finding(
                Trouble.RESET, f"SPI {use.spi} ({way}): the sequence numbers began anew {numbers.resets} times"
            )
    if (seen := generation.comparison) and seen.is_off and seen.was_off:
        into, out = seen.drift
        yield Finding(
            Trouble.MISCOUNT,
            f"fwd counted {into:+} packets in and {out:+} out against strongSwan: what IPsec drops (replay, ICV) or"
            " sends past fwd's rules",
        )
