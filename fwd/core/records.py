"""What of the core outlives the daemon: records, as bytes, and the way back from them.

A record is the whole of one session, but for what is learned again by itself (troubles, comparisons with the IKE
daemon). Its counts leave out what the kernel counts under its elements, which goes on while no daemon runs; the record
names these elements, each with its count as it was read last. So a record stays true while the kernel decides, and has
to be written anew only when the daemon itself counts or changes something.

Bytes are trusted no further than their types: `from_bytes` raises RecordError for anything else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import msgspec

from .ike import Peers
from .policy import Rule
from .sa import ChildSa, SaEnd, SpiKey
from .sequence import Sequence
from .session import Application, Element, Flow, FlowKey, Generation, Place, Session, SessionType, SpiUse
from .state import EndReason, State
from .traffic_log import LogRecord

#: To be raised whenever older records must not be read by this code, or newer ones by older code.
LAYOUT = 3

_T = TypeVar("_T")


class RecordError(ValueError):
    """Bytes that are no record; the message says why."""


class _Record(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """Short on the wire: fields in order, without their names."""


_Octet = Annotated[int, msgspec.Meta(ge=0, lt=2**8)]
_Port = Annotated[int, msgspec.Meta(ge=0, lt=2**16)]
_Number = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, lt=1e15)]


class ElementRecord(_Record):
    """One SPI of a flow that the kernel decides on, and what had been read of its counter."""

    indev: int
    outdev: int
    outer: bytes
    is_c2s: bool
    spi: int
    packets: int
    octets: int

    @property
    def key(self) -> tuple[int, int, bytes]:
        """The key of the kernel's map."""
        return (self.indev, self.outdev, self.outer)


class UseRecord(_Record):
    """One SPI of a flow. Times are monotonic seconds."""

    spi: int
    first_seen_at: float
    last_seen_at: float
    packets: int
    octets: int
    sequence: Sequence | None
    exported: tuple[_Count, _Count]


class FlowRecord(_Record):
    """One direction of a session."""

    address: bytes
    zone: str
    port: int
    packets: int
    octets: int
    fragments: int
    uses: tuple[UseRecord, ...]
    exported: tuple[_Count, _Count]


class GenerationRecord(_Record):
    """One CHILD_SA of a tunnel. Times are monotonic seconds."""

    sa: ChildSa
    installed_at: float
    removed_at: float | None
    end: SaEnd | None
    moves: int
    after_end_count: int
    is_rekeyed: bool


class SessionRecord(_Record):
    """One session. Times are monotonic seconds; `ends_at` is when its time is up if no packet comes.

    With each key stands whether it leads to the c2s flow. `is_to_be_logged`: it has ended, and the traffic log has yet
    to be told.
    """

    id: int
    application: Application
    c2s: FlowRecord
    s2c: FlowRecord
    rule: str
    is_terminated: bool
    ingress: str
    egress: str
    timeout_s: int
    created_at: float
    state: State
    type: SessionType
    end_reason: EndReason
    is_provisional: bool
    last_seen_at: float
    ends_at: float
    refresh_s: int
    is_client_here: bool
    rekeys: int
    udp_ports: tuple[int, int] | None
    is_gated: bool
    is_limited: bool
    is_half_open: bool
    ended_at: float | None
    is_to_be_logged: bool
    keys: tuple[tuple[FlowKey, bool], ...]
    spi_keys: tuple[tuple[SpiKey, bool], ...]
    generations: tuple[GenerationRecord, ...]
    elements: tuple[ElementRecord, ...]
    exported_at: float


class GateRecord(_Record):
    """An open IKE gate between two peers."""

    low: bytes
    high: bytes
    open_until: float


class FlowDelta(_Record):
    """What one SPI of a flow carried between two moments (monotonic seconds): what a flow record tells a collector.

    `spi` is None where packets have none, or are too few or too old to be told apart. `ports` are None where
    there are none on the wire. `ingress` and `egress` are interface indices, 0 for this host. `end_reason` is a
    flowEndReason (flow_export.py).
    """

    session_id: _Number
    source: bytes
    destination: bytes
    protocol: _Octet
    ports: tuple[_Port, _Port] | None
    spi: _Number | None
    packets: _Count
    octets: _Count
    started_at: _Seconds
    ended_at: _Seconds
    end_reason: _Octet
    application: str
    ingress: _Number
    egress: _Number
    is_outbound: bool
    is_dropped: bool


