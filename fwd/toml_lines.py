"""In which line of a TOML file something stands. tomllib does not say; it is asked what the file's first lines mean."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence

#: Looking ends when so many lines were read, over and over: that takes a quarter of a second.
_MOST_LINES_READ = 20_000

_AT_LINE = re.compile(r"\(at line (\d+), column \d+\)$")

#: What tomllib says of slips that people make, and what is to be done.
_ADVICE = (
    ("Invalid value", 'a text wants quotes: "..."'),
    ("Unclosed array", "a list ends with ]"),
    ("Cannot overwrite a value", "the key is there twice: keep one"),
    ("Cannot declare", "the table is there twice: put its keys below one heading"),
    ("Expected '='", "want KEY = VALUE, or [TABLE]"),
    ("Expected newline or end of document", "want one KEY = VALUE a line, and # before a comment"),
    ("Illegal character '\\n'", 'a text ends with " on its line'),
)


class Lines:
    """The lines of a whole file that tomllib can read."""

    def __init__(self, text: str) -> None:
        self._lines = text.split("\n")
        self._beginnings: dict[int, object] = {}
        self._lines_left = _MOST_LINES_READ

    def find(self, place: Sequence[int | str]) -> int | None:
        """The line, from 1 on, of a key, a table's heading or a list's entry; if it is not there, of what it is in.

        None if it is not to be found at a bearable price.
        """
        try:
            while place and not _has(self._beginning(len(self._lines)), place):
                place = place[:-1]
            if not place:
                return None
            before, behind = 0, len(self._lines)  # so many lines are without the place, so many have it
            while before + 1 < behind:
                middle = (before + behind) // 2
                if _has(self._beginning(self._whole(middle)), place):
                    behind = middle
                else:
                    before = middle
            return self._whole(before) + 1
        except _TooDear:
            return None

    def _beginning(self, count: int) -> object:
        """What the first lines mean; None if they end in the midst of a value."""
        if count not in self._beginnings:
            self._lines_left -= count
            if self._lines_left < 0:
                raise _TooDear
            try:
                self._beginnings[count] = tomllib.loads("\n".join(self._lines[:count]))
            except ValueError:
                self._beginnings[count] = None
        return self._beginnings[count]

    def _whole(self, count: int) -> int:
        """The most lines up to that many that do not end in the midst of a value."""
        while self._beginning(count) is None:
            count -= 1
        return count


def explain(error: tomllib.TOMLDecodeError, text: str) -> tuple[int, str]:
    """Of a file that is no TOML: the line, and in words what is wrong there and what to do."""
    words = str(error)
    at = _AT_LINE.search(words)
    line = int(at[1]) if at else text.rstrip().count("\n") + 1
    found = text.split("\n")[line - 1].strip()
    advice = next((f"; {advice}" for slip, advice in _ADVICE if words.startswith(slip)), "")
    reason = re.sub(r" \(at [^)]*\)$", "", words)
    return line, f"not TOML: {reason}: {found[:80]!r}{advice}"


class _TooDear(Exception):
    pass


def _has(content: object, place: Sequence[int | str]) -> bool:
    for part in place:
        try:
            content = content[part]  # type: ignore[index]  # what cannot be indexed raises, too
        except (KeyError, IndexError, TypeError):
            return False
    return True
