"""The manual pages: `python -m fwd.man FOLDER` writes man1/fwctl.1, man8/fwd.8 and man5/fwd.toml.5 there.

What they say of commands, options and keys is what the code says of itself: fwctl's tree of commands, the daemon's
command, and the models of the configuration. The form is man(7).
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import click

from . import __version__, reference, schema
from .cli.grammar import HOW_VALUES_MATCH, Clause, Filter
from .cli.main import fwctl
from .cli.pipes import pipe
from .cli.shell import Shell
from .config import DEFAULT_PATH, Config
from .daemon import main as fwd
from .rpc import DEFAULT_SOCKET, SORT_KEYS, FilterKey

#: What roff would take for something else, and a hyphen, which somebody may copy into a command line.
_ESCAPES = str.maketrans(
    {"\\": r"\e", "-": r"\-", "'": r"\(aq", "^": r"\(ha", "~": r"\(ti", '"': r"\(dq", "\xa0": r"\~", "\b": ""}
)

#: Options that every command has; the page says so once.
_EVERYWHERE = {"--help", "--json"}


def pages() -> dict[str, str]:
    """The pages, by the names that they have below a folder such as /usr/share/man."""
    return {"man1/fwctl.1": _fwctl(), "man8/fwd.8": _fwd(), "man5/fwd.toml.5": _fwd_toml()}


# --- fwctl(1) ---------------------------------------------------------------------------------------------------


def _fwctl() -> str:
    context = _context(fwctl, "fwctl")
    about = _paragraphs(fwctl)
    exit_status = next(text for text in about if text.strip().startswith("Exit status:"))
    page = _Page("fwctl", 1, fwctl.get_short_help_str(80))
    page.section("Synopsis")
    page.put(r"\fBfwctl\fR [\fB\-\-socket\fR \fIPATH\fR] [\fB\-\-json\fR] [\fICOMMAND\fR]")
    page.section("Description")
    page.help(text for text in about if text is not exit_status)
    page.text(
        "Words, filter keys, and values out of a closed set may be shortened as long as they are unambiguous:"
        " `fwctl sh sess all fil st act`. What may follow a command stands in any order, and with or without"
        " dashes: `limit 5` is `--limit 5`."
    )
    page.section("Options")
    page.options(context)
    page.section("Commands")
    page.text("Each knows `--json`, and `--help`, which tells of it what stands here.")
    commands = list(_commands(fwctl, context))
    keys: dict[tuple[str, FilterKey], list[str]] = {}
    for below in commands:
        page.command(below)
        for clause in below.command.params:
            if isinstance(clause, Filter):
                for named in clause.keys.items():
                    keys.setdefault(named, []).append(_words(below))
    page.section("Filter keys")
    page.text(f"All that are given must match. {HOW_VALUES_MATCH}")
    everywhere = max(map(len, keys.values()))
    for (name, key), those in keys.items():
        meaning = ": ".join(filter(None, (key.about[:1].upper() + key.about[1:], " or ".join(key.words))))
        only = f" Only with {_and(those)}." if len(those) < everywhere else ""
        page.item(f"{_bold(_escaped(name))} {_italic('VALUE')}", _marked(f"{meaning}.{only}"))
    page.section("Sort keys")
    for name, meaning in SORT_KEYS.items():
        page.item(_bold(_escaped(name)), _escaped(f"{meaning[:1].upper()}{meaning[1:]}."))
    page.section("Pipes")
    page.text(
        "Behind a command, and behind one another, these choose or count the lines that it prints. Another shell"
        " wants the bar in quotes: `fwctl show session all '|' match 20033`."
    )
    for below in _commands(pipe, _context(pipe, "|")):
        page.command(below)
    page.section("The shell")
    page.text(
        "Without a command, on a terminal, fwctl asks for one after the other. Tab completes words and what the"
        " daemon has: session ids, zones, rules, interfaces, tunnels. `?` shows what may come next, at every place"
        " but within quotes; there it is a question mark. A blank behind a word's unambiguous beginning writes the"
        " word out. Arrow up finds former lines that begin alike, Ctrl-R those that have a text in them. Ctrl-C"
        " gives a line up, or ends what is running; Ctrl-D leaves. A word in quotation marks may have blanks and"
        " bars in it; `#` begins a comment. What goes wrong ends no shell, and its exit status is 0. A fwd that"
        " was started again is asked again. On a terminal whose cursor cannot be moved (TERM=dumb), `?` is the"
        " last letter of a line."
    )
    page.text("Only the shell knows these:")
    shell = Shell(fwctl, "").tree
    own = click.Group(commands={name: each for name, each in shell.commands.items() if name not in fwctl.commands})
    for below in _commands(own, _context(own, "")):
        page.command(below)
    page.section("Exit status")
    page.help([exit_status.replace("Exit status: ", "", 1)])
    page.section("Environment")
    page.item(_bold("FWD_SOCKET"), _escaped(f"The daemon's control socket; without it {DEFAULT_SOCKET}."))
    page.item(_bold("PAGER"), "What the shell shows long output with, if it is told to; without it less.")
    page.item(_bold("XDG_STATE_HOME"), _escaped("Where the shell's history is kept; without it ~/.local/state."))
    page.section("Files")
    page.item(_italic(_escaped(DEFAULT_SOCKET)), "The control socket.")
    page.item(_italic(_escaped("~/.local/state/fwd/fwctl-history")), "The shell's history.")
    page.section("See also")
    page.put(r"\fBfwd\fR(8), \fBfwd.toml\fR(5)")
    return page.whole()


def _commands(group: click.Group, context: click.Context) -> Iterator[click.Context]:
    """A context for each command below a group, with the words that lead there."""
    for name, command in group.commands.items():
        below = _context(command, name, context)
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield below
        if isinstance(command, click.Group):
            yield from _commands(command, below)


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    return click.Context(command, info_name=name, parent=parent, **command.context_settings)


def _words(context: click.Context) -> str:
    """The words that lead to a command, without the program's name."""
    return context.command_path.removeprefix("fwctl ").strip()