class ExportRecord(_Record):
    """How far the export of flows is.

    `sequence` is the number of the next data record over UDP. `sent` are flow records, packets and bytes that are on
    their way, of which `unsure` flow records may not have been given to the kernel yet. `returned` did not arrive.
    """

    sequence: _Count
    sent: tuple[_Count, _Count, _Count]
    unsure: _Count
    returned: tuple[FlowDelta, ...]


class TotalsRecord(_Record):
    """What there is but once: counters, without what the kernel counts under the elements of live sessions.

    `queue_offset` is what the kernel's count of undecided packets is ahead of the daemon's. `ike_answered_at` is when
    the IKE daemon said something last, in monotonic seconds.
    """

    counters: dict[str, int]
    last_session_id: int
    queue_offset: int
    ike_answered_at: float | None
    last_log_number: int


_ENCODE = msgspec.msgpack.Encoder().encode
_DECODERS: Mapping[type, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in (SessionRecord, GateRecord, TotalsRecord, LogRecord, ExportRecord)
}


def to_bytes(record: SessionRecord | GateRecord | TotalsRecord | LogRecord | ExportRecord) -> bytes:
    """A record as bytes."""
    return _ENCODE(record)


def from_bytes(kind: type[_T], octets: bytes) -> _T:
    """A record of that kind. Raises RecordError."""
    try:
        record: _T = _DECODERS[kind].decode(octets)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise RecordError(str(error)) from None
    return record


TOTALS_KEY = b"totals"
EXPORT_KEY = b"export"
_SESSION, _GATE, _LOG = b"session ", b"gate ", b"log "


def session_key(session_id: int) -> bytes:
    """What a session's record is stored under."""
    return _SESSION + session_id.to_bytes(4)


def gate_key(peers: Peers) -> bytes:
    """What a gate's record is stored under."""
    return _GATE + b"".join(peers)


def log_key(number: int) -> bytes:
    """What a record of the traffic log is stored under until it is written."""
    return _LOG + number.to_bytes(8)


@dataclass(slots=True)
class Kept:
    """All that a state file held."""

    totals: TotalsRecord | None = None
    gates: list[GateRecord] = field(default_factory=list)
    sessions: list[SessionRecord] = field(default_factory=list)
    log: list[LogRecord] = field(default_factory=list)
    export: ExportRecord | None = None


def read(rows: Mapping[bytes, bytes]) -> Kept:
    """All records by their keys. Raises RecordError if one of them is none."""
    kept = Kept()
    for key, octets in rows.items():
        if key == TOTALS_KEY:
            kept.totals = from_bytes(TotalsRecord, octets)
        elif key.startswith(_GATE):
            kept.gates.append(from_bytes(GateRecord, octets))
        elif key.startswith(_LOG):
            kept.log.append(from_bytes(LogRecord, octets))
        elif key.startswith(_SESSION):
            session = from_bytes(SessionRecord, octets)
            _check(session)
            kept.sessions.append(session)
        elif key == EXPORT_KEY:
            kept.export = from_bytes(ExportRecord, octets)
            if any({len(delta.source), len(delta.destination)} not in ({4}, {16}) for delta in kept.export.returned):
                raise RecordError("flow records: addresses are of neither IPv4 nor IPv6")
        else:
            raise RecordError(f"nobody knows a record {key!r}")
    return kept


def _check(record: SessionRecord) -> None:
    """What types do not say. Raises RecordError."""
    is_live = record.state not in (State.INIT, State.CLOSED, State.FREE)
    if record.id <= 0 or is_live != (record.ended_at is None):
        raise RecordError(f"session {record.id}: it cannot be {record.state}")


