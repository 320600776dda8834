"""What a daemon leaves to its successor: the records of a firewall on their way out, and on their way in.

    orphans = succession.restore(rows, found, ...)    # once, before the first packet
    succession.note_orphans_removed(orphans, last)
    rows = succession.take_changes(now)               # whenever `firewall.changes` are due

What a record says and leaves out is told in `records.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from . import records
from .constants import SA_LINGER_S
from .fast_path import Found, Reading
from .firewall import Firewall, Hook
from .gate import CLOSED
from .packet import packet_of
from .policy import Action, Rule, Verdict
from .sa import KnownSa, SaEnd
from .session import Application, Element, ElementKey, FlowKey, Place, Session, SpiUse
from .settings import PassThrough
from .state import State
from .table import MAX_ID, KeyInUse
from .totals import Totals
from .traffic_log import Subtype

#: Counters that packets which the kernel decides on are a part of.
_COUNTED_BY_KERNEL = {
    "pkt_recv": "packets",
    "pkt_session": "packets",
    "pkt_fast_path": "packets",
    "byte_session": "bytes",
}


class Succession:
    """The way of one firewall's records to a state file, and from that of its predecessor."""

    def __init__(self, firewall: Firewall) -> None:
        self._firewall = firewall
        #: What the kernel's count of undecided packets is ahead of the daemon's.
        self._queue_offset = 0

    # --- out ------------------------------------------------------------------------------------------

    def take_changes(self, now: float, of: Iterable[Session] | None = None) -> dict[bytes, bytes | None]:
        """The records that changed since this was asked last, by their keys; None: there is no such record any more.

        Those of SAVE_SLICE sessions at most: if more have changed, they come with the next call. Or those of some
        sessions only.
        """
        firewall = self._firewall
        changes, log, export = firewall.changes, firewall.traffic_log, firewall.flow_export
        chosen = changes.take(now, of)
        rows: dict[bytes, bytes | None] = {}
        fresh, gone = log.take_changes()
        for entry in fresh:  # at once with the session that need not be logged any more
            rows[records.log_key(entry.number)] = records.to_bytes(entry)
            if entry.subtype is not Subtype.START and entry.session_id in log.owed:
                del log.owed[entry.session_id]
                changes.forget(entry.session_id)
                chosen.append(entry.session_id)
        rows.update((records.log_key(number), None) for number in gone)
        for session_id in chosen:
            # An ended one may be readable no more, and still have to be told to somebody.
            session = firewall.table.find(session_id) or export.find(session_id) or log.owed.get(session_id)
            rows[records.session_key(session_id)] = (
                records.to_bytes(self.record(session, now)) if session is not None else None
            )
        for peers in changes.take_gates():
            until = firewall.gate.open_until(*peers)
            rows[records.gate_key(peers)] = records.to_bytes(records.GateRecord(*peers, until)) if until else None
        rows[records.TOTALS_KEY] = records.to_bytes(self._totals())
        if export.is_changed:
            export.is_changed = False
            rows[records.EXPORT_KEY] = records.to_bytes(export.record())
        return rows

    def save_all(self, at: float) -> None:
        """All records are to be written anew at that time, for some may not have been."""
        firewall = self._firewall
        for session in (*firewall.table, *firewall.table.ended, *firewall.flow_export.waiting):
            firewall.changes.note(session)
        firewall.traffic_log.save_again()
        firewall.flow_export.is_changed = True
        firewall.changes.put_off(at)

    def record(self, session: Session, now: float) -> records.SessionRecord:
        """The record of a session, as it is."""
        firewall = self._firewall
        known = (firewall.directory.known(sa) for sa in session.sas) if session.ended_at is None else ()
        rekeyed = [found.sa for found in known if found is not None and found.is_rekeyed]
        return records.session_record(
            session,
            firewall.table.flows_of(session),
            firewall.fast_path.leaving(session),
            rekeyed,
            firewall.limits.is_half_open(session),
            session.expires_at - firewall.ager.age(now),
            session.id in firewall.traffic_log.owed,
            now,
        )

    def _totals(self) -> records.TotalsRecord:
        firewall, path = self._firewall, self._firewall.fast_path
        values = dict(firewall.counters.values)
        for name, counted in _COUNTED_BY_KERNEL.items():
            values[name] -= path.kernel_bytes if counted == "bytes" else path.kernel_packets
        return records.TotalsRecord(
            values,
            firewall.table.last_id,
            self._queue_offset,
            firewall.directory.answered_at,
            firewall.traffic_log.last_number,
        )

    # --- in -------------------------------------------------------------------------------------------

    def restore(
        self,
        rows: Mapping[bytes, bytes],
        found: Iterable[Found],
        undecided: int | None,
        now: float,
        first_log_number: int = 0,
    ) -> list[Found]:
        """Go on where a former daemon stopped: with its records, and what it left in the kernel.

        To be called before the first packet. `undecided` is how many packets had reached the queue's rule since the
        kernel has these elements, when the queue became this daemon's, if it tells. What nobody counted of them stands
        in `pkt_unseen`. All sessions meet the rules anew. Where there are no records, those of the traffic log are
        numbered from `first_log_number` on. Gives those elements that belong to no session: the kernel is to be rid of
        them (`note_orphans_removed`). Raises RecordError for rows that are no records, and then nothing has changed.
        """
        kept = records.read(rows)
        firewall, totals = self._firewall, kept.totals
        if totals is not None:
            firewall.directory.answered_at = totals.ike_answered_at
            self._queue_offset = totals.queue_offset
        elements = {element.key: element for element in found}
        firewall.traffic_log.restore(kept.log, totals.last_log_number if totals is not None else first_log_number)
        for gate in kept.gates:
            firewall.gate.open(gate.low, gate.high, gate.open_until)
        policy = firewall.settings.policy
        names = {rule.name: rule for rule in (CLOSED, *policy.rules, policy.default)}
        for record in sorted(kept.sessions, key=lambda record: (record.ended_at or 0.0, record.id)):
            self._restore_session(record, names, elements, now)
        self._restore_lingering(now)
        if totals is not None:
            self._restore_totals(totals)
        firewall.flow_export.restore(kept.export, now)
        orphans = [element for element in elements.values() if not self._take_over_nameless(element, now)]
        if undecided is not None:
            if totals is not None:
                self._count_unseen(totals, undecided, orphans)
            self._queue_offset = undecided - _handled(firewall.counters.values)
        firewall.totals = Totals(firewall.settings.tunnel_totals, now)
        for session in list(firewall.table):
            firewall.changes.note(session)
            firewall.rematch(session, now)
        return orphans

    def note_orphans_removed(self, orphans: Iterable[Found], last: Mapping[ElementKey, Reading]) -> None:
        """The kernel is rid of them: what they counted after they were found, nobody else did."""
        for orphan in orphans:
            packets = last.get(orphan.key, orphan.reading)[0] - orphan.reading[0]
            self._firewall.counters.add("pkt_unseen", max(0, packets))

    def _restore_totals(self, totals: records.TotalsRecord) -> None:
        table, counters = self._firewall.table, self._firewall.counters
        table.last_id = max(table.last_id, min(totals.last_session_id, MAX_ID))
        values = counters.values
        for name, value in totals.counters.items():
            if name in values:
                values[name] += value
        there = len(table) + values["session_ended"] + values["session_absorbed"]
        missing = values["session_allocated"] - there - values["session_not_restored"]
        counters.add("session_not_restored", max(0, missing))

    def _count_unseen(self, totals: records.TotalsRecord, undecided: int, orphans: Iterable[Found]) -> None:
        """Count the packets that reached the queue's rule, or that an orphan decided on, and that no daemon counted."""
        unseen = undecided - totals.queue_offset - _handled(totals.counters)
        unseen += sum(element.reading[0] for element in orphans)
        self._firewall.counters.add("pkt_unseen", max(0, unseen))

    def _restore_session(
        self, record: records.SessionRecord, names: Mapping[str, Rule], elements: dict[ElementKey, Found], now: float
    ) -> None:
        """One session, and those of the kernel's elements that its record names: they are taken out of `elements`."""
        firewall = self._firewall
        is_denied = record.state is State.DISCARD
        rule = names.get(record.rule) or Rule(record.rule, Action.DENY if is_denied else Action.ALLOW)
        session = records.session_of(record, rule)
        try:
            firewall.table.restore(session, records.keys_of(record, session))
        except KeyInUse:  # a record that is older than another one: the other one is right
            firewall.changes.note(session)
            return
        if record.ended_at is None:
            if record.is_limited:
                firewall.limits.take_over(session, is_half_open=record.is_half_open)
            firewall.ager.arm(session, max(0.0, record.ends_at - now), now)
            self._restore_place(session, record)
        for named in sorted(record.elements, key=lambda named: named.packets, reverse=True):
            use = session.flow(named.is_c2s).note_spi(named.spi, now)
            there = elements.get(named.key)
            if there is not None and there.reading[0] >= named.packets:
                del elements[named.key]
                self._take_over(there, use, named.packets, now)
            else:  # it went with the former daemon: what it had counted when it was read last is all that is known
                lost = Element(named.key, use, Verdict.ACCEPT, 0, 0, use.last_seen_at, Place.GONE)
                firewall.count(lost, named.packets, named.octets, news=0)
                firewall.counters.add("pkt_fast_path", named.packets)
                firewall.counters.add("fast_path_lost")
        if record.is_to_be_logged and session.ended_at is not None:
            firewall.traffic_log.owed[session.id] = session
            firewall.log_end(session)

    def _restore_place(self, session: Session, record: records.SessionRecord) -> None:
        """Let a live session be found wherever else its like are found."""
        firewall = self._firewall
        is_in_transit = not session.is_terminated and session.application is not Application.IKE
        if session.generations:
            self._restore_tunnel(session, record)
        elif session.is_terminated and not session.is_provisional and (session.c2s.uses or session.s2c.uses):
            firewall.strangers.add(session)
        is_of_spi = any(isinstance(key, FlowKey) and key.low_port for key in session.keys)
        if is_in_transit and is_of_spi and session.application is Application.IPSEC_ESP:
            firewall.spi_sessions.join(session)
            if len(session.keys) > 1:
                firewall.spi_sessions.pair(session)
        if is_in_transit and firewall.settings.pass_through is PassThrough.IKE_GATED:
            if record.is_gated:
                firewall.gate.join(session)
            else:
                firewall.open_gate_soon(session)

    def _restore_tunnel(self, session: Session, record: records.SessionRecord) -> None:
        directory, tunnels = self._firewall.directory, self._firewall.tunnels
        before: KnownSa | None = None
        for generation in record.generations:
            sa = generation.sa
            if generation.removed_at is None:
                replaces = before if before is not None and before.is_rekeyed else None
                before = directory.restore(sa, generation.installed_at, replaces, generation.is_rekeyed)
            else:
                directory.remember(sa, generation.end or SaEnd.VANISHED, generation.removed_at)
        tunnel = session.generations[-1].sa.tunnel
        if (session.sas or session.state is State.CLOSING) and tunnels.get(tunnel) is None:
            tunnels.add(tunnel, session)

    def _restore_lingering(self, now: float) -> None:
        """SPIs of SAs that are gone are still their tunnel's for a while."""
        gone = [
            (max(now, generation.removed_at + SA_LINGER_S), session, generation.sa)
            for session in self._firewall.table
            for generation in session.generations
            if generation.removed_at is not None
            and (generation.sa.key_in in session.keys or generation.sa.key_out in session.keys)
        ]
        for until, session, sa in sorted(gone, key=lambda lingering: lingering[0]):
            self._firewall.linger(session, sa, until)

    def _take_over(self, found: Found, use: SpiUse, known: int, now: float) -> Element:
        """An element of a former daemon goes on in this one; `known` packets of it were counted before."""
        firewall = self._firewall
        element = firewall.fast_path.adopt(found, use, now)
        element.seen_at = now if found.reading[0] > known else use.last_seen_at
        firewall.fast_path.note_reading(element, found.reading)
        use.unseen_count += found.reading[0]
        firewall.count(element, *found.reading, news=found.reading[0] - known)
        firewall.counters.add("pkt_fast_path", found.reading[0])
        session = use.flow.session
        is_otherwise = (found.verdict is Verdict.DROP) != (session.state is State.DISCARD)
        if is_otherwise or not session.is_decided or session.rule.inspects_every_packet:
            firewall.fast_path.withdraw((element,))
        return element

    def _take_over_nameless(self, found: Found, now: float) -> bool:
        """The same for one that no record names, since the former daemon was killed; whether there is a session."""
        firewall = self._firewall
        indev, outdev, outer = found.key
        hook = Hook.FORWARD if indev and outdev else Hook.INPUT if indev else Hook.OUTPUT
        packet = packet_of(outer)
        key = firewall.key_of(packet, hook, indev or outdev, outdev or indev)
        flow = firewall.table.lookup(key)
        if flow is None or packet.spi is None:
            return False
        flow = flow.session.flow_of(packet) if isinstance(key, FlowKey) else flow
        self._take_over(found, flow.note_spi(packet.spi, now), 0, now)
        return True


def _handled(values: Mapping[str, int]) -> int:
    """Packets that the kernel did not decide on by itself, as far as they were counted."""
    lost = values["queue_kernel_drop"] + values["queue_socket_drop"]
    return values["pkt_recv"] - values["pkt_fast_path"] + lost
