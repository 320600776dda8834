"""What makes click speak PAN-OS: abbreviations, words behind a command, values that complete themselves.

The tree of commands in `main.py` is the one grammar. The command line, its `--help`, the shell, the completion of bash,
zsh and fish, and the manual page all come from it.

- At every place the beginning of a word will do, if no other word there begins so.
- A *clause* is a word that may follow a command, with what it wants after it: `limit 5`, `filter KEY VALUE ...`. To
  click it is an option whose dashes may be left out (`--limit 5` is the same), so a command declares it as it declares
  an option, and gets its value as a parameter.
- What may come next is asked with `expected`; completion and the shell's `?` show it.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem, ShellComplete

from ..rpc import DEFAULT_SOCKET, FilterKey, LiveKind, RpcError
from .client import Client, NoDaemon
from .when import when

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
Item = CompletionItem[str]

#: The type of an item that is shown where help is asked for, and never inserted.
HINT = "hint"

#: How long the daemon may take to say what values there are, in seconds: somebody waits with a finger on Tab.
LIVE_TIMEOUT_S = 0.5

#: What may stand before the value of a filter key: all but that.
_NOT = "not "

#: What help says below the filter keys.
HOW_VALUES_MATCH = "A value may be a list, a,b,c with no blanks: any of them. 'not' before it: none of them."

#: Where a context keeps how far the words behind its command lead.
_LINE = "fwctl.line"


@dataclass
class Asked:
    """What holds for the whole command line."""

    client: Client
    as_json: bool = False

    def show(self, answer: Any, text: Callable[[Any], str]) -> None:
        """Print an answer, for people or for programs."""
        click.echo(json.dumps(answer, indent=2) if self.as_json else text(answer))


# --- words ------------------------------------------------------------------------------------------------


def pick(word: str, words: Iterable[str]) -> str | None:
    """The one of the words that is meant: the word itself, or the only one that begins so; None if none does.

    Raises click.UsageError that names all that it may be.
    """
    candidates = [name for name in words if word and name.startswith(word)]
    if word in candidates:
        return word
    if len(candidates) > 1:
        raise click.UsageError(f"'{word}' is ambiguous: {', '.join(candidates)}")
    return candidates[0] if candidates else None


def _instead(word: str, words: Iterable[str]) -> str:
    """What to write instead of a word that is not there."""
    from difflib import get_close_matches

    words = list(words)
    near = get_close_matches(word, words, 1)
    return f"did you mean '{near[0]}'?" if near else f"there are {', '.join(words)}"


def _item(word: str, help: str, mark: str = " ", kind: str = "plain") -> Item:
    """A word that may come next; `mark` as in PAN-OS: `>` leads to further words, `+` may be left out."""
    return CompletionItem(word, kind, help, mark=mark)


# --- values -----------------------------------------------------------------------------------------------


class Number(click.ParamType[int]):
    """A number in decimal or, if it may be, behind 0x in hex. `live` names what the daemon has such numbers of."""

    name = "number"

    def __init__(self, minimum: int, maximum: int, *, may_be_hex: bool = False, live: LiveKind | None = None) -> None:
        self.minimum, self.maximum, self.may_be_hex, self.live = minimum, maximum, may_be_hex, live
        self.hint = f"<{minimum}-{maximum}>"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number. Raises click.BadParameter."""
        if isinstance(value, int):
            return value
        digits, base = (value[2:], 16) if self.may_be_hex and value.startswith("0x") else (value, 10)
        valid = "0123456789abcdefABCDEF"[: 22 if base == 16 else 10]
        number = int(digits, base) if 0 < len(digits) <= 10 and all(digit in valid for digit in digits) else -1
        if not self.minimum <= number <= self.maximum:
            in_hex = ", in decimal or, behind 0x, in hex" if self.may_be_hex else ""
            self.fail(f"found '{value}', want a number from {self.minimum} to {self.maximum}{in_hex}", param, ctx)
        return number

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
        """The numbers that the daemon has."""
        return _live(ctx, self.live, incomplete) if self.live else []


