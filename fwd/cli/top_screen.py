"""`fwctl top` on the screen: the widgets and keys, and the thread that asks the daemon meanwhile."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from rich.console import Console
from rich.text import Text
from textual import events, on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.geometry import Size
from textual.message import Message
from textual.screen import ModalScreen
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.suggester import Suggester
from textual.theme import Theme
from textual.widgets import Footer, Input, Static

from ..rpc import FORBIDDEN, RpcError
from . import top_view as view
from .client import Client, NoDaemon
from .top_data import (
    ORDERS,
    Answers,
    Asker,
    Filter,
    Frame,
    Kind,
    Level,
    Overview,
    Pictures,
    Question,
    Row,
    complete_filter,
    order_by,
    parse_filter,
)

#: From so many columns on, one session in full stands beside the rows; from such a size on, the overview has graphs.
SPLIT_COLUMNS = 150
TALL_COLUMNS, TALL_LINES = 100, 26

#: How soon after fwd went away it is asked again, and how long its return is told, in seconds.
_RETRY_S = 1.0
_RETURN_TOLD_S = 5.0

#: So much later than usual, an answer is late, in seconds.
_SLOW_S = 2.0

INTERVALS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

_THEME = Theme(
    name="fwd",
    primary="#5fafd7",
    secondary="#d7afff",
    accent="#5fd7ff",
    warning="#ffd75f",
    error="#ff5f5f",
    success="#87d75f",
    foreground="#d0d0d0",
    background="#121212",
    surface="#1c1c1c",
    panel="#262626",
    dark=True,
)


_CSS = """
Screen { background: $background; }

#title, #state { height: 1; padding: 0 1; background: $panel; }
#overview { height: 2; padding: 0 1; }
#panels { display: none; height: 7; }
.-tall #panels { display: block; }
.-tall #overview { display: none; }
.panel {
    width: 1fr; height: 7; padding: 0 1; border: round $primary 40%;
    border-title-color: $foreground; border-subtitle-color: $foreground 50%;
}
#facts { width: 56; }

#notice {
    display: none; height: auto; max-height: 2; padding: 0 1; text-style: bold; color: black; background: $error;
}
#notice.-back { background: $success; }

#body { height: 1fr; }
#list { width: 1fr; }
#heading { height: 1; padding: 0 0 0 1; text-style: bold; }
#rows { height: 1fr; padding: 0 0 0 1; scrollbar-size-vertical: 1; scrollbar-gutter: stable; overflow-x: hidden; }
.-away #list { opacity: 60%; }
#trouble { display: none; height: auto; max-height: 3; padding: 0 1; background: $surface; }

#detail { display: none; padding: 0 1; scrollbar-size-vertical: 1; }
.-split #detail { display: block; width: 92; border-left: tall $primary 40%; }
.-full #detail { display: block; width: 1fr; }
.-full #list { display: none; }
#page { width: auto; }

#asked { display: none; height: 2; padding: 0 1; background: $surface; }
.-asking #asked { display: block; }
#asked Input { background: $surface; }
#hint { height: 1; }

Footer { background: $panel; }

