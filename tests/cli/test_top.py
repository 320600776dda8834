"""`fwctl top`: what it makes of a real Api's answers, and its screen on a real control socket."""

import asyncio
import json
import subprocess
import sys
import time
from contextlib import asynccontextmanager

import pytest
from textual import events
from textual.keys import _character_to_key

from fwd.api import Api
from fwd.cli import main, top, top_data
from fwd.cli import top_view as view
from fwd.cli.client import Client
from fwd.cli.top_data import (
    HISTORY,
    ORDERS,
    Asker,
    History,
    Kind,
    Pictures,
    Question,
    complete_filter,
    parse_filter,
)
from fwd.cli.top_screen import TopApp
from fwd.cli.top_view import COLOURS, PLAIN
from fwd.core.policy import Action, Prefix, Rule
from fwd.core.sa import SaSnapshot, SaSourceLost
from fwd.edge.control import Access, ControlServer
from fwd.rpc import SORT_KEYS
from tests.builders import ALLOW_ALL, HERE, LEFT, PEER, RIGHT, Bench, child_sa, esp, packed

SIZES = [(80, 24), (200, 50)]


class Daemon:
    """A core and its Api, which `serve` puts on a control socket: three tunnels, two sessions in transit."""

    def __init__(self):
        denied = Rule("no-tens", Action.DENY, sources=(Prefix(packed("10.0.0.0"), 8),))
        self.bench = Bench(denied, ALLOW_ALL)
        self.pid = 100
        self.seq = 1
        names = ("net", "branch", "far")
        self.bench.sas(
            SaSnapshot(
                tuple(child_sa(0x1001 + i, 0x2001 + i, child_name=name, reqid=i + 1) for i, name in enumerate(names))
            )
        )
        self.flow(1)
        self.bench.forward(esp("10.0.0.1", RIGHT, 5))
        self.api = Api(
            self.bench.firewall,
            lambda: self.bench.now,
            "/run/charon.vici",
            lambda: {"hostname": "gateway", "fwd-version": "0.1.0", "pid": self.pid},
            lambda: None,
            lambda _: None,
            dict,
        )

    def flow(self, seconds, *, branch_lost=0):
        """Traffic: `net` both ways, `branch` in only, some in transit, nothing through `far`."""
        for _ in range(int(seconds * 10)):
            self.seq += 1
            self.bench.wait(0.1)
            self.bench.receive(esp(PEER, HERE, 0x1001, self.seq, 1000))
            self.bench.send(esp(HERE, PEER, 0x2001, self.seq, 500))
            self.bench.receive(esp(PEER, HERE, 0x1002, self.seq + branch_lost, 60))
            self.bench.forward(esp(LEFT, RIGHT, 5, self.seq, 200))

    @asynccontextmanager
    async def serve(self, path):
        server = ControlServer(path, self.api.dispatch, self.api.rights, Access([], []))
        await server.start()
        try:
            yield server
        finally:
            await server.stop()


class Direct(Client):
    """A client whose answers come without a socket, as JSON all the same."""

    def __init__(self, api):
        super().__init__("none")
        self._api = api
        self.asked = []

    def call(self, method, **params):
        self.asked.append(method)
        return json.loads(json.dumps(self._api.dispatch(method, json.loads(json.dumps(params)))))


@pytest.fixture
def daemon():
    return Daemon()


def ask(daemon, question):
    return Asker(Direct(daemon.api)).ask(question)


def seen(daemon, question=None, *, seconds=8):
    """A frame after some seconds of traffic, during which somebody watched."""
    question = question or Question()
    pictures, frame = Pictures(1.0), None
    for second in range(seconds):
        frame = pictures.take(ask(daemon, question), float(second), frame)
        daemon.flow(1)
    return pictures.take(ask(daemon, question), float(seconds), frame)


# --- rows and frames ----------------------------------------------------------------------------------------


