"""One line of the shell: its words, and the word that is being typed."""

from __future__ import annotations

from typing import NamedTuple

_BLANKS = " \t"
_QUOTES = "\"'"

#: What a value has to be quoted for.
_SPECIAL = frozenset(_BLANKS + _QUOTES + "|#?")


class Line(NamedTuple):
    """What was typed: whole words, then the one that is still being typed (empty behind a blank).

    `start` is where that one begins, its quotation mark included; `quote` the mark that is not closed yet, if one is.
    """

    words: list[str]
    last: str
    start: int
    quote: str
    is_comment: bool

    @property
    def all_words(self) -> list[str]:
        """The words of a line that nobody goes on with."""
        return [*self.words, self.last] if self.last or self.quote else self.words

    @property
    def asks_for_help(self) -> bool:
        """Whether a question mark stands at the end, where a key press would have shown help."""
        return self.last.endswith("?") and not self.quote and not self.is_comment


def read(text: str) -> Line:
    r"""Take a line apart.

    Words end at blanks and at `|`, which is a word of its own. `"` and `'` quote if a word begins with them; within, a
    backslash takes the mark's meaning away. Anywhere else a backslash is one, for regular expressions are full of
    them. `#` at the beginning of a word begins a comment.
    """
    words: list[str] = []
    last, start, quote = "", 0, ""
    is_word = False
    position = 0
    while position < len(text):
        letter = text[position]
        if quote:
            if letter == "\\" and position + 1 < len(text):
                position += 1
                last += text[position] if text[position] == quote else letter + text[position]
            elif letter == quote:
                quote = ""
            else:
                last += letter
        elif letter in _BLANKS or letter == "|":
            if is_word:
                words.append(last)
            if letter == "|":
                words.append(letter)
            last, start, is_word = "", position + 1, False
        elif not is_word and letter == "#":
            return Line(words, "", len(text), "", True)
        elif not is_word and letter in _QUOTES:
            quote, is_word = letter, True
        else:
            last += letter
            is_word = True
        position += 1
    if is_word and not last and not quote:  # "" at the end: a value that is empty
        return Line([*words, last], "", len(text), "", False)
    return Line(words, last, start, quote, False)


def quoted(value: str) -> str:
    """A value as it has to be typed."""
    if value and _SPECIAL.isdisjoint(value):
        return value
    return '"' + value.replace('"', '\\"') + '"'