Confirm, Help { align: center middle; background: $background 60%; }
.box {
    width: 64; max-width: 96%; height: auto; max-height: 94%; padding: 1 2;
    border: round $primary; border-title-style: bold; background: $surface;
}
Help .box { width: 90; }
"""


class Poller(threading.Thread):
    """Asks the daemon one question again and again, and at once when the question changes.

    `deliver` is called in this thread, with the answers or with the reason why there are none.
    """

    def __init__(
        self, path: str, question: Question, interval_s: float, deliver: Callable[[Answers | str], None]
    ) -> None:
        super().__init__(name="poller", daemon=True)  # a daemon that hangs does not hold up the exit
        self._path = path
        self._question = question
        self._interval_s = interval_s
        self._deliver = deliver
        self._changed = threading.Condition()
        self._is_asked = True
        self._is_paused = False
        self._is_over = False

    def ask(self, question: Question) -> None:
        """Ask this from now on, and at once."""
        with self._changed:
            self._question, self._is_asked = question, True
            self._changed.notify()

    def set_pace(self, interval_s: float, is_paused: bool) -> None:
        """Ask every so many seconds or, if paused, only when the question changes."""
        with self._changed:
            self._interval_s, self._is_paused = interval_s, is_paused
            self._changed.notify()

    def stop(self) -> None:
        """Ask no more."""
        with self._changed:
            self._is_over = True
            self._changed.notify()

    def run(self) -> None:
        """The thread."""
        asker = Asker(Client(self._path))
        asked_at, is_away = 0.0, False
        while (question := self._next(asked_at, is_away)) is not None:
            asked_at = time.monotonic()
            try:
                answers: Answers | str = asker.ask(question)
            except (NoDaemon, RpcError) as error:
                asker.close()
                asker = Asker(Client(self._path))
                answers = str(error)
            is_away = isinstance(answers, str)
            if not self._is_over:
                self._deliver(answers)
        asker.close()

    def _next(self, asked_at: float, is_away: bool) -> Question | None:
        """Wait until it is time to ask; None at the end."""
        with self._changed:
            while not self._is_over and not self._is_asked:
                if self._is_paused and not is_away:
                    self._changed.wait()
                    continue
                pace = min(_RETRY_S, self._interval_s) if is_away else self._interval_s
                left = asked_at + pace - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            self._is_asked = False
            return None if self._is_over else self._question


# --- the rows -------------------------------------------------------------------------------------------


class Heading(Static):
    """The titles of the columns. A click sorts."""

    @dataclass
    class Sort(Message):
        """Somebody wants it sorted by a key of the daemon."""

        key: str

    places: Sequence[view.Place] = ()

    def on_click(self, event: events.Click) -> None:
        """Sort by the column below the pointer."""
        column = view.column_at(self.places, event.x)
        if column is not None and column.order:
            self.post_message(self.Sort(column.order))


class RowTable(ScrollView, can_focus=True):
    """The rows, of which one is chosen.

    The choice stays with its session wherever that goes, except on the first line: that is whatever comes first.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup,ctrl+b", "turn(-1)", show=False),
        Binding("pagedown,ctrl+f", "turn(1)", show=False),
        Binding("home,g", "move(-1000000)", show=False),
        Binding("end,G", "move(1000000)", show=False),
        Binding("enter", "open", "Details", key_display="↵"),
    ]

    class Chosen(Message):
        """Another row is chosen."""

    class Opened(Message):
        """The chosen row is wanted in full."""

    def __init__(self, palette: view.Palette) -> None:
        super().__init__(id="rows")
        self.palette = palette
        self.rows: Sequence[Row] = ()
        self.places: Sequence[view.Place] = ()
        self.empty = ""
        self._cursor = 0

    @property
    def chosen(self) -> Row | None:
        """The chosen row; None if there are no rows."""
        return self.rows[self._cursor] if self.rows else None

    def fill(self, rows: Sequence[Row], places: Sequence[view.Place], empty: str) -> None:
        """Show these rows, or if there are none why."""
        before = self.chosen
        self.rows, self.places, self.empty = rows, places, empty
        if before is not None and self._cursor:
            numbers = (number for number, row in enumerate(rows) if row.id == before.id)
            self._cursor = next(numbers, self._cursor)
        self._cursor = max(0, min(self._cursor, len(rows) - 1))
        self.virtual_size = Size(self.scrollable_content_region.width, max(1, len(rows)))
        self._follow()
        self.refresh()
        after = self.chosen
        if (before and before.id) != (after and after.id):
            self.post_message(self.Chosen())

    def choose_first(self) -> None:
        """Go back to the first row."""
        self._cursor = 0

    def _follow(self) -> None:
        """Scroll to where the chosen row is."""
        height = self.scrollable_content_region.height or 1
        top = round(self.scroll_y)
        wanted = min(max(top, self._cursor - height + 1), self._cursor)
        if wanted != top:
            self.scroll_to(y=wanted, animate=False)

    def action_move(self, by: int) -> None:
        """Choose another row."""
        if self.rows:
            self._cursor = max(0, min(self._cursor + by, len(self.rows) - 1))
            self._follow()
            self.refresh()
            self.post_message(self.Chosen())

    def action_turn(self, pages: int) -> None:
        """Choose a row one page on."""
        self.action_move(pages * max(1, self.scrollable_content_region.height - 1))

    def action_open(self) -> None:
        """Show the chosen row in full."""
        if self.rows:
            self.post_message(self.Opened())

    def on_click(self, event: events.Click) -> None:
        """Choose the row below the pointer; if it is chosen already, show it in full."""
        number = event.y + round(self.scroll_y)
        if number == self._cursor:
            self.action_open()
        elif number < len(self.rows):
            self.action_move(number - self._cursor)

    def render_line(self, y: int) -> Strip:
        """One line of the screen."""
        width = self.size.width
        number = y + round(self.scroll_y)
        if number < len(self.rows):
            line = view.row_line(self.rows[number], self.places, self.palette)
            line.truncate(width)
            line.pad_right(max(0, width - line.cell_len))
            if number == self._cursor:
                line.stylize(self.palette.cursor)
        else:
            is_message = not self.rows and y == min(2, self.size.height - 1)
            line = Text(self.empty if is_message else "", self.palette.faint, overflow="ellipsis")
            line.truncate(width)
        strip = Strip(line.render(self.app.console), line.cell_len)
        return strip.extend_cell_length(width).apply_style(self.rich_style)


