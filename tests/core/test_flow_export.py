"""Flow export: what records tell adds up to what sessions counted, whatever happens in between."""

import random
from collections import Counter
from dataclasses import replace

import msgspec
import pytest

from fwd.core import records
from fwd.core.constants import EXPORT_ROUNDS, EXPORT_SLICE, SPIS_SEEN
from fwd.core.flow_export import FlowEndReason
from fwd.core.interfaces import LinkPresent
from fwd.core.records import ExportRecord
from fwd.core.sa import SaDeleted, SaEstablished, SaRekeyed
from tests.builders import (
    ALLOW_ALL,
    DENY_ALL,
    HERE,
    LEFT,
    PEER,
    RIGHT,
    TO_LEFT,
    TO_RIGHT,
    WAN,
    Bench,
    child_sa,
    esp,
    esp_in_udp,
    ike,
    ipv4,
    packed,
)

SA = child_sa()
NEXT_SA = child_sa(0x1002, 0x2002, uniqueid=2)
TIMEOUT = 60


class Collector:
    """What a collector would have of a bench, and what a daemon does with it."""

    def __init__(self, bench):
        self.bench = bench
        self.told = []
        self.lost = []

    @property
    def export(self):
        return self.bench.firewall.flow_export

    def collect(self, *, arrives=True):
        """Take and send what is due now, all of it; gives that."""
        told = []
        while True:
            deltas, _ = self.export.take(self.bench.now)
            self.bench.save()
            self.export.handed_over()
            (self.export.confirm if arrives else self.export.take_back)(deltas)
            self.bench.save()
            told += deltas
            if not arrives or (not deltas and not self.export.has_more):
                break
        if arrives:
            self.told += told
        return told

    def finish(self):
        self.bench.read_all()
        self.export.finish()
        return self.collect()

    def packets(self):
        return sum(delta.packets for delta in self.told)

    def check_totals(self):
        """All was told: that is what was counted."""
        counters = self.bench.firewall.counters.values
        assert self.packets() + counters["ipfix_packets_not_sent"] == counters["pkt_session"]
        octets = sum(delta.octets for delta in self.told)
        assert octets + counters["ipfix_bytes_not_sent"] == counters["byte_session"]
        assert counters["ipfix_packets_sent"] == self.packets() and counters["ipfix_bytes_sent"] == octets
        assert counters["ipfix_records_sent"] == len(self.told)


@pytest.fixture(params=[True, False], ids=["kernel", "daemon"])
def bench(request):
    return Bench(fast_path=request.param, flow_active_timeout_s=TIMEOUT)


@pytest.fixture
def collector(bench):
    return Collector(bench)


def by_spi(deltas):
    """Packets of each SPI."""
    counted = Counter()
    for delta in deltas:
        counted[delta.spi] += delta.packets
    return dict(counted)


def test_a_session_that_goes_on_is_told_of_in_differences(bench, collector):
    began = bench.now
    for seq in range(1, 4):
        bench.forward(esp(LEFT, RIGHT, 7, seq))
    bench.forward(esp(RIGHT, LEFT, 8), to_left=True)
    bench.wait(TIMEOUT - 1)
    assert collector.collect() == []
    bench.wait(1 + TIMEOUT / EXPORT_ROUNDS)
    there, back = collector.collect()
    assert (there.source, there.destination, there.spi, there.packets, there.octets) == (
        packed(LEFT),
        packed(RIGHT),
        7,
        3,
        204,
    )
    assert (back.source, back.destination, back.spi, back.packets) == (packed(RIGHT), packed(LEFT), 8, 1)
    assert (there.ingress, there.egress, back.ingress, back.egress) == (TO_LEFT, TO_RIGHT, TO_RIGHT, TO_LEFT)
    assert there.end_reason == back.end_reason == FlowEndReason.ACTIVE_TIMEOUT
    assert (there.protocol, there.ports, there.application) == (50, None, "ipsec-esp")
    assert there.session_id == back.session_id == bench.session.id
    assert began == there.started_at <= there.ended_at <= began + 2
    told_at = bench.now
    bench.wait(TIMEOUT + 4)
    assert collector.collect() == []  # no packets, nothing to tell
    looked_at = bench.now
    bench.forward(esp(LEFT, RIGHT, 7, 4))
    bench.wait(TIMEOUT + 4)
    (more,) = collector.collect()
    assert (more.spi, more.packets) == (7, 1)
    assert told_at < looked_at == more.started_at <= more.ended_at <= looked_at + 1
    collector.check_totals()