def test_tunnels_have_rates_by_direction_and_a_history(daemon):
    frame = seen(daemon)
    assert [(row.name, row.peer, row.health.word) for row in frame.rows] == [
        ("gw/net", PEER, "ok"),
        ("gw/branch", PEER, "ok"),
        ("gw/far", PEER, "waiting"),
    ]
    net, branch, far = frame.rows
    assert net.into.packets == pytest.approx(10, rel=0.2) and net.into.bits == pytest.approx(2 * net.out.bits, rel=0.1)
    assert branch.out == (0, 0) and far.packet_rate == 0
    assert len(net.history) == 9 and net.history[0] is None and net.history[-1] == (net.into.bits, net.out.bits)
    assert (frame.matched, frame.overview.host, frame.overview.capacity) == (3, "gateway", 65536)
    assert frame.overview.session_count == len(daemon.bench.firewall.table) == 5
    assert frame.overview.packet_rate == pytest.approx(40, rel=0.3)


def test_sessions_that_a_killed_fwd_had_not_saved_are_not_there(daemon):
    for name in ("session_allocated", "session_not_restored"):
        daemon.bench.firewall.counters.add(name)
    assert seen(daemon).overview.session_count == len(daemon.bench.firewall.table)


def test_troubles_are_words_and_the_worst_comes_first(daemon):
    for _ in range(40):
        daemon.flow(1)
        daemon.bench.firewall.findings(daemon.bench.sessions[1], daemon.bench.now)
    daemon.flow(20, branch_lost=100)
    daemon.flow(15, branch_lost=100)
    daemon.bench.forward(esp("10.0.0.1", RIGHT, 5))
    daemon.bench.sas(SaSourceLost("connection refused"))
    frame = seen(daemon, seconds=1)
    words = {row.name: row.health for row in frame.rows}
    assert words["gw/branch"].word == "one-way" and len(words["gw/branch"].troubles) >= 3
    assert words["gw/far"].word == "silent" and words["gw/net"].word == "stale"
    assert view.health_text(words["gw/branch"]).startswith("✗ one-way +")
    assert not frame.overview.vici_connected and frame.overview.vici_reason == "connection refused"
    by_trouble = next(order for order in ORDERS if order.key == "trouble")
    words = [row.health.word for row in seen(daemon, Question(Kind.SESSIONS, by_trouble), seconds=1).rows]
    assert words[0] == "one-way" and words[-1] == "ok" and {"discard", "silent"} <= set(words)


def test_every_order_is_one_that_the_daemon_knows(daemon):
    for order in ORDERS:
        assert order.key in SORT_KEYS
        assert not ask(daemon, Question(Kind.SESSIONS, order=order)).refusal


def test_a_filter_that_the_daemon_refuses_leaves_the_rows_as_they_were(daemon):
    before = seen(daemon, Question(Kind.SESSIONS), seconds=1)
    answers = ask(daemon, Question(Kind.SESSIONS, filter=parse_filter("source 10.0.0")))
    frame = Pictures(1.0).take(answers, 9.0, before)
    assert "want an address or a prefix" in frame.refusal and frame.rows == before.rows


