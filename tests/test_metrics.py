"""What is exposed, as Prometheus reads it; and that dashboard and alerts ask for nothing else."""

import importlib.util
import json
import re
from pathlib import Path

import promql_parser
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from fwd import metrics
from fwd.core.counters import COUNTERS
from fwd.core.histogram import Histogram
from fwd.core.limits import Bounds
from fwd.core.sa import SaSnapshot, SaSourceLost
from fwd.metrics import HostFigures, Metrics, expose
from tests.builders import HERE, LEFT, PEER, RIGHT, Bench, child_sa, esp, ike

DOCS = Path(__file__).parents[1] / "docs" / "monitoring"
OPENMETRICS = "application/openmetrics-text;version=1.0.0"


def spans(*seconds):
    histogram = Histogram((0.001, 0.01))
    for second in seconds:
        histogram.note(second)
    return histogram


def taken(bench, waiting=3):
    """The figures, and how many steps they took."""
    host = HostFigures(waiting, 4096, 0, spans(0.0005, 0.002, 0.001), spans(5))
    steps = Metrics(bench.firewall, lambda: bench.now, lambda: host, bench.read_all).take()
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value, count
        count += 1


def scrape(bench, accept="", **host):
    """All samples by name and labels."""
    text, _ = expose(taken(bench, **host)[0], accept)
    families = (parse_openmetrics if accept else parse_text)(text.decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(samples, name, **labels):
    return samples[name, tuple(sorted(labels.items()))]


@pytest.fixture
def bench():
    bench = Bench(fast_path=True)
    bench.sas(SaSnapshot((child_sa(), child_sa(0x1002, 0x2002, child_name='q"\\\n{}', uniqueid=2, reqid=2))))
    for seq in range(1, 4):
        bench.receive(esp(PEER, HERE, 0x1001, seq, size=100))
        bench.forward(esp(LEFT, RIGHT, 0xAA, seq))
    bench.forward(ike(LEFT, RIGHT))
    bench.forward(esp(LEFT, RIGHT, 0))
    return bench


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_what_the_core_counts_is_what_prometheus_reads(bench, accept):
    samples = scrape(bench, accept)
    own = {"tunnel": "gw/net", "remote_id": "there"}
    assert value(samples, "fwd_tunnel_packets_total", direction="in", **own) == 3
    assert value(samples, "fwd_tunnel_bytes_total", direction="in", **own) == 3 * 128
    assert value(samples, "fwd_tunnel_packets_total", direction="out", **own) == 0
    assert value(samples, "fwd_tunnel_sas", **own) == 1
    assert value(samples, "fwd_tunnel_sas", tunnel='gw/q"\\\n{}', remote_id="there") == 1
    assert value(samples, "fwd_tunnel_sas", tunnel="other", remote_id="") == 0
    zones = {"from_zone": "trust", "to_zone": "untrust", "direction": "c2s"}
    assert value(samples, "fwd_packets_total", **zones) == 4
    assert value(samples, "fwd_sessions", application="ipsec-udp", state="ACTIVE", type="FLOW") == 1
    assert value(samples, "fwd_sessions", application="ipsec-udp", state="OPENING", type="PRED") == 1
    assert value(samples, "fwd_sessions", application="ike", state="ACTIVE", type="FLOW") == 1
    assert sum(v for (name, _), v in samples.items() if name == "fwd_sessions") == len(bench.firewall.table)
    assert value(samples, "fwd_dropped_packets_total", reason="flow_parse_esp") == 1
    assert value(samples, "fwd_pkt_fast_path_total") == bench.count("pkt_fast_path") == 4
    assert value(samples, "fwd_fast_path_spis") == 2 and value(samples, "fwd_fast_path_up") == 1
    assert value(samples, "fwd_queue_packets") == 3 and value(samples, "fwd_vici_up") == 1
    assert value(samples, "fwd_decision_seconds_bucket", le="0.001") == 2
    assert value(samples, "fwd_decision_seconds_bucket", le="+Inf") == 3 == value(samples, "fwd_decision_seconds_count")
    assert value(samples, "fwd_decision_seconds_sum") == pytest.approx(0.0035)
    assert value(samples, "process_resident_memory_bytes") > 1e6


def test_the_sum_of_all_zones_is_pkt_session_at_each_scrape(bench):
    for seq in range(4, 40):
        bench.receive(esp(PEER, HERE, 0x1001, seq))
        bench.forward(esp(LEFT, RIGHT, seq % 7 + 1))
        if seq == 20:
            bench.clear(*bench.sessions)
        samples = scrape(bench)
        for metric, counter in (
            ("fwd_packets_total", "fwd_pkt_session_total"),
            ("fwd_bytes_total", "fwd_session_bytes_total"),
        ):
            assert sum(v for (name, _), v in samples.items() if name == metric) == value(samples, counter)


def test_every_global_counter_is_there_and_those_of_severity_drop_are_reasons(bench):
    samples = scrape(bench)
    for counter in COUNTERS:
        if counter.severity == "drop":
            assert counter.description.startswith("Packets ")
            assert value(samples, "fwd_dropped_packets_total", reason=counter.name) == bench.count(counter.name)
        elif counter.name != "byte_session":
            assert value(samples, f"fwd_{counter.name}_total") == bench.count(counter.name)


def test_what_is_not_known_is_absent():
    bench = Bench(limits=Bounds(0, 0, 0))
    samples = scrape(bench, waiting=None)
    absent = {"fwd_queue_packets", "fwd_vici_answer_age_seconds", "fwd_half_open_sessions_limit"}
    assert not absent & {name for name, _ in samples}
    bench.sas(SaSnapshot(()))
    bench.sas(SaSourceLost("gone"))
    bench.now += 7
    samples = scrape(bench)
    assert value(samples, "fwd_vici_answer_age_seconds") == 7 and value(samples, "fwd_vici_up") == 0


def test_troubles_by_tunnel_and_by_kind(bench):
    bench.sas(SaSourceLost("gone"))
    bench.wait(3)
    samples = scrape(bench)
    assert value(samples, "fwd_tunnel_troubles", tunnel="gw/net", remote_id="there", trouble="stale") == 1
    assert value(samples, "fwd_troubled_sessions", trouble="stale") == 2
    assert value(samples, "fwd_troubled_sessions", trouble="loss") == 0
    bench.sas(SaSnapshot((child_sa(),)))
    bench.wait(10)
    samples = scrape(bench)
    assert value(samples, "fwd_troubled_sessions", trouble="stale") == 0
    assert not any(name == "fwd_tunnel_troubles" for name, _ in samples)


def test_names_and_units_are_as_prometheus_wants_them(bench):
    """The rules of its `promtool check metrics`."""
    text = expose(taken(bench)[0], "")[0].decode()
    for family in parse_text(text):
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name) and family.documentation, family.name
        assert len({(*sorted(s.labels.items()), s.name) for s in family.samples}) == len(family.samples)
        words = family.name.split("_")
        assert not {"ms", "us", "ns", "milliseconds", "kb", "mb", "kilobytes", "percent", "minutes"} & set(words)
        assert family.type in ("counter", "gauge", "histogram") and family.type not in words, family.name
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
            if family.type == "gauge":
                assert not sample.name.endswith(("_count", "_sum", "_bucket"))
            assert all(re.fullmatch(r"[a-z_]+", label) for label in sample.labels)


