"""How `fwctl top` looks: columns that fit a width, sparklines, the overview, the page of one session.

All of it is text with styles, made of a frame; a terminal shows it, and so does a plain table for scripts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from ..rpc import FILTER_KEYS
from . import render
from .top_data import Frame, Health, Kind, Level, Overview, Row, Sample

#: What is not known (yet).
UNKNOWN: Final = "?"

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
#: No traffic, which is known, in a graph.
_NOTHING: Final = "·"

SIGNS: Final = {Level.REST: "·", Level.GOOD: "●", Level.DOUBT: "▲", Level.BAD: "✗"}


@dataclass(frozen=True)
class Palette:
    """The styles of what has a meaning, as rich understands them."""

    text: str
    faint: str
    title: str
    into: str
    out: str
    trend: str
    packets: Sequence[str]
    bits: Sequence[str]
    rest: str
    good: str
    doubt: str
    bad: str
    cursor: str

    def of(self, level: Level) -> str:
        """The style of a level of health."""
        return (self.rest, self.good, self.doubt, self.bad)[level]


#: Colours of the 256 that terminals share, so that they look the same with and without true colour.
COLOURS: Final = Palette(
    text="#d0d0d0",
    faint="#808080",
    title="bold #ffffff",
    into="#5fd7ff",
    out="#d7afff",
    trend="#5fafd7",
    packets=("#afffff", "#5fffff", "#5fd7ff", "#00afd7", "#0087af"),
    bits=("#d7afff", "#af87ff", "#875fff", "#875fd7", "#5f5faf"),
    rest="#808080",
    good="#87d75f",
    doubt="#ffd75f",
    bad="bold #ff5f5f",
    cursor="on #3a3a3a",
)
#: For 16 colours, and for none.
PLAIN: Final = Palette(
    text="default",
    faint="bright_black",
    title="bold",
    into="cyan",
    out="magenta",
    trend="cyan",
    packets=("cyan",),
    bits=("magenta",),
    rest="default",
    good="green",
    doubt="yellow",
    bad="bold red",
    cursor="reverse",
)


# --- numbers --------------------------------------------------------------------------------------------


def short(value: float | None) -> str:
    """A number in five places at most: 0, 7, 812, 9.14k, 81.3M."""
    if value is None:
        return UNKNOWN
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5 or unit == "T":
            break
        value /= 1000
    digits = 0 if not unit or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{unit}"


def span(seconds: float | None) -> str:
    """A time span in five places at most: 4s, 3m05, 2h07, 3d04."""
    if seconds is None:
        return UNKNOWN
    total = int(seconds)
    if total < 60:
        return f"{total}s"
    for unit, name, smaller in ((86400, "d", 3600), (3600, "h", 60), (60, "m", 1)):
        if total >= unit:
            return f"{total // unit}{name}{total % unit // smaller:02}"
    raise AssertionError


def percent(share: float) -> str:
    """A share from 0 to 1; only all is 100 %."""
    text = f"{100 * share:.1f}" if share < 0.9995 or share == 1 else "99.9"
    return f"{text.removesuffix('.0')} %"


# --- graphs ---------------------------------------------------------------------------------------------


def totals(samples: Sequence[Sample]) -> list[float | None]:
    """Both directions together."""
    return [None if sample is None else sample[0] + sample[1] for sample in samples]


def one_of(samples: Sequence[Sample], which: int) -> list[float | None]:
    """One direction."""
    return [None if sample is None else sample[which] for sample in samples]


def graph(values: Sequence[float | None], width: int, height: int = 1, peak: float | None = None) -> list[str]:
    """The newest values as blocks, `height` lines of `width` columns, the newest at the right; unknown ones are empty.

    The highest one fills it, unless it is told a `peak`. One line stays a little below the one above it.
    """
    full = 8 * height - (height == 1)
    shown = list(values[-width:]) if width > 0 else []
    top = max((value for value in shown if value is not None), default=0.0) if peak is None else peak
    lines = [[" "] * max(0, width - len(shown)) for _ in range(height)]
    for value in shown:
        eighths = -1 if value is None else 0 if not value else max(1, round(full * min(1.0, value / top)))
        for number, line in enumerate(reversed(lines)):
            left = eighths - 8 * number
            if left > 0:
                line.append(_BLOCKS[min(left, 8) - 1])
            else:
                line.append(_NOTHING if eighths == number == 0 else " ")
    return ["".join(line) for line in lines]


def gauge(share: float, width: int) -> str:
    """A bar that is full at 1."""
    eighths = round(8 * width * min(1.0, max(0.0, share)))
    if share > 0:
        eighths = max(1, eighths)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")).ljust(width)


# --- columns --------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """One column: as narrow as `least`, as wide as `most` if there is room; `rank` 0 is always there.

    `style` is the name of a style in the palette, or gives a style; `order` is what a click on its title sorts by.
    """

    title: str
    rank: int
    least: int
    most: int
    cell: Callable[[Row, int], str]
    style: str | Callable[[Row, Palette], str] = "text"
    is_right: bool = False
    order: str = ""


def cut(text: str, width: int) -> str:
    """A text that is cut where there is no room for it."""
    return text if cell_len(text) <= width else set_cell_size(text, max(0, width - 1)) + "…"


def health_text(health: Health) -> str:
    """Sign and word, and how many more troubles there are."""
    return f"{SIGNS[health.level]} {health.word}{f' +{health.more}' if health.more else ''}"


def _flow(row: Row, side: str, port: str, width: int) -> str:
    """An address with its port, if there is room for both."""
    address, number = str(row.session["c2s"][side]), row.session["c2s"][port]
    text = f"{address}[{number}]"
    return text if cell_len(text) <= width else cut(address, width)


def _spi(row: Row, way: str) -> str:
    """The newest SPI of a way of a tunnel that ends here."""
    ports = row.session["c2s"]
    client_sends = (way == "out") == row.is_client_here
    return render.spi_hex(ports["dport"] if client_sends else ports["sport"])


def _trend(row: Row, width: int) -> str:
    return graph(totals(row.history), width)[0]


def _quiet(row: Row, palette: Palette) -> str:
    """Names of what is at rest do not shout."""
    return palette.faint if row.health.level is Level.REST else palette.text


def _number(
    value_of: Callable[[Row], float | None], style: str
) -> tuple[Callable[[Row, int], str], Callable[[Row, Palette], str]]:
    """A cell of a number and its style: nothing at all is faint."""

    def styled(row: Row, palette: Palette) -> str:
        return getattr(palette, style) if value_of(row) else palette.faint

    return lambda row, _: short(value_of(row)), styled


_IN = _number(lambda row: row.into and row.into.bits, "into")
_OUT = _number(lambda row: row.out and row.out.bits, "out")
_BITS = _number(lambda row: row.bit_rate, "into")
_PACKETS = _number(lambda row: row.packet_rate, "text")
_BYTES = _number(lambda row: row.session["c2s"]["bytes"] + row.session["s2c"]["bytes"], "text")


def _health_style(row: Row, palette: Palette) -> str:
    return palette.of(row.health.level)


_HEALTH = Column("Health", 0, 13, 17, lambda row, _: health_text(row.health), _health_style, order="trouble")
_TREND = Column("Trend", 0, 8, 60, _trend, "trend", order="bit-rate")
_IDLE = Column("Idle", 2, 5, 5, lambda row, _: span(row.session.get("idle_s")), "faint", True, "idle")
_AGE = Column("Age", 5, 5, 5, lambda row, _: span(time.time() - row.session["start_time"]), "faint", True, "age")
_TOTAL = Column("Bytes", 4, 6, 6, *_BYTES, True, "bytes")
_TROUBLE = Column("What is wrong", 3, 40, 90, lambda row, _: (row.health.troubles or ("",))[0], _health_style)
_STATE = Column("State", 6, 7, 7, lambda row, _: row.session["state"], _quiet, order="state")

_COLUMNS: Final = {
    Kind.TUNNELS: (
        _HEALTH,
        Column("Tunnel", 0, 14, 34, lambda row, _: row.name, _quiet),
        Column("Peer", 0, 15, 26, lambda row, _: row.peer, _quiet),
        Column("In b/s", 0, 6, 6, *_IN, True),
        Column("Out b/s", 0, 7, 7, *_OUT, True),
        Column("Pkt/s", 0, 6, 6, *_PACKETS, True, "packet-rate"),
        _TREND,
        _IDLE,
        _TOTAL,
        _AGE,
        Column("ID", 1, 6, 6, lambda row, _: str(row.id), "faint", True, "id"),
        _STATE,
        Column("SPI in", 7, 10, 10, lambda row, _: _spi(row, "in"), "faint"),
        Column("SPI out", 7, 10, 10, lambda row, _: _spi(row, "out"), "faint"),
        Column("Rekeys", 8, 6, 6, lambda row, _: str(row.session["ipsec"]["rekeys"]), "faint", True),
        _TROUBLE,
    ),
    Kind.SESSIONS: (
        Column("ID", 0, 6, 7, lambda row, _: str(row.id), "faint", True, "id"),
        Column("Application", 0, 13, 13, lambda row, _: row.session["application"], _quiet, order="application"),
        Column("Source", 0, 15, 28, lambda row, width: _flow(row, "source", "sport", width), _quiet, order="source"),
        Column(
            "Destination",
            0,
            15,
            28,
            lambda row, width: _flow(row, "destination", "dport", width),
            _quiet,
            order="destination",
        ),
        Column("Bit/s", 0, 6, 6, *_BITS, True, "bit-rate"),
        Column("c2s b/s", 1, 7, 7, *_IN, True),
        Column("s2c b/s", 1, 7, 7, *_OUT, True),
        Column("Pkt/s", 2, 6, 6, *_PACKETS, True, "packet-rate"),
        _TREND._replace(least=6),
        _HEALTH._replace(least=11),
        _IDLE._replace(rank=3),
        _STATE,
        Column(
            "From>to",
            4,
            12,
            22,
            lambda row, _: f"{row.session['c2s']['source_zone']}>{row.session['c2s']['destination_zone']}",
            "faint",
            order="from",
        ),
        Column("Rule", 5, 10, 18, lambda row, _: row.session["rule"], "faint", order="rule"),
        _TOTAL._replace(rank=6),
        _AGE._replace(rank=7),
        _TROUBLE._replace(rank=8),
    ),
}

_GAP = 1


class Place(NamedTuple):
    """A column on the screen, and how wide it is there."""

    column: Column
    width: int


def layout(kind: Kind, width: int) -> list[Place]:
    """The columns for which there is room, those of low rank first; what is left over makes them wider."""
    chosen = [column for column in _COLUMNS[kind] if column.rank == 0]
    for rank in sorted({column.rank for column in _COLUMNS[kind]} - {0}):
        more = [column for column in _COLUMNS[kind] if column in chosen or column.rank == rank]
        if kind is Kind.SESSIONS and rank == 1:  # the directions one by one instead of both together
            more = [column for column in more if column.title != "Bit/s"]
        if sum(column.least + _GAP for column in more) > width:
            break
        chosen = more
    while len(chosen) > 1 and sum(column.least + _GAP for column in chosen) > width + _GAP:
        chosen.remove(next((column for column in chosen if column.title in ("Pkt/s", "Trend")), chosen[-1]))
    widths = [column.least for column in chosen]
    left = width - sum(least + _GAP for least in widths)
    while left > 0 and (growing := [i for i, column in enumerate(chosen) if widths[i] < column.most]):
        growing += [i for i in growing if chosen[i].title == _TREND.title]  # which has most to tell in more room
        for number in growing[:left]:
            widths[number] += 1
        left -= min(left, len(growing))
    return [Place(column, width) for column, width in zip(chosen, widths, strict=True)]


def heading(places: Sequence[Place], key: str, is_descending: bool, palette: Palette) -> Text:
    """The titles, the one that is sorted by with an arrow."""
    line = Text(no_wrap=True)
    is_marked = False
    for column, width in places:
        is_sorted = column.order == key and not is_marked
        is_marked |= is_sorted
        title = f"{column.title}{'▼' if is_descending else '▲'}" if is_sorted else column.title
        title = f"{column.title[: width - 1]}{title[-1]}" if len(title) > width else title
        line.append(
            f"{title:>{width}}" if column.is_right else f"{title:<{width}}",
            palette.title if is_sorted else palette.faint,
        )
        line.append(" " * _GAP)
    return line


def row_line(row: Row, places: Sequence[Place], palette: Palette) -> Text:
    """One row."""
    line = Text(no_wrap=True)
    for column, width in places:
        text = cut(column.cell(row, width), width)
        room = " " * (width - cell_len(text))
        style = column.style(row, palette) if callable(column.style) else getattr(palette, column.style)
        line.append(room + text if column.is_right else text + room, style)
        line.append(" " * _GAP)
    return line


def column_at(places: Sequence[Place], x: int) -> Column | None:
    """The column at a place of the line."""
    for column, width in places:
        if x < width + _GAP:
            return column
        x -= width + _GAP
    return None


# --- the overview ---------------------------------------------------------------------------------------


def vici_text(overview: Overview, palette: Palette) -> Text:
    """Whether strongSwan answers, and when it did last."""
    age = overview.vici_age_s
    if overview.vici_connected:
        return Text.assemble((f"{SIGNS[Level.GOOD]} connected", palette.good), (f", {span(age)} ago", palette.faint))
    when = "never answered" if age is None else f"silent for {span(age)}"
    return Text.assemble(
        (f"{SIGNS[Level.BAD]} away", palette.bad),
        (f", {when}", palette.doubt),
        (f": {overview.vici_reason}", palette.faint),
    )


def fast_path_text(overview: Overview, palette: Palette) -> Text:
    """How many of the packets the kernel decided on."""
    if not overview.fast_on:
        return Text("off", palette.doubt)
    if overview.fast_share is None:
        return Text("on", palette.text)
    return Text(percent(overview.fast_share), palette.good if overview.fast_share >= 0.5 else palette.text)


def drops_text(overview: Overview, palette: Palette) -> Text:
    """Packets that were dropped for other reasons than a rule."""
    style = palette.bad if overview.drop_rate else palette.doubt if overview.drops else palette.text
    return Text.assemble(
        (f"{short(overview.drop_rate)}/s", style), (f", {short(overview.drops)} in all", palette.faint)
    )


def table_text(overview: Overview, palette: Palette, width: int = 10) -> Text:
    """How full the session table is."""
    share = overview.table_share
    style = palette.bad if share >= 0.95 else palette.doubt if share >= 0.8 else palette.good
    return Text.assemble(
        (f"{overview.session_count:,} of {overview.capacity:,} ", palette.text),
        ("▕", palette.faint),
        (gauge(share, width), style),
        ("▏", palette.faint),
        (f" {percent(share)}", palette.faint),
    )


def overview_lines(overview: Overview, width: int, palette: Palette) -> Text:
    """Two lines of what the daemon does as a whole, for a small screen."""
    room = max(0, (width - 56) // 2)
    packets, bits = (graph(one_of(overview.history, which), room)[0] for which in (0, 1))
    first = Text.assemble(
        (f"{short(overview.packet_rate):>5}", palette.title),
        (" pkt/s ", palette.faint),
        (packets, palette.trend),
        (f"  {short(overview.bit_rate):>5}", palette.title),
        (" bit/s ", palette.faint),
        (bits, palette.trend),
        ("  fast path ", palette.faint),
        fast_path_text(overview, palette),
    )
    second = Text.assemble(
        ("drops ", palette.faint),
        drops_text(overview, palette),
        ("   new ", palette.faint),
        (f"{short(overview.new_rate)}/s", palette.text),
        ("   table ", palette.faint),
        table_text(overview, palette, max(4, min(20, width - 66))),
    )
    return _stacked(first, second)


def facts(overview: Overview, width: int, palette: Palette) -> Text:
    """The same one below the other, beside graphs that stand for themselves."""
    lines = [
        ("strongSwan", vici_text(overview, palette)),
        ("fast path", fast_path_text(overview, palette)),
        ("drops", drops_text(overview, palette)),
        ("new", Text.assemble((f"{short(overview.new_rate)}", palette.text), (" sessions/s", palette.faint))),
        ("table", table_text(overview, palette, max(4, min(16, width - 40)))),
    ]
    text = Text(no_wrap=True, overflow="ellipsis")
    for number, (label, value) in enumerate(lines):
        text.append("\n" if number else "")
        text.append(f"{label:<11}", palette.faint)
        text.append_text(value)
    return text


def area(values: Sequence[float | None], width: int, height: int, styles: Sequence[str]) -> Text:
    """A graph of some lines, in styles from the top to the ground."""
    lines = graph(values, width, height)
    shades = [styles[number * len(styles) // len(lines)] for number in range(len(lines))]
    return _stacked(*map(Text, lines, shades))


def _stacked(*lines: Text) -> Text:
    return Text("\n", no_wrap=True, overflow="ellipsis").join(lines)


# --- one session in full --------------------------------------------------------------------------------

PAGES: Final = ("session", "SPIs and health", "why")


def detail(frame: Frame, page: int, width: int, palette: Palette) -> Text:
    """All of one session: its rates as graphs, what is wrong, and one of three pages of text."""
    row = frame.detail
    assert row is not None
    c2s = row.session["c2s"]
    lines = [
        Text.assemble(
            (row.name, palette.title),
            (f"  session {row.id}  ", palette.faint),
            (health_text(row.health), palette.of(row.health.level)),
        ),
        Text(f"{c2s['source']}[{c2s['sport']}] → {c2s['destination']}[{c2s['dport']}]", palette.faint),
    ]
    names = ("in ", "out") if row.is_tunnel else ("c2s", "s2c")
    peak = max((max(sample) for sample in row.history[-(width - 4) :] if sample is not None), default=0.0)
    for which, (name, rate, style) in enumerate(((names[0], row.into, palette.into), (names[1], row.out, palette.out))):
        drawn = graph(one_of(row.history, which), width - 4, 2, peak or 1.0)
        told = f"{short(rate and rate.bits)} bit/s, {short(rate and rate.packets)} pkt/s"
        lines.append(
            Text.assemble(
                (f"{name} ", palette.faint),
                (told, style),
                (f"   both up to {short(peak)} bit/s" if not which else "", palette.faint),
            )
        )
        lines += [Text.assemble("    ", (line, style)) for line in drawn]
    for trouble in row.health.troubles:
        lines += [
            Text(line, palette.of(row.health.level))
            for line in render.wrapped(f"{SIGNS[row.health.level]} {trouble}", width, 2)
        ]
    lines += [Text(), tabs(page, palette), Text()]
    lines.append(Text(_page_text(frame, row, page, width), palette.text))
    return Text("\n").join(lines)


def trouble_text(row: Row, palette: Palette) -> Text:
    """What is wrong with a row, a sentence after the other."""
    text = Text.assemble((f"{SIGNS[row.health.level]} {row.name} ", palette.title))
    return text.append("; ".join(row.health.troubles), palette.of(row.health.level))


def tabs(page: int, palette: Palette) -> Text:
    """The pages of one session, the one that is shown marked."""
    line = Text()
    for number, name in enumerate(PAGES):
        line.append(f" {number + 1} {name} ", palette.cursor if number == page else palette.faint)
        line.append(" ")
    return line


def _page_text(frame: Frame, row: Row, page: int, width: int) -> str:
    match page:
        case 0:
            return render.session_detail(row.session, width)
        case 1:
            return render.session_health(row.session, width)
    if frame.explanation is None:
        return "asking ..."
    return render.explanation(frame.explanation, width)


# --- a plain table --------------------------------------------------------------------------------------


def plain(frame: Frame, width: int) -> str:
    """One frame as text without colours, for scripts."""
    overview, question = frame.overview, frame.question
    # A course over time is not to be had at once.
    places = [place for place in layout(question.kind, width) if place.column.title != _TREND.title]
    when = time.strftime("%F %T")
    head = [
        f"fwd {overview.version} on {overview.host}, {when}, strongSwan {vici_text(overview, PLAIN).plain}",
        f"{short(overview.packet_rate)} packets/s, {short(overview.bit_rate)} bit/s,"
        f" fast path {fast_path_text(overview, PLAIN).plain}, drops {drops_text(overview, PLAIN).plain},"
        f" {overview.session_count} of {overview.capacity} sessions",
        f"{len(frame.rows)} of {frame.matched} {question.kind}, by {question.order.name}",
        "",
    ]
    rows = [heading(places, question.order.key, question.is_descending, PLAIN)]
    rows += [row_line(row, places, PLAIN) for row in frame.rows]
    return "\n".join([*head, *(line.plain.rstrip() for line in rows)])


# --- help -----------------------------------------------------------------------------------------------

_KEYS: Final = (
    ("↑ ↓ j k, Home End", "choose a row: it stays chosen wherever it goes, but for the first line"),
    ("Enter", "one session in full, live; again or Esc: back"),
    ("1 2 3, ← →", "its pages: session, SPIs and health, why"),
    ("Shift+↑ ↓, J K", "scroll it where it stands beside the rows"),
    ("t, Tab", "tunnels that end here, or all sessions"),
    ("s S, r", "next or former order, the other way round; or click a title"),
    ("/", "filter as you type; Tab completes, Enter keeps, Esc shows all"),
    ("c", "clear the session, after a question"),
    ("p, Space", "pause: the picture stands; counts go on"),
    ("+ -", "ask more or less often"),
    ("q, Ctrl-C", "quit"),
)

_WORDS: Final = (
    (Level.GOOD, "ok", "nothing is wrong that packets or strongSwan tell"),
    (Level.REST, "waiting", "announced by strongSwan, no packet yet"),
    (Level.REST, "closing, ended", "its tunnel is down, or it was cleared or aged out"),
    (Level.DOUBT, "silent", "no packet for long"),
    (Level.DOUBT, "stale", "strongSwan does not answer: the SA may have changed"),
    (Level.DOUBT, "loss, out-of-order", "gaps in the sequence numbers; packets that came late"),
    (Level.DOUBT, "miscount", "strongSwan counted other packets than fwd"),
    (Level.DOUBT, "fragments", "packets larger than the link's MTU"),
    (Level.BAD, "one-way", "packets flow in one direction only"),
    (Level.BAD, "after-delete", "packets on an SA that strongSwan deleted"),
    (Level.BAD, "unknown-spi", "packets on an SPI that strongSwan does not own"),
    (Level.BAD, "reset, wrap", "the sender uses sequence numbers again"),
    (Level.BAD, "discard", "its packets are dropped by a rule"),
)


def help_page(palette: Palette) -> Table:
    """All keys, what the words of health mean, and the filter."""
    page = Table.grid(padding=(0, 2, 0, 0))
    page.add_column(min_width=18)
    page.add_column()
    for keys, meaning in _KEYS:
        page.add_row(Text(keys, palette.into), Text(meaning, palette.text))
    page.add_row()
    page.add_row(Text("Health", palette.title))
    for level, word, meaning in _WORDS:
        page.add_row(Text(f"{SIGNS[level]} {word}", palette.of(level)), Text(meaning, palette.text))
    page.add_row()
    page.add_row(Text("Filter", palette.title), Text("a text, or any number of these", palette.faint))
    for key, wanted in FILTER_KEYS.items():
        page.add_row(Text(key, palette.into), Text(wanted.meaning, palette.text))
    page.add_row()
    page.add_row(Text("Trend", palette.title), Text("a block for each time that fwd was asked", palette.text))
    page.add_row(Text("·", palette.trend), Text("no traffic; where nothing stands nobody looked", palette.text))
    return page