def test_what_takes_long_to_put_in_order_is_put_in_order_less_often(daemon, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(top_data.time, "monotonic", lambda: clock[0])
    client = Direct(daemon.api)
    rank, asker = client.rank, Asker(client)

    def slowly(*args, **options):
        clock[0] += 0.4
        return rank(*args, **options)

    client.rank = slowly
    ranked = []
    for question in [Question(), *[Question(detail=1)] * 5, *[Question(Kind.SESSIONS)] * 2]:
        client.asked.clear()
        assert len(asker.ask(question).sessions) == (5 if question.kind is Kind.SESSIONS else 3)
        assert "session.list" in client.asked
        ranked.append("session.rank" in client.asked)
        clock[0] += 2
    assert ranked == [True, False, False, False, True, False, True, False]


def test_a_text_is_looked_for_in_all_of_a_row(daemon):
    def found(text, kind=Kind.SESSIONS):
        return [row.id for row in seen(daemon, Question(kind, filter=parse_filter(text)), seconds=1).rows]

    for text in ("branch", "BRANCH 192.0", "0x1002", "4098"):
        assert found(text) == [2], text
    assert sorted(found("esp")) == [4, 5] and found("discard") == [5] and found("nowhere") == []
    assert found("net", Kind.TUNNELS) == [1]


def test_a_session_in_full_is_live_and_may_be_gone(daemon):
    frame = seen(daemon, Question(detail=1, why=True))
    assert frame.detail.into == frame.rows[0].into and frame.detail.history == frame.rows[0].history
    for width in (60, 90, 200):
        for page, words in enumerate(("session in session ager", "SPI generations", "Sessions with it:")):
            text = view.detail(frame, page, width, COLOURS).plain
            assert words in text or page == 2, text
    assert frame.explanation["session"] == 1
    assert seen(daemon, Question(detail=99), seconds=1).detail is None


def test_another_daemon_has_other_sessions(daemon):
    pictures = Pictures(1.0)
    for second in range(5):
        frame = pictures.take(ask(daemon, Question()), float(second))
        daemon.flow(1)
    assert len(frame.rows[0].history) == 5
    daemon.pid += 1
    assert len(pictures.take(ask(daemon, Question()), 5.0).rows[0].history) == 1


def test_a_history_has_gaps_where_nobody_looked():
    history = History()
    history.note(1, (1.0, 2.0))
    history.note(2, (3.0, 4.0))
    history.note(2, (5.0, 6.0))
    history.note(5, None)
    assert history.last(6) == ((1.0, 2.0), (5.0, 6.0), None, None, None, None)
    for tick in range(6, 1000):
        history.note(tick, (1.0, 1.0))
    assert len(history.last(5000)) == HISTORY and set(history.last(5000)) == {None}


# --- the filter line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words", "text", "hint"),
    [
        ("", {}, "", "a text, or a filter: application, source"),
        ("berlin", {}, "berlin", "text"),
        ("sour", {}, "sour", "source, source-port"),
        ("source", {}, "", "client's address or prefix"),
        ("source 10.0.0.0/8", {"source": "10.0.0.0/8"}, "", "filter"),
        ("filter source 10.0.0.0/8 sta", {"source": "10.0.0.0/8"}, "", "state"),
        ("application ipsec-udp state", {"application": "ipsec-udp"}, "", "active or discard"),
        ("state active to untrust", {"state": "active", "to": "untrust"}, "", "filter"),
        ("tunnel", {}, "", "name of the CHILD_SA"),
        ("source not", {}, "", "client's address or prefix"),
        ("source not 10.0.0.0/8,192.0.2.1 state", {"source": "not 10.0.0.0/8,192.0.2.1"}, "", "active or discard"),
        ("state active colour red", {"state": "active"}, "", "no filter key 'colour'"),
        ("state active state discard", {"state": "active"}, "", "twice"),
    ],
)
def test_a_filter_line_holds_as_far_as_it_is_complete(line, words, text, hint):
    found = parse_filter(line)
    assert (found.words, found.text) == (words, text) and hint in found.hint
    assert found.is_wrong == ("no filter" in hint or hint == "twice")


@pytest.mark.parametrize(
    ("line", "whole"),
    [
        ("app", "application"),
        ("application ipsec-u", "application ipsec-udp"),
        ("filter state d", "filter state discard"),
        ("state active sou", "state active source"),
        ("state active sta", None),
        ("state active,dis", "state active,discard"),
        ("state not dis", "state not discard"),
        ("berlin sou", None),
        ("from un", "from untrust"),
        ("to nowhere", None),
        ("", None),
    ],
)
def test_a_filter_line_is_completed(daemon, line, whole):
    assert complete_filter(line, seen(daemon, seconds=1).rows) == whole


# --- looks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(Kind))
def test_lines_fit_every_width(daemon, kind):
    frame = seen(daemon, Question(kind), seconds=3)
    for width in range(12, 260):
        places = view.layout(kind, width)
        lines = [view.heading(places, "bit-rate", True, COLOURS)]
        lines += [view.row_line(row, places, COLOURS) for row in frame.rows]
        assert len({line.cell_len for line in lines}) == 1
        if width >= 78:
            assert width - 1 <= lines[0].cell_len <= width + 1, width