class Moment(click.ParamType[float]):
    """A time, in seconds since the epoch."""

    name = "time"
    hint = "<time>"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The time. Raises click.BadParameter."""
        if isinstance(value, float):
            return value
        try:
            return when(value, time.time())
        except ValueError as error:
            self.fail(str(error), param, ctx)


class OneOf(click.ParamType[str]):
    """A word out of a closed set, in upper or lower case, or its beginning.

    If somebody else `checks_the_rest`, a word that is not in the set is left to him.
    """

    name = "word"
    hint = ""

    def __init__(self, words: Mapping[str, str] | Sequence[str], *, checks_the_rest: bool = False) -> None:
        self.words = words if isinstance(words, Mapping) else dict.fromkeys(words, "")
        self.checks_the_rest = checks_the_rest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The whole word. Raises click.UsageError."""
        found = pick(str(value).lower(), self.words)
        if found is None and not self.checks_the_rest:
            self.fail(f"found '{value}', want {' or '.join(self.words)}", param, ctx)
        return str(value) if found is None else found

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
        """The words that begin so."""
        return [_item(word, help) for word, help in self.words.items() if word.startswith(incomplete.lower())]


class Text(click.ParamType[str]):
    """Any text. `live` names what the daemon has names of (`zone`, `rule`, ...), for completion."""

    name = "text"
    hint = "<value>"

    def __init__(self, live: LiveKind | None = None) -> None:
        self.live = live

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text as it is."""
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
        """The names that the daemon has."""
        return _live(ctx, self.live, incomplete) if self.live else []


class Several(click.ParamType[str]):
    """Values of another type with commas between."""

    name = "list"

    def __init__(self, one: click.ParamType[str]) -> None:
        self.one = one
        self.hint = getattr(one, "hint", "")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The values, each as its own type has it. Raises click.UsageError."""
        return ",".join(self.one.convert(part, param, ctx) for part in str(value).split(","))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
        """Lists with one value more: what may follow the last comma and does not stand there yet."""
        *given, begun = incomplete.split(",")
        items = self.one.shell_complete(ctx, param, begun)
        return [_item(",".join((*given, item.value)), item.help or "") for item in items if item.value not in given]


def _live(ctx: click.Context, kind: LiveKind, prefix: str) -> list[Item]:
    """What the daemon has of a kind now; nothing if it does not answer at once."""
    asked = ctx.find_object(Asked)
    path = ctx.find_root().params.get("path") or DEFAULT_SOCKET
    client = asked.client if asked else Client(path, LIVE_TIMEOUT_S)
    with suppress(NoDaemon, RpcError):
        values, are_more = client.values(kind, prefix)
        more = [_item("...", "There are more: type how it begins.", kind=HINT)] if are_more else []
        return [*(_item(value, meaning) for value, meaning in values), *more]
    return []


class Place(NamedTuple):
    """A value that is wanted: by which parameter, of which type, and what it means."""

    param: click.Parameter
    type: click.ParamType[Any]
    help: str

    def complete(self, ctx: click.Context, incomplete: str) -> list[Item]:
        """What may stand here: a hint of what is wanted, and the values that are known."""
        hint = getattr(self.type, "hint", "<value>")
        hints = [_item(hint, self.help, kind=HINT)] if hint else []
        return [*hints, *self.type.shell_complete(ctx, self.param, incomplete)]


