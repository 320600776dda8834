"""What fwctl prints: PAN-OS's layouts, to the column, from the daemon's answers."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_RULE = "-" * 80
_NO_SESSIONS = "No Active Sessions"


def session_count(count: int) -> str:
    """`show session all filter ... count yes`."""
    return f"Number of sessions that match filter: {count}" if count else _NO_SESSIONS


# --- show session all -----------------------------------------------------------------------------------

_ALL_HEADER = (
    _RULE,
    f"{'ID':<12}{'Application':<15}{'State':<8}{'Type':<5}{'Flag':<6}Src[Sport]/Zone/Proto (translated IP[Port])",
    f"{'Vsys':<46}Dst[Dport]/Zone (translated IP[Port])",
    _RULE,
)


def session_rows(sessions: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """`show session all`: two lines a session; a value too long for its column moves the rest to the right."""
    is_first = True
    for session in sessions:
        if is_first:
            yield from _ALL_HEADER
            is_first = False
        flow = session["c2s"]
        source = f"{flow['source']}[{flow['sport']}]"
        destination = f"{flow['destination']}[{flow['dport']}]"
        yield (
            f"{session['id']!s:<12} {session['application']:<14} {session['state']:<7} {session['type']:<4}       "
            f"{source}/{flow['source_zone']}/{flow['protocol']}  ({source})"
        )
        yield f"{session['vsys']:<46} {destination}/{flow['destination_zone']}  ({destination})"
    if is_first:
        yield _NO_SESSIONS


# --- show session id --------------------------------------------------------------------------------------


def session_detail(session: Mapping[str, Any]) -> str:
    """`show session id`: PAN-OS's fields in its order, then what it has no field for."""
    lines = [f"{'Session':<20}{session['id']}", ""]
    for name in ("c2s", "s2c"):
        lines += [*_flow(name, session[name]), ""]
    lines += [_footer(label, value) for label, value in _footer_values(session)]
    if session["ipsec"]:
        lines += ["", "        IPsec, as seen by fwd:"]
        lines += [_footer(label, value) for label, value in _ipsec_values(session)]
    return "\n".join(lines)


def _flow(name: str, flow: Mapping[str, Any]) -> list[str]:
    return [
        f"        {name} flow:",
        _field("source:", f"{flow['source']} [{flow['source_zone']}]"),
        _field("dst:", flow["destination"]),
        _field("proto:", flow["protocol"]),
        _field("sport:", flow["sport"], "dport:", flow["dport"]),
        _field("state:", flow["state"], "type:", flow["type"]),
        _field("src user:", "unknown"),
        _field("dst user:", "unknown"),
    ]


def _field(label: str, value: object, second_label: str = "", second_value: object = "") -> str:
    line = f"{'':16}{label:<13}{value}"
    return f"{line:<44} {second_label:<12}{second_value}" if second_label else line


def _footer(label: str, value: object) -> str:
    return f"        {label:<37}: {value}"