def test_numbers_take_little_room():
    assert [view.short(n) for n in (None, 0, 7.4, 999, 999.6, 9_140, 81_300_000, 2.5e9)] == [
        "?", "0", "7", "999", "1.00k", "9.14k", "81.3M", "2.50G",
    ]  # fmt: skip
    assert [view.span(s) for s in (None, 4.9, 59, 65, 3600 * 2 + 420, 86400 * 3)] == [
        "?", "4s", "59s", "1m05", "2h07", "3d00",
    ]  # fmt: skip
    assert [view.percent(s) for s in (0, 0.5, 0.99996, 1)] == ["0 %", "50 %", "99.9 %", "100 %"]


def test_a_graph_tells_nothing_from_unknown():
    assert view.graph([None, 0, 1, 4, 8], 7) == ["   ·▁▄▇"]
    assert view.graph([4, 0], 2, 2) == ["█ ", "█·"]
    assert view.graph([], 3) == ["   "] and view.gauge(0, 2) == "  " and view.gauge(1, 2) == "██"
    assert view.gauge(0.001, 2) == "▏ "


def test_a_plain_frame_is_a_table(daemon):
    lines = view.plain(seen(daemon), 300).splitlines()
    assert lines[0].startswith("fwd 0.1.0 on gateway") and "3 of 3 tunnels, by rate" in lines
    assert lines[-3].split()[:3] == ["●", "ok", "gw/net"] and "announced by strongSwan" in lines[-1]
    assert "\x1b" not in "\n".join(lines)


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def fwctl(daemon, monkeypatch, capsys):
    """Runs a command line on the daemon; gives exit status, stdout and stderr."""
    monkeypatch.setattr(top, "Client", lambda path: Direct(daemon.api))
    monkeypatch.setattr(top, "_MEASURED_S", 0)

    def run(*words):
        status = main.run(main.fwctl, words)
        return status, *capsys.readouterr()

    return run


def test_without_a_terminal_there_is_one_picture(fwctl):
    status, out, _ = fwctl("top", "limit", "2")
    assert status == 0 and out.count("gw/") == 2 and "2 of 3 tunnels, by rate" in out and "\x1b" not in out
    status, out, _ = fwctl("top", "once", "sessions", "sort", "troub", "filter", "source", "10.0.0.0/8")
    assert status == 0 and out.splitlines()[-1].split()[:3] == ["5", "ipsec-esp", "10.0.0.1[20033]"]
    assert "by trouble" in out and "Health▼" in out
    assert "Application" in fwctl("top", "once", "filter", "application", "ike")[1]  # which no tunnel is of
    status, out, _ = fwctl("top", "--json", "sort", "source", "reverse")
    assert status == 0 and [session["id"] for session in json.loads(out)["sessions"]] == [1, 2, 3]
    assert json.loads(out)["matched"] == 3


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("once", "sort", "colour"), "found 'colour', want id or age"),
        (("once", "filter", "source", "1.2"), "want an address or a prefix"),
        (("interval", "0"), "want a number from 1 to 3600"),
    ],
)
def test_what_top_cannot_do_is_said_in_a_line(fwctl, words, reason):
    status, out, err = fwctl("top", *words)
    assert status == 2 and not out and reason in err


def test_other_commands_do_not_wait_for_the_library_of_the_screen():
    loaded = "import sys, fwd.cli.main; print(sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert "click" in done.stdout and "textual" not in done.stdout


# --- the screen ---------------------------------------------------------------------------------------------


def on_screen(app):
    return "\n".join(strip.text.rstrip() for strip in app.screen._compositor.render_strips())