def test_each_spi_has_its_own_share_across_rekeys(bench, collector):
    bench.sas(SaEstablished(SA))
    for seq in range(1, 6):
        bench.receive(esp(PEER, HERE, SA.spi_in, seq))
        bench.send(esp(HERE, PEER, SA.spi_out, seq))
    bench.wait(TIMEOUT + 4)
    collector.collect()
    bench.receive(esp(PEER, HERE, SA.spi_in, 6))
    bench.sas(SaRekeyed(SA, NEXT_SA))
    for seq in range(1, 4):
        bench.receive(esp(PEER, HERE, NEXT_SA.spi_in, seq))
    bench.sas(SaDeleted(SA))
    bench.wait(TIMEOUT + 4)
    second = collector.collect()
    assert by_spi(second) == {SA.spi_in: 1, NEXT_SA.spi_in: 3}
    assert by_spi(collector.told) == {SA.spi_in: 6, SA.spi_out: 5, NEXT_SA.spi_in: 3}
    assert {(delta.is_outbound, delta.ingress, delta.egress) for delta in collector.told} == {
        (False, WAN, 0),
        (True, 0, WAN),
    }
    collector.check_totals()


def end_idle(bench):
    bench.wait(3700)


def end_tunnel(bench):
    bench.sas(SaDeleted(SA))
    bench.wait(6)


def end_cleared(bench):
    bench.clear(*bench.sessions)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (end_idle, FlowEndReason.IDLE_TIMEOUT),
        (end_tunnel, FlowEndReason.END_OF_FLOW),
        (end_cleared, FlowEndReason.FORCED_END),
    ],
)
def test_an_end_is_told_at_once_and_why(bench, collector, end, reason):
    bench.sas(SaEstablished(SA))
    bench.receive(esp(PEER, HERE, SA.spi_in))
    end(bench)
    (last,) = collector.collect()
    assert (last.spi, last.packets, last.end_reason, last.is_dropped) == (SA.spi_in, 1, reason, False)
    collector.check_totals()


def test_what_was_denied_is_told_as_dropped():
    bench = Bench(DENY_ALL, flow_active_timeout_s=TIMEOUT)
    collector = Collector(bench)
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.wait(TIMEOUT + 4)
    bench.forward(esp(LEFT, RIGHT, 7, 2))
    bench.clear(*bench.sessions)
    deltas = collector.collect()
    assert sum(delta.packets for delta in deltas) == 2 and all(delta.is_dropped for delta in deltas)


def test_a_tunnel_without_a_packet_is_no_flow(bench, collector):
    bench.sas(SaEstablished(SA))
    bench.wait(TIMEOUT + 4)
    bench.clear(bench.session)
    assert collector.collect() == []


def test_ports_are_those_on_the_wire(bench, collector):
    bench.forward(ike(LEFT, RIGHT))
    bench.forward(esp_in_udp(LEFT, RIGHT, 9, sport=1025))
    sa = child_sa(encap=True, local_port=4500, remote_port=1026, is_initiator=True)
    bench.sas(SaEstablished(sa))
    bench.receive(esp_in_udp(PEER, HERE, sa.spi_in, 1026, 4500))
    bench.send(esp_in_udp(HERE, PEER, sa.spi_out, 4500, 1026))
    told = {(delta.application, delta.spi): (delta.protocol, delta.ports) for delta in collector.finish()}
    assert told == {
        ("ike", None): (17, (500, 500)),
        ("ipsec-esp-udp", 9): (17, (1025, 4500)),
        ("ipsec-udp", sa.spi_in): (17, (1026, 4500)),
        ("ipsec-udp", sa.spi_out): (17, (4500, 1026)),
    }


def test_later_fragments_are_told_without_an_spi(bench, collector):
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.forward(ipv4(LEFT, RIGHT, 50, bytes(40), fragment=0x2004))
    assert by_spi(collector.finish()) == {7: 1, None: 1}


def test_a_provisional_session_takes_along_what_was_told_of_it():
    bench = Bench(flow_active_timeout_s=1)
    collector = Collector(bench)
    bench.receive(esp(PEER, HERE, SA.spi_in))
    bench.wait(1.5)
    assert by_spi(collector.collect()) == {SA.spi_in: 1}
    bench.receive(esp(PEER, HERE, SA.spi_in, 2))
    bench.sas(SaEstablished(SA))
    bench.wait(1.5)
    (delta,) = collector.collect()
    assert (delta.spi, delta.packets, delta.application) == (SA.spi_in, 1, "ipsec-udp")
    collector.check_totals()


def test_unknown_spis_that_become_one_session_do_too():
    bench = Bench(flow_active_timeout_s=1)
    collector = Collector(bench)
    for spi in (5, 6):
        bench.receive(esp(PEER, HERE, spi))
        bench.wait(1.5)
        collector.collect()
        bench.receive(esp(PEER, HERE, spi, 2))
    bench.wait(10)
    collector.collect()
    assert by_spi(collector.told) == {5: 2, 6: 2}
    collector.check_totals()


