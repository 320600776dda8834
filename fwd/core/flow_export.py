"""Flow export: which sessions are due to be told of, and what of their counts has been told already.

What a session's flow records tell are differences: each flow and each SPI of it keeps how much of its counts was
`exported`. So nothing is lost while a collector is away, whatever becomes of the session (a rekey, a restart, a
provisional session that becomes part of a tunnel's): what was not told is told by the next record. All records of a
session add up to its counts.

    deltas, sessions = export.take(now)   # told from now on: save this, then send them
    export.handed_over()                  # the kernel has taken them
    export.confirm(deltas)                # they have arrived, as far as anybody can tell; or
    export.take_back(deltas)              # they have not: they come first in what is taken next

A session is told of when it has gone on for the active timeout since it was last, and when it ends. Each direction and
each SPI is a record of its own: an SPI is what a collector tells flows apart by, and both directions of a tunnel
have different ones, so that RFC 5103's records of both directions cannot be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from enum import IntEnum
from itertools import islice

from .constants import EXPORT_LOOKS, EXPORT_ROUNDS, EXPORT_SLICE, PROTO_ESP, PROTO_UDP
from .counters import Counters
from .interfaces import InterfaceTable
from .records import ExportRecord, FlowDelta
from .session import NOTHING, Application, Flow, Session
from .state import EndReason, State
from .table import SessionTable


class FlowEndReason(IntEnum):
    """Why a flow record was sent: flowEndReason, element 136 of IANA's registry of IPFIX."""

    IDLE_TIMEOUT = 1
    ACTIVE_TIMEOUT = 2
    END_OF_FLOW = 3
    FORCED_END = 4


_REASONS = {
    EndReason.UNKNOWN: FlowEndReason.FORCED_END,
    EndReason.AGED_OUT: FlowEndReason.IDLE_TIMEOUT,
    EndReason.TUNNEL_DOWN: FlowEndReason.END_OF_FLOW,
    EndReason.POLICY_DENY: FlowEndReason.FORCED_END,
    EndReason.CLEARED: FlowEndReason.FORCED_END,
}


