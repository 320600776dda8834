"""fwctl as a shell: its prompt with keys from a pipe, on a real terminal, and as a script."""

import contextlib
import os
import pty
import re
import select
import stat
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from fwd.cli.main import fwctl
from fwd.cli.prompt import FileHistory, Prompt, history_path
from fwd.cli.shell import Shell
from fwd.core.sa import SaEstablished
from tests.builders import Bench, child_sa
from tests.cli.conftest import serving

FWCTL = Path(sys.executable).parent / "fwctl"
PROMPT = r"\w+@[\w-]+>"
DOWN, TAB, ENTER = "\x1b[B", "\t", "\r"


@pytest.fixture
def shell(small_daemon):
    with contextlib.closing(Shell(fwctl, str(small_daemon))) as shell:
        yield shell


@pytest.fixture
def typed(shell, tmp_path):
    """What a line is when these keys were pressed."""

    def press(keys, shell=shell):
        with create_pipe_input() as keyboard:
            keyboard.send_text(keys)
            return Prompt(shell, tmp_path / "state/history", keyboard, DummyOutput()).ask("> ")

    return press


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("sh" + TAB + ENTER, "show "),
        ("show ses" + TAB + "id 3" + ENTER, "show session id 3"),
        ("sh ses al fil st act co ye" + ENTER, "show session all filter state active count ye"),
        ("show t d n" + TAB + ENTER, "show tunnel detail net "),
        ("show session id 1" + TAB + TAB + ENTER + ENTER, "show session id 1 "),
        ("show session id 1" + TAB + DOWN + DOWN + ENTER + ENTER, "show session id 10 "),
        ("show session id 1 " + ENTER, "show session id 1 "),
        ("show session all | cou" + TAB + ENTER, "show session all | count "),
        ('show session all filter rule "any' + TAB + ENTER, "show session all filter rule any-any "),
        ("show map " + TAB + ENTER, "show map "),
        ("e " + ENTER, "e "),
        ("ex " + ENTER, "ex "),
        ("exi " + ENTER, "exit "),
        ("show session all fil state n act " + ENTER, "show session all filter state not active "),
        ("show session all fil rule n " + ENTER, "show session all filter rule n "),
        ("show session all fil spi 0x1 " + ENTER, "show session all filter spi 0x1 "),
        ("# show ses " + TAB + ENTER, "# show ses "),
    ],
)
def test_words_are_completed(typed, keys, line):
    assert typed(keys) == line


def test_question_mark_shows_what_may_come_next_and_is_not_inserted(typed, capsys):
    assert typed("show session ?id 7" + ENTER) == "show session id 7"
    rows = capsys.readouterr().out.splitlines()
    assert [row[:6] for row in rows] == ["  all ", "  id  ", "  info"] and "Show all sessions" in rows[0]
    assert typed('show session all | match "colou?r"' + ENTER) == 'show session all | match "colou?r"'
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("", "> show     Show sessions"),
        ("cle", "> clear  End sessions."),
        ("show session id ", "  <1-2147483647>  The session's id."),
        ("show session id 2", "  2               ipsec-esp 10.0.0.1 -> 203.0.113.2 ACTIVE"),
        ("show session all ", "+ filter      Only what matches."),
        ("show session all ", "  <Enter>     Finish input"),
        ("show session all filter from ", "  trust    zone of left"),
        ("show session all | ", "  count   Show only how many lines there are."),
        ("show x", "nothing here begins with 'x':"),
        ("show \x1b", "nothing here begins with '\\x1b':"),
        ("show map ", "'map' is not known here: '?' in its place shows what may stand there"),
        ("set cli pager o", "  on        "),
        ("exit ", "  <Enter>  Finish input"),
    ],
)
def test_help_at_every_place(shell, text, row):
    assert any(line.startswith(row.rstrip()) for line in shell.help(text)), list(shell.help(text))


def test_help_says_that_there_is_more(tmp_path):
    from tests.builders import RIGHT, esp

    bench = Bench()
    for host in range(1, 60):
        bench.forward(esp(f"10.0.0.{host}", RIGHT, 7))
    with serving(tmp_path / "sock", bench), contextlib.closing(Shell(fwctl, str(tmp_path / "sock"))) as shell:
        *_, last = shell.help("show session id ")
        assert last.split()[0] == "..." and len(list(shell.help("show session id 59"))) == 2


def test_ctrl_c_and_ctrl_d(typed):
    with pytest.raises(KeyboardInterrupt):
        typed("show\x03")
    with pytest.raises(EOFError):
        typed("\x04")