def test_more_spis_than_are_remembered_still_add_up(bench, collector):
    for spi in range(1, 3 * SPIS_SEEN):
        for seq in range(1 + spi % 3):
            bench.forward(esp(LEFT, RIGHT, spi, seq + 1))
        if spi == SPIS_SEEN:
            bench.wait(TIMEOUT + 4)
            collector.collect()
    bench.restart(flow_active_timeout_s=TIMEOUT, fast_path=bench.firewall.fast_path.is_on)
    for spi in range(1, 3 * SPIS_SEEN):
        bench.forward(esp(LEFT, RIGHT, spi, 9))
    collector.finish()
    collector.check_totals()


def test_what_did_not_arrive_comes_first_and_as_it_was(bench, collector):
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.clear(bench.session)
    bench.forward(esp(LEFT, RIGHT, 8))
    lost = collector.collect(arrives=False)
    assert lost and bench.count("ipfix_records_sent") == 0
    bench.restart(flow_active_timeout_s=TIMEOUT, fast_path=bench.firewall.fast_path.is_on)
    bench.clear(*bench.sessions)
    assert collector.collect()[:1] == lost
    assert by_spi(collector.told) == {7: 1, 8: 1}
    collector.check_totals()


def test_a_kill_between_saving_and_sending_loses_that_turn_and_says_so(bench, collector):
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.clear(bench.session)
    deltas, _ = bench.firewall.flow_export.take(bench.now)
    bench.save()
    assert len(deltas) == 1
    bench.restart(saved=bench.saved, flow_active_timeout_s=TIMEOUT, fast_path=bench.firewall.fast_path.is_on)
    assert collector.collect() == []
    assert bench.count("ipfix_records_unsure") == bench.count("ipfix_records_sent") == 1
    bench.restart(flow_active_timeout_s=TIMEOUT, fast_path=bench.firewall.fast_path.is_on)
    assert bench.count("ipfix_records_unsure") == bench.count("ipfix_records_sent") == 1


def test_what_is_on_its_way_when_fwd_is_killed_counts_as_sent(bench):
    export = bench.firewall.flow_export
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.clear(bench.session)
    assert len(export.take(bench.now)[0]) == 1
    export.sequence = 5
    export.handed_over()
    bench.save()
    bench.restart(saved=bench.saved, flow_active_timeout_s=TIMEOUT)
    assert (bench.count("ipfix_records_unsure"), bench.count("ipfix_packets_sent")) == (0, 1)
    assert bench.firewall.flow_export.sequence == 5


def test_ended_sessions_wait_for_the_collector_longer_than_they_are_readable():
    bench = Bench(flow_active_timeout_s=TIMEOUT, keep_ended=0)
    collector = Collector(bench)
    for spi in range(1, 4):
        bench.forward(esp(LEFT, RIGHT, spi))
        bench.clear(*bench.sessions)
    bench.wait(400)
    assert not list(bench.firewall.table.ended)
    for _ in range(2):
        bench.restart(flow_active_timeout_s=TIMEOUT, fast_path=False, keep_ended=0)
    assert by_spi(collector.collect()) == {1: 1, 2: 1, 3: 1}
    collector.check_totals()
    bench.wait(1)
    bench.save()
    assert not records.read(bench.saved).sessions, "what was told is forgotten"


def test_of_too_many_that_wait_the_oldest_are_given_up_and_counted():
    bench = Bench(flow_active_timeout_s=TIMEOUT, max_sessions=16)
    collector = Collector(bench)
    for spi in range(1, 21):
        bench.forward(esp(LEFT, RIGHT, spi))
        bench.clear(*bench.sessions)
    assert bench.firewall.flow_export.waiting_count == 16
    assert bench.count("ipfix_records_not_sent") == bench.count("ipfix_packets_not_sent") == 4
    assert by_spi(collector.collect()) == dict.fromkeys(range(5, 21), 1)
    collector.check_totals()


def test_without_a_collector_nothing_waits():
    bench = Bench()
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.clear(bench.session)
    export = bench.firewall.flow_export
    assert export.take(bench.now) == ([], []) and not export.waiting_count and not export.has_more


