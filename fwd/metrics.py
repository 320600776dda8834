"""Metrics for Prometheus: figures out of the core, a bounded amount at a time, and their exposition.

`Metrics.take` runs beside packets, in the daemon's loop; `expose`, which takes longest, looks at nothing but what that
took down, so it can run in a thread. No label has values without bound: applications, states, zones and reasons are
few, and tunnels are capped (see core/totals.py). Names and units follow Prometheus's own rules: base units, `_total`.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector

from . import __version__
from .core.counters import COUNTERS
from .core.firewall import Firewall
from .core.health import Trouble
from .core.histogram import Histogram
from .core.session import Application, SessionType
from .core.state import State
from .core.totals import OTHERS, OneWay, TunnelName, Zones

#: Tunnels that one step looks at, at most: some 1 ms, in which packets wait.
TUNNELS_PER_STEP = 256

#: The states that a session in the table can be in.
_STATES: Final = (State.OPENING, State.ACTIVE, State.DISCARD, State.CLOSING)

#: Counters of severity `drop` are the reasons of one metric; these others have names that Prometheus's rules dislike.
_RENAMED: Final = {"byte_session": "session_bytes"}

_PROCESS: Final = ProcessCollector(registry=None)


@dataclass(frozen=True, slots=True)
class HostFigures:
    """What only the daemon knows; `queue_waiting` is None if the kernel does not tell."""

    queue_waiting: int | None
    queue_length: int
    sa_events_waiting: int
    decisions: Histogram
    lags: Histogram


@dataclass(slots=True)
class _Spans:
    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total_s: float

    @classmethod
    def of(cls, histogram: Histogram) -> _Spans:
        return cls(histogram.bounds, tuple(histogram.counts), histogram.total_s)


@dataclass(slots=True)
class Figures:
    """All that is exposed, as it was when it was taken."""

    sessions: dict[tuple[Application, State, SessionType], int] = field(default_factory=dict)
    tunnel_sas: Counter[TunnelName] = field(default_factory=Counter)
    tunnel_troubles: Counter[tuple[TunnelName, Trouble]] = field(default_factory=Counter)
    counters: dict[str, int] = field(default_factory=dict)
    zones: dict[Zones, tuple[int, int]] = field(default_factory=dict)
    tunnels: dict[TunnelName, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    troubles: dict[Trouble, int] = field(default_factory=dict)
    spans: dict[str, _Spans] = field(default_factory=dict)
    gauges: dict[str, float | None] = field(default_factory=dict)


class Metrics:
    """The figures of one firewall. `now` gives monotonic seconds, `host` what only the daemon knows.

    `sync` brings the counters of the edges up to date.
    """

    def __init__(
        self,
        firewall: Firewall,
        now: Callable[[], float],
        host: Callable[[], HostFigures],
        sync: Callable[[], None],
    ) -> None:
        self._firewall = firewall
        self._now = now
        self._host = host
        self._sync = sync

    def take(self) -> Generator[None, None, Figures]:
        """The figures, in steps between which packets may have their turn; the last step takes all counts at once."""
        figures = Figures()
        yield from self._take_tunnels(figures)
        self._take_counts(figures)
        return figures

    def _take_tunnels(self, figures: Figures) -> Generator[None, None, None]:
        sessions = iter(list(self._firewall.tunnels))
        while page := list(islice(sessions, TUNNELS_PER_STEP)):
            for session in page:
                name = self._firewall.totals.name_of(session)
                figures.tunnel_sas[name] += len(session.sas)
                for finding in self._firewall.known_findings(session):
                    figures.tunnel_troubles[name, finding.trouble] += 1
            yield

    def _take_counts(self, figures: Figures) -> None:
        self._sync()
        firewall, host, now = self._firewall, self._host(), self._now()
        directory, path, limits = firewall.directory, firewall.fast_path, firewall.limits
        figures.sessions = {key: count for key, count in firewall.table.tally.items() if key[1] in _STATES}
        figures.counters = dict(firewall.counters.values)
        figures.zones = {zones: (c.packets, c.octets) for zones, c in firewall.totals.by_zones.items()}
        figures.tunnels = {
            name: (_one_way(tunnel.inbound), _one_way(tunnel.outbound))
            for name, tunnel in firewall.totals.by_tunnel.items()
        }
        figures.troubles = dict(firewall.trouble_counts)
        figures.spans = {"decision": _Spans.of(host.decisions), "event_loop_lag": _Spans.of(host.lags)}
        figures.gauges = {
            "sessions_limit": firewall.table.capacity,
            "half_open_sessions": limits.half_open_count,
            "half_open_sessions_limit": limits.bounds.half_open or None,
            "queue_packets": host.queue_waiting,
            "queue_packets_limit": host.queue_length,
            "fast_path_up": path.is_on,
            "fast_path_spis": path.in_kernel,
            "fast_path_spis_limit": path.capacity,
            "vici_up": directory.is_fresh,
            "vici_answer_age_seconds": None if directory.answered_at is None else now - directory.answered_at,
            "sas": len(directory),
            "tunnels": len(firewall.tunnels),
            "sa_events_waiting": host.sa_events_waiting,
        }


def _one_way(way: OneWay) -> tuple[int, ...]:
    return (way.packets, way.octets, way.lost, way.late, way.duplicates)


_GAUGES: Final[Mapping[str, str]] = {
    "sessions_limit": "The most sessions that the table holds",
    "half_open_sessions": "Sessions of strangers that nobody has answered",
    "half_open_sessions_limit": "The most of these that there may be; absent: no limit",
    "queue_packets": "Packets that wait in the kernel's queue; absent: fwd may not read that",
    "queue_packets_limit": "The most packets that can wait there",
    "fast_path_up": "Whether the kernel repeats decisions by itself",
    "fast_path_spis": "SPIs that it decides on by itself",
    "fast_path_spis_limit": "The most SPIs that it has room for",
    "vici_up": "Whether strongSwan answers over VICI; while it does not, its SAs stay in use as last known",
    "vici_answer_age_seconds": "Seconds since strongSwan last said anything; absent: it never did",
    "sas": "CHILD_SAs that strongSwan told of",
    "tunnels": "Tunnels that end here and have a session",
    "sa_events_waiting": "What strongSwan said that fwd has yet to learn",
}

_SPANS: Final[Mapping[str, str]] = {
    "decision": "How long fwd takes to decide on a packet that the kernel does not: of one in 64, and the first of each"
    " turn of its loop",
    "event_loop_lag": "How late fwd's timers are: about as long may a packet wait for its turn",
}

_TUNNEL_COUNTS: Final = (
    (
        "packets",
        'Packets since fwd was started, by tunnel that ends here; tunnel="other": those beyond [metrics] tunnels',
    ),
    ("bytes", "Bytes of these, outer IP header included"),
    ("lost_packets", "Packets that were missing by their sequence numbers, and were not found late"),
    ("late_packets", "Packets that others overtook, of those that fwd looked at itself"),
    ("duplicate_packets", "Packets that came again, of those that fwd looked at itself"),
)


def expose(figures: Figures, accept: str) -> tuple[bytes, str]:
    """The exposition for an HTTP `Accept` header, and its content type."""
    encode, content_type = choose_encoder(accept)
    return encode(_Collected([*_families(figures), *_PROCESS.collect()])), content_type


@dataclass(frozen=True, slots=True)
class _Collected:
    """What the encoders take in place of a registry."""

    families: list[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families


def _families(figures: Figures) -> Iterator[Metric]:
    build = {"version": __version__, "python": platform.python_version(), "kernel": platform.release()}
    yield InfoMetricFamily("fwd_build", "Which fwd this is, and what it runs on", build)
    for name, text in _GAUGES.items():
        if (value := figures.gauges[name]) is not None:
            yield GaugeMetricFamily(f"fwd_{name}", text, float(value))
    sessions = GaugeMetricFamily("fwd_sessions", "Sessions in the table", labels=("application", "state", "type"))
    for key, count in figures.sessions.items():
        sessions.add_metric(key, count)
    yield sessions
    yield from _traffic(figures)
    yield from _tunnels(figures)
    yield from _counters(figures)
    for name, text in _SPANS.items():
        spans = figures.spans[name]
        bounds = (*(str(bound) for bound in spans.bounds), "+Inf")
        counted = list(zip(bounds, accumulate(spans.counts), strict=True))
        yield HistogramMetricFamily(f"fwd_{name}_seconds", text, counted, spans.total_s)


def _traffic(figures: Figures) -> Iterator[Metric]:
    labels = ("from_zone", "to_zone", "direction")
    which = "by the zones of session's client and server; what the kernel decided on is counted within seconds"
    packets = CounterMetricFamily(
        "fwd_packets",
        f"Packets {which}. Their sum is what fwd_pkt_session_total grew by since fwd was started",
        labels=labels,
    )
    octets = CounterMetricFamily("fwd_bytes", f"Bytes of IP packets {which}", labels=labels)
    for (client, server, is_c2s), counts in figures.zones.items():
        for family, count in zip((packets, octets), counts, strict=True):
            family.add_metric((client, server, "c2s" if is_c2s else "s2c"), count)
    yield packets
    yield octets


def _tunnels(figures: Figures) -> Iterator[Metric]:
    labels = ("tunnel", "remote_id")
    sas = GaugeMetricFamily("fwd_tunnel_sas", "CHILD_SAs of a tunnel that ends here; 0: it is down", labels=labels)
    for name in figures.tunnels:
        sas.add_metric(_tunnel(name), figures.tunnel_sas[name])
    yield sas
    for index, (what, text) in enumerate(_TUNNEL_COUNTS):
        family = CounterMetricFamily(f"fwd_tunnel_{what}", text, labels=(*labels, "direction"))
        for name, (into, out) in figures.tunnels.items():
            family.add_metric((*_tunnel(name), "in"), into[index])
            family.add_metric((*_tunnel(name), "out"), out[index])
        yield family
    troubles = GaugeMetricFamily(
        "fwd_tunnel_troubles", "Troubles that a tunnel has now; absent: it has none", labels=(*labels, "trouble")
    )
    for (name, trouble), count in figures.tunnel_troubles.items():
        troubles.add_metric((*_tunnel(name), trouble), count)
    yield troubles
    troubled = GaugeMetricFamily(
        "fwd_troubled_sessions",
        "Sessions of this host, tunnels and strangers, that have a trouble now",
        labels=("trouble",),
    )
    for trouble, count in figures.troubles.items():
        troubled.add_metric((trouble,), count)
    yield troubled


def _tunnel(name: TunnelName) -> tuple[str, str]:
    return ("other", "") if name == OTHERS else (f"{name.connection}/{name.child}", name.remote_id)


def _counters(figures: Figures) -> Iterator[Metric]:
    dropped = CounterMetricFamily(
        "fwd_dropped_packets", "Packets that no session counts, by the global counter that does", labels=("reason",)
    )
    for counter in COUNTERS:
        value = figures.counters[counter.name]
        if counter.severity == "drop":
            dropped.add_metric((counter.name,), value)
        else:
            yield CounterMetricFamily(f"fwd_{_RENAMED.get(counter.name, counter.name)}", counter.description, value)
    yield dropped