def test_very_many_tunnels_are_looked_at_in_steps_and_exposed_in_bounds(monkeypatch):
    monkeypatch.setattr(metrics, "TUNNELS_PER_STEP", 16)
    bench = Bench(tunnel_totals=8)
    sas = [child_sa(0x1000 + n, 0x9000 + n, ike_name=f"gw{n}", reqid=n, uniqueid=n) for n in range(100)]
    bench.sas(SaSnapshot(tuple(sas)))
    bench.wait(2)
    figures, steps = taken(bench)
    assert steps == 7 and sum(figures.sessions.values()) == 100
    samples = scrape(bench)
    assert sum(name == "fwd_tunnel_sas" for name, _ in samples) == 9
    assert value(samples, "fwd_tunnel_sas", tunnel="other", remote_id="") == 92


def _asked_for(expression):
    """The names of the metrics in an expression."""
    for variable, stands_for in (("$__rate_interval", "1m"), ("$instance", ".*"), ("$tunnel", ".*")):
        expression = expression.replace(variable, stands_for)
    promql_parser.parse(expression)  # raises ValueError for what Prometheus would not take
    return set(re.findall(r"\b(?:fwd|process)_[a-z_]+|\bup\b", re.sub(r'"[^"]*"', "", expression)))


def _dashboard():
    return json.loads((DOCS / "dashboard.json").read_text())


def _expressions():
    found = [target["expr"] for panel in _dashboard()["panels"] for target in panel.get("targets", [])]
    rules = re.findall(r"^ +expr: (?:>-\n)?((?:.|\n)+?)\n +for:", (DOCS / "alerts.yml").read_text(), re.MULTILINE)
    assert len(found) > 30 and len(rules) == 6
    return [*found, *rules]


def test_dashboard_and_alerts_ask_for_what_there_is(bench):
    bench.sas(SaSourceLost("gone"))
    bench.wait(2)
    there = {name for name, _ in scrape(bench)} | {"up"}
    for expression in _expressions():
        asked = _asked_for(expression)
        assert asked and asked <= there, expression


def test_the_dashboard_is_what_its_program_writes_and_fits_its_grid():
    path = DOCS / "dashboard.py"
    spec = importlib.util.spec_from_file_location("dashboard", path)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    assert (DOCS / "dashboard.json").read_text() == program.text(), f"run python {path}"
    panels = _dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        grid = panel["gridPos"]
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken and grid["x"] + grid["w"] <= 24, panel["title"]
        taken |= cells
