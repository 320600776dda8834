"""The shell's prompt on a terminal: completion, `?`, history. The only module that needs prompt_toolkit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import CompletionState
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, get_common_complete_suffix
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import completion_is_selected, has_focus
from prompt_toolkit.history import History
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import ConditionalKeyBindings, KeyBindings, KeyBindingsBase, KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.styles import Style

from .grammar import HINT
from .line import quoted, read
from .shell import Shell

#: Lines that history keeps.
_LINES_KEPT = 1000

#: Only the choice in the menu stands out, whatever colours the terminal has.
_STYLE = Style.from_dict(
    {
        "completion-menu": "noinherit",
        "completion-menu.completion.current": "noinherit reverse",
        "completion-menu.meta.completion": "noinherit",
        "completion-menu.meta.completion.current": "noinherit reverse",
        "scrollbar.background": "noinherit",
        "scrollbar.button": "noinherit reverse",
    }
)


class Prompt:
    """Asks for lines. `input` and `output` are a terminal's that is not the process's own."""

    def __init__(
        self, shell: Shell, history: Path | None = None, input: Input | None = None, output: Output | None = None
    ) -> None:
        self._shell = shell
        completer = _Completer(shell)
        self._session: PromptSession[str] = PromptSession(
            completer=completer,
            complete_while_typing=False,
            key_bindings=_keys(shell, completer),
            history=FileHistory(history or history_path()),
            enable_history_search=True,
            enable_suspend=True,
            style=_STYLE,
            input=input,
            output=output,
        )

    def ask(self, prompt: str) -> str:
        """What is typed. Raises EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C."""
        document = Document()
        while True:
            try:
                return self._session.prompt(
                    prompt, default=document.text, pre_run=partial(self._move_to, document.cursor_position)
                )
            except _HelpWanted as wanted:
                document = wanted.document
            for row in self._shell.help(document.text_before_cursor):
                click.echo(row)

    def _move_to(self, position: int) -> None:
        self._session.default_buffer.cursor_position = position


class _HelpWanted(Exception):
    """Somebody pressed `?`: the line is left for a moment, so that keys that were typed ahead come after the help."""

    def __init__(self, document: Document) -> None:
        self.document = document


class _Completer(Completer):
    """Offers what the shell says may come next, with a blank behind it."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        line = read(text)
        if line.is_comment:
            return
        blank = "" if document.current_char == " " else " "
        for item in self._shell.expected(line):
            if item.type != HINT:
                yield Completion(
                    quoted(item.value) + blank, line.start - len(text), display=item.value, display_meta=item.help
                )


def _keys(shell: Shell, completer: Completer) -> KeyBindingsBase:
    """What keys do in a line; while history is searched they are letters."""
    keys = KeyBindings()

    @keys.add("?")
    def help_here(event: KeyPressEvent) -> None:
        """Show what may come next, and go on with the line as it is."""
        document = event.current_buffer.document
        if read(document.text_before_cursor).quote:
            event.current_buffer.insert_text("?")
        else:
            event.app.exit(exception=_HelpWanted(document))

    @keys.add("tab")
    def complete(event: KeyPressEvent) -> None:
        """Write what leaves no doubt, and show the rest in the menu.

        prompt_toolkit's own way asks in the background, and what is typed ahead would come before the answer.
        """
        buffer = event.current_buffer
        if buffer.complete_state:
            buffer.complete_next()
            return
        found = list(completer.get_completions(buffer.document, CompleteEvent(completion_requested=True)))
        if len(found) == 1:
            buffer.apply_completion(found[0])
        elif found:
            common = get_common_complete_suffix(buffer.document, found)
            buffer.insert_text(common)
            rest = [completion.new_completion_from_position(len(common)) for completion in found]
            buffer.complete_state = CompletionState(buffer.document, rest)

    @keys.add(" ")
    def next_word(event: KeyPressEvent) -> None:
        """Write a word out whose beginning leaves no doubt."""
        buffer = event.current_buffer
        text = buffer.document.text_before_cursor
        line = read(text)
        if buffer.document.is_cursor_at_the_end and not line.quote and not line.is_comment:
            whole = shell.whole(line)
            if whole is not None and whole != line.last:
                buffer.delete_before_cursor(len(text) - line.start)
                buffer.insert_text(whole)
        buffer.insert_text(" ")

    @keys.add("enter", filter=completion_is_selected)
    def choose(event: KeyPressEvent) -> None:
        """Take what is selected in the menu; the line is not finished by it."""
        event.current_buffer.complete_state = None

    return ConditionalKeyBindings(keys, has_focus(DEFAULT_BUFFER))


# --- history ----------------------------------------------------------------------------------------------------


def history_path() -> Path:
    """Where history is kept (XDG Base Directory Specification: a relative path there counts as none)."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if state.startswith("/") else Path(os.path.expanduser("~")) / ".local/state"
    return folder / "fwd/fwctl-history"


class FileHistory(History):
    """Lines in a file, the newest last. Without a file that can be read or written there is less history, no error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def load_history_strings(self) -> Iterable[str]:
        """Lines, newest first."""
        with contextlib.suppress(OSError):
            if self._path.is_file():
                lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
                if len(lines) > 2 * _LINES_KEPT:
                    lines = lines[-_LINES_KEPT:]
                    self._write(lines)
                return reversed(lines)
        return []

    def store_string(self, string: str) -> None:
        """Add a line."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._path.is_file() or not self._path.exists():
                descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
                with open(descriptor, "a", encoding="utf-8", errors="replace") as file:
                    file.write(" ".join(string.splitlines()) + "\n")

    def _write(self, lines: Iterable[str]) -> None:
        """Write the file anew; whoever reads it meanwhile sees the one or the other."""
        anew = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with open(
            os.open(anew, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w", encoding="utf-8"
        ) as file:
            file.writelines(f"{line}\n" for line in lines)
        anew.replace(self._path)
