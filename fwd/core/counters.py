"""The global counters: which there are, in PAN-OS's terms, and their values and rates.

A packet is counted in exactly one session or in exactly one counter of severity `drop`:
pkt_recv = pkt_session + the sum of the drop counters of category packet or flow.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from .constants import SAMPLE_INTERVAL_S
from .health import Trouble
from .limits import BY_PEERS, BY_SOURCE, HALF_OPEN
from .packet import Malformation


@dataclass(frozen=True, slots=True)
class Counter:
    """What is counted. Severity, category and aspect are PAN-OS's columns."""

    name: str
    severity: str
    category: str
    aspect: str
    description: str


_MALFORMATIONS: Final = {
    Malformation.TRUNCATED: "Packets dropped: shorter than their headers say",
    Malformation.IP_VERSION: "Packets dropped: neither IPv4 nor IPv6",
    Malformation.IP_HEADER: "Packets dropped: impossible length in the IP header",
    Malformation.IPV6_EXTENSION: "Packets dropped: IPv6 extension headers too long or too many",
    Malformation.ESP: "Packets dropped: ESP with SPI 0, which must not be on the wire",
    Malformation.UDP: "Packets dropped: too short for ESP in UDP, and no keepalive",
    Malformation.NOT_IPSEC: "Packets dropped: neither ESP nor IKE nor NAT-T",
}

_TROUBLES: Final = {
    Trouble.SILENT: "Tunnels found without a packet for the configured time",
    Trouble.ONE_WAY: "Tunnels found carrying packets one way only",
    Trouble.LOSS: "Tunnels found losing packets, by their sequence numbers",
    Trouble.OUT_OF_ORDER: "Tunnels found with packets out of order",
    Trouble.RESET: "Tunnels found with sequence numbers that began anew",
    Trouble.WRAP: "Tunnels found with sequence numbers that wrapped, without ESN",
    Trouble.AFTER_DELETE: "Tunnels found with packets on an SA that is deleted",
    Trouble.UNKNOWN_SPI: "Peers found using an SPI of this host that the IKE daemon does not own",
    Trouble.MISCOUNT: "Tunnels found where the IKE daemon counts other packets than fwd",
    Trouble.FRAGMENTS: "Tunnels found with fragmented ESP",
    Trouble.STALE: "Tunnels found while the IKE daemon was away",
}

_LIMITS: Final = {
    BY_SOURCE: "Packets dropped: their source has too many sessions",
    BY_PEERS: "Packets dropped: their two peers have too many sessions",
    HALF_OPEN: "Packets dropped: too many sessions that nobody answered",
}

_EXPORTED: Final = {
    "records": "Flow records",
    "packets": "Packets of flow records",
    "bytes": "Bytes of flow records",
}