# --- fwd(8), fwd.toml(5) ------------------------------------------------------------------------------------------


def _fwd() -> str:
    context = _context(fwd, "fwd")
    page = _Page("fwd", 8, fwd.get_short_help_str(200))
    page.section("Synopsis")
    page.put(" ".join([r"\fBfwd\fR", *(f"[{_option(option, context)}]" for option in _options(context))]))
    page.section("Description")
    page.help(_paragraphs(fwd))
    page.section("Options")
    page.options(context)
    page.section("Files")
    page.item(_italic(_escaped(str(DEFAULT_PATH))), r"The configuration: \fBfwd.toml\fR(5).")
    page.item(_italic(_escaped(Config().control.socket)), r"The control socket, for \fBfwctl\fR(1).")
    page.item(_italic(_escaped(Config().state.file)), "The state file: sessions and counts, for the next fwd.")
    page.section("See also")
    page.put(r"\fBfwctl\fR(1), \fBfwd.toml\fR(5), \fBswanctl\fR(8), \fBnft\fR(8)")
    return page.whole()


def _fwd_toml() -> str:
    page = _Page("fwd.toml", 5, "configuration of the fwd daemon")
    page.section("Description")
    page.text(
        f"`{DEFAULT_PATH}`, or what `fwd --config` names, is TOML. What it leaves out is as here; without a file,"
        " all is. The daemon takes it whole or not at all: `fwd --check` says what is wrong, `systemctl reload"
        " fwd` applies a change, and the sessions that exist meet the new rules, zones and timeouts, too. Keys"
        " that are marked [restart] want `systemctl restart fwd`. `fwd --print-default-config` prints a file with"
        " every key and its default."
    )
    page.section("Keys")
    page.table("", schema.keys(Config))
    page.section("See also")
    page.put(r"\fBfwd\fR(8), \fBfwctl\fR(1)")
    return page.whole()


# --- the form ---------------------------------------------------------------------------------------------------


