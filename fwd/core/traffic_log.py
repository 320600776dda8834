"""The traffic log's records: which session leaves one, what it says, and which have yet to be written.

A record is made when a session has ended and the kernel's last counts are in, or when a rule with `log-at-start` has
let it in or turned it away. It has a number of its own, the next one after the last record's, and keeps it: whoever
gets a record twice, after a crash say, knows it by its number.

Records wait here until somebody has written them for good. So that none is lost meanwhile they are rows of the state
file, written in one transaction with the session that is then no more to be logged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import StrEnum
from itertools import islice

import msgspec

from .constants import LOG_HANDED_OUT, LOG_SLICE, LOG_WAITING
from .policy import Action
from .session import Session
from .state import EndReason


class Subtype(StrEnum):
    """What is told of a session (PAN-OS: subtype of a traffic log)."""

    START = "start"
    END = "end"
    DENY = "deny"  # the end of one that was never let in


class LogRecord(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """One line of the traffic log. `at` and `started_at` are monotonic seconds of this boot.

    Addresses are in network order; `spis_*` are the SPIs that packets were seen with, oldest first.
    """

    number: int
    subtype: Subtype
    at: float
    session_id: int
    application: str
    protocol: int
    source: bytes
    source_port: int
    source_zone: str
    destination: bytes
    destination_port: int
    destination_zone: str
    ingress: str
    egress: str
    rule: str
    action: Action
    end_reason: EndReason
    started_at: float
    packets_c2s: int
    packets_s2c: int
    bytes_c2s: int
    bytes_s2c: int
    is_terminated: bool
    ike_sa: str | None
    child_sa: str | None
    rekeys: int
    udp_ports: tuple[int, int] | None
    spis_c2s: tuple[int, ...]
    spis_s2c: tuple[int, ...]


def _record_of(session: Session, number: int, subtype: Subtype, at: float) -> LogRecord:
    client, server, sa = session.client, session.server, session.sa
    # A tunnel that came and went without a packet met its rule in advance, and a denial stands as the reason.
    is_denied = session.rule.action is Action.DENY or session.end_reason is EndReason.POLICY_DENY
    if subtype is Subtype.END and session.end_reason is EndReason.POLICY_DENY:
        subtype = Subtype.DENY
    return LogRecord(
        number,
        subtype,
        at,
        session.id,
        session.application,
        session.application.protocol,
        client.address,
        client.port,
        client.zone,
        server.address,
        server.port,
        server.zone,
        session.ingress,
        session.egress,
        session.rule.name,
        Action.DENY if is_denied else Action.ALLOW,
        session.end_reason,
        session.created_at,
        client.packet_count,
        server.packet_count,
        client.byte_count,
        server.byte_count,
        session.is_terminated,
        sa.ike_name if sa else None,
        sa.child_name if sa else None,
        session.rekeys,
        session.udp_ports,
        client.spis,
        server.spis,
    )


class TrafficLog:
    """Records on their way: made, saved in the state file, handed out, and forgotten when they are written for good.

    `last_number` is that of the record made last.
    """

    def __init__(self) -> None:
        self.last_number = 0
        #: Sessions that ended and have not left their record, by id.
        self.owed: dict[int, Session] = {}
        self._unsaved: deque[LogRecord] = deque()
        self._saved: deque[LogRecord] = deque()
        self._handed_out: deque[LogRecord] = deque()
        #: Numbers of rows of the state file that can go, and of those that were to go with the last save.
        self._gone: deque[int] = deque()
        self._going: list[int] = []

    @property
    def waiting(self) -> int:
        """How many records are not written yet."""
        return len(self._unsaved) + len(self._saved) + len(self._handed_out)

    @property
    def has_changes(self) -> bool:
        """Whether `take_changes` has something to tell."""
        return bool(self._unsaved or self._gone)

    def add(self, session: Session, subtype: Subtype, at: float, *, is_saved_first: bool) -> bool:
        """Make a record of a session as it is; whether it is handed out only after it was given to be saved.

        False if LOG_WAITING wait already: it is lost.
        """
        if self.waiting >= LOG_WAITING:
            return False
        self.last_number += 1
        record = _record_of(session, self.last_number, subtype, at)
        (self._unsaved if is_saved_first else self._saved).append(record)
        return True

    def left(self, sessions: Iterable[Session], now: float) -> list[LogRecord]:
        """What sessions will have to be logged as if nobody goes on with them; numbers are those that come next."""
        return [
            _record_of(session, number, Subtype.END, now if session.ended_at is None else session.ended_at)
            for number, session in enumerate(sessions, self.last_number + 1)
        ]

    def take_changes(self) -> tuple[list[LogRecord], list[int]]:
        """Records that are to be saved, LOG_SLICE at most, and numbers of those that need not be kept any more.

        What is given counts as saved; it is handed out after that.
        """
        fresh = [self._unsaved.popleft() for _ in range(min(LOG_SLICE, len(self._unsaved)))]
        self._going = [self._gone.popleft() for _ in range(min(LOG_SLICE, len(self._gone)))]
        self._saved.extend(fresh)
        return fresh, self._going

    def save_again(self) -> None:
        """What was given to be saved was not: records are handed out all the same, and rows have yet to go."""
        self._gone.extend(self._going)
        self._going = []

    def restore(self, records: Iterable[LogRecord], last_number: int) -> None:
        """Records that a former daemon had saved and may not have written."""
        self._saved.extend(sorted(records, key=lambda record: record.number))
        self.last_number = max(last_number, self._saved[-1].number if self._saved else 0)

    def take(self) -> list[LogRecord]:
        """Records to be written, LOG_SLICE at most, in the order of their numbers, while not too many are under way."""
        room = LOG_HANDED_OUT - len(self._handed_out)
        records = list(islice(self._saved, min(LOG_SLICE, room))) if room > 0 else []
        for record in records:
            self._handed_out.append(record)
            self._saved.popleft()
        return records

    def note_written(self, number: int, *, is_saved: bool) -> int:
        """All up to this number are written for good, and their rows can go if there are any; gives how many."""
        count = 0
        while self._handed_out and self._handed_out[0].number <= number:
            written = self._handed_out.popleft().number
            count += 1
            if is_saved:
                self._gone.append(written)
        return count