COUNTERS: Final[tuple[Counter, ...]] = (
    Counter("pkt_recv", "info", "packet", "pktproc", "Packets received, those of the fast path included"),
    Counter("pkt_fast_path", "info", "packet", "offload", "Packets of these that the kernel decided on by itself"),
    Counter("pkt_session", "info", "packet", "pktproc", "Packets counted in a session"),
    Counter("byte_session", "info", "packet", "pktproc", "Bytes of the packets counted in a session"),
    *(Counter(f"flow_parse_{reason}", "drop", "flow", "parse", text) for reason, text in _MALFORMATIONS.items()),
    Counter("flow_table_full", "drop", "flow", "resource", "Packets dropped: session table full"),
    *(Counter(name, "drop", "flow", "resource", text) for name, text in _LIMITS.items()),
    Counter("flow_internal_error", "drop", "flow", "pktproc", "Packets dropped: error inside fwd, see its log"),
    Counter("pkt_unseen", "warn", "packet", "pktproc", "Packets that no fwd counted: none ran, or one was killed"),
    Counter("flow_policy_deny", "warn", "flow", "session", "Session setup: denied by policy"),
    Counter("queue_kernel_drop", "drop", "queue", "resource", "Packets the kernel dropped: queue was full"),
    Counter("queue_socket_drop", "drop", "queue", "resource", "Packets the kernel dropped: socket was full"),
    Counter("fast_path_full", "warn", "flow", "offload", "Decisions not repeated: too many SPIs at once"),
    Counter("fast_path_refused", "warn", "flow", "offload", "Decisions that the kernel would not take over"),
    Counter("fast_path_lost", "warn", "flow", "offload", "Decisions that vanished from the kernel, with their counts"),
    Counter("session_allocated", "info", "session", "resource", "Sessions allocated"),
    Counter("session_predicted", "info", "session", "session", "Sessions announced by the IKE daemon"),
    Counter("session_promoted", "info", "session", "session", "Announced sessions that got their first packet"),
    Counter("session_provisional", "info", "session", "session", "Sessions for an SPI that nobody knew yet"),
    Counter("session_absorbed", "info", "session", "session", "Provisional sessions that another took over"),
    Counter("session_discard", "info", "session", "session", "Sessions set to discard"),
    Counter("session_rematched", "info", "session", "session", "Sessions under another rule after a change of rules"),
    Counter("session_not_restored", "warn", "session", "session", "Sessions that a killed fwd had not saved yet"),
    Counter("session_ended", "info", "session", "session", "Sessions ended"),
    Counter("session_aged_out", "info", "session", "aging", "Sessions ended by the session ager"),
    Counter("timer_internal_error", "warn", "session", "aging", "Timers that met an error inside fwd, see its log"),
    Counter("session_gave_way", "warn", "session", "resource", "Sessions without an answer ended to make room"),
    Counter("session_cleared", "info", "session", "mgmt", "Sessions ended by an operator"),
    Counter("session_tunnel_down", "info", "session", "tunnel", "Sessions ended with their tunnel"),
    Counter("pkt_fragment", "warn", "packet", "fragment", "Packets seen in fragments, or larger than their link's MTU"),
    Counter("flow_ike_gate_closed", "warn", "flow", "session", "Sessions denied: no IKE exchange between the peers"),
    Counter("ike_completed", "info", "tunnel", "ike", "IKE exchanges that were answered and may have made a CHILD_SA"),
    Counter("ike_keepalive", "info", "tunnel", "ike", "NAT keepalives"),
    Counter("ike_not_ike", "warn", "tunnel", "ike", "Packets on IKE's ports without an IKE header"),
    Counter("sa_established", "info", "tunnel", "ike", "CHILD_SAs that came up"),
    Counter("sa_rekeyed", "info", "tunnel", "ike", "CHILD_SAs rekeyed"),
    Counter("sa_moved", "info", "tunnel", "ike", "CHILD_SAs whose addresses changed (MOBIKE)"),
    Counter("sa_deleted", "info", "tunnel", "ike", "CHILD_SAs that went"),
    Counter("sa_snapshot", "info", "tunnel", "ike", "Times all CHILD_SAs were read from the IKE daemon"),
    Counter("sa_source_lost", "warn", "tunnel", "ike", "Times the IKE daemon stopped answering"),
    Counter("sa_spi_conflict", "warn", "tunnel", "ike", "CHILD_SAs without a session: their SPI is another one's"),
    Counter("pkt_unknown_spi", "warn", "tunnel", "ike", "Packets to or from this host on an SPI that nobody owns"),
    Counter("pkt_deleted_sa", "warn", "tunnel", "ike", "Packets on an SPI whose SA the IKE daemon has deleted"),
    *(Counter(trouble.counter, "warn", "tunnel", "health", text) for trouble, text in _TROUBLES.items()),
    Counter("rules_restored", "warn", "queue", "resource", "Times the netfilter rules were gone and put back"),
    Counter("state_not_saved", "warn", "mgmt", "state", "Times the state file could not be written, see fwd's log"),
    Counter("log_record", "info", "log", "traffic", "Records made for the traffic log"),
    Counter("log_written", "info", "log", "traffic", "Records written to the traffic log"),
    Counter("log_write_failed", "warn", "log", "traffic", "Times the traffic log could not be written: a full disk?"),
    Counter("log_lost", "warn", "log", "traffic", "Records lost: too many waited for the traffic log to be writable"),
    Counter("log_rotated", "info", "log", "traffic", "Records that the traffic log had no more room or time for"),
    Counter("log_sent", "info", "log", "export", "Records sent on, to syslog or the journal"),
    Counter("log_send_failed", "warn", "log", "export", "Times syslog or the journal could not be reached"),
    Counter("log_not_sent", "warn", "log", "export", "Records that made room before they could be sent on"),
    *(
        Counter(f"ipfix_{unit}_sent", "info", "log", "ipfix", f"{text} sent to the collector")
        for unit, text in _EXPORTED.items()
    ),
    *(
        Counter(
            f"ipfix_{unit}_not_sent", "warn", "log", "ipfix", f"{text} given up: the collector was away for too long"
        )
        for unit, text in _EXPORTED.items()
    ),
    Counter("ipfix_records_unsure", "warn", "log", "ipfix", "Flow records that a killed fwd may not have sent"),
    Counter("ipfix_collector_lost", "warn", "log", "ipfix", "Times the collector could not be reached, see fwd's log"),
    Counter("control_request", "info", "mgmt", "control", "Requests on the control socket"),
    Counter("control_refused", "warn", "mgmt", "control", "Requests and clients refused on the control socket"),
    Counter("metrics_request", "info", "mgmt", "metrics", "Requests for metrics"),
    Counter("metrics_refused", "warn", "mgmt", "metrics", "Requests and clients refused where the metrics are"),
)


_ALARMING: Final = tuple(counter for counter in COUNTERS if counter.severity != "info")


class Counters:
    """The values by name, and the rate of each over the last second or so."""

    def __init__(self, now: float) -> None:
        self.values: dict[str, int] = {counter.name: 0 for counter in COUNTERS}
        self._samples: deque[tuple[float, dict[str, int]]] = deque([(now, dict(self.values))], maxlen=2)

    def add(self, name: str, amount: int = 1) -> None:
        """Count. Raises KeyError for a name that is not in COUNTERS."""
        self.values[name] += amount

    def next_sample_at(self) -> float:
        """When `sample` wants to be called again, in monotonic seconds."""
        return self._samples[-1][0] + SAMPLE_INTERVAL_S

    def sample(self, now: float) -> list[tuple[Counter, int]]:
        """Remember the values if the last sample is old enough; gives the warnings and drops since then."""
        if now < self.next_sample_at():
            return []
        before, after = self._samples[-1][1], dict(self.values)
        self._samples.append((now, after))
        return [
            (counter, after[counter.name] - before[counter.name])
            for counter in _ALARMING
            if after[counter.name] != before[counter.name]
        ]

    def elapsed_s(self, now: float) -> float:
        """Seconds over which `rate` is taken."""
        return now - self._samples[0][0]

    def rate(self, name: str, now: float) -> float:
        """Growth a second since the last sample but one."""
        elapsed = self.elapsed_s(now)
        return (self.values[name] - self._samples[0][1][name]) / elapsed if elapsed > 0 else 0.0
