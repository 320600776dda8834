"""Writes dashboard.json beside itself: fwd in Grafana, from 10.1 on. `python docs/monitoring/dashboard.py`."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    GraphDrawStyle,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableHide,
    VariableRefresh,
    VariableSort,
)

FILE = Path(__file__).with_name("dashboard.json")

_SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
_HOST = 'instance=~"$instance"'
_TUNNEL = f'{_HOST}, tunnel=~"$tunnel"'
_INTERVAL = "$__rate_interval"
_HEIGHT, _WIDTH = 8, 12


def _rate(metric: str, by: str = "", of: str = _HOST) -> str:
    """How fast a counter grows: over all its series of the firewalls chosen, or for each value of some labels."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{{{of}}}[{_INTERVAL}]))"


def _percentiles(histogram: str) -> dict[str, str]:
    """Three of a histogram's percentiles, with their legends."""
    buckets = _rate(f"{histogram}_bucket", "le")
    return {f"{share:.0%}": f"histogram_quantile({share}, {buckets})" for share in (0.5, 0.9, 0.99)}


def _queries(panel: timeseries.Panel | stat.Panel, queries: dict[str, str]) -> None:
    for letter, (legend, expr) in zip("ABCDEFGH", queries.items(), strict=False):
        panel.with_target(
            prometheus.Dataquery().expr(expr).legend_format(legend).datasource(_SOURCE).ref_id(letter).range()
        )