def test_history_outlives_the_shell(typed, tmp_path):
    for line in ("show tunnel", "show tunnel", "clear session id 3"):
        typed(line + ENTER)
    assert typed("show\x1b[A" + ENTER) == "show tunnel"
    assert typed("\x12r ses" + ENTER + "\x05 | count" + ENTER) == "clear session id 3 | count"
    path = tmp_path / "state/history"
    assert path.read_text() == "show tunnel\nclear session id 3\nshow tunnel\nclear session id 3 | count\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_kept_is_no_error(typed, tmp_path):
    (tmp_path / "state").write_text("")
    assert typed("show" + ENTER) == "show"
    for nothing in (tmp_path, Path("/dev/null"), Path("/proc/no/history")):
        history = FileHistory(nothing)
        history.store_string("show")
        assert list(history.load_history_strings()) == []


def test_history_is_bounded_and_any_bytes_will_do(tmp_path):
    path = tmp_path / "history"
    path.write_bytes(b"\xff\x1b[31m\n" + b"".join(b"%d\n" % number for number in range(5000)))
    assert list(FileHistory(path).load_history_strings())[:2] == ["4999", "4998"]
    assert len(path.read_text().splitlines()) == 1000 and os.listdir(tmp_path) == ["history"]


def test_history_is_where_state_belongs(monkeypatch):
    monkeypatch.setenv("HOME", "/home/jane")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert history_path() == Path("/home/jane/.local/state/fwd/fwctl-history")
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert history_path() == Path("/var/state/fwd/fwctl-history")


# --- lines that are run ----------------------------------------------------------------------------------------


def test_nothing_of_a_line_lasts(shell, capsys):
    assert shell.execute("show session id 1 --json") == 0
    assert capsys.readouterr().out.startswith("{")
    assert shell.execute("show session id 1") == 0
    assert capsys.readouterr().out.startswith("Session")


@pytest.mark.parametrize(
    ("line", "status", "reason"),
    [
        ("show", 2, "'show' wants a word after it: session, counter, tunnel"),
        ("s", 2, "'s' is ambiguous: show, set"),
        ("show session id 99", 1, "no session 99: 'show session all' lists those there are"),
        ('show "sess', 2, 'the quotation mark " is not closed'),
        ("show session all | match (", 2, "'(' is no regular expression"),
        ("set cli pager maybe", 2, "found 'maybe', want on or off"),
        ("show \x1b[31m", 2, "No such command '\\x1b[31m'"),
        ("show session all filter rule " + "x" * 70_000, 1, "a request has 65536 bytes at most"),
    ],
)
def test_a_wrong_line_is_told_in_one(shell, capsys, line, status, reason):
    assert shell.execute(line) == status
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and reason in printed.err and "--help" not in printed.err


def test_paging(shell, capfd, monkeypatch, tmp_path):
    assert shell.execute("set cli pager on") == 0
    monkeypatch.setenv("PAGER", "sed s/^/page:/")
    assert shell.execute("show session info | match supported") == 0
    assert capfd.readouterr().out.startswith("page:")
    monkeypatch.setenv("PAGER", "true")
    assert shell.execute("show session all") == 0
    monkeypatch.setenv("PAGER", str(tmp_path / "none"))
    assert shell.execute("show session id 1") == 0
    printed = capfd.readouterr()
    assert printed.out.startswith("Session") and "cannot page with" in printed.err
    monkeypatch.setenv("PAGER", "sed s/^/page:/")
    assert shell.execute("set cli pager off") == shell.execute("show tunnel") == 0
    assert "page:" not in capfd.readouterr().out


def test_what_the_terminal_would_obey_does_not_reach_it(tmp_path, capsys):
    bench = Bench()
    bench.sas(SaEstablished(child_sa(child_name="a\x1b]0;owned\x07\x9b31m\nroot@fw> ", ike_name="\u202egw")))
    with serving(tmp_path / "sock", bench), contextlib.closing(Shell(fwctl, str(tmp_path / "sock"))) as shell:
        for line in (
            "show tunnel",
            "show tunnel detail",
            "show session id 1",
            "explain session 1",
            "show tunnel --json",
        ):
            assert shell.execute(line) == 0
        shell.execute("show tunnel detail ?")
    printed = capsys.readouterr().out
    assert "\\x1b]0;owned" in printed and "\\u202egw" in printed
    assert all(letter.isprintable() for letter in printed.replace("\n", ""))
    assert not re.search("^root@fw", printed, re.MULTILINE)