class FlowExport:
    """What is to be exported of the sessions of a table.

    `note` is told of sessions whose records are to be written anew; `leaving` says for which elements of a session the
    kernel still owes the last counts. Times are monotonic seconds.
    """

    def __init__(
        self,
        table: SessionTable,
        interfaces: InterfaceTable,
        counters: Counters,
        note: Callable[[Session], None],
        leaving: Callable[[Session], Collection[object]],
    ) -> None:
        self._table = table
        self._interfaces = interfaces
        self._counters = counters
        self._note = note
        self._leaving = leaving
        self._active_timeout_s: int | None = None
        #: The number of the next data record (RFC 7011 section 3.1): over UDP, a successor goes on with it.
        self.sequence = 0
        #: Sessions that have ended, the oldest end first: as many as the table has places.
        self._ended: dict[int, Session] = {}
        self._returned: deque[FlowDelta] = deque()
        self._sent = (0, 0, 0)
        self._unsure = 0
        self._looked_at = 0  # the id of the session that a round came to
        self._is_in_round = False
        self._next_round_at = 0.0
        self._is_over = False
        #: Whether `record` is another one than when this was last set to False.
        self.is_changed = False

    def set_active_timeout(self, seconds: int | None) -> None:
        """Tell of a session that goes on so often; None: tell nothing, and forget what waits."""
        self._active_timeout_s = seconds
        self._next_round_at = 0.0
        if seconds is None:
            self._returned.clear()
            self.is_changed = True
            for session in self._ended.values():
                self._note(session)
            self._ended.clear()

    def finish(self) -> None:
        """Nobody counts any more, for now: what is taken from now on is all that there is to tell."""
        self._is_over = True
        self._next_round_at = 0.0

    @property
    def has_more(self) -> bool:
        """Whether there may be more to take at once."""
        return bool(self._returned or self._ended or self._is_in_round)

    @property
    def waiting_count(self) -> int:
        """How many sessions have ended, and records were sent in vain, that are to be told yet."""
        return len(self._ended) + len(self._returned)

    @property
    def waiting(self) -> Iterator[Session]:
        """Sessions that have ended and are to be told of yet."""
        return iter(self._ended.values())

    def find(self, session_id: int) -> Session | None:
        """A session that has ended and is to be told of yet."""
        return self._ended.get(session_id)

    def end(self, session: Session, now: float) -> None:
        """A session has ended: what is left of it is to be told. Of too many, the oldest is given up, and counted."""
        if self._active_timeout_s is None:
            return
        self._ended[session.id] = session
        while len(self._ended) > self._table.capacity:
            oldest = self._ended.pop(next(iter(self._ended)))
            self._note(oldest)
            self._count("not_sent", list(self._tell(oldest, now)))

    def take(self, now: float) -> tuple[list[FlowDelta], list[Session]]:
        """The next flow records, and the sessions that they tell of: some EXPORT_SLICE records at most.

        They count as told from now on: the sessions' records and `record` are to be saved before anything is sent.
        """
        deltas: list[FlowDelta] = []
        sessions: list[Session] = []
        timeout_s = self._active_timeout_s
        if timeout_s is None:
            return deltas, sessions
        deltas += [self._returned.popleft() for _ in range(min(EXPORT_SLICE, len(self._returned)))]
        for session in self._due(timeout_s, now):
            told = list(self._tell(session, now))
            if told:
                self._note(session)
                deltas += told
                sessions.append(session)
            if len(deltas) >= EXPORT_SLICE:
                break
        self._unsure = len(deltas)
        self._book(deltas, 1)
        return deltas, sessions

    def handed_over(self) -> None:
        """The kernel has what was taken, or it was taken back."""
        self._unsure = 0
        self.is_changed = True

    def confirm(self, deltas: Collection[FlowDelta]) -> None:
        """These have arrived, as far as anybody can tell."""
        self._book(deltas, -1)
        self._count("sent", deltas)

    def take_back(self, deltas: Collection[FlowDelta]) -> None:
        """These did not arrive: they are the first that are taken next."""
        self._book(deltas, -1)
        if self._active_timeout_s is not None:
            self._returned.extendleft(reversed([*deltas]))

    def record(self) -> ExportRecord:
        """What a successor has to know, beside the sessions."""
        return ExportRecord(self.sequence, self._sent, self._unsure, tuple(self._returned))

    def restore(self, record: ExportRecord | None, now: float) -> None:
        """Go on where a former daemon stopped, when the table has its sessions."""
        if record is not None:
            self.sequence = record.sequence
            for what, amount in zip(("records", "packets", "bytes"), record.sent, strict=True):
                self._counters.add(f"ipfix_{what}_sent", amount)
            self._counters.add("ipfix_records_unsure", record.unsure)
            if self._active_timeout_s is not None:
                self._returned.extend(record.returned)
            self.is_changed = True
        for session in self._table.ended:
            if any(flow.packet_count > flow.exported[0] for flow in (session.c2s, session.s2c)):
                self.end(session, now)

    # --- which, and what -----------------------------------------------------------------------------

    def _due(self, timeout_s: int, now: float) -> Iterator[Session]:
        """Those that have ended, then those that have gone on for long enough; of these, EXPORT_LOOKS are looked at."""
        for session_id in list(islice(self._ended, EXPORT_SLICE)):
            session = self._ended[session_id]
            if not self._leaving(session):
                del self._ended[session_id]
                self._note(session)  # or the state file would keep it for ever
                yield session
        if not self._is_in_round:
            if now < self._next_round_at:
                return
            self._is_in_round = True
            self._looked_at = 0
            self._next_round_at = now + timeout_s / EXPORT_ROUNDS
        due_since = now - (0 if self._is_over else timeout_s)
        for session in islice(self._table.after(self._looked_at), EXPORT_LOOKS):
            self._looked_at = session.id
            if max(session.exported_at, session.created_at) <= due_since:
                yield session
        else:
            self._is_in_round = next(self._table.after(self._looked_at), None) is not None

    def _tell(self, session: Session, now: float) -> Iterator[FlowDelta]:
        """The differences of a session, a record for each SPI, and one for what no SPI is known of."""
        since = max(session.exported_at, session.created_at)
        for is_c2s, flow in ((True, session.c2s), (False, session.s2c)):
            packets, octets = flow.packet_count - flow.exported[0], max(0, flow.byte_count - flow.exported[1])
            if packets <= 0:
                continue
            for use in flow.uses:
                # Never more than the flow has to tell: then all records add up, whatever else may be.
                told = (use.packet_count - use.exported[0], use.byte_count - use.exported[1])
                told = (max(0, min(told[0], packets)), max(0, min(told[1], octets)))
                use.exported = (use.packet_count, use.byte_count)
                if told != NOTHING:
                    packets, octets = packets - told[0], octets - told[1]
                    times = (max(since, use.first_seen_at), use.last_seen_at)
                    yield self._delta(session, is_c2s, use.spi, told, times, now)
            if packets or octets:
                yield self._delta(session, is_c2s, None, (packets, octets), (since, session.last_seen_at), now)
            flow.exported = (flow.packet_count, flow.byte_count)
        session.exported_at = now  # without a packet, too: what it will tell is not older than this

    def _delta(
        self,
        session: Session,
        is_c2s: bool,
        spi: int | None,
        told: tuple[int, int],
        times: tuple[float, float],
        now: float,
    ) -> FlowDelta:
        source, destination = session.flow(is_c2s), session.flow(not is_c2s)
        ports = _ports(session, is_c2s, spi)
        ended_at = min(times[1], now)
        is_outbound = self._is_outbound(session, source)
        ends = (session.ingress, session.egress) if is_c2s else (session.egress, session.ingress)
        ingress, egress = (self._interfaces.index_of(name) or 0 for name in ends)
        if session.is_terminated:  # one side is this host itself
            ingress, egress = (0, egress) if is_outbound else (ingress, 0)
        return FlowDelta(
            session.id,
            source.address,
            destination.address,
            PROTO_ESP if ports is None else PROTO_UDP,
            ports,
            spi,
            *told,
            min(times[0], ended_at),
            ended_at,
            self._reason(session),
            session.application,
            ingress,
            egress,
            is_outbound,
            session.state is State.DISCARD or session.end_reason is EndReason.POLICY_DENY,
        )

    def _reason(self, session: Session) -> FlowEndReason:
        if self._table.live(session.id) is not session:
            return _REASONS[session.end_reason]
        return FlowEndReason.FORCED_END if self._is_over else FlowEndReason.ACTIVE_TIMEOUT

    def _is_outbound(self, session: Session, source: Flow) -> bool:
        """Whether this host sends it."""
        if session.generations:
            return source is session.outbound
        return session.is_terminated and self._interfaces.owner_of(source.address) is not None

    def _book(self, deltas: Collection[FlowDelta], sign: int) -> None:
        """These are on their way, or no more."""
        if deltas:
            records, packets, octets = _sum(deltas)
            sent = self._sent
            self._sent = (sent[0] + sign * records, sent[1] + sign * packets, sent[2] + sign * octets)
            self.is_changed = True

    def _count(self, what: str, deltas: Iterable[FlowDelta]) -> None:
        for unit, amount in zip(("records", "packets", "bytes"), _sum(deltas), strict=True):
            self._counters.add(f"ipfix_{unit}_{what}", amount)


def _sum(deltas: Iterable[FlowDelta]) -> tuple[int, int, int]:
    """How many records, packets and bytes these are."""
    records = packets = octets = 0
    for delta in deltas:
        records += 1
        packets += delta.packets
        octets += delta.octets
    return records, packets, octets


def _ports(session: Session, is_c2s: bool, spi: int | None) -> tuple[int, int] | None:
    """The UDP ports on the wire, source first; None for ESP."""
    if session.application is Application.IPSEC_ESP:
        return None
    ports: tuple[int, int] | None = (session.client.port, session.server.port)
    if session.application is Application.IPSEC_UDP:
        ports = session.udp_ports
        generation = session.generation_of(spi) if spi is not None else None
        if generation is not None:
            sa = generation.sa
            here_first = (sa.local_port, sa.remote_port)
            ports = (here_first if session.is_client_here else here_first[::-1]) if sa.encap else None
    return ports if ports is None or is_c2s else ports[::-1]