class Argument(click.Argument):
    """A value that follows its command's last word."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Item]:
        """The command knows the place."""
        return ctx.command.shell_complete(ctx, incomplete)


class Clause(click.Option):
    """A word that may follow a command in any order with others, and the values that it wants."""

    param_type_name = "word"

    @property
    def word(self) -> str:
        """The word, without dashes."""
        return self.opts[0].removeprefix("--")

    @property
    def places(self) -> list[Place]:
        """The values that it wants after it."""
        if self.is_flag:
            return []
        types = self.type.types if isinstance(self.type, click.Tuple) else [self.type] * self.nargs
        return [Place(self, kind, self.help or "") for kind in types]

    def spelled(self, ctx: click.Context) -> str:
        """The clause as a usage line has it: `limit N`."""
        return self.word if self.is_flag else f"{self.word} {self.make_metavar(ctx)}"

    def get_usage_pieces(self, ctx: click.Context) -> list[str]:
        """In brackets, if it may be left out."""
        return [self.spelled(ctx) if self.required else f"[{self.spelled(ctx)}]"]

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """What `--help` says of it."""
        return self.spelled(ctx), self.help or ""

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """How errors name it."""
        return f"'{self.word}'"

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Item]:
        """The command knows the place."""
        return ctx.command.shell_complete(ctx, incomplete)


class Filter(Clause):
    """`filter KEY VALUE ...`: any number of keys, each once; the command gets a mapping.

    A value may be several with commas between, and `not` may stand before it, as far as the key has that; the command
    gets `not VALUE` then.
    """

    def __init__(self, *args: Any, keys: Mapping[str, FilterKey], **attrs: Any) -> None:
        attrs |= {"multiple": True, "nargs": 2, "metavar": "KEY VALUE ...", "callback": self._mapping}
        super().__init__(*args, **attrs)
        self.keys = keys

    @staticmethod
    def _mapping(ctx: click.Context, param: click.Parameter, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
        return dict(pairs)

    def place_of(self, key: str) -> Place:
        """The value that a key wants."""
        known = self.keys[key]
        one = OneOf(known.words, checks_the_rest=True) if known.words else Text(known.live)
        return Place(self, Several(one) if known.is_list else one, known.meaning)

    def type_cast_value(self, ctx: click.Context, value: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
        """Keys and values, with whole words for their beginnings."""
        pairs = []
        for key, text in value:
            values = text.removeprefix(_NOT)
            negation = text[: len(text) - len(values)]
            try:
                pairs.append((key, negation + self.place_of(key).type.convert(values, self, ctx)))
            except click.UsageError as error:
                raise click.UsageError(f"filter {key}: {error.message}", ctx) from None
        return tuple(pairs)


# --- the words behind a command ---------------------------------------------------------------------------


class _Line:
    """The words behind a command, taken one after the other; what click gets for them; what may come next.

    click gets the clauses first, with dashes, then the arguments behind `--`: values may begin with a dash.
    """

    def __init__(self, params: Sequence[click.Parameter]) -> None:
        self.clauses = {param.word: param for param in params if isinstance(param, Clause)}
        self.options = [param for param in params if isinstance(param, click.Option) and not isinstance(param, Clause)]
        self._flags = {name for option in self.options for name in option.opts}
        self.arguments = deque(
            Place(param, param.type, param.help or "")
            for param in params
            if isinstance(param, click.Argument)
            for _ in range(param.nargs)
        )
        self.given: set[str] = set()
        self._wanted: deque[Place] = deque()
        self._wanting = ""
        self._negation = ""
        self._scope: Filter | None = None
        self._keys: set[str] = set()
        self._optional: list[str] = []
        self._positional: list[str] = []

    @property
    def place(self) -> Place | None:
        """The value that is wanted next, if one is."""
        return next(iter(self._wanted or self.arguments), None)

    @property
    def keys(self) -> Mapping[str, FilterKey]:
        """The filter's keys, behind `filter`."""
        return self._scope.keys if self._scope else {}

    @property
    def may_be_negated(self) -> bool:
        """Whether `not` may stand here."""
        is_value = self._wanted and not self._negation and self._wanting in self.keys
        return bool(is_value) and self.keys[self._wanting].has_not

    @property
    def is_whole(self) -> bool:
        """Whether the line may end here."""
        missing = any(clause.required and word not in self.given for word, clause in self.clauses.items())
        wants = (
            self._wanted or any(place.param.required for place in self.arguments) or (self._scope and not self._keys)
        )
        return not missing and not wants

    def words(self) -> dict[str, str]:
        """The words that may come next, and what they mean."""
        keys = {key: known.meaning for key, known in self.keys.items() if key not in self._keys}
        if self._scope and not self._keys:
            return keys
        clauses = {word: clause.help or "" for word, clause in self.clauses.items() if word not in self.given}
        return {**keys, **clauses}

    def take(self, word: str) -> None:
        """Take the next word. Raises click.UsageError that says what to write instead."""
        if self.may_be_negated and word == _NOT.strip():
            self._negation = _NOT
        elif self._wanted:
            self._wanted.popleft()
            self._optional.append(self._negation + word)
            self._negation = ""
        elif word in self._flags:
            self._optional.append(word)
        elif self.arguments:
            self.arguments.popleft()
            self._positional.append(word)
        elif word.startswith("--") and "=" in word:
            word, _, value = word.partition("=")
            self._follow(word)
            self.take(value)
        else:
            self._follow(word)

    def end(self) -> list[str]:
        """What click gets. Raises click.UsageError if something is missing."""
        if self._wanted:
            raise click.UsageError(f"'{self._wanting}' wants a value after it")
        if self._scope and not self._keys:
            raise click.UsageError(f"{self._scope.word} wants KEY VALUE")
        return [*self._optional, "--", *self._positional]

    def _follow(self, word: str) -> None:
        bare = word.removeprefix("--")
        possible = [name for name in self.words() if bare == word or name in self.clauses]
        found = pick(bare, possible)
        if found is None:
            if bare in self.given or bare in self._keys:
                raise click.UsageError(f"'{bare}' stands there twice")
            raise click.UsageError(self._what_instead(word))
        self._wanting = found
        if found in self.keys and bare == word:
            assert self._scope is not None
            self._keys.add(found)
            self._optional += [self._scope.opts[0], found]
            self._wanted.append(self._scope.place_of(found))
            return
        clause = self.clauses[found]
        self.given.add(found)
        self._scope = clause if isinstance(clause, Filter) else None
        self._keys = set()
        if self._scope is None:
            self._optional.append(clause.opts[0])
            self._wanted.extend(clause.places)

    def _what_instead(self, word: str) -> str:
        if word.startswith("-"):
            return f"No such option '{word}': {_instead(word, sorted(self._flags))}"
        if self._scope:
            return f"no {self._scope.word} key '{word}': {_instead(word, self.words())}"
        left = [clause for name, clause in self.clauses.items() if name not in self.given]
        wanted = " or ".join(f"'{clause.spelled(click.get_current_context())}'" for clause in left)
        return f"found '{word}', want {wanted or 'nothing more'}"


