"""What fwctl prints: PAN-OS's layouts, to the column, from the daemon's answers."""

from __future__ import annotations

import json
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import click

from ..times import time_of_day as clock

_RULE = "-" * 80

#: How wide a page is that is not told otherwise, in columns.
_PAGE = 120
_NO_SESSIONS = "No Active Sessions"


def session_count(count: int) -> str:
    """`show session all filter ... count yes`."""
    return f"Number of sessions that match filter: {count}" if count else _NO_SESSIONS


def json_list(name: str, items: Iterable[Any]) -> Iterable[str]:
    """A JSON object with one list, as lines while it comes: an item each. Nothing before the first one is there."""
    line = None
    for item in items:
        yield f"{{{json.dumps(name)}: [" if line is None else f"{line},"
        line = json.dumps(item)
    yield from (line, "]}") if line is not None else (json.dumps({name: []}),)


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


# --- show log traffic -------------------------------------------------------------------------------------

_LOG_FORM = "{:<20}{:<16}{:<16}{:<18}{}"
_LOG_HEADER = (
    _LOG_FORM.format("Time", "App", "From", "Src Port", "Source"),
    _LOG_FORM.format("Rule", "Action", "To", "Dst Port", "Destination"),
    _LOG_FORM.format("Session (Type)", "Packets", "Bytes", "End Reason", "Tunnel"),
    "=" * 100,
)


def log_rows(entries: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """`show log traffic`: three lines an entry; PAN-OS's two, and one of what it shows in its web interface only."""
    is_first = True
    for entry in entries:
        if is_first:
            yield from _LOG_HEADER
            is_first = False
        at = time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(entry["time"]))
        tunnel = f"{entry['ike_sa']}/{entry['child_sa']}" if entry["child_sa"] else ""
        rows = (
            (at, entry["application"], entry["source_zone"], entry["source_port"], entry["source"]),
            (
                entry["rule"],
                entry["action"],
                entry["destination_zone"],
                entry["destination_port"],
                entry["destination"],
            ),
            (
                f"{entry['session']} ({entry['subtype']})",
                entry["packets_c2s"] + entry["packets_s2c"],
                entry["bytes_c2s"] + entry["bytes_s2c"],
                entry["end_reason"],
                tunnel,
            ),
        )
        for row in rows:
            yield _LOG_FORM.format(*(f"{value} " if len(f"{value}") >= 15 else value for value in row)).rstrip()
    if is_first:
        yield "No matching entries in the traffic log"


# --- show session id --------------------------------------------------------------------------------------


def session_detail(session: Mapping[str, Any], width: int = _PAGE) -> str:
    """`show session id`: PAN-OS's fields in its order, then what it has no field for."""
    lines = [f"{'Session':<20}{session['id']}", ""]
    for name in ("c2s", "s2c"):
        lines += [*_flow(name, session[name]), ""]
    lines += [_footer(label, value) for label, value in _footer_values(session)]
    if session["ipsec"]:
        lines += _block("IPsec, as seen by fwd:", _ipsec_values(session), width)
    for sa in session.get("ike", ()):
        heading = f"IKE_SA {sa['initiator_spi']}_i {sa['responder_spi']}_r, as seen on the wire:"
        lines += _block(heading, _ike_values(sa), width)
    if beside := list(_beside(session)):
        lines += _block("Beside it, of the same tunnel or peers:", beside, width)
    if session["ipsec"] and (table := _spi_table(session, width)):
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


def _block(heading: str, values: Iterable[tuple[str, object]], width: int) -> list[str]:
    """What PAN-OS has no field for: a heading, and lines that are broken where the page ends."""
    lines = ["", f"        {heading}"]
    for label, value in values:
        lines += wrapped(_footer(label, value), max(width, 80), 47)
    return lines


