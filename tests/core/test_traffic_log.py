"""Each session leaves its record in the traffic log once, whatever happens between."""

from __future__ import annotations

import random

import pytest

from fwd.core import records
from fwd.core.constants import LOG_HANDED_OUT, LOG_SLICE
from fwd.core.events import SessionEnded
from fwd.core.policy import Action, Rule
from fwd.core.sa import SaDeleted, SaEstablished
from fwd.core.traffic_log import LogRecord, Subtype
from tests.builders import HERE, LEFT, PEER, RIGHT, Bench, child_sa, esp, ike

LOGS_BOTH = Rule("both", Action.ALLOW, log_at_start=True)


class LoggedBench(Bench):
    """A bench whose firewall keeps the traffic log, and what is written of it for good."""

    def __init__(self, *rules: Rule, **changes) -> None:
        super().__init__(*rules, **changes)
        self.firewall.keeps_log = True
        self.written: dict[int, LogRecord] = {}
        #: What a killed firewall's successor finds.
        self.durable = dict(self.saved)

    def serve_kernel(self) -> None:
        while (work := self.firewall.take_work(self.now, is_drained=True)) is not None:
            leaving = [element.flow.session for element in work.removals]
            for step in (
                lambda: None,
                lambda: self.firewall.apply_outcome(work, self.kernel.carry_out(work), self.now),
            ):
                step()
                if leaving:
                    self.save_once(leaving)

    def save_once(self, sessions=None) -> None:
        for key, row in self.succession.take_changes(self.now, sessions).items():
            if row is None:
                self.saved.pop(key, None)
            else:
                self.saved[key] = row
        self.durable = dict(self.saved)

    def save(self) -> None:
        super().save()
        self.durable = dict(self.saved)

    def tell(self) -> None:
        """What the daemon does after each turn."""
        while self.firewall.next_event() is not None:
            pass

    def write(self, *, is_noted: bool = True) -> None:
        while entries := self.firewall.take_log():
            for entry in entries:
                self.written.setdefault(entry.number, entry)  # INSERT OR IGNORE
            if is_noted:
                self.firewall.note_logged(entries[-1].number)

    def log(self) -> list[LogRecord]:
        self.tell()
        self.save()
        self.write()
        self.save()
        return [entry for _, entry in sorted(self.written.items())]

    def restart(self, *rules: Rule, **changes) -> None:
        super().restart(*rules, **changes)
        self.firewall.keeps_log = True


def test_the_end_of_a_session_with_all_that_it_counted():
    bench = LoggedBench(fast_path=True)
    for sequence in range(1, 6):
        bench.forward(esp(LEFT, RIGHT, 0x1001, sequence))
    bench.forward(esp(RIGHT, LEFT, 0x2002), to_left=True)
    begun = bench.firewall.started_at
    bench.wait(3601)
    (entry,) = bench.log()
    assert (entry.subtype, entry.action, entry.end_reason) == ("end", "allow", "aged-out")
    assert (entry.packets_c2s, entry.packets_s2c, entry.bytes_c2s, entry.bytes_s2c) == (5, 1, 340, 68)
    assert (entry.source_port, entry.destination_port) == (20033, 20033)
    assert (entry.spis_c2s, entry.spis_s2c) == ((0x1001,), (0x2002,))
    assert (entry.source_zone, entry.destination_zone, entry.rule) == ("trust", "untrust", "any-any")
    assert entry.started_at == begun and begun + 3600 <= entry.at <= bench.now
    assert not any(key.startswith(b"log ") for key in bench.saved)  # what is written need not be kept


def test_a_tunnel_tells_its_names_and_its_newest_spis():
    bench = LoggedBench(LOGS_BOTH)
    bench.sas(SaEstablished(child_sa(0x1001, 0x2001)))
    assert bench.log() == []  # it is there, but has not begun
    bench.receive(esp(PEER, HERE, 0x1001))
    bench.sas(SaDeleted(child_sa(0x1001, 0x2001)))
    bench.wait(6)
    start, end = bench.log()
    assert (start.subtype, end.subtype, end.end_reason) == ("start", "end", "tunnel-down")
    assert (end.ike_sa, end.child_sa, end.application) == ("gw", "net", "ipsec-udp")
    assert {end.source_port, end.destination_port} == {0x1001, 0x2001}
    assert start.session_id == end.session_id and (start.packets_c2s, end.packets_c2s) == (0, 1)