class _Spoken(click.Command):
    """What commands and groups of them have in common."""

    def _at_the_end(self) -> list[Item]:
        """What is shown where a command may end."""
        return [_item("|", "Pipe through a command", kind=HINT), _item("<Enter>", "Finish input", kind=HINT)]

    def summary(self) -> str:
        """The first sentence of the help."""
        return self.get_short_help_str(100)


class Command(_Spoken):
    """A command whose clauses may stand in any order, with or without dashes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Let click have what the words mean; without reliance on them (completion), note how far they lead."""
        line = _Line(self.get_params(ctx))
        try:
            for word in args:
                line.take(word)
            words = [] if ctx.resilient_parsing else line.end()
        except click.UsageError as error:
            if ctx.resilient_parsing:
                ctx.meta[_LINE] = None
                return []
            if not set(args) & set(ctx.help_option_names):
                error.ctx = ctx
                raise
            words = ctx.help_option_names[:1]
        ctx.meta[_LINE] = line
        return super().parse_args(ctx, words)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Item]:
        """What may stand at the end of the words."""
        line: _Line | None = ctx.meta.get(_LINE)
        if line is None:
            return []
        end = self._at_the_end() if line.is_whole and not incomplete else []
        if line.place is not None:
            negation = [_item(_NOT.strip(), "All but what follows.", "+")] if line.may_be_negated else []
            words = [item for item in negation if item.value.startswith(incomplete)]
            return [*line.place.complete(ctx, incomplete), *words, *end]
        dashes = "--" if incomplete.startswith("-") else ""
        words = [_item(dashes + word, help, "+") for word, help in line.words().items()]
        kind = "plain" if dashes else HINT  # an option is offered to one who begins it
        options = [_item(option.opts[-1], option.help or "", "+", kind) for option in line.options]
        return [item for item in (*words, *options) if item.value.startswith(incomplete)] + end

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Clauses, filter keys, then options."""
        clauses = [param for param in self.get_params(ctx) if isinstance(param, Clause)]
        if clauses:
            with formatter.section("What may follow, in any order"):
                formatter.write_dl([clause.get_help_record(ctx) for clause in clauses])
        for clause in clauses:
            if isinstance(clause, Filter):
                with formatter.section("Filter keys, any number of them (all must match)"):
                    formatter.write_dl([(key, known.meaning) for key, known in clause.keys.items()])
                    formatter.write_paragraph()
                    formatter.write_text(HOW_VALUES_MATCH)
        for clause in clauses:
            if isinstance(clause.type, OneOf) and any(clause.type.words.values()):
                with formatter.section(f"Keys of {clause.word}"):
                    formatter.write_dl(list(clause.type.words.items()))
        records = [
            param.get_help_record(ctx)
            for param in self.get_params(ctx)
            if isinstance(param, click.Option) and not isinstance(param, Clause)
        ]
        with formatter.section("Options"):
            formatter.write_dl([record for record in records if record])


class Group(_Spoken, click.Group):
    """Commands by their first word, or its beginning."""

    command_class = Command
    group_class = type

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first word means. Raises click.UsageError that says what to write instead."""
        word = args[0]
        try:
            name = pick(word, self.commands)
            if name is None and not word.startswith("-"):
                raise click.UsageError(f"No such command '{word}': {_instead(word, self.commands)}")
        except click.UsageError as error:
            if ctx.resilient_parsing:
                ctx.meta[_LINE] = None
                return None, None, []
            error.ctx = ctx
            raise
        return super().resolve_command(ctx, [name or word, *args[1:]])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Item]:
        """The words that may stand here."""
        if ctx.meta.get(_LINE, self) is None:
            return []
        items = [
            _item(name, command.summary(), ">" if isinstance(command, Group) else " ")
            for name, command in self.commands.items()
            if name.startswith(incomplete) and isinstance(command, _Spoken)
        ]
        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        return items + (self._at_the_end() if self.invoke_without_command and ctx.parent and not incomplete else [])


def expected(tree: click.Command, words: Sequence[str], incomplete: str, asked: Asked | None = None) -> list[Item]:
    """What may come behind the words and begin with `incomplete`; `asked` has the daemon that knows live values."""
    return ShellComplete(tree, {"obj": asked}, "fwctl", "").get_completions(list(words), incomplete)


# --- how commands declare what they want --------------------------------------------------------------------


def clause(word: str, **attrs: Any) -> Decorator:
    """Let a word follow the command; the rest is as with click.option."""
    return click.option(f"--{word}", cls=Clause, **attrs)


def filtered(keys: Mapping[str, FilterKey]) -> Decorator:
    """Let `filter KEY VALUE ...` follow the command, which gets it as the mapping `chosen`."""
    return click.option("--filter", "chosen", cls=Filter, keys=keys, help="Only what matches.")


def argument(name: str, **attrs: Any) -> Decorator:
    """Let a value follow the command; as click.argument."""
    return click.argument(name, cls=Argument, **attrs)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let `--json` stand after the command's words as well as before them."""

    def remember(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            context.ensure_object(Asked).as_json = True

    return click.option(
        "--json", is_flag=True, expose_value=False, callback=remember, help="Print JSON, for programs."
    )(command)