def wrapped(text: str, width: int, indent: int) -> list[str]:
    """A line that begins with a label, broken between words; what follows stands below its value."""
    label, value = text[:indent], text[indent:]
    return textwrap.wrap(
        value,
        max(width, indent + 20),
        initial_indent=label,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [label.rstrip()]


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
        yield "SA confirmed by strongSwan", _confirmed(ipsec)
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


def session_health(session: Mapping[str, Any], width: int) -> str:
    """What `show tunnel detail` tells of a tunnel, of one session: what is wrong, both sides' counts, its SPIs."""
    ipsec = session["ipsec"]
    if ipsec is None:
        return "IKE has no SPIs."
    values = [("trouble", finding["text"]) for finding in ipsec["findings"]] or [("trouble", "none")]
    for pair in ipsec["generations"]:
        if pair["strongswan"] and not pair["removed"]:
            values.append(("packets", _against(pair)))
    lines = [line for label, value in values for line in wrapped(f"{label:<9}{value}", width, 9)]
    table = _spi_table(session, width)
    return "\n".join([*lines, "", *(table or ["No SPI was seen on the wire yet."])])


def _confirmed(ipsec: Mapping[str, Any]) -> str:
    """Whether the IKE daemon vouches for the newest SA."""
    if ipsec["sa_removed"] is not None:
        return f"no, {ipsec['sa_end']} at {clock(ipsec['sa_removed'])}"
    stale = ipsec["sa_stale_s"]
    return "yes" if stale is None else f"no, not for {duration(stale)}"


def _ike_values(sa: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    yield "version, messages, retransmitted", f"{sa['version']}, {sa['messages']}, {sa['retransmits']}"
    yield "last exchange", f"{sa['last_exchange']} at {clock(sa['last_seen'])}"
    yield "exchange for a CHILD_SA answered", f"at {clock(sa['completed'])}" if sa["completed"] else "not seen"
    yield "on port 4500 since", clock(sa["floated"]) if sa["floated"] else "never"


def _beside(session: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    for other in session.get("linked", ()):
        state = f"ended ({other['end_reason']})" if other["state"] == "INIT" else other["state"]
        yield f"session {other['id']}", f"{other['application']}, {state}"
    if count := session.get("nat_keepalives"):
        yield "NAT keepalives", count


# --- tables of SPIs -----------------------------------------------------------------------------------------

_USE_TITLES = ("SPI", "First seen", "Last seen", ">Packets", ">Bytes", ">Lost", ">Late", ">Dup")


class _SpiRow(NamedTuple):
    """One SPI in a table; a row whose first cell is empty belongs to the one above it."""

    first: tuple[str, ...]
    spi: int
    use: Mapping[str, Any] | None
    note: str


def _spi_table(session: Mapping[str, Any], width: int) -> list[str]:
    """Each SPI with what it carried and the health that its sequence numbers show; nothing if none was seen."""
    ipsec = session["ipsec"]
    if ipsec.get("generations"):
        return generation_table(ipsec["generations"], width)
    uses = [(name, use) for name, all_of in ipsec.get("spis", {}).items() for use in all_of]
    if not uses:
        return []
    rows = [
        _SpiRow((name,), use["spi"], use, _story(use))
        for name, use in sorted(uses, key=lambda item: item[1]["first_seen"])
    ]
    return ["SPIs, as observed on the wire; not authenticated:", *_spi_lines(("",), rows, "Pair, story", width)]


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
    partner = f"with {spi_hex(use['partner'])} ({use['evidence']})" if use["partner"] else use["evidence"]
    relation = words.get(use["relation"], "").format(spi_hex(use["before"]) if use["before"] else "")
    return f"{partner}; {relation}" if relation else partner


def generation_table(generations: Iterable[Mapping[str, Any]], width: int) -> list[str]:
    """The SPI pairs of a tunnel that ends here, oldest first: a rekey is a row that ends where the next begins."""
    rows = []
    for number, pair in enumerate(generations, 1):
        end = f"{pair['end']} {clock(pair['removed'])}" if pair["removed"] else "in use"
        overlap = pair["overlap_s"]["in"]
        more = ["ESN"] if pair["esn"] else []
        more += [] if overlap is None else [f"{overlap:.1f} s beside #{number - 1}"]
        life = f"{clock(pair['installed'])}, {end}"
        rows.append(_SpiRow((str(number), "in"), pair["spi_in"], pair["in"], life))
        rows.append(_SpiRow(("", "out"), pair["spi_out"], pair["out"], ", ".join(more)))
    return [
        "SPI generations, as observed on the wire; not authenticated:",
        *_spi_lines(("#", ""), rows, "Installed, end", width),
    ]


def _spi_lines(first: tuple[str, ...], rows: Sequence[_SpiRow], note_title: str, width: int) -> list[str]:
    """A table of SPIs; where it is too wide: SPIs in hex only, and the notes below their rows. Then what is odd."""
    wide = ((*row.first, spi(row.spi), *_use_cells(row.use), row.note) for row in rows)
    lines = _table((*first, *_USE_TITLES, note_title), wide)
    if len(lines[0]) > width:
        narrow = ((*row.first, spi_hex(row.spi), *_use_cells(row.use)) for row in rows)
        lines = _table((*first, *_USE_TITLES), narrow, gap=1)
        lines = _with_notes(lines, rows, note_title.lower(), width)
    return lines + [line for row in rows if row.use for line in _oddities(row.spi, row.use["sequence"], width)]


def _with_notes(lines: Sequence[str], rows: Sequence[_SpiRow], title: str, width: int) -> list[str]:
    """A table's lines, of which three are its title, with the rows' notes between them."""
    noted = list(lines[:3])
    notes: list[str] = []
    for number, (line, row) in enumerate(zip(lines[3:], rows, strict=True), 1):
        noted.append(line)
        notes += [row.note] if row.note else []
        if number == len(rows) or rows[number].first[0]:
            noted += wrapped(f"{'':6}{title}: {'; '.join(notes)}", width, 8) if notes else []
            notes = []
    return noted


def _use_cells(use: Mapping[str, Any] | None) -> list[str]:
    if use is None:
        return ["never", "never", *"00000"]
    numbers = use["sequence"]
    return [
        clock(use["first_seen"]),
        clock(use["last_seen"]),
        str(use["packets"]),
        str(use["bytes"]),
        *(str(numbers[key]) for key in ("lost", "late", "duplicates")),
    ]


def _oddities(number: int, numbers: Mapping[str, Any], width: int) -> list[str]:
    """What the columns have no place for, of an SPI where there is any of it."""
    found = [f"late by up to {_times(numbers['depth'], 'number')}"] if numbers["depth"] else []
    found += [_times(numbers[f"{what}s"], what) for what in ("reset", "wrap", "outlier") if numbers[f"{what}s"]]
    return textwrap.wrap(f"SPI {spi_hex(number)}: {', '.join(found)}", width) if found else []


def _table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], gap: int = 2, widths: Sequence[int | None] | None = None
) -> list[str]:
    """A plain table, `gap` spaces between its columns, its titles between rules as long as its longest line.

    A title behind `>` stands to the right, as its column does. Titles and cells may have several lines. What is wider
    than its column's entry in `widths` is folded.
    """
    import tabulate  # only who prints a table waits until it is loaded

    row = tabulate.DataRow("", " " * gap, "")
    text = tabulate.tabulate(
        # A title is a row like the others: what tabulate calls a header gets more room than it needs.
        [[title.removeprefix(">") for title in titles], *rows],
        # Its own `plain` has two spaces, and knows cells of several lines, which no format of ours does.
        tablefmt="plain" if gap == 2 else tabulate.TableFormat(None, None, None, None, row, row, 0, None),
        disable_numparse=True,
        colalign=["right" if title.startswith(">") else "left" for title in titles],
        maxcolwidths=widths,
        break_on_hyphens=False,
        preserve_whitespace=True,
    )
    lines = [line.rstrip() for line in text.splitlines()]
    rule = "-" * max(map(len, lines))
    height = 1 + max(title.count("\n") for title in titles)
    return [rule, *lines[:height], rule, *lines[height:]]


def spi(number: int) -> str:
    """An SPI in decimal, as sessions show it, and in hex, as charon and tcpdump do."""
    return f"{number} ({spi_hex(number)})"


def spi_hex(number: int) -> str:
    """An SPI in hex alone, where there is no room for both."""
    return f"0x{number:08x}"


# --- show session info, counters, tunnels, system ---------------------------------------------------------


def session_info(facts: Mapping[str, Any]) -> str:
    """`show session info`: PAN-OS's sections and labels as far as fwd has what they tell, and then its own."""
    sections: list[Iterable[tuple[str, object]]] = [
        _table_use(facts),
        [("Session timeout", ""), *_timeouts(facts)],
        _ageing(facts["accelerated_ageing"], facts["ager"]),
        [("Session setup", ""), *_setup(facts["setup"])],
        [("Session limits, 0 for none", ""), *_limits(facts["limits"])],
        _fast_path(facts["fast_path"]),
        [("Session behavior when resource limit is reached:", "drop"), *_room(facts)],
    ]
    lines = [_RULE]
    for section in sections:
        lines += [f"{label:<48} {value}".rstrip() for label, value in section]
        lines.append(_RULE)
    return "\n".join(lines)


def _table_use(facts: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    yield "Number of sessions supported:", facts["sessions_supported"]
    yield "Number of allocated sessions:", facts["sessions_allocated"]
    for name, count in facts["active"].items():
        yield f"Number of active {name} sessions:", count
    yield "Number of active predict sessions:", facts["predicted"]
    yield "Number of discard sessions:", facts["discard"]
    yield "Number of ended sessions still readable:", facts["ended_readable"]
    yield "Session table utilization:", f"{facts['utilization_percent']}%"
    yield "Number of sessions created since bootup:", facts["created_since_start"]
    yield "Packet rate:", f"{facts['packet_rate']:.0f}/s"
    yield "Throughput:", f"{facts['throughput_kbps']:.0f} kbps"
    yield "New connection establish rate:", f"{facts['new_session_rate']:.0f} cps"


def _timeouts(facts: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    for name, seconds in facts["timeouts_s"].items():
        if name != "discard":
            yield f"  {name} default timeout:", f"{seconds} secs"
    yield "  Session timeout in discard state:", f"{facts['timeouts_s']['discard']} secs"
    yield "  Session timeout after tunnel down:", f"{facts['tunnel_down_timeout_s']:g} secs"
    yield "  Ended sessions stay readable for:", f"{facts['readable_s']} secs"


def _ageing(ageing: Mapping[str, Any], ager: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    yield "Session accelerated aging:", ageing["enabled"]
    yield "  Accelerated aging threshold:", f"{ageing['threshold_percent']}% of utilization"
    yield "  Scaling factor:", f"{ageing['factor']} X"
    yield "  Active now:", ageing["active"]
    yield "  Sessions aged out:", ager["aged_out"]
    next_look = ager["next_look_s"]
    yield "  Next session to be looked at:", "none" if next_look is None else f"in {next_look:.0f} secs"


def _setup(setup: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    yield "  IPv6 firewalling:", True
    yield "  ESP in transit, ports shown:", setup["transit_ports"]
    yield "  ESP in transit, may pass:", setup["pass_through"]
    grace = f"{setup['unknown_spi']}, after {setup['unknown_spi_grace_s']} secs"
    yield "  ESP to or from this host, SPI unknown:", grace


def _limits(limits: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    yield "  Sessions of one source:", f"{limits['source']['most']} at most, limit {limits['source']['limit']}"
    yield "  Sessions of two peers:", f"{limits['peers']['most']} at most, limit {limits['peers']['limit']}"
    yield "  Half-open sessions:", f"{limits['half_open']['now']}, limit {limits['half_open']['limit']}"
    yield "  Packets dropped for these limits:", limits["dropped"]


def _fast_path(path: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    yield "Fast path in the kernel:", "on" if path["on"] else "off"
    yield "  SPIs it decides on:", f"{path['spis_in_kernel']} of {path['capacity']}"
    yield "  Packets it decides on:", f"{path['packet_rate']:.0f}/s"


def _room(facts: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    yield "  Packets dropped, table full:", facts["setup"]["dropped_table_full"]
    yield "  Half-open sessions give way when silent for:", f"{facts['half_open_idle_s']:g} secs"
    yield "  Half-open sessions that gave way:", facts["ager"]["gave_way"]


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
    lines = _tunnel_table(answer["tunnels"], spi, None)
    if len(lines[0]) > width:
        lines = _tunnel_table(answer["tunnels"], spi_hex, max(width, 60))
    return "\n".join([head, *lines])


_TUNNEL_TITLES = ("IKE_SA\nCHILD_SA", "Local\nRemote", "SPI in\nSPI out", "\nSession", "\nAge", "\nSA")


def _tunnel_table(tunnels: Iterable[Mapping[str, Any]], name: Callable[[int], str], width: int | None) -> list[str]:
    """A table of SAs, two lines each; names and addresses are folded where they find no room."""
    rows = []
    for tunnel in tunnels:
        nat_t = [f"[{port}]" for port in tunnel["nat_t_ports"] or ()] or ["", ""]
        stale = tunnel["stale_s"]
        rows.append(
            (
                f"{tunnel['ike_sa']}\n{tunnel['child_sa']}",
                f"{tunnel['local']}{nat_t[0]}\n{tunnel['remote']}{nat_t[1]}",
                f"{name(tunnel['spi_in'])}\n{name(tunnel['spi_out'])}",
                str(tunnel["session"] or "none"),
                duration(tunnel["age_s"]),
                "fresh" if stale is None else f"stale {duration(stale)}",
            )
        )
    return _table(_TUNNEL_TITLES, rows, widths=None if width is None else _fold(rows, width))


def _fold(rows: Iterable[Sequence[str]], width: int) -> list[int | None]:
    """How wide the first two columns may be for the table to fit; what one does not need is the other's."""
    from wcwidth import wcswidth

    columns = zip(_TUNNEL_TITLES, *rows, strict=True)
    needs = [max(wcswidth(line) for cell in column for line in cell.split("\n")) for column in columns]
    room = width - sum(needs[2:]) - 2 * (len(needs) - 1)
    first = max(len("CHILD_SA"), min(needs[0], room - min(needs[1], room // 2)))
    return [first, max(len("Remote"), room - first)]


def tunnel_detail(answer: Mapping[str, Any], width: int = _PAGE) -> str:
    """`show tunnel detail`: each tunnel that ends here, its SPI generations, both counts, and what is wrong."""
    lines = [_source_line(answer["source"])]
    if not answer["tunnels"]:
        lines.append("No tunnel ends on this host.")
    for tunnel in answer["tunnels"]:
        reqid, mode = tunnel["reqid"], tunnel["mode"].lower()
        lines += ["", f"Tunnel {tunnel['ike_sa']}/{tunnel['child_sa']} (reqid {reqid}, {mode} mode)"]
        for label, value in _tunnel_values(tunnel):
            lines += wrapped(f"  {label:<9}{value}", width, 11)
        lines += generation_table(tunnel["generations"], width)
    for stranger in answer["strangers"]:
        ends = f"{stranger['source']} to {stranger['destination']}"
        lines += ["", f"No tunnel's: session {stranger['session']} ({stranger['state']}), {ends}"]
        lines.append(f"  {'packets':<9}{stranger['packets']}")
        for finding in stranger["findings"]:
            lines += wrapped(f"  {'trouble':<9}{finding['text']}", width, 11)
    return "\n".join(lines)


def _tunnel_values(tunnel: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    ended = tunnel["ended"]
    state = tunnel["state"] if ended is None else f"ended at {clock(ended)}: {tunnel['end_reason']}"
    yield "local", f"{tunnel['local']} ({tunnel['local_id']})"
    yield "remote", f"{tunnel['remote']} ({tunnel['remote_id']})"
    yield "session", f"{tunnel['session']} ({state}), {_times(tunnel['rekeys'], 'rekey')}"
    if tunnel["nat_t_ports"]:
        yield "NAT-T", "UDP ports " + " to ".join(map(str, tunnel["nat_t_ports"]))
    if ended is not None:
        return
    for pair in tunnel["generations"]:
        if pair["strongswan"] and not pair["removed"]:
            yield "packets", _against(pair)
    for finding in tunnel["findings"]:
        yield "trouble", finding["text"]
    if not tunnel["findings"]:
        yield "trouble", "none"


def _against(pair: Mapping[str, Any]) -> str:
    """The IKE daemon's counts of an SA pair beside ours, which are as many packets more."""
    theirs = pair["strongswan"]
    return (
        f"SPI {spi_hex(pair['spi_in'])}, {duration(theirs['age_s'])} ago: strongSwan {theirs['packets_in']} in,"
        f" {theirs['packets_out']} out; fwd {theirs['fwd_more_in']:+} in, {theirs['fwd_more_out']:+} out"
    )


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def explanation(answer: Mapping[str, Any], width: int) -> str:
    """`explain`: sentences under headings."""
    lines = []
    for group in answer["groups"]:
        lines.append(f"{group['heading'].capitalize()}:")
        for sentence in group["sentences"]:
            lines += wrapped(f"  {sentence}", width, 4)
    return "\n".join(lines)


def event(event: Mapping[str, Any], width: int = _PAGE) -> str:
    """One event of `monitor`; what is too long for a line goes on in the next."""
    head = f"{clock(event['time'])}.{int(event['time'] % 1 * 1000):03} {event['event']:<9} "
    return "\n".join(wrapped(head + _event_text(event), width, len(head)))


def _event_text(event: Mapping[str, Any]) -> str:
    match event["event"]:
        case "counter":
            # What is wrong with a tunnel stands in an event of its own.
            about = "" if event["counter"].startswith("tunnel_") else f" ({event['description']})"
            return f"{event['counter']} +{event['amount']} = {event['value']}{about}"
        case "missed":
            return f"{event['count']} events were forgotten before they were read"
        case "stale":
            return "strongSwan " + ("answers again" if event["over"] else f"is away: {event['reason']}")
    ends = (("source", "sport"), ("destination", "dport"))
    flow = " -> ".join(f"{event[end]}[{_port(event[port])}]" for end, port in ends)
    who = f"session {event['id']} {event['tunnel'] or event['application'] + ' ' + flow}"
    match event["event"]:
        case "rekeyed":
            return f"{who}: in {spi_hex(event['spi_in'])}, out {spi_hex(event['spi_out'])}"
        case "ended":
            packets, size = _times(event["packets"], "packet"), _times(event["bytes"], "byte")
            return f"{who}: {event['end_reason']}, {packets}, {size}"
        case "absorbed":
            return f"{who}: absorbed into session {event['into']}"
        case "trouble":
            return f"{who}: " + (f"no more {event['trouble']}" if event["over"] else event["text"])
    return f"{who}{' ' + flow if event['tunnel'] else ''}, rule {event['rule']}"


def _port(number: int) -> str:
    """A port, or the SPI that stands in its place."""
    return str(number) if number <= 0xFFFF else spi_hex(number)


def system_info(facts: Mapping[str, object]) -> str:
    """`show system info`: name and value, a line each."""
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def reloaded(answer: Mapping[str, Any]) -> str:
    """What came of a reload."""
    rules, sessions = answer["rules"], answer["sessions"]
    return (
        f"{answer['configuration']}: {rules} rule{'' if rules == 1 else 's'} in force;"
        f" {sessions} session{'' if sessions == 1 else 's'} meet them anew"
    )


_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red", "unknown": "magenta"}


def diagnosis(answer: Mapping[str, Any], width: int = _PAGE) -> str:
    """`doctor`: findings by area, each with what to do; a command stays on one line, to be copied."""
    lines, area = [f"fwd on {answer['hostname']}, as {answer['user']} sees it"], ""
    for finding in answer["findings"]:
        if finding["area"] != area:
            area = finding["area"]
            lines += ["", area if area != area.lower() else area.capitalize()]
        level = finding["level"]
        name = f"{finding['check']}: " if level == "unknown" else ""
        first, *others = wrapped(f"  {level:<9}{name}{finding['text']}", width, 11)
        lines += [
            first.replace(level, click.style(level, fg=_COLOURS[level], bold=level == "problem" or None), 1),
            *others,
        ]
        if finding["action"]:
            lines.append(f"{'':11}-> {finding['action']}")
    counts = Counter(finding["level"] for finding in answer["findings"])
    countable = ("note", "warning", "problem")
    told = [_times(counts[level], level) if level in countable else f"{counts[level]} {level}" for level in _COLOURS]
    return "\n".join([*lines, "", ", ".join(told)])


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