def _footer_values(session: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    """Label and value of each line below the flows. What fwd has no function for says False, any or N/A."""
    yield "start time", time.strftime("%a %b %e %H:%M:%S %Y", time.localtime(session["start_time"]))
    yield "timeout", f"{session['timeout_s']} sec"
    if session["time_to_live_s"] is not None:
        yield "time to live", f"{session['time_to_live_s']} sec"
    yield "total byte count(c2s)", session["c2s"]["bytes"]
    yield "total byte count(s2c)", session["s2c"]["bytes"]
    yield "layer7 packet count(c2s)", session["c2s"]["packets"]
    yield "layer7 packet count(s2c)", session["s2c"]["packets"]
    yield "vsys", session["vsys"]
    yield "application", session["application"]
    yield "rule", session["rule"]
    yield "session to be logged at end", session["log_at_end"]
    yield "session in session ager", session["in_ager"]
    yield "session updated by HA peer", False
    yield "layer7 processing", "completed"
    yield "URL filtering enabled", False
    yield "URL category", "any"
    yield "session via syn-cookies", False
    yield "session terminated on host", session["terminated_on_host"]
    yield "session traverses tunnel", False
    yield "captive portal session", False
    yield "ingress interface", session["ingress_interface"]
    yield "egress interface", session["egress_interface"]
    yield "session QoS rule", "N/A (class 4)"
    yield "tracker stage l7proc", "ctd app has no decoder"
    yield "end-reason", session["end_reason"]


def _ipsec_values(session: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    ipsec = session["ipsec"]
    if ipsec["child_sa"] is not None:
        yield "CHILD_SA", f"{ipsec['child_sa']} (reqid {ipsec['reqid']})"
        yield "IKE_SA", ipsec["ike_sa"]
        yield "local id", ipsec["local_id"]
        yield "remote id", ipsec["remote_id"]
        yield "SPI c2s, negotiated", spi(session["c2s"]["dport"])
        yield "SPI s2c, negotiated", spi(session["c2s"]["sport"])
        yield "rekeys", ipsec["rekeys"]
        stale = ipsec["sa_stale_s"]
        yield "SA confirmed by strongSwan", "yes" if stale is None else f"no, not for {duration(stale)}"
    if ipsec["nat_t_ports"]:
        yield "NAT-T UDP ports (c2s)", " to ".join(map(str, ipsec["nat_t_ports"]))
    for name, spis in ipsec["spis_seen"].items():
        yield f"SPIs seen on the wire ({name})", ", ".join(map(spi, spis)) or "none yet"
    yield "SPIs on the kernel's fast path", ipsec["spis_in_kernel"]


def spi(number: int) -> str:
    """An SPI in decimal, as sessions show it, and in hex, as charon and tcpdump do."""
    return f"{number} (0x{number:08x})"


# --- show session info, counters, tunnels, system ---------------------------------------------------------


def session_info(facts: Mapping[str, Any]) -> str:
    """`show session info`."""
    active = facts["active"]
    ageing, path = facts["accelerated_ageing"], facts["fast_path"]
    sections: list[list[tuple[str, str]]] = [
        [
            ("Number of sessions supported:", f"{facts['sessions_supported']}"),
            ("Number of allocated sessions:", f"{facts['sessions_allocated']}"),
            *((f"Number of active {name} sessions:", f"{count}") for name, count in active.items()),
            ("Number of active predict sessions:", f"{facts['predicted']}"),
            ("Number of discard sessions:", f"{facts['discard']}"),
            ("Number of ended sessions still readable:", f"{facts['ended_readable']}"),
            ("Session table utilization:", f"{facts['utilization_percent']}%"),
            ("Number of sessions created since start:", f"{facts['created_since_start']}"),
            ("Packet rate:", f"{facts['packet_rate']:.0f}/s"),
            ("Throughput:", f"{facts['throughput_kbps']:.0f} kbps"),
            ("New connection establish rate:", f"{facts['new_session_rate']:.0f} cps"),
        ],
        [
            ("Fast path in the kernel:", "on" if path["on"] else "off"),
            ("  SPIs it decides on:", f"{path['spis_in_kernel']} of {path['capacity']}"),
            ("  Packets it decides on:", f"{path['packet_rate']:.0f}/s"),
        ],
        [
            ("Session timeout", ""),
            *((f"  {name} timeout:", f"{seconds} secs") for name, seconds in facts["timeouts_s"].items()),
        ],
        [
            ("Session accelerated aging:", f"{ageing['enabled']}"),
            ("  Accelerated aging threshold:", f"{ageing['threshold_percent']}% of utilization"),
            ("  Scaling factor:", f"{ageing['factor']} X"),
            ("  Active now:", f"{ageing['active']}"),
        ],
    ]
    lines = [_RULE]
    for section in sections:
        lines += [f"{label:<49}{value}".rstrip() for label, value in section]
        lines.append(_RULE)
    return "\n".join(lines)


def counters(answer: Mapping[str, Any]) -> str:
    """`show counter global`: those that ever counted, as PAN-OS does."""
    shown = [counter for counter in answer["counters"] if counter["value"]]
    return "\n".join(
        [
            "",
            "Global counters:",
            f"Elapsed time since last sampling: {answer['elapsed_s']:.3f} seconds",
            "",
            f"{'name':<34}{'value':>10}{'rate':>9} {'severity':<10}{'category':<10}{'aspect':<10}description",
            _RULE,
            *(
                f"{counter['name']:<34}{counter['value']:>10}{counter['rate']:>9} {counter['severity']:<10}"
                f"{counter['category']:<10}{counter['aspect']:<10}{counter['description']}"
                for counter in shown
            ),
            _RULE,
            f"Total counters shown: {len(shown)}",
            _RULE,
        ]
    )


def tunnels(answer: Mapping[str, Any], width: int) -> str:
    """`show tunnel`: the IKE daemon's state, then each CHILD_SA with its SPIs and its session."""
    source = answer["source"]
    answered = source["last_answer_age_s"]
    last = "never answered" if answered is None else f"last answer {duration(answered)} ago"
    state = "connected" if source["connected"] else f"AWAY ({source['reason']})"
    head = f"strongSwan on {source['socket']}: {state}, {last}"
    if not answer["tunnels"]:
        return f"{head}\nNo tunnel ends on this host."
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    for title in ("IKE / CHILD_SA", "Local / Remote"):
        table.add_column(title, overflow="fold")
    for title in ("SPI in / out", "Session", "Age", "SA"):
        table.add_column(title, no_wrap=True)
    for tunnel in answer["tunnels"]:
        nat_t = [f"[{port}]" for port in tunnel["nat_t_ports"] or ()] or ["", ""]
        stale = tunnel["stale_s"]
        table.add_row(
            f"{tunnel['ike_sa']}\n{tunnel['child_sa']}",
            f"{tunnel['local']}{nat_t[0]}\n{tunnel['remote']}{nat_t[1]}",
            f"{spi(tunnel['spi_in'])}\n{spi(tunnel['spi_out'])}",
            str(tunnel["session"] or "none"),
            duration(tunnel["age_s"]),
            "fresh" if stale is None else f"stale {duration(stale)}",
        )
    page = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    with page.capture() as capture:
        page.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join([head, _RULE, lines[0], _RULE, *lines[1:]])


def system_info(facts: Mapping[str, object]) -> str:
    """`show system info`: name and value, a line each."""
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def cleared(count: int, session_id: int | None) -> str:
    """What `clear session` did."""
    if session_id is not None:
        return f"session {session_id} cleared"
    return f"{count} session{'' if count == 1 else 's'} cleared"


def duration(seconds: float) -> str:
    """A time span for people: 4 s, 3 min 5 s, 2 h 7 min, 3 d 4 h."""
    total = int(seconds)
    for unit, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if total >= unit:
            return f"{total // unit} {name} {total % unit // smaller} {smaller_name}"
    return f"{total} s"
