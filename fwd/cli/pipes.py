"""`| match RE`, `| except RE`, `| count`: what stands between a command's output and the page, line by line."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO, TypeAlias

import click

from .grammar import Group, argument

#: Takes a line and gives those that go on in its place; None is the end of the output.
Stage: TypeAlias = Callable[[str | None], Iterable[str]]


class _Expression(click.ParamType[re.Pattern[str]]):
    """A regular expression."""

    name = "RE"
    hint = "<regular expression>"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> re.Pattern[str]:
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # `[[` may mean more one day
                return re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            self.fail(f"'{value}' is no regular expression: {error}", param, ctx)


@click.group("|", cls=Group)
def pipe() -> None:
    """Choose or count the lines of what a command prints."""


@pipe.command()
@argument("expression", metavar="RE", type=_Expression(), help="Regular expression, in quotes if it has blanks.")
def match(expression: re.Pattern[str]) -> Stage:
    """Show only lines in which a regular expression is found."""
    return lambda line: [line] if line is not None and expression.search(line) else []


@pipe.command("except")
@argument("expression", metavar="RE", type=_Expression(), help="Regular expression, in quotes if it has blanks.")
def leave_out(expression: re.Pattern[str]) -> Stage:
    """Leave out lines in which a regular expression is found."""
    return lambda line: [line] if line is not None and not expression.search(line) else []


@pipe.command()
def count() -> Stage:
    """Show only how many lines there are."""
    number = 0

    def stage(line: str | None) -> Iterable[str]:
        nonlocal number
        if line is None:
            return [f"Count: {number} line{'' if number == 1 else 's'}"]
        number += 1
        return []

    return stage


class _Piped(io.TextIOBase):
    """A stream whose lines go through stages."""

    def __init__(self, stages: Sequence[Stage], out: TextIO) -> None:
        self._stages = stages
        self._out = out
        self._rest = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._pass_on(line, 0)
        return len(text)

    def flush(self) -> None:
        self._out.flush()

    def end(self) -> None:
        """There is no more: a line without an end is one, too, and each stage hears of it."""
        if self._rest:
            self._pass_on(self._rest, 0)
        for number in range(len(self._stages)):
            self._pass_on(None, number)
        self.flush()

    def _pass_on(self, line: str | None, number: int) -> None:
        if number < len(self._stages):
            for further in self._stages[number](line):
                self._pass_on(further, number + 1)
        elif line is not None:
            self._out.write(line + "\n")


def split(words: Iterable[str]) -> list[list[str]]:
    """The words of a command, and those behind each `|`."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "|":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


@contextlib.contextmanager
def through(parts: Iterable[Sequence[str]]) -> Iterator[None]:
    """Let what is printed meanwhile go through the pipes. Raises click.UsageError if they make no sense."""
    stages: list[Stage] = [pipe.main(list(words), prog_name="|", standalone_mode=False) for words in parts]
    if not all(callable(stage) for stage in stages):
        raise click.exceptions.Exit(0)  # somebody asked for help
    if not stages:
        yield
        return
    piped = _Piped(stages, sys.stdout)
    with contextlib.redirect_stdout(piped):
        try:
            yield
        except (click.Abort, KeyboardInterrupt):  # that is how `monitor` ends
            piped.end()
            raise
        piped.end()
