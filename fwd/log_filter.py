"""Which entries of the traffic log an operator asked for: the filter's words as one predicate of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, NamedTuple, TypeAlias

from .core.filter_value import ANY_NAME, ANY_NUMBER, AT_LEAST, NAME, NUMBER, OCTET, PREFIX, Kind, parse, word_of
from .core.policy import Action
from .core.session import Application
from .core.state import EndReason
from .core.traffic_log import Subtype

#: A row of the log, by the names of `log_entry.COLUMNS`.
Row: TypeAlias = Any


class Key(NamedTuple):
    """A filter word: of which kind its values are, and what of a row they are held against."""

    kind: Kind
    value: Callable[[Row], Any]


def _column(name: str) -> Callable[[Row], Any]:
    return lambda row: row[name]


def _address(name: str) -> Callable[[Row], bytes]:
    return lambda row: ip_address(row[name]).packed


def _spis(row: Row) -> Iterable[int]:
    """The SPIs that were seen in either direction, and those of the tunnel's last CHILD_SA if it never carried any."""
    seen = [int(spi) for column in ("spis_c2s", "spis_s2c") for spi in row[column].split()]
    return seen if row["child_sa"] is None else (*seen, row["source_port"], row["destination_port"])


def _tunnels(row: Row) -> Iterable[str]:
    ike, child = row["ike_sa"], row["child_sa"]
    return () if child is None else (child, ike, f"{ike}/{child}")


KEYS: Mapping[str, Key] = {
    "subtype": Key(word_of(Subtype), _column("subtype")),
    "application": Key(word_of(Application), _column("application")),
    "source": Key(PREFIX, _address("source")),
    "destination": Key(PREFIX, _address("destination")),
    "source-port": Key(NUMBER, _column("source_port")),
    "destination-port": Key(NUMBER, _column("destination_port")),
    "protocol": Key(OCTET, _column("protocol")),
    "from": Key(NAME, _column("source_zone")),
    "to": Key(NAME, _column("destination_zone")),
    "rule": Key(NAME, _column("rule")),
    "action": Key(word_of(Action), _column("action")),
    "end-reason": Key(word_of(EndReason), _column("end_reason")),
    "session": Key(NUMBER, _column("session")),
    "min-age": Key(AT_LEAST, _column("elapsed_s")),
    "min-kb": Key(AT_LEAST, lambda row: (row["bytes_c2s"] + row["bytes_s2c"]) / 1024),
    "ingress-interface": Key(NAME, _column("ingress")),
    "egress-interface": Key(NAME, _column("egress")),
    "spi": Key(ANY_NUMBER, _spis),
    "tunnel": Key(ANY_NAME, _tunnels),
}

_KINDS = {name: key.kind for name, key in KEYS.items()}


@dataclass(frozen=True, slots=True)
class LogQuestion:
    """A page of the log: entries after number `after` (None: from the beginning) in the order of their numbers.

    Without `is_forward` it is the other way round. Times in seconds since the epoch. `matches` holds for a row that is
    wanted.
    """

    matches: Callable[[Row], bool]
    since: float | None
    until: float | None
    is_forward: bool
    after: int | None
    limit: int


def build_log_filter(words: Mapping[str, str]) -> Callable[[Row], bool]:
    """One predicate of a row for all words together. Raises FilterError."""
    tests = [(KEYS[key].value, wanted.test()) for key, wanted in parse(_KINDS, words).items()]
    return lambda row: all(test(value(row)) for value, test in tests)