class Screen:
    """The app in a terminal that tests write to and look at."""

    def __init__(self, app, pilot):
        self.app, self._pilot = app, pilot

    async def press(self, *keys):
        for key in keys:
            self.app.post_message(events.Key(key, key if len(key) == 1 else None))
            await self._pilot._wait_for_screen()
        deadline = time.monotonic() + 60
        while self.app.message_queue_size and time.monotonic() < deadline:
            await asyncio.sleep(0.01)  # on a busy machine the app has yet to hear them

    async def shows(self, *words, but=()):
        deadline = time.monotonic() + 60
        while True:
            text = on_screen(self.app)
            if all(word in text for word in words) and not any(word in text for word in but):
                return text
            assert time.monotonic() < deadline, f"want {words}, not {but}:\n{text}"
            await asyncio.sleep(0.02)

    async def write(self, text):
        for letter in text:
            self.app.post_message(events.Key(_character_to_key(letter), letter))
        await self._pilot._wait_for_screen()


def watch(daemon, path, work, size=(80, 24), interval_s=0.3, is_served=True, **options):
    """Let `work(screen)` look at the app while the daemon answers."""

    async def main():
        app = TopApp(str(path), Question(**options), interval_s)
        async with app.run_test(size=size, notifications=True) as pilot:
            await work(Screen(app, pilot))

    async def served():
        async with daemon.serve(path):
            await main()

    asyncio.run(served() if is_served else main())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "c.sock"


@pytest.mark.parametrize("size", SIZES)
def test_the_screen_has_all_of_it(daemon, path, size):
    async def work(screen):
        text = await screen.shows("gw/net", "gw/branch", "waiting", "TUNNELS 3", "Quit")
        for word in ("gateway", "strongSwan", "fast path", "drops", "5 of 65,536", "rate ▼", "Details", "Quit"):
            assert word in text, text
        await screen.press("t")
        text = await screen.shows("SESSIONS 5", "ipsec-esp", "✗ discard", "198.51.100.2")
        await screen.press("s")
        await screen.shows("packets/s ▼")
        await screen.press("r")
        await screen.shows("packets/s ▲")
        await screen.press("question_mark")
        await screen.shows("choose a row", "fwctl top")
        await screen.press("escape")
        await screen.shows("packets/s ▲", but=["choose a row"])
        assert all(len(line) <= size[0] for line in on_screen(screen.app).splitlines())

    watch(daemon, path, work, size)


@pytest.mark.parametrize("size", SIZES)
def test_one_session_in_full(daemon, path, size):
    is_split = size[0] > 150

    async def work(screen):
        await screen.shows("gw/net")
        await screen.press("enter")
        text = await screen.shows("c2s flow:", "1 session", "session 1", "Back", "Page", "Quit")
        assert ("gw/branch" in text) == ("Filter" in text) == is_split
        await screen.press("2")
        await screen.shows("SPI generations")
        await screen.press("right")
        await screen.shows("3 why", but=["SPI generations", "asking"])
        await screen.press("escape")
        await screen.shows("gw/net", "gw/branch", but=["3 why"])
        await screen.press("down", "enter")
        await screen.shows("session 2", "3 why")
        await screen.press("1")
        await screen.shows("c2s flow:", "session 2")
        if is_split:  # it follows the chosen row
            await screen.press("down")
            await screen.shows("c2s flow:", "session 3", but=["session 2"])
        daemon.bench.clear(*daemon.bench.sessions)
        await screen.shows("cleared")

    watch(daemon, path, work, size)


def test_filter_as_you_type(daemon, path):
    async def work(screen):
        await screen.shows("gw/net")
        await screen.press("slash")
        await screen.shows("a text, or a filter")
        await screen.write("bran")
        await screen.shows("gw/branch", "/ bran", but=["gw/net", "gw/far"])
        await screen.press("escape")
        await screen.shows("gw/net", "gw/branch", but=["bran "])
        await screen.press("t")
        await screen.shows("SESSIONS 5")
        await screen.press("slash")
        await screen.shows("a text, or a filter")
        await screen.write("state disc")
        await screen.shows("discard")
        await screen.press("tab")
        await screen.shows("state discard", "10.0.0.1", but=["198.51.100.2"])
        await screen.write(" source 10.0.0.")
        await screen.shows("want an address or a prefix")
        await screen.write("0/8")
        await screen.shows("10.0.0.1", but=["want an address"])
        await screen.press("enter")
        await screen.shows("Details", but=["Keep"])
        await screen.press("t")
        await screen.shows("TUNNELS 3", "gw/net", but=["state discard"])
        await screen.press("t")
        await screen.shows("/ state discard source", "1 match")

    watch(daemon, path, work)