# --- what comes before the rows for a while ---------------------------------------------------------------


class Confirm(ModalScreen[bool]):
    """Asks yes or no; no is what any other key means."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)", "Yes"),
        Binding("n,escape,enter,q", "dismiss(False)", "No"),
    ]

    def __init__(self, question: Text) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        """The box."""
        with Vertical(classes="box") as box:
            box.border_title = "Clear session"
            yield Static(self._question)
            yield Static(Text.assemble(("\n y ", "reverse"), " yes, clear it    ", (" n ", "reverse"), " no"))


class Help(ModalScreen[None]):
    """All keys, what the words of health mean, and the filter."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,enter,h,f1", "dismiss", "Close")]

    def __init__(self, palette: view.Palette) -> None:
        super().__init__()
        self._palette = palette

    def compose(self) -> ComposeResult:
        """The box."""
        with VerticalScroll(classes="box") as box:
            box.border_title = "fwctl top"
            box.border_subtitle = "Esc closes"
            yield Static(view.help_page(self._palette))


class _Suggester(Suggester):
    """How a filter may go on."""

    def __init__(self, rows: Callable[[], Sequence[Row]]) -> None:
        super().__init__(use_cache=False, case_sensitive=True)
        self._rows = rows

    async def get_suggestion(self, value: str) -> str | None:
        """The whole line, or None."""
        return complete_filter(value, self._rows())