def test_a_provisional_session_begins_when_it_is_known_whose_it_is():
    bench = LoggedBench(LOGS_BOTH)
    bench.receive(esp(PEER, HERE, 0x1001))
    assert bench.log() == []
    bench.sas(SaEstablished(child_sa(0x1001, 0x2001)))
    bench.receive(esp(PEER, HERE, 0x7777))  # and one that nobody claims
    bench.wait(6)
    assert [(entry.subtype, entry.application) for entry in bench.log()] == [
        ("start", "ipsec-udp"),
        ("start", "ipsec-esp"),
    ]


def test_a_denied_session_is_a_denial():
    bench = LoggedBench(Rule("no", Action.DENY, log_at_start=True))
    bench.forward(esp(LEFT, RIGHT, 1))
    bench.wait(61)
    start, end = bench.log()
    assert (start.subtype, start.action) == ("start", "deny")
    assert (end.subtype, end.action, end.end_reason) == ("deny", "deny", "policy-deny")


def test_a_rule_that_does_not_log_leaves_nothing():
    bench = LoggedBench(Rule("quiet", Action.ALLOW, log_at_end=False))
    bench.receive(ike(PEER, HERE))
    bench.wait(31)
    assert bench.log() == [] and bench.firewall.counters.values["session_ended"] == 1


def test_nothing_is_handed_out_before_it_is_saved():
    bench = LoggedBench()
    bench.receive(ike(PEER, HERE))
    bench.save()
    bench.clear(bench.session)
    bench.tell()
    assert bench.firewall.take_log() == []
    bench.save()
    assert [entry.subtype for entry in bench.firewall.take_log()] == [Subtype.END]


def test_a_session_that_ended_untold_is_told_by_the_successor():
    bench = LoggedBench()
    bench.receive(ike(PEER, HERE))
    bench.clear(bench.session)
    bench.save()  # but nobody asked for the event
    bench.restart(saved=dict(bench.saved))
    (entry,) = bench.log()
    assert (entry.session_id, entry.end_reason, entry.packets_c2s) == (1, "cleared", 1)
    bench.restart()
    assert len(bench.log()) == 1


def test_what_nobody_may_go_on_with_has_its_record_in_advance():
    bench = LoggedBench(Rule("quiet", Action.ALLOW, log_at_end=False, applications=frozenset({"ike"})), LOGS_BOTH)
    bench.receive(ike(PEER, HERE))
    bench.sas(SaEstablished(child_sa(0x1001, 0x2001)))
    bench.receive(esp(PEER, HERE, 0x1001))
    bench.forward(esp(LEFT, RIGHT, 0x3003))
    before = bench.log()
    tunnel, ended = (one for one in bench.firewall.table if one.application != "ike")
    bench.clear(ended)  # of which nobody was told yet
    bench.now += 7
    first, second = bench.firewall.left_to_log(bench.now)
    assert [one.number for one in (first, second)] == [before[-1].number + 1, before[-1].number + 2]
    assert (first.session_id, first.end_reason, first.at) == (ended.id, "cleared", ended.ended_at)
    assert (second.subtype, second.end_reason, second.at) == ("end", "unknown", bench.now)
    assert (second.session_id, second.packets_c2s, second.child_sa) == (tunnel.id, 1, "net")
    assert bench.log() == [*before, first]  # and whoever goes on loses and repeats nothing


def test_a_session_that_is_readable_no_more_is_told_all_the_same():
    bench = LoggedBench(keep_ended=0)
    bench.receive(ike(PEER, HERE))
    bench.clear(bench.session)
    bench.save()
    bench.restart(saved=dict(bench.saved), keep_ended=0)
    assert [entry.session_id for entry in bench.log()] == [1]


