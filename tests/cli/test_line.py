"""A line of the shell, taken apart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwd.cli.line import quoted, read


@pytest.mark.parametrize(
    ("text", "words", "last"),
    [
        ("", [], ""),
        ("  show\tsess", ["show"], "sess"),
        ("show ", ["show"], ""),
        ("show|match x", ["show", "|", "match"], "x"),
        ("show |", ["show", "|"], ""),
        (r"match \d+\.1", ["match"], r"\d+\.1"),
        ('match "a | b" x', ["match", "a | b"], "x"),
        (r'match "say \"no\" \d \\" x', ["match", r'say "no" \d \\'], "x"),
        ("match 'a\"b", ["match"], 'a"b'),
        ("match don't", ["match"], "don't"),
        ('rule "" ', ["rule", ""], ""),
        ('rule ""', ["rule", ""], ""),
        ('"a b"c', [], "a bc"),
        ("show # | match x", ["show"], ""),
        ("show a#b", ["show"], "a#b"),
    ],
)
def test_words(text, words, last):
    line = read(text)
    assert (line.words, line.last) == (words, last)


@pytest.mark.parametrize(
    ("text", "start", "quote"),
    [("show se", 5, ""), ('rule "a b', 5, '"'), ("rule 'a", 5, "'"), ("rule ", 5, ""), ('rule "a" ', 9, "")],
)
def test_where_the_last_word_begins(text, start, quote):
    assert read(text)[2:4] == (start, quote)


@given(st.text())
def test_any_text_can_be_read(text):
    line = read(text)
    assert 0 <= line.start <= len(text)


@given(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda value: not value.endswith("\\")))
def test_what_is_quoted_is_read_as_it_was(value):
    assert read(quoted(value) + " ").words == [value]
    assert read(quoted(value)).all_words == [value]
