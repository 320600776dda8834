"""fwctl without a command: a shell in PAN-OS's manner on a terminal, else a script of commands on stdin.

What is common to all ways of reading a line is here, and imports nothing that a script would wait for; `prompt.py` has
the terminal.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import click

from .. import __version__
from ..rpc import LiveKind, RpcError
from .client import Client, NoDaemon, printable
from .grammar import HINT, LIVE_TIMEOUT_S, Asked, Group, Item, OneOf, argument, expected, pick
from .line import Line, read
from .main import run
from .pipes import pipe, split

#: Terminals on which a cursor cannot be moved.
_DUMB = ("", "dumb", "unknown")

#: What is paged, if paging is on; the others go on without end, or are short.
_PAGED = ("show", "explain")

_INTERRUPTED = 130


class _Nobody(Client):
    """A daemon that has nothing: asked with it, the grammar tells its own words alone."""

    def __init__(self) -> None:
        super().__init__("")

    def values(self, kind: LiveKind, prefix: str) -> tuple[list[tuple[str, str]], bool]:
        return [], False


class Shell:
    """Runs lines, and says what may come next in one; `path` is the daemon's control socket.

    One connection is kept from line to line. Whatever becomes of a line, the next one can be run.
    """

    def __init__(self, tree: Group, path: str, as_json: bool = False) -> None:
        self._path = path
        self._asked = Asked(Client(path), as_json)
        self.tree = Group(commands={**tree.commands, **self._own_words()})
        self._is_paging = False
        self.is_over = False

    def _own_words(self) -> Mapping[str, click.Command]:
        """What only a shell has."""

        @click.group(cls=Group)
        def own() -> None:
            pass

        @own.command("exit")
        def leave() -> None:
            """Leave the shell."""
            self.is_over = True

        @own.command("quit")
        def leave_too() -> None:
            """Leave the shell."""
            self.is_over = True

        @own.group("set")
        def change() -> None:
            """Change how the shell behaves."""

        @change.group("cli")
        def of_the_shell() -> None:
            """Change how the shell behaves."""

        @of_the_shell.command()
        @argument("state", metavar="on|off", type=OneOf(("on", "off")), help="Long output page by page, or at once.")
        def pager(state: str) -> None:
            """Show long output page by page, with $PAGER or less, or all of it at once, as at the start."""
            self._is_paging = state == "on"

        return own.commands

    # --- a line ---------------------------------------------------------------------------------------------

    def execute(self, text: str, prefix: str = "") -> int:
        """Run a line. Gives the exit status that it had as a command; `prefix` stands before the reason."""
        line = read(text)
        if line.asks_for_help:
            for row in self.help(text.rstrip()[:-1]):
                click.echo(row)
            return 0
        if line.quote:
            click.echo(f"{prefix}the quotation mark {line.quote} is not closed", err=True)
            return 2
        words = line.all_words
        if not words:
            return 0
        try:
            with self._paged() if self._is_paging and self._may_be_long(words) else contextlib.nullcontext():
                return run(self.tree, words, replace(self._asked), prefix)
        except KeyboardInterrupt:
            return _INTERRUPTED
        except Exception as error:  # a defect; the shell and its connection go on
            self._asked.client.close()
            click.echo(f"{prefix}this is a defect of fwctl: {type(error).__name__}: {error!r}", err=True)
            return 1

    def greet(self, keys: str) -> None:
        """Say what this is, which keys help, and whether anybody answers."""
        click.echo(f"fwctl {__version__}: {keys}, exit leaves")
        try:
            self._asked.client.call("session.info")
        except (NoDaemon, RpcError) as error:
            click.echo(str(error), err=True)

    def close(self) -> None:
        """Hang up."""
        self._asked.client.close()

    def _may_be_long(self, words: Sequence[str]) -> bool:
        with contextlib.suppress(click.UsageError):
            return pick(words[0], self.tree.commands) in _PAGED
        return False

    @staticmethod
    @contextlib.contextmanager
    def _paged() -> Iterator[None]:
        """Let what is printed meanwhile go to a pager, which stays as long as somebody reads."""
        command = shlex.split(os.environ.get("PAGER") or "less")
        # What fits the screen is just shown; nobody gets another program's powers by way of the pager.
        environment = {"LESS": "-FX", "LESSSECURE": "1", **os.environ}
        try:
            pager = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, text=True, errors="replace")
        except OSError as error:
            click.echo(f"cannot page with {command[0]}: {error.strerror}", err=True)
            yield
            return
        assert pager.stdin is not None
        try:
            with contextlib.redirect_stdout(pager.stdin):
                yield
        finally:
            with contextlib.suppress(OSError):
                pager.stdin.close()
            while pager.returncode is None:
                with contextlib.suppress(KeyboardInterrupt):  # that is the pager's
                    pager.wait()

    # --- what may come next -----------------------------------------------------------------------------------

    def expected(self, line: Line) -> list[Item]:
        """What the word that is being typed may be, values that the daemon has included."""
        client = Client(self._path, LIVE_TIMEOUT_S)
        with contextlib.closing(client):
            return self._expected(line.words, line.last, Asked(client))

    def whole(self, line: Line) -> str | None:
        """The word of the grammar that is meant by the beginning that is being typed, if it can only be one.

        Where a value of the user's may stand, which is when there is a hint, it may be that.
        """
        items = self._expected(line.words, line.last, Asked(_Nobody()))
        return items[0].value if line.last and len(items) == 1 and items[0].type != HINT else None

    def _expected(self, words: Sequence[str], last: str, asked: Asked) -> list[Item]:
        *before, current = split(words)
        return expected(pipe if before else self.tree, current, last, asked)

    def help(self, text: str) -> Iterable[str]:
        """What may come next behind a text, in lines."""
        line = read(text)
        if line.quote or line.is_comment:
            return ["  any text"]
        items = self.expected(line)
        if not items and line.last:
            items = self.expected(line._replace(last=""))
            if items:
                return [f"nothing here begins with '{printable(line.last)}':", *_rows(items)]
        return _rows(items) if items else [self._where_it_ends(line.words)]

    def _where_it_ends(self, words: Sequence[str]) -> str:
        """What to say where nothing may follow."""
        for number in range(1, len(words) + 1):
            if not self._expected(words[:number], "", Asked(_Nobody())):
                return (
                    f"'{printable(words[number - 1])}' is not known here: '?' in its place shows what may stand there"
                )
        return "nothing may follow"


def _rows(items: Iterable[Item]) -> list[str]:
    """Words and what they mean, in columns that fit the terminal."""
    items = list(items)
    width = max(shutil.get_terminal_size().columns - 1, 40)
    column = min(max(len(item.value) for item in items), width // 2)
    rows = []
    for item in items:
        head = f"{item.mark or ' '} {item.value:<{column}}  "
        rows += textwrap.wrap(item.help or "", width, initial_indent=head, subsequent_indent=" " * (column + 4)) or [
            head.rstrip()
        ]
    return rows


# --- where lines come from -----------------------------------------------------------------------------------


def start(tree: Group, path: str, as_json: bool) -> int:
    """Run what comes from stdin until its end. Gives the exit status.

    On a terminal that is 0: what became of its commands, somebody has seen. Of a script it is that of the first command
    that failed; those behind it are run all the same.
    """
    if sys.stdin is None:
        raise click.UsageError("there is no stdin to read commands from")
    sys.stdin.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    shell = Shell(tree, path, as_json)
    with contextlib.closing(shell):
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return _follow(shell, sys.stdin)
        _converse(shell)
    return 0


def _follow(shell: Shell, script: Iterable[str]) -> int:
    """Run a script, a command a line."""
    first_failure = 0
    for number, text in enumerate(script, 1):
        status = shell.execute(text.rstrip("\r\n"), f"fwctl: line {number}: ")
        if status == _INTERRUPTED:
            return status
        first_failure = first_failure or status
        if shell.is_over:
            break
    return first_failure


def _converse(shell: Shell) -> None:
    """Run what somebody types."""
    if os.environ.get("TERM", "") in _DUMB:
        shell.greet("? at the end of a line shows what may come next")
        ask: Callable[[str], str] = _ask_plainly
    else:
        shell.greet("Tab completes, ? shows what may come next")
        from .prompt import Prompt  # only who has a terminal waits until prompt_toolkit is loaded

        ask = Prompt(shell).ask
    prompt = f"{_user()}@{printable(socket.gethostname().partition('.')[0])}> "
    while not shell.is_over:
        try:
            for text in ask(prompt).splitlines():  # what is pasted may have several
                if not shell.is_over:
                    shell.execute(text)
        except KeyboardInterrupt:
            pass
        except EOFError:
            return


def _ask_plainly(prompt: str) -> str:
    """What is typed, on a terminal that can do nothing. Raises EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C."""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        click.echo()
        raise


def _user() -> str:
    """Who asks, as the daemon sees it."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
