"""Zones and the rules between them: which session may be, decided once, when it is set up.

As in PAN-OS the first rule that matches wins, and a default that the configuration names stands at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from fnmatch import fnmatchcase


class Verdict(Enum):
    """What becomes of a packet."""

    ACCEPT = "accept"
    DROP = "drop"


class Action(StrEnum):
    """What a rule does with the session."""

    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, slots=True)
class Prefix:
    """An address prefix: `network` in network order (4 or 16 bytes), `length` in bits."""

    network: bytes
    length: int

    def contains(self, address: bytes) -> bool:
        """Whether the address lies in the prefix; one of the other family never does."""
        if len(address) != len(self.network):
            return False
        shift = len(address) * 8 - self.length
        return int.from_bytes(address) >> shift == int.from_bytes(self.network) >> shift


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. An empty match field matches everything (PAN-OS's `any`)."""

    name: str
    action: Action
    log_at_end: bool = True
    log_at_start: bool = False
    from_zones: frozenset[str] = frozenset()
    to_zones: frozenset[str] = frozenset()
    sources: tuple[Prefix, ...] = ()
    destinations: tuple[Prefix, ...] = ()
    applications: frozenset[str] = frozenset()
    inspects_every_packet: bool = False  # its sessions are kept off the kernel's fast path

    def matches(self, from_zone: str, to_zone: str, source: bytes, destination: bytes, application: str) -> bool:
        """Whether a session from client to server, addresses in network order, falls under this rule."""
        return self.mismatch(from_zone, to_zone, source, destination, application) is None

    def mismatch(self, from_zone: str, to_zone: str, source: bytes, destination: bytes, application: str) -> str | None:
        """The first field that keeps a session from this rule, by its name in the configuration; None: it matches."""
        if self.from_zones and from_zone not in self.from_zones:
            return "from"
        if self.to_zones and to_zone not in self.to_zones:
            return "to"
        if self.applications and application not in self.applications:
            return "application"
        if self.sources and not any(prefix.contains(source) for prefix in self.sources):
            return "source"
        if self.destinations and not any(prefix.contains(destination) for prefix in self.destinations):
            return "destination"
        return None


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules in order, and the one that applies where none matches."""

    rules: tuple[Rule, ...]
    default: Rule

    def lookup(self, from_zone: str, to_zone: str, source: bytes, destination: bytes, application: str) -> Rule:
        """The first rule that matches, else the default."""
        for rule in self.rules:
            if rule.matches(from_zone, to_zone, source, destination, application):
                return rule
        return self.default


@dataclass(frozen=True, slots=True)
class Zones:
    """Which interface lies in which zone: (name or shell pattern, zone), the first match wins."""

    patterns: Sequence[tuple[str, str]] = ()
    default: str = "any"

    def zone_of(self, interface: str) -> str:
        """The zone of an interface by its name."""
        for pattern, zone in self.patterns:
            if fnmatchcase(interface, pattern):
                return zone
        return self.default