def test_a_reload_begins_and_ends_it():
    bench = Bench()
    collector = Collector(bench)
    bench.forward(esp(LEFT, RIGHT, 7))
    settings = bench.firewall.settings
    bench.firewall.reconfigure(replace(settings, flow_active_timeout_s=TIMEOUT))
    bench.wait(TIMEOUT + 4)
    assert by_spi(collector.collect()) == {7: 1}
    bench.forward(esp(LEFT, RIGHT, 7, 2))
    bench.clear(bench.session)
    bench.firewall.reconfigure(settings)
    assert bench.firewall.flow_export.waiting_count == 0
    bench.check_saved()


def test_the_work_of_a_turn_is_bounded():
    bench = Bench(flow_active_timeout_s=TIMEOUT)
    for spi in range(1, 400):
        bench.forward(esp(f"198.51.{spi >> 8}.{spi & 255}", RIGHT, spi))
    bench.wait(TIMEOUT + 4)
    seen = set()
    while not seen or bench.firewall.flow_export.has_more:
        deltas, sessions = bench.firewall.flow_export.take(bench.now)
        assert len(deltas) <= EXPORT_SLICE and len(sessions) == len(deltas)
        seen |= {delta.spi for delta in deltas}
        bench.firewall.flow_export.confirm(deltas)
    assert seen == set(range(1, 400))


def test_an_interface_that_is_gone_has_no_index(bench, collector):
    bench.forward(esp(LEFT, RIGHT, 7))
    bench.firewall.apply_interface(LinkPresent(TO_LEFT, "renamed"))
    (delta,) = collector.finish()
    assert (delta.ingress, delta.egress) == (0, TO_RIGHT)


@pytest.mark.parametrize("octets", [b"", b"\x90", msgspec.msgpack.encode([1, [0, 0, 0], 0, [[1, b"x"]]])])
def test_damaged_records_are_refused(octets):
    with pytest.raises(records.RecordError):
        records.read({records.EXPORT_KEY: octets})


def test_records_of_addresses_that_cannot_be_are_refused(bench, collector):
    bench.forward(esp(LEFT, RIGHT, 7))
    (delta,) = collector.finish()
    for wrong in (
        {"source": bytes(5)},
        {"destination": bytes(16)},
        {"packets": -1},
        {"spi": 2**32},
        {"ports": (1, -1)},
    ):
        record = ExportRecord(0, (0, 0, 0), 0, (msgspec.structs.replace(delta, **wrong),))
        with pytest.raises(records.RecordError):
            records.read({records.EXPORT_KEY: records.to_bytes(record)})


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_all_records_add_up(seed):
    chance = random.Random(seed)
    bench = Bench(ALLOW_ALL, fast_path=seed % 2 == 0, flow_active_timeout_s=2)
    collector = Collector(bench)
    sas = {}
    number = 1
    for _ in range(400):
        match chance.randrange(12):
            case 0 if sas:
                old = chance.choice(list(sas.values()))
                number += 1
                sas[old.reqid] = child_sa(number, 0x1000 + number, uniqueid=number, reqid=old.reqid)
                bench.sas(SaRekeyed(old, sas[old.reqid]))
                bench.sas(SaDeleted(old))
            case 1 if len(sas) < 3:
                number += 1
                reqid = max(sas, default=0) + 1
                sas[reqid] = child_sa(number, 0x1000 + number, uniqueid=number, reqid=reqid)
                if chance.random() < 0.5:  # the packet is faster than the news
                    bench.receive(esp(PEER, HERE, number))
                    collector.collect()
                bench.sas(SaEstablished(sas[reqid]))
            case 2 if sas:
                bench.sas(SaDeleted(sas.pop(chance.choice(list(sas)))))
            case 3:
                bench.wait(chance.random() * 7)
            case 4 if bench.sessions:
                bench.clear(chance.choice(bench.sessions))
            case 5:  # or killed: what was not saved since is a number of its own, pkt_unseen
                is_fast = bench.firewall.fast_path.is_on  # then the daemon saves more often than a bench does
                saved = bench.saved if not is_fast and chance.random() < 0.5 else None
                bench.restart(saved=saved, flow_active_timeout_s=2, fast_path=is_fast)
            case 6:
                collector.collect(arrives=False)
            case 7:
                collector.collect()
            case _ if sas and chance.random() < 0.6:
                sa = chance.choice(list(sas.values()))
                for seq in range(chance.randrange(4)):
                    bench.receive(esp(PEER, HERE, sa.spi_in, seq + 1))
                    bench.send(esp(HERE, PEER, sa.spi_out, seq + 1))
            case _:
                bench.receive(esp(PEER, HERE, chance.randrange(0x9000, 0x9040)))
                bench.forward(esp(LEFT, RIGHT, chance.randrange(1, 60)))
    collector.finish()
    collector.check_totals()
    assert collector.packets() > 100
    assert bench.firewall.flow_export.record().sent == (0, 0, 0)