def test_clear_asks_first(daemon, path):
    async def work(screen):
        await screen.shows("gw/net")
        await screen.press("c")
        await screen.shows("Clear session 1, gw/net?")
        await screen.press("n")
        await screen.shows("gw/net", but=["Clear session"])
        assert daemon.bench.count("session_cleared") == 0
        await screen.press("c")
        await screen.shows("Clear session 1")
        await screen.press("y")
        await screen.shows("session 1 cleared")
        assert daemon.bench.count("session_cleared") == 1
        await screen.press("t", "end")
        await screen.shows("SESSIONS 5")
        await screen.press("end", "c")
        await screen.shows("Clear session 6")  # the tunnel's next one
        daemon.bench.clear(*daemon.bench.sessions)
        await screen.press("y")
        await screen.shows("no session 6")

    watch(daemon, path, work, kind=Kind.TUNNELS)


def test_fwd_goes_away_and_comes_back(daemon, path):
    async def work(screen):
        await screen.shows("FWD IS AWAY", "as long as fwd does not answer")
        async with daemon.serve(path):
            await screen.shows("fwd is back", "gw/net", but=["AWAY"])
        await screen.shows("FWD IS AWAY", "gw/net", "below is what was")
        daemon.pid += 1
        async with daemon.serve(path):
            await screen.shows("fwd is back", "Another fwd", but=["AWAY"])

    watch(daemon, path, work, is_served=False)


def test_a_pause_lets_the_picture_stand(daemon, path):
    async def work(screen):
        await screen.shows("gw/net")
        await screen.press("p")
        await screen.shows("PAUSED")
        frames = [screen.app.frame]
        while len(frames) < 5 or len({*map(id, frames[-5:])}) > 1:  # what was on its way may come yet
            assert len(frames) < 50
            await asyncio.sleep(0.2)
            frames.append(screen.app.frame)
        await screen.press("t")  # a question of one's own is answered all the same
        await screen.shows("SESSIONS 5", "10.0.0.1")
        await screen.press("space")
        await screen.shows("SESSIONS 5", but=["PAUSED"])

    watch(daemon, path, work)


def test_the_choice_stays_with_its_session(daemon, path):
    async def work(screen):
        await screen.shows("gw/net")
        await screen.press("down")
        await screen.press("r")
        await screen.shows("rate ▲")
        await screen.press("enter")
        await screen.shows("session 2")
        await screen.press("escape")
        await screen.shows("gw/net")
        await screen.press("home", "r")
        await screen.shows("rate ▼")
        await screen.press("enter")
        await screen.shows("session 1")

    watch(daemon, path, work)


def test_any_size_will_do(daemon, path):
    async def work(screen):
        await screen.shows("fwd 0.1.0", "Details")
        await screen.press("enter", "question_mark", "escape", "2", "escape", "slash", "x", "escape", "end", "pageup")
        await screen.press("question_mark")
        await screen.shows("Esc closes")  # the help: so the keys before it have been heard, and find no closed screen

    for size in ((20, 6), (150, 32)):
        watch(daemon, path, work, size)


def test_without_colours_it_is_the_same(daemon, path, monkeypatch):
    async def main():
        async with daemon.serve(path):
            app = TopApp(str(path), Question(), 0.05, is_plain=True)
            async with app.run_test(size=(80, 24)) as pilot:
                await Screen(app, pilot).shows("● ok", "· waiting", "rate ▼")
                assert app.palette is PLAIN

    monkeypatch.setenv("NO_COLOR", "1")
    asyncio.run(main())