def session_record(
    session: Session,
    keys: Mapping[FlowKey | SpiKey, Flow],
    leaving: Iterable[Element],
    rekeyed: Collection[ChildSa],
    is_half_open: bool,
    left_s: float,
    is_to_be_logged: bool,
    now: float,
) -> SessionRecord:
    """The record of a session.

    `keys` lead to its flows; `leaving` are elements of it that the kernel is to remove, of which it has not said the
    last counts; `rekeyed` are SAs of its tunnel that gave way to another one; `left_s` is what is left of its time.
    """
    elements = [element for element in session.elements if element.place is Place.KERNEL]
    elements += leaving
    c2s = session.c2s
    return SessionRecord(
        session.id,
        session.application,
        _flow_record(c2s, [element for element in elements if element.use.flow is c2s]),
        _flow_record(session.s2c, [element for element in elements if element.use.flow is not c2s]),
        session.rule.name,
        session.is_terminated,
        session.ingress,
        session.egress,
        session.timeout_s,
        session.created_at,
        session.state,
        session.type,
        session.end_reason,
        session.is_provisional,
        session.last_seen_at,
        now + left_s,
        session.refresh_s,
        session.is_client_here,
        session.rekeys,
        session.udp_ports,
        session.gate is not None and session.ended_at is None,
        session.is_limited,
        is_half_open,
        session.ended_at,
        is_to_be_logged,
        tuple((key, flow is c2s) for key, flow in keys.items() if isinstance(key, FlowKey)),
        tuple((key, flow is c2s) for key, flow in keys.items() if not isinstance(key, FlowKey)),
        tuple(
            GenerationRecord(g.sa, g.installed_at, g.removed_at, g.end, g.moves, g.after_end_count, g.sa in rekeyed)
            for g in session.generations
        ),
        tuple(ElementRecord(*e.key, e.use.flow is c2s, e.use.spi, e.kernel_packets, e.kernel_bytes) for e in elements),
        session.exported_at,
    )


def _flow_record(flow: Flow, elements: list[Element]) -> FlowRecord:
    packets, octets = flow.packet_count, flow.byte_count
    by_use: dict[int, tuple[int, int]] = {}
    for element in elements:
        packets -= element.kernel_packets
        octets -= element.kernel_bytes
        before = by_use.get(element.use.spi, (0, 0))
        by_use[element.use.spi] = (before[0] + element.kernel_packets, before[1] + element.kernel_bytes)
    uses = []
    for use in flow.uses:
        in_kernel = by_use.get(use.spi, (0, 0))
        own = (use.packet_count - in_kernel[0], use.byte_count - in_kernel[1])
        uses.append(UseRecord(use.spi, use.first_seen_at, use.last_seen_at, *own, use.sequence, use.exported))
    counts = (packets, octets, flow.fragment_count)
    return FlowRecord(flow.address, flow.zone, flow.port, *counts, tuple(uses), flow.exported)


def session_of(record: SessionRecord, rule: Rule) -> Session:
    """The session of a record, in no table yet; without its elements, gate and time to live."""
    session = Session(
        record.id,
        record.application,
        _flow_of(record.c2s),
        _flow_of(record.s2c),
        rule,
        record.is_terminated,
        record.ingress,
        record.egress,
        record.timeout_s,
        record.created_at,
        record.state,
        record.type,
        record.end_reason,
        record.is_provisional,
        record.last_seen_at,
        refresh_s=record.refresh_s,
        is_client_here=record.is_client_here,
        rekeys=record.rekeys,
        udp_ports=record.udp_ports,
        exported_at=record.exported_at,
        ended_at=record.ended_at,
    )
    session.generations = tuple(
        Generation(
            g.sa, g.installed_at, removed_at=g.removed_at, end=g.end, moves=g.moves, after_end_count=g.after_end_count
        )
        for g in record.generations
    )
    return session


def _flow_of(record: FlowRecord) -> Flow:
    counts = (record.packets, record.octets, record.fragments)
    flow = Flow(record.address, record.zone, record.port, *counts, exported=record.exported)
    flow.uses = tuple(
        # Which numbers went by while nobody looked cannot be told: the next packet is taken for the first.
        SpiUse(
            use.spi,
            flow,
            use.first_seen_at,
            use.last_seen_at,
            use.packets,
            use.octets,
            sequence=use.sequence,
            exported=use.exported,
        )
        for use in record.uses
    )
    return flow


def keys_of(record: SessionRecord, session: Session) -> dict[FlowKey | SpiKey, Flow]:
    """The keys of a record, each with the flow of its session that it leads to."""
    keys: dict[FlowKey | SpiKey, Flow] = {key: session.flow(is_c2s) for key, is_c2s in record.keys}
    return keys | {key: session.flow(is_c2s) for key, is_c2s in record.spi_keys}