def _chart(
    title: str, unit: str, queries: dict[str, str], text: str = "", *, is_stacked: bool = False
) -> timeseries.Panel:
    """Lines over time: legend and query of each."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(text)
        .datasource(_SOURCE)
        .unit(unit)
        .min(0)
        .height(_HEIGHT)
        .span(_WIDTH)
        .draw_style(GraphDrawStyle.LINE)
        .show_points(VisibilityMode.NEVER)
        .fill_opacity(40 if is_stacked else 10)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if is_stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    _queries(panel, queries)
    return panel


def _figure(title: str, unit: str, expr: str, text: str, steps: dict[float | None, str]) -> stat.Panel:
    """One number, and the colour that it has from which value on."""
    panel = (
        stat.Panel()
        .title(title)
        .description(text)
        .datasource(_SOURCE)
        .unit(unit)
        .height(4)
        .span(4)
        .color_mode(BigValueColorMode.VALUE)
        .graph_mode(BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(
            dashboard.ThresholdsConfig()
            .mode(ThresholdsMode.ABSOLUTE)
            .steps([Threshold(value=value, color=color) for value, color in steps.items()])
        )
    )
    _queries(panel, {"": expr})
    return panel


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .hide(VariableHide.DONT_HIDE)
    )


_HEALTHY: dict[float | None, str] = {None: "red", 1: "green"}
_NONE_WANTED: dict[float | None, str] = {None: "green", 1: "red"}


def build() -> dashboard.Dashboard:
    """The dashboard."""
    board = (
        dashboard.Dashboard("fwd: IPsec firewall")
        .uid("fwd-dataplane")
        .description("Sessions, tunnels and what becomes of packets. Metrics: [metrics] listen in fwd's configuration.")
        .tags(["fwd", "ipsec", "firewall"])
        .time("now-3h", "now")
        .refresh("30s")
        .timezone("browser")
        .editable()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("source").label("Data source").type("prometheus"))
        .with_variable(_variable("instance", "Firewall", "label_values(fwd_build_info, instance)"))
        .with_variable(_variable("tunnel", "Tunnel", "label_values(fwd_tunnel_sas, tunnel)"))
    )
    overview = [
        _figure(
            "strongSwan",
            "bool_yes_no",
            f"min(fwd_vici_up{{{_HOST}}})",
            "Whether strongSwan answers over VICI",
            _HEALTHY,
        ),
        _figure(
            "Tunnels up",
            "none",
            f"sum(fwd_tunnel_sas{{{_HOST}}} > bool 0)",
            "Tunnels of this host that have an SA",
            {None: "blue"},
        ),
        _figure(
            "Troubles now",
            "none",
            f"sum(fwd_troubled_sessions{{{_HOST}}})",
            "Tunnels, and strangers, with a trouble: fwctl show tunnel detail says more",
            _NONE_WANTED,
        ),
        _figure(
            "Table used",
            "percentunit",
            f"max(sum by (instance) (fwd_sessions{{{_HOST}}}) / on (instance) fwd_sessions_limit{{{_HOST}}})",
            "Sessions of [dataplane] max-sessions",
            {None: "green", 0.8: "orange", 0.95: "red"},
        ),
        _figure(
            "Decided in the kernel",
            "percentunit",
            f"{_rate('fwd_pkt_fast_path_total')} / {_rate('fwd_pkt_recv_total')}",
            "The fast path's share of all packets",
            {None: "blue"},
        ),
        _figure(
            "Drops",
            "pps",
            _rate("fwd_dropped_packets_total"),
            "Packets dropped that no session counts",
            {None: "green", 1: "orange", 100: "red"},
        ),
    ]
    traffic = [
        _chart(
            "Throughput by zones",
            "Bps",
            {"{{from_zone}} → {{to_zone}} {{direction}}": _rate("fwd_bytes_total", "from_zone, to_zone, direction")},
            "Zones of a session's client and server",
            is_stacked=True,
        ),
        _chart(
            "Packets by zones",
            "pps",
            {"{{from_zone}} → {{to_zone}} {{direction}}": _rate("fwd_packets_total", "from_zone, to_zone, direction")},
            is_stacked=True,
        ),
        _chart(
            "Who decides",
            "pps",
            {
                "kernel": _rate("fwd_pkt_fast_path_total"),
                "fwd": f"{_rate('fwd_pkt_recv_total')} - {_rate('fwd_pkt_fast_path_total')}",
            },
            is_stacked=True,
        ),
        _chart(
            "Drops by reason",
            "pps",
            {"{{reason}}": f"{_rate('fwd_dropped_packets_total', 'reason')} > 0"},
            "queue_...: before fwd saw them; flow_...: by fwd. What a rule denies is counted in its session",
        ),
    ]
    sessions = [
        _chart(
            "Sessions by application and state",
            "none",
            {"{{application}} {{state}}": f"sum by (application, state) (fwd_sessions{{{_HOST}}}) > 0"},
            is_stacked=True,
        ),
        _chart(
            "Sessions opened and ended",
            "ops",
            {
                "opened": _rate("fwd_session_allocated_total"),
                "ended": _rate("fwd_session_ended_total"),
                "denied": _rate("fwd_flow_policy_deny_total"),
            },
        ),
    ]
    tunnels = [
        _chart(
            "Throughput by tunnel",
            "Bps",
            {"{{tunnel}} {{remote_id}} {{direction}}": f"rate(fwd_tunnel_bytes_total{{{_TUNNEL}}}[{_INTERVAL}])"},
        ),
        _chart(
            "SAs by tunnel",
            "none",
            {"{{tunnel}} {{remote_id}}": f"fwd_tunnel_sas{{{_TUNNEL}}}"},
            "0: the tunnel is down; 2: it is being rekeyed",
        ),
        _chart(
            "Lost, late, duplicate",
            "pps",
            {
                f"{{{{tunnel}}}} {{{{direction}}}} {what}": _rate(
                    f"fwd_tunnel_{what}_packets_total", "tunnel, direction", _TUNNEL
                )
                for what in ("lost", "late", "duplicate")
            },
            "By the sequence numbers; lost: before the packets came to this host (in) or between IPsec and fwd (out)",
        ),
        _chart(
            "Troubles by kind",
            "none",
            {"{{trouble}}": f"sum by (trouble) (fwd_troubled_sessions{{{_HOST}}})"},
            "Sessions of this host that have each; fwd_tunnel_troubles names the tunnels",
            is_stacked=True,
        ),
        _chart(
            "Rekeys and SAs",
            "ops",
            {what: _rate(f"fwd_sa_{what}_total") for what in ("established", "rekeyed", "deleted", "moved")},
        ),
        _chart(
            "strongSwan",
            "s",
            {"seconds since its last answer": f"max by (instance) (fwd_vici_answer_age_seconds{{{_HOST}}})"},
        ),
    ]
    inside = [
        _chart(
            "Decisions in fwd",
            "s",
            _percentiles("fwd_decision_seconds"),
            "Time to decide on a packet that the kernel does not decide on",
        ),
        _chart(
            "Lag of fwd's loop",
            "s",
            _percentiles("fwd_event_loop_lag_seconds"),
            "About as long may a packet wait for its turn",
        ),
        _chart(
            "Queue",
            "none",
            {
                "packets waiting": f"max by (instance) (fwd_queue_packets{{{_HOST}}})",
                "room": f"max by (instance) (fwd_queue_packets_limit{{{_HOST}}})",
            },
        ),
        _chart(
            "SPIs in the kernel",
            "none",
            {
                "SPIs": f"sum by (instance) (fwd_fast_path_spis{{{_HOST}}})",
                "room": f"sum by (instance) (fwd_fast_path_spis_limit{{{_HOST}}})",
            },
        ),
        _chart("CPU", "percentunit", {"{{instance}}": f"rate(process_cpu_seconds_total{{{_HOST}}}[{_INTERVAL}])"}),
        _chart("Memory", "bytes", {"{{instance}}": f"process_resident_memory_bytes{{{_HOST}}}"}),
    ]
    numbers = count(1)
    for panel in overview:
        board.with_panel(panel.id(next(numbers)))
    for title, panels in (("Traffic", traffic), ("Sessions", sessions), ("Tunnels", tunnels), ("fwd itself", inside)):
        board.with_row(dashboard.Row(title).id(next(numbers)))
        for chart in panels:
            board.with_panel(chart.id(next(numbers)))
    return board


def text() -> str:
    """The dashboard as JSON."""
    return JSONEncoder(sort_keys=True, indent=1).encode(build().build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
