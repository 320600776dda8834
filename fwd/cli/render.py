"""What fwctl prints: PAN-OS's layouts, to the column, from the daemon's answers."""

from __future__ import annotations

import io
import textwrap
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
    if session.get("ike") or session.get("linked"):
        lines += ["", "        IKE, as seen on the wire:"]
        lines += [_footer(label, value) for label, value in _ike_values(session)]
    if session["ipsec"] and (table := _spi_table(session)):
        lines += ["", *table]
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
        before = f", and {len(spis) - 1} before it" if len(spis) > 1 else ""
        yield f"SPIs seen on the wire ({name})", f"{spi(spis[-1])}{before}" if spis else "none yet"
    yield "SPIs on the kernel's fast path", ipsec["spis_in_kernel"]
    if any(ipsec["fragments"].values()):
        yield "packets in fragments (c2s, s2c)", f"{ipsec['fragments']['c2s']}, {ipsec['fragments']['s2c']}"
    for finding in ipsec.get("findings", ()):
        yield f"trouble: {finding['trouble']}", finding["text"]


def _ike_values(session: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    for sa in session.get("ike", ()):
        yield "IKE_SA (SPIs initiator, responder)", f"{sa['initiator_spi']}, {sa['responder_spi']}"
        yield "version, messages, retransmitted", f"{sa['version']}, {sa['messages']}, {sa['retransmits']}"
        yield "last exchange", f"{sa['last_exchange']} at {clock(sa['last_seen'])}"
        yield "exchange for a CHILD_SA answered", f"at {clock(sa['completed'])}" if sa["completed"] else "not seen"
        yield "on port 4500 since", clock(sa["floated"]) if sa["floated"] else "never"
    if linked := session.get("linked"):
        yield "other sessions of it", ", ".join(f"{other['id']} ({other['application']})" for other in linked)


def clock(epoch: float) -> str:
    """A time of day."""
    return time.strftime("%H:%M:%S", time.localtime(epoch))


def _spi_table(session: Mapping[str, Any]) -> list[str]:
    """Each SPI with what it carried and the health that its sequence numbers show; nothing if none was seen."""
    ipsec = session["ipsec"]
    if ipsec.get("generations"):
        return generation_table(ipsec["generations"])
    uses = [(name, use) for name, all_of in ipsec.get("spis", {}).items() for use in all_of]
    if not uses:
        return []
    table = _table("", "SPI", "First seen", "Last seen", ">Packets", ">Bytes", ">Lost", ">Late", ">Dup", "Pair, story")
    for name, use in sorted(uses, key=lambda item: item[1]["first_seen"]):
        table.add_row(name, *_use_cells(use), _story(use))
    return ["SPIs, as observed on the wire; their numbers are not authenticated:", *_lines(table)]


def _use_cells(use: Mapping[str, Any]) -> list[str]:
    numbers = use["sequence"]
    return [
        spi(use["spi"]),
        clock(use["first_seen"]),
        clock(use["last_seen"]),
        str(use["packets"]),
        str(use["bytes"]),
        *(str(numbers[key]) for key in ("lost", "late", "duplicates")),
    ]


def _story(use: Mapping[str, Any]) -> str:
    """What an SPI in transit is to the others."""
    words = {
        "takes-over": "takes over from {}",
        "follows": "after {}, which was silent",
        "beside": "beside {}: a second tunnel",
        "undecided": "rekey of {}, or a second tunnel",
    }
    if "evidence" not in use:
        return ""
    partner = f"with {use['partner']} ({use['evidence']})" if use["partner"] else use["evidence"]
    relation = words.get(use["relation"], "").format(use["before"])
    return f"{partner}; {relation}" if relation else partner


def generation_table(generations: Iterable[Mapping[str, Any]]) -> list[str]:
    """The SPI pairs of a tunnel that ends here, oldest first: a rekey is a row that ends where the next begins."""
    table = _table(
        "#", "", "SPI", "First seen", "Last seen", ">Packets", ">Bytes", ">Lost", ">Late", ">Dup", "Installed, end"
    )
    for number, pair in enumerate(generations, 1):
        end = f"{pair['end']} {clock(pair['removed'])}" if pair["removed"] else "in use"
        notes = {"in": f"{clock(pair['installed'])}, {end}", "out": ""}
        overlap = pair["overlap_s"]["in"]
        if overlap is not None:
            notes["out"] = f"{overlap:.1f} s beside #{number - 1}"
        for way in ("in", "out"):
            use = pair[way]
            unseen = [spi(pair[f"spi_{way}"]), "never", "never", "0", "0", "0", "0", "0"]
            table.add_row(str(number) if way == "in" else "", way, *(_use_cells(use) if use else unseen), notes[way])
    return ["SPI generations; sequence numbers as observed, not authenticated:", *_lines(table)]


def _table(*titles: str) -> Table:
    """A plain table; a title behind `>` stands to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    for title in titles:
        table.add_column(title.lstrip(">"), justify="right" if title.startswith(">") else "left", no_wrap=True)
    return table


def _lines(table: Table, width: int = 400) -> list[str]:
    """A table as text, its title between rules."""
    page = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    with page.capture() as capture:
        page.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return [_RULE, lines[0], _RULE, *lines[1:]]


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


def _source_line(source: Mapping[str, Any]) -> str:
    """The IKE daemon's state."""
    answered = source["last_answer_age_s"]
    last = "never answered" if answered is None else f"last answer {duration(answered)} ago"
    state = "connected" if source["connected"] else f"AWAY ({source['reason']})"
    return f"strongSwan on {source['socket']}: {state}, {last}"


def tunnels(answer: Mapping[str, Any], width: int) -> str:
    """`show tunnel`: the IKE daemon's state, then each CHILD_SA with its SPIs and its session."""
    head = _source_line(answer["source"])
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
    return "\n".join([head, *_lines(table, width)])


def tunnel_detail(answer: Mapping[str, Any]) -> str:
    """`show tunnel detail`: each tunnel that ends here, its SPI generations, both counts, and what is wrong."""
    lines = [_source_line(answer["source"])]
    if not answer["tunnels"]:
        lines.append("No tunnel ends on this host.")
    for tunnel in answer["tunnels"]:
        lines += [
            "",
            f"Tunnel {tunnel['ike_sa']}/{tunnel['child_sa']} (reqid {tunnel['reqid']}, {tunnel['mode'].lower()} mode)",
            _fact("local", f"{tunnel['local']} ({tunnel['local_id']})"),
            _fact("remote", f"{tunnel['remote']} ({tunnel['remote_id']})"),
            _fact("session", f"{tunnel['session']} ({tunnel['state']}), {_times(tunnel['rekeys'], 'rekey')}"),
        ]
        if tunnel["nat_t_ports"]:
            lines.append(_fact("NAT-T", "UDP ports " + " to ".join(map(str, tunnel["nat_t_ports"]))))
        in_use = [pair for pair in tunnel["generations"] if not pair["removed"]]
        lines += [_fact("packets", _against(pair)) for pair in in_use if pair["strongswan"]]
        lines += [_fact("trouble", finding["text"]) for finding in tunnel["findings"]] or [_fact("trouble", "none")]
        lines += generation_table(tunnel["generations"])
    return "\n".join(lines)


def _against(pair: Mapping[str, Any]) -> str:
    """The IKE daemon's counts of an SA pair beside ours, which are as many packets more."""
    theirs = pair["strongswan"]
    return (
        f"strongSwan counts {theirs['packets_in']} in, {theirs['packets_out']} out on SPI {pair['spi_in']};"
        f" fwd {theirs['fwd_more_in']:+} in, {theirs['fwd_more_out']:+} out, at {clock(theirs['at'])}"
    )


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _fact(label: str, value: object) -> str:
    return f"  {label:<9}{value}"


def explanation(answer: Mapping[str, Any], width: int) -> str:
    """`explain`: sentences under headings."""
    lines = []
    for group in answer["groups"]:
        lines.append(f"{group['heading'].capitalize()}:")
        for sentence in group["sentences"]:
            lines += textwrap.wrap(sentence, width, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def event(event: Mapping[str, Any]) -> str:
    """One line of `monitor`."""
    fraction = int(event["time"] % 1 * 1000)
    head = f"{clock(event['time'])}.{fraction:03} {event['event']:<9} "
    if event["event"] == "counter":
        return f"{head} {event['counter']} +{event['amount']} = {event['value']}  ({event['description']})"
    if event["event"] == "missed":
        return f"{head} {event['count']} events were forgotten before they were read"
    if event["event"] == "stale":
        return f"{head} strongSwan " + ("answers again" if event["over"] else f"is away: {event['reason']}")
    flow = f"{event['source']}[{event['sport']}] -> {event['destination']}[{event['dport']}]"
    words = [f"session {event['id']} {event['application']} {flow}"]
    if event["tunnel"]:
        words.append(event["tunnel"])
    match event["event"]:
        case "rekeyed":
            words.append(f"new SPIs: in {spi(event['spi_in'])}, out {spi(event['spi_out'])}")
        case "ended":
            words.append(f"{event['end_reason']}, {event['packets']} packets, {event['bytes']} bytes")
        case "trouble":
            words.append(f"no more {event['trouble']}" if event["over"] else event["text"])
        case _:
            words.append(f"rule {event['rule']}")
    return f"{head} {'; '.join(words)}"


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