class _Page:
    """A page that grows from its head to its foot."""

    def __init__(self, name: str, section: int, summary: str) -> None:
        # A page that is built again is the same (reproducible-builds.org, SOURCE_DATE_EPOCH).
        date = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())))
        self._lines = [f'.TH {name.upper()} {section} {date} "fwd {__version__}" "fwd"']
        self.section("Name")
        summary = summary.rstrip(".")
        self.put(rf"{name} \- {_escaped(summary[0].lower() + summary[1:])}")

    def whole(self) -> str:
        """The page."""
        return "\n".join(self._lines) + "\n"

    def section(self, name: str) -> None:
        """Begin a section."""
        self._lines.append(f".SH {name.upper()}")

    def put(self, roff: str) -> None:
        """Text that is roff already, in lines as short as mandoc wants them."""
        for line in textwrap.wrap(roff, 78, break_long_words=False, break_on_hyphens=False):
            self._lines.append(rf"\&{line}" if line[0] in ".'" else line)

    def text(self, text: str) -> None:
        """A paragraph; what is between backticks is typed as it stands there."""
        if not self._lines[-1].startswith(".S"):
            self._lines.append(".PP")
        self.put(_marked(text))

    def item(self, term: str, roff: str) -> None:
        """A term, and what it means below it."""
        self._lines += [".TP", term]
        self.put(roff)

    def help(self, paragraphs: Iterable[str]) -> None:
        """What click has as help: paragraphs to be filled, and examples, which are indented."""
        for text in paragraphs:
            lines = text.splitlines()
            if all(line.startswith("  ") for line in lines):
                self.example(line[2:] for line in lines)
            else:
                self.text(text)

    def example(self, lines: Iterable[str]) -> None:
        """Lines as they are, but for what explains them far to the right: that stands below."""
        self._lines += [".PP", ".nf", ".RS 2"]
        for line in lines:
            typed, *meaning = re.split(r" {3,}", line, maxsplit=1)
            self._lines += [_bold(_escaped(typed)), *(_escaped(f"    {text}") for text in meaning)]
        self._lines += [".RE", ".fi"]

    def options(self, context: click.Context) -> None:
        """The options of a command."""
        for option in _options(context):
            record = option.get_help_record(context)
            self.item(_option(option, context, ", "), _marked(record[1] if record else ""))

    def command(self, context: click.Context) -> None:
        """A command under a heading: how it is written, what it does, what may follow it."""
        command = context.command
        self._lines.append(f".SS {_escaped(_words(context))}")
        pieces = [piece for piece in command.collect_usage_pieces(context) if piece not in ("[OPTIONS]", "COMMAND")]
        pieces = [piece for piece in pieces if not piece.startswith("[COMMAND") and piece != "[ARGS]..."]
        if pieces:
            self.put(" ".join([_bold(_escaped(_words(context))), *map(_piece, pieces)]))
        self.help(_paragraphs(command))
        for param in command.params:
            if isinstance(param, Clause):
                words, about = param.get_help_record(context)
                self.item(_piece(words), _marked(about))
            elif isinstance(param, click.Argument):
                self.item(_italic(_escaped(param.make_metavar(context).strip("[]"))), _marked(param.help or ""))
            elif not set(param.opts) & _EVERYWHERE:
                record = param.get_help_record(context)
                self.item(_bold(_escaped(", ".join(param.opts))), _marked(record[1] if record else ""))

    def table(self, name: str, keys: Iterable[schema.Key]) -> None:
        """The keys of a table of the configuration, then the tables below it."""
        below = []
        for key in keys:
            if key.section is not None or key.is_table_of_any_names:
                below.append(key)
            else:
                value = "" if key.default is None else f" = {json.dumps(key.default, ensure_ascii=False)}"
                self.item(_bold(_escaped(key.name)) + _escaped(value), _marked(reference.remark(key)))
        for key in below:
            path = f"{name}.{key.name}".lstrip(".")
            is_list = key.is_list and key.section is not None
            self._lines.append(f".SS {_escaped(f'[[{path}]]' if is_list else f'[{path}]')}")
            self.text(key.description)
            if key.section is not None:
                self.table(path, schema.keys(key.section))
            for example in key.field.examples or ():
                self.example(_toml(path, example, is_list))


def _toml(name: str, table: Mapping[str, object], is_list: bool) -> list[str]:
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()]
    return [f"[[{name}]]" if is_list else f"[{name}]", *lines]


def _options(context: click.Context) -> list[click.Option]:
    """A command's options, `--help` included."""
    return [param for param in context.command.get_params(context) if isinstance(param, click.Option)]


def _option(option: click.Option, context: click.Context, between: str = "|") -> str:
    """An option with its value, as usage has it."""
    value = "" if option.is_flag or option.count else f" {_italic(_escaped(option.make_metavar(context)))}"
    return between.join(_bold(_escaped(name)) for name in option.opts) + value


def _paragraphs(command: click.Command) -> list[str]:
    """The paragraphs of a command's help; behind `\\b`, lines are as they are."""
    text = inspect.cleandoc(command.help or "")
    return [part.replace("\b\n", "").strip("\n") for part in re.split(r"\n[ \t]*\n", text) if part.strip("\b\n ")]


def _piece(text: str) -> str:
    """A piece of a usage line: values are in capitals, words are not."""
    return re.sub(r"\w[\w-]*", lambda word: (_italic if word[0].isupper() else _bold)(_escaped(word[0])), text)


def _marked(text: str) -> str:
    """Text for a page: `what is between backticks` in bold."""
    return re.sub(r"`([^`]*)`", r"\\fB\1\\fR", _escaped(text)).replace("`", r"\(ga")


def _escaped(text: str) -> str:
    """Text that roff shows as it is."""
    escaped = text.translate(_ESCAPES)
    return rf"\&{escaped}" if escaped[:1] in (".", "'") else escaped


def _bold(roff: str) -> str:
    return rf"\fB{roff}\fR"


def _italic(roff: str) -> str:
    return rf"\fI{roff}\fR"


def _and(names: Iterable[str]) -> str:
    *names, last = names
    return f"{', '.join(names)} and {last}" if names else last


def main() -> None:
    """Write the pages below the folder that is named."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fwd.man FOLDER (such as /usr/local/share/man)")
    for name, text in pages().items():
        path = Path(sys.argv[1]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