def test_too_many_that_wait_are_lost_and_counted(monkeypatch):
    monkeypatch.setattr("fwd.core.traffic_log.LOG_WAITING", 3)
    bench = LoggedBench()
    for host in range(5):
        bench.receive(ike(f"10.0.0.{host + 1}", HERE))
    bench.clear(*bench.sessions)
    bench.tell()
    values = bench.firewall.counters.values
    assert (values["log_record"], values["log_lost"]) == (3, 2)
    assert [entry.session_id for entry in bench.log()] == [1, 2, 3]
    bench.restart()
    assert len(bench.log()) == 3


def test_no_more_are_under_way_than_may_be():
    bench = LoggedBench(max_sessions=2 * LOG_HANDED_OUT, keep_ended=0)
    for number in range(LOG_HANDED_OUT + 100):
        bench.firewall.receive_packet(ike(f"10.{number >> 8}.{number & 255}.1", HERE), 1, 2, 0, bench.now)
    bench.firewall.clear(list(bench.firewall.table), bench.now)
    while len(bench.firewall.table):
        bench.firewall.handle_timer(bench.now)
    bench.tell()
    bench.save()
    handed = []
    while entries := bench.firewall.take_log():
        assert len(entries) <= LOG_SLICE
        handed += entries
    assert len(handed) == LOG_HANDED_OUT
    bench.firewall.note_logged(handed[-1].number)
    assert len(bench.firewall.take_log()) == 100


def test_numbers_go_on_where_the_state_was_lost():
    bench = LoggedBench()
    bench.succession.restore({}, [], None, bench.now, first_log_number=1000)
    bench.receive(ike(PEER, HERE))
    bench.clear(bench.session)
    assert [entry.number for entry in bench.log()] == [1001]
    bench.receive(ike(PEER, HERE))
    bench.restart()
    bench.clear(bench.session)
    assert [entry.number for entry in bench.log()] == [1001, 1002]


@pytest.mark.parametrize("seed", range(40))
def test_kills_at_any_instant_lose_nothing_and_repeat_nothing(seed):
    """Sessions come and end, saves and writes happen or not, and now and then fwd is killed."""
    chance = random.Random(seed)
    bench = LoggedBench(fast_path=bool(seed % 2), keep_ended=chance.choice((0, 3, 4096)))
    settings = {"keep_ended": bench.firewall.settings.keep_ended}
    bench.save_once()
    for _ in range(60):
        match chance.randrange(8):
            case 0 | 1:
                bench.forward(esp(f"10.0.0.{chance.randrange(6) + 1}", RIGHT, chance.randrange(1, 4), 1))
            case 2 if bench.sessions:
                bench.clear(chance.choice(bench.sessions))
            case 3:
                bench.wait(chance.choice((0.1, 1, 3700)))
            case 4:
                bench.tell()
            case 5:
                bench.save_once()
            case 6:
                bench.write(is_noted=chance.random() < 0.5)
            case 7 if chance.random() < 0.4:
                bench.restart(saved=dict(bench.durable), **settings)
                bench.save_once()
    bench.clear(*bench.sessions)
    log = bench.log()
    told = [entry.session_id for entry in log]
    assert len(told) == len(set(told))
    # Who was killed before a new session was saved has nothing to end, and its successor says so.
    untold = set(range(1, bench.firewall.table.last_id + 1)) - set(told)
    assert len(untold) == bench.firewall.counters.values["session_not_restored"]


def test_an_event_tells_of_the_end_only_after_its_record_is_made():
    bench = LoggedBench()
    bench.receive(ike(PEER, HERE))
    bench.clear(bench.session)
    while (event := bench.firewall.next_event()) is not None:
        if isinstance(event, SessionEnded):
            assert bench.firewall.counters.values["log_record"] == 1


def test_damaged_records_of_the_log_are_refused():
    with pytest.raises(records.RecordError):
        records.read({records.log_key(7): b"\x91\x01"})
