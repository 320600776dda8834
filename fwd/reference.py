"""The configuration file with every key, its default and a comment: what `fwd --print-default-config` prints.

All of it is in the models of `fwd.config`: a section's docstring, a key's type, default, description and examples.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from . import schema
from .config import Config
from .schema import Key

WIDTH = 120  # columns
_COMMENTS_AT = 28  # the column at which comments beside keys begin, where the keys leave room
_UNBROKEN = "\xa0"  # a space at which no line ends

_HEAD = (
    "/etc/fwd/fwd.toml: what fwd does. Every key stands here with its default; delete what you do not change."
    " Check a change with `fwd --check`, apply it with `systemctl reload fwd`: it takes effect whole or not at all,"
    " and the sessions that exist meet the new rules, zones and timeouts, too."
    " Keys marked [restart] want `systemctl restart fwd` instead. `fwd --print-default-config` prints this file."
)


def default_config() -> str:
    """The file. What is in it are exactly the defaults."""
    return "\n".join([*_comment(_HEAD), *_table("", schema.keys(Config), {}), ""])


def remark(key: Key) -> str:
    """What is to be said of a key: its description, and what of its type the description leaves open."""
    more = []
    if key.bounds:
        more.append(f"{key.bounds[0]}{_UNBROKEN}to{_UNBROKEN}{key.bounds[1]}")
    if any(_quoted(choice) not in key.description for choice in key.choices):
        more.append("one of " * (not key.is_list) + ", ".join(map(_quoted, key.choices)))
    if key.is_only_at_start:
        more.append("restart")
    return " ".join([*([key.description] if key.description else []), *([f"[{'; '.join(more)}]"] if more else [])])


def _table(name: str, keys: Iterable[Key], values: Mapping[str, Any]) -> Iterator[str]:
    """A table's keys, then the tables below it. `values` are there instead of defaults."""
    lines, below = [], []
    for key in keys:
        if key.section is not None or key.is_table_of_any_names:
            below.append(key)
            continue
        value = values.get(key.name, key.default)
        # TOML has no word for "nothing": the line is a comment, with an example of what there could be.
        example = value if value is not None else next(iter(key.field.examples or [""]))
        lines.append((("# " if value is None else "") + f"{key.name} = {_value(example)}", remark(key)))
    if lines and not name:
        yield ""
    yield from _beside(lines)
    for key in below:
        yield ""
        yield from _comment(key.description)
        yield from _one_below(f"{name}.{key.name}".lstrip("."), key)


def _one_below(name: str, key: Key) -> Iterator[str]:
    examples = key.field.examples or []
    if key.section is None:  # a table whose keys are the user's
        yield f"[{name}]"
        yield from (f"{entry} = {_value(value)}" for entry, value in key.default.items())
        yield from (f"# {entry} = {_value(value)}" for example in examples for entry, value in example.items())
    elif key.is_list:
        for entry in key.default:
            values = {below.name: getattr(entry, attribute) for below, attribute in _attributes(key.section)}
            yield f"[[{name}]]"
            yield from _table(name, schema.keys(key.section), values)
        for example in examples:
            yield from ["", f"# [[{name}]]", *(f"# {entry} = {_value(value)}" for entry, value in example.items())]
    else:
        yield f"[{name}]"
        yield from _table(name, schema.keys(key.section), {})


def _attributes(section: type[schema.Section]) -> Iterator[tuple[Key, str]]:
    return zip(schema.keys(section), section.model_fields, strict=True)


def _beside(lines: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Keys with their comments to the right of them, in one column."""
    column = max([_COMMENTS_AT, *(len(line) + 2 for line, _ in lines)])
    for line, comment in lines:
        first, *others = textwrap.wrap(comment, WIDTH - column - 2, break_on_hyphens=False) or [""]
        yield f"{line:<{column}}# {first}".replace(_UNBROKEN, " ") if first else line
        yield from (f"{'':{column}}# {other}".replace(_UNBROKEN, " ") for other in others)


def _comment(text: str) -> Iterator[str]:
    yield from (f"# {line}" for line in textwrap.wrap(text, WIDTH - 2, break_on_hyphens=False))


def _value(value: Any) -> str:
    """A value as TOML writes it; of strings, numbers, truths and lists this is what JSON writes."""
    return json.dumps(value, ensure_ascii=False)


def _quoted(choice: str) -> str:
    return f'"{choice}"'