class FilterLine(Input):
    """Where a filter is written. What is written holds at once; Enter keeps it, Esc gives it up."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "Keep", key_display="↵"),
        Binding("tab", "cursor_right", "Complete", key_display="Tab"),
        Binding("escape", "give_up", "Show all", key_display="Esc"),
    ]

    class GivenUp(Message):
        """It is given up."""

    def action_give_up(self) -> None:
        """Esc."""
        self.post_message(self.GivenUp())


# --- the whole ------------------------------------------------------------------------------------------


def has_colours() -> bool:
    """Whether the terminal has 256 colours at least, and the user wants them."""
    return not os.environ.get("NO_COLOR") and Console(force_terminal=True).color_system in ("256", "truecolor")


class TopApp(App[None]):
    """The screen. `is_plain` keeps to the terminal's own 16 colours."""

    CSS = _CSS
    TITLE = "fwctl top"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", show=False),
        Binding("backspace", "close", "Back", key_display="Esc"),
        Binding("1", "page(0)", "Page", key_display="1-3"),
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("s", "sort(1)", "Sort"),
        Binding("S", "sort(-1)", show=False),
        Binding("r", "reverse", "Reverse"),
        Binding("t,tab,shift+tab", "other_kind", "Switch", key_display="t"),
        Binding("p,space", "pause", "Pause", key_display="p"),
        Binding("c", "clear", "Clear"),
        Binding("plus,equals_sign", "pace(-1)", show=False),
        Binding("minus", "pace(1)", show=False),
        Binding("2", "page(1)", show=False),
        Binding("3", "page(2)", show=False),
        Binding("left", "turn_page(-1)", show=False),
        Binding("right", "turn_page(1)", show=False),
        Binding("shift+up,K", "scroll_detail(-1)", show=False),
        Binding("shift+down,J", "scroll_detail(1)", show=False),
        Binding("escape", "leave", show=False),
        Binding("question_mark,h,f1", "help", "Help", key_display="?"),
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c", "quit", show=False, priority=True),
        Binding("ctrl+z", "suspend_process", show=False),
    ]

    @dataclass
    class Delivered(Message):
        """The daemon's answers, or the reason why there are none."""

        answers: Answers | str

    def __init__(self, path: str, question: Question, interval_s: float, *, is_plain: bool = False) -> None:
        super().__init__(ansi_color=is_plain)
        self._path = path
        self.palette = view.PLAIN if is_plain else view.COLOURS
        self.register_theme(_THEME)
        self.theme = "ansi-dark" if is_plain else "fwd"
        self.question = question
        self.interval_s = interval_s
        self.is_paused = False
        self.page = 0
        self.frame: Frame | None = None
        self._pictures = Pictures(interval_s)
        self._away = ""
        self._away_since = self._returned_at = float("-inf")
        self._answered_at = time.monotonic()
        self._counts: dict[Kind, int] = {}
        self._keys_shown = (False, False, False)
        self._kept_filters: dict[Kind, Filter] = {}
        self._poller = Poller(path, question, interval_s, self._deliver)
        # By reference, not by query: what is asked for arrives also while a question or the help stands before them.
        names = ("title", "overview", "notice", "state", "trouble", "page", "hint")
        self._texts = {name: Static(id=name) for name in names}
        self._panels = {name: Static(id=name, classes="panel") for name in ("packets", "bits", "facts")}
        self._heading, self._table = Heading(id="heading"), RowTable(self.palette)
        self._detail = VerticalScroll(self._texts["page"], id="detail", can_focus=True)
        self._line = FilterLine(
            compact=True,
            placeholder="a text, or: application ipsec-udp source 10.0.0.0/8",
            select_on_focus=False,
            suggester=_Suggester(lambda: self._table.rows),
        )

    def compose(self) -> ComposeResult:
        """The widgets, from top to bottom."""
        yield self._texts["title"]
        yield self._texts["overview"]
        yield Horizontal(*self._panels.values(), id="panels")
        yield self._texts["notice"]
        yield self._texts["state"]
        yield Horizontal(
            Vertical(self._heading, self._table, self._texts["trouble"], id="list"), self._detail, id="body"
        )
        yield Vertical(self._line, self._texts["hint"], id="asked")
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Begin to ask."""
        self.screen.set_focus(self._table)
        self.set_interval(1.0, self._show_time)
        self._poller.start()
        self._show()

    def on_unmount(self) -> None:
        """The screen is given back."""
        self._poller.stop()

    # --- answers ------------------------------------------------------------------------------------------

    def _deliver(self, answers: Answers | str) -> None:
        """In the poller's thread."""
        self.post_message(self.Delivered(answers))

    @on(Delivered)
    def _take(self, delivered: Delivered) -> None:
        answers, now = delivered.answers, time.monotonic()
        if isinstance(answers, str):
            if not self._away:
                self._away_since = now
            self._away, self._returned_at = answers, float("-inf")
        else:
            if answers.question != self.question:
                return  # the answers to the present one are on their way
            if self._away:
                self._away, self._returned_at = "", now
            before = self.frame
            self.frame = self._pictures.take(answers, now, before)
            self._answered_at = now
            if not self.question.filter:
                self._counts[self.question.kind] = self.frame.matched
            if before is not None and before.overview.pid != self.frame.overview.pid:
                self.notify("fwd was started anew; rates are measured afresh", title="Another fwd")
        self._show()

    def _change(self, **changes: object) -> None:
        """Ask something else from now on."""
        self.question = replace(self.question, **changes)  # type: ignore[arg-type]
        self._poller.ask(self.question)
        self._show()

    # --- what is shown ------------------------------------------------------------------------------------

    @property
    def _is_split(self) -> bool:
        return self.size.width >= SPLIT_COLUMNS

    def on_resize(self) -> None:
        """The terminal has another size."""
        self.call_after_refresh(self._show)

    def _show(self) -> None:
        """Bring all of the screen up to date; it costs a few milliseconds."""
        if not self._table.is_attached:
            return
        width, height = self.size
        frame = self.frame
        is_tall = width >= TALL_COLUMNS and height >= TALL_LINES
        is_open = self.question.detail is not None
        self.set_class(is_tall, "-tall")
        self.set_class(is_open and self._is_split, "-split")
        self.set_class(is_open and not self._is_split, "-full")
        self.set_class(bool(self._away), "-away")
        self._show_keys()
        self._show_time()
        if frame is not None:
            overview = frame.overview
            if is_tall:
                self._show_panels(overview, width)
            else:
                self._put("overview", view.overview_lines(overview, width - 2, self.palette))
        self._put("state", self._state(width - 2))
        self._show_rows(frame)
        self._show_trouble(is_open)
        if is_open:
            self._show_page(frame)
        if self.has_class("-asking"):
            self._show_hint()

    def _show_time(self) -> None:
        """What changes by itself. The rest is painted when there is news: the terminal may be far away."""
        self._put("title", self._title(self.size.width - 2))
        self._show_notice()

    def _put(self, name: str, text: Text) -> None:
        self._texts[name].update(text)

    def _title(self, width: int) -> Text:
        palette = self.palette
        left = Text.assemble(("fwd", palette.title))
        right = Text()
        if self.frame is not None:
            overview = self.frame.overview
            left.append(f" {overview.version} on {overview.host}", palette.faint)
            if not self.has_class("-tall"):
                left.append("   strongSwan ", palette.faint)
                left.append_text(view.vici_text(overview, palette))
        if self.is_paused:
            right.append(" ‖ PAUSED ", f"reverse {palette.doubt}")
            right.append(" ")
        right.append(f"every {self.interval_s:g} s  ", palette.faint)
        right.append(time.strftime("%H:%M:%S"), palette.text)
        return _spread(left, right, width)

    def _show_notice(self) -> None:
        """Whether fwd is away, takes its time, or is back."""
        notice, now = self._texts["notice"], time.monotonic()
        age, sign = now - self._answered_at, view.SIGNS[Level.BAD]
        is_slow = age > 3 * self.interval_s + _SLOW_S and not self.is_paused
        has_returned = not is_slow and now - self._returned_at < _RETURN_TOLD_S
        notice.set_class(has_returned, "-back")
        notice.display = bool(self._away) or is_slow or has_returned
        if self._away:
            old = f", below is what was {view.span(age)} ago" if self.frame is not None else ""
            notice.update(Text(f"{sign} FWD IS AWAY for {view.span(now - self._away_since)}{old}: {self._away}"))
        elif is_slow:
            notice.update(Text(f"{sign} FWD HAS NOT ANSWERED for {view.span(age)}; it is being waited for"))
        elif has_returned:
            gone = view.span(self._returned_at - self._away_since)
            notice.update(Text(f"{view.SIGNS[Level.GOOD]} fwd is back, after {gone}"))

    def _show_panels(self, overview: Overview, width: int) -> None:
        packets, bits, facts = self._panels.values()
        packets.border_title = f"packets  {view.short(overview.packet_rate)}/s"
        bits.border_title = f"throughput  {view.short(overview.bit_rate)} bit/s"
        facts.border_title = "dataplane"
        for panel, which, styles in ((packets, 0, self.palette.packets), (bits, 1, self.palette.bits)):
            size = panel.content_size
            values = view.one_of(overview.history, which)
            panel.border_subtitle = (
                f"peak {view.short(max((value for value in values if value is not None), default=0))}"
            )
            panel.update(view.area(values, size.width, size.height, styles))
        facts.update(view.facts(overview, facts.content_size.width, self.palette))

    def _state(self, width: int) -> Text:
        palette, question = self.palette, self.question
        left = Text()
        for kind in Kind:
            count = self._counts.get(kind)
            label = f" {kind.upper() if kind is question.kind else kind}{'' if count is None else f' {count:,}'} "
            left.append(label, f"reverse {palette.title}" if kind is question.kind else palette.faint)
            left.append(" ")
        if question.filter:
            left.append(f" / {question.filter} ", palette.doubt)
        right = Text()
        if self.frame is not None and (told := self._shown_of(self.frame)):
            right.append(f"{told}   ", palette.faint)
        right.append("by ", palette.faint)
        right.append(f"{question.order.name} {'▼' if question.is_descending else '▲'}", palette.text)
        return _spread(left, right, width)

    def _shown_of(self, frame: Frame) -> str:
        """How many rows there are, where that is not all."""
        shown, text = len(frame.rows), frame.question.filter.text
        if text:
            return f"{shown} of the first {frame.searched:,}" if frame.searched < frame.matched else f"{shown} match"
        return (
            f"first {shown} of {frame.matched:,}"
            if shown < frame.matched
            else f"{shown} match"
            if frame.question.filter
            else ""
        )

    def _show_rows(self, frame: Frame | None) -> None:
        table = self._table
        width = table.scrollable_content_region.width
        places = view.layout(self.question.kind, width)
        is_same = frame is not None and frame.question.kind is self.question.kind
        rows = frame.rows if frame is not None and is_same else ()
        table.fill(rows, places, self._why_empty(frame if is_same else None))
        question = self.question
        self._heading.places = places
        self._heading.update(view.heading(places, question.order.key, question.is_descending, self.palette))

    def _show_trouble(self, is_open: bool) -> None:
        """What is wrong with the chosen row, in full."""
        row, trouble = self._table.chosen, self._texts["trouble"]
        trouble.display = bool(row and row.health.troubles) and not is_open
        if row is not None and trouble.display:
            trouble.update(view.trouble_text(row, self.palette))

    def _why_empty(self, frame: Frame | None) -> str:
        if self._away:
            return "Nothing is known as long as fwd does not answer."
        if frame is None:
            return "Asking fwd ..."
        if frame.question.filter:
            return f"Nothing matches '{frame.question.filter}'. Esc shows all again."
        if frame.question.kind is Kind.TUNNELS:
            return "No tunnel ends on this host. Press t for all sessions."
        return "No active sessions."

    def _show_page(self, frame: Frame | None) -> None:
        pane = self._detail
        width = max(20, pane.scrollable_content_region.width - 2)
        wanted = self.question.detail
        pane.border_title = f"session {wanted}"
        if frame is None or frame.question.detail != wanted:
            return  # the answer is on its way
        if frame.detail is None:
            self._put(
                "page", Text(f"Session {wanted} ended more than five minutes ago. Esc goes back.", self.palette.faint)
            )
        else:
            self._put("page", view.detail(frame, self.page, width, self.palette))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Which keys there are, and so what the last line of the screen tells: it has room for what matters."""
        if self.has_class("-asking"):
            return action == "quit"
        if action in ("close", "page", "turn_page"):
            return self.question.detail is not None
        return not (self.has_class("-full") and action in ("filter", "sort", "reverse", "other_kind"))

    def _show_keys(self) -> None:
        """Let the last line follow, if other keys are there than before: it is made anew then."""
        state = (self.has_class("-asking"), self.has_class("-full"), self.question.detail is not None)
        if state != self._keys_shown:
            self._keys_shown = state
            self.refresh_bindings()

    # --- keys ---------------------------------------------------------------------------------------------

    def action_other_kind(self) -> None:
        """Tunnels or sessions; each has a filter of its own."""
        kind = Kind.SESSIONS if self.question.kind is Kind.TUNNELS else Kind.TUNNELS
        self._kept_filters[self.question.kind] = self.question.filter
        self._table.choose_first()
        self._change(kind=kind, filter=self._kept_filters.get(kind, Filter()))

    def action_sort(self, by: int) -> None:
        """The next order."""
        keys = [order.key for order in ORDERS]
        number = keys.index(self.question.order.key) + by if self.question.order.key in keys else 0
        self._change(order=ORDERS[number % len(ORDERS)], is_reversed=False)

    @on(Heading.Sort)
    def _sort_by(self, wanted: Heading.Sort) -> None:
        if wanted.key == self.question.order.key:
            self.action_reverse()
        else:
            self._change(order=order_by(wanted.key), is_reversed=False)

    def action_reverse(self) -> None:
        """The other way round."""
        self._change(is_reversed=not self.question.is_reversed)

    def action_pause(self) -> None:
        """Let the picture stand, or go on."""
        self.is_paused = not self.is_paused
        self._set_pace()

    def action_pace(self, by: int) -> None:
        """More or less often."""
        at_least = [number for number, s in enumerate(INTERVALS_S) if s >= self.interval_s] or [len(INTERVALS_S) - 1]
        self.interval_s = INTERVALS_S[max(0, min(at_least[0] + by, len(INTERVALS_S) - 1))]
        self._set_pace()

    def _set_pace(self) -> None:
        self._pictures.interval_s = self.interval_s
        self._poller.set_pace(self.interval_s, self.is_paused)
        self._show()

    @on(RowTable.Opened)
    def action_open(self) -> None:
        """One session in full, or back to the rows."""
        row = self._table.chosen
        if self.question.detail is not None:
            self.action_leave()
        elif row is not None:
            self._change(detail=row.id, why=self.page == 2)
            self._detail.scroll_home(animate=False)
            if not self._is_split:
                self.screen.set_focus(self._detail)

    @on(RowTable.Chosen)
    def _follow(self) -> None:
        """Beside the rows stands the one that is chosen."""
        row = self._table.chosen
        if self.question.detail is not None and self._is_split and row is not None and row.id != self.question.detail:
            self._change(detail=row.id)
        self._show_trouble(self.question.detail is not None)

    def action_page(self, page: int) -> None:
        """One of the pages of a session."""
        if self.question.detail is not None:
            self.page = page
            self._change(why=page == 2)
            self._detail.scroll_home(animate=False)

    def action_turn_page(self, by: int) -> None:
        """The next page of a session."""
        self.action_page((self.page + by) % len(view.PAGES))

    def action_scroll_detail(self, by: int) -> None:
        """Scroll the session that stands beside the rows."""
        self._detail.scroll_relative(y=by * 3, animate=False)

    def action_close(self) -> None:
        """Close the session that is shown in full."""
        self.action_leave()

    def action_leave(self) -> None:
        """Close the session that is shown in full; else give up the filter."""
        if self.question.detail is not None:
            self._change(detail=None, why=False)
            self.screen.set_focus(self._table)
        elif self.question.filter:
            self._change(filter=Filter())

    def action_help(self) -> None:
        """The keys."""
        self.push_screen(Help(self.palette))

    # --- the filter ---------------------------------------------------------------------------------------

    def action_filter(self) -> None:
        """Write a filter."""
        self.add_class("-asking")
        self._show_keys()
        line = self._line
        line.value = str(self.question.filter)
        line.cursor_position = len(line.value)
        self.screen.set_focus(line)
        self._show_hint()

    @on(Input.Changed)
    def _filter_changed(self, changed: Input.Changed) -> None:
        if not self.has_class("-asking"):
            return
        written = parse_filter(changed.value)
        self._show_hint()
        if (written.words, written.text) != (self.question.filter.words, self.question.filter.text):
            self._table.choose_first()
            # Tunnels are of one application: who names one wants to see all sessions of it.
            kind = Kind.SESSIONS if "application" in written.words else self.question.kind
            self._change(kind=kind, filter=Filter(written.words, written.text))

    def _show_hint(self) -> None:
        """What may follow, or what is wrong with what is written."""
        written = parse_filter(self._line.value)
        is_answered = self.frame is not None and self.frame.question == self.question
        refusal = self.frame.refusal if self.frame is not None and is_answered else ""
        style = self.palette.bad if refusal or written.is_wrong else self.palette.faint
        self._put("hint", Text(refusal or written.hint, style, overflow="ellipsis", no_wrap=True))

    @on(Input.Submitted)
    def _filter_done(self) -> None:
        self.remove_class("-asking")
        self._show_keys()
        self.screen.set_focus(self._table)

    @on(FilterLine.GivenUp)
    def _filter_given_up(self) -> None:
        self._filter_done()
        self._change(filter=Filter())

    # --- clear --------------------------------------------------------------------------------------------

    def action_clear(self) -> None:
        """Ask whether the session that is shown or chosen is to be cleared."""
        row = self.frame.detail if self.question.detail is not None and self.frame is not None else None
        row = row or self._table.chosen
        if row is None:
            return
        palette = self.palette
        flow = row.session["c2s"]
        words = Text.assemble(
            (f"Clear session {row.id}, {row.name}?\n", palette.title),
            (f"{flow['source']} to {flow['destination']}\n\n", palette.faint),
            "Its counts end here. The next packet opens a new session, if the rules allow it.",
        )
        self.push_screen(Confirm(words), lambda is_sure: self._clear(row.id) if is_sure else None)

    def _clear(self, session_id: int) -> None:
        """Clear a session, in a thread that may wait."""

        def work() -> None:
            client = Client(self._path)
            try:
                client.call("session.clear", id=session_id)
                told, kind = f"session {session_id} cleared", "information"
            except RpcError as error:
                hint = " (become root, or see [control] in fwd's configuration)" if error.code == FORBIDDEN else ""
                told, kind = f"{error.message}{hint}", "error"
            except NoDaemon as error:
                told, kind = str(error), "error"
            finally:
                client.close()
            self.call_from_thread(self.notify, told, severity=kind)
            self._poller.ask(self.question)

        self.run_worker(work, thread=True, exit_on_error=False)


def _spread(left: Text, right: Text, width: int) -> Text:
    """One line with something at both ends; what has no place is cut off the left one."""
    room = max(0, width - right.cell_len - 1)
    if left.cell_len > room:
        left.truncate(room, overflow="ellipsis")
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append_text(left)
    line.append(" " * max(1, width - left.cell_len - right.cell_len))
    line.append_text(right)
    return line