def test_a_script(small_daemon):
    def follow(script, *words):
        environment = {**os.environ, "FWD_SOCKET": str(small_daemon)}
        done = subprocess.run(
            [FWCTL, *words], input=script, capture_output=True, timeout=30, env=environment, check=False
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    assert follow(b"") == (0, "", "")
    script = b"# ends\nclear session id 3\nclear session id 77\n\nshow map\n"
    script += b"clear session id 4 # yes\nexit\nclear session id 5\n"
    status, out, err = follow(script)
    assert (status, out) == (1, "session 3 cleared\nsession 4 cleared\n")
    assert [line.split(": ")[:2] for line in err.splitlines()] == [["fwctl", "line 3"], ["fwctl", "line 5"]]
    status, out, err = follow(b"\xff\xfe\0show\nshow session id 1", "--json")
    assert status == 2 and out.startswith("{") and err.startswith('{"error"') and "\\xff" in err


def test_one_command_waits_for_no_terminal(small_daemon):
    code = (
        "import sys; from fwd.cli.main import fwctl, run; run(fwctl, sys.argv[1:]);"
        "print(*{'prompt_toolkit', 'rich', 'asyncio', 'fwd.cli.shell'} & {*sys.modules}, end='', file=sys.stderr)"
    )
    words = ["--socket", str(small_daemon), "show", "session", "all"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.stderr == "" and done.stdout.startswith("----")


# --- on a terminal ------------------------------------------------------------------------------------------------


class Terminal:
    """fwctl on a terminal of its own, and what stands on it since `press`."""

    def __init__(self, path, home, **environment):
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            own = {"FWD_SOCKET": str(path), "XDG_STATE_HOME": str(home), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
            os.environ.update(own | environment)
            os.execv(FWCTL, [FWCTL])
        self._shown = ""

    def press(self, keys, while_editing=True):
        self.wait_for(while_editing)
        self._shown = ""
        os.write(self._master, keys.encode())

    def see(self, wanted):
        """Wait until a text that matches is there."""
        until = time.monotonic() + 30
        while not (found := re.search(wanted, self._shown)):
            assert select.select([self._master], [], [], until - time.monotonic())[0], repr(self._shown)
            self._shown += os.read(self._master, 65536).decode(errors="replace")
        self._shown = self._shown[found.end() :]

    def wait_for(self, is_editing):
        """Wait until keys are the prompt's, or the terminal's own, who knows Ctrl-C."""
        until = time.monotonic() + 30
        while self._is_editing() is not is_editing:
            assert time.monotonic() < until
            time.sleep(0.01)

    def interrupt(self):
        """Press Ctrl-C until it is heard: nobody does while a command is about to begin."""
        until = time.monotonic() + 30
        while not self._is_editing():
            assert time.monotonic() < until
            os.write(self._master, b"\x03")
            time.sleep(0.05)

    def _is_editing(self):
        return not termios.tcgetattr(self._master)[3] & termios.ICANON

    def status(self):
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while os.read(self._master, 65536):
                pass
        os.close(self._master)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_on_a_terminal(tmp_path, small_bench):
    path = tmp_path / "sock"
    with serving(path, small_bench):
        terminal = Terminal(path, tmp_path / "home")
        terminal.see("Tab completes")
        terminal.see(PROMPT)
        terminal.press("sh sess all | cou" + ENTER)
        terminal.see(r"Count: 24 lines")
        terminal.press("monitor" + ENTER)
        terminal.wait_for(is_editing=False)
        terminal.interrupt()
        terminal.press("show session id 4?")
        terminal.see(r"10\.0\.0\.3 -> ")
        terminal.press("\x03show session id 42" + ENTER)
        terminal.see(r"no session 42")
        terminal.press("monitor" + ENTER)
        terminal.wait_for(is_editing=False)
    terminal.see(r"no fwd|fwd hung up")
    terminal.press("show tunnel" + ENTER)
    terminal.see(r"no fwd on")
    with serving(path, small_bench):
        terminal.press("show session all | match 10.0.0.3" + ENTER)
        terminal.see(r"10\.0\.0\.3\[20033\]")
        terminal.press("show map" + ENTER)
        terminal.see(r"No such command")
        terminal.press("\x04")
        assert terminal.status() == 0


def test_on_a_dumb_terminal(tmp_path, small_daemon):
    terminal = Terminal(small_daemon, tmp_path, TERM="dumb")
    terminal.see(PROMPT)
    terminal.press("show session id 4?\n", while_editing=False)
    terminal.see(r"10\.0\.0\.3 -> ")
    terminal.press("show session all | count\n", while_editing=False)
    terminal.see(r"Count: 24 lines")
    terminal.press("quit\n", while_editing=False)
    assert terminal.status() == 0
