"""What a table of the configuration file is, and what its keys may be, in words: all from pydantic's models.

`fwd.config` has the models, `fwd.reference` prints them, and errors name what was wanted.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

_Item = TypeVar("_Item")

#: Where something stands in a file: keys, and numbers from 0 for entries of a list.
Place = tuple[int | str, ...]


class _OnlyAtStart:
    """Marks a key that only a start reads."""


#: The type of a key that only a start reads: a reload that changes it is refused.
AtStart = Annotated[_Item, _OnlyAtStart()]


class Section(BaseModel):
    """A table of the file: keys are written with dashes, and unknown ones are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        alias_generator=lambda name: name.rstrip("_").replace("_", "-"),
    )


class Disagreement(ValueError):
    """What is wrong between keys that are right by themselves: where, and in which words."""

    def __init__(self, problems: Sequence[tuple[Place, str]]) -> None:
        super().__init__("; ".join(words for _, words in problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a section, as its model has it. `default` is None where it has none."""

    name: str
    default: Any
    description: str
    field: FieldInfo

    @property
    def is_only_at_start(self) -> bool:
        """Whether only a start reads it."""
        return any(isinstance(mark, _OnlyAtStart) for mark in self.field.metadata)

    @property
    def choices(self) -> Sequence[str]:
        """The values it may have, if those are a few words; a list's are those of its entries."""
        return _choices(self.field.annotation)

    @property
    def bounds(self) -> tuple[int, int] | None:
        """The least and the greatest number that it may be, both included."""
        return _bounds(self.field.annotation, self.field.metadata)

    @property
    def section(self) -> type[Section] | None:
        """The model below it, if it is a table; of a list of tables, that of each."""
        return _section(self.field.annotation)

    @property
    def is_table_of_any_names(self) -> bool:
        """Whether it is a table whose keys are the user's."""
        return get_origin(self.field.annotation) is dict

    @property
    def is_list(self) -> bool:
        """Whether it has entries; where these are tables, each is written below [[its name]]."""
        return get_origin(self.field.annotation) is list


def keys(model: type[BaseModel]) -> Iterator[Key]:
    """The keys of a model, in their order."""
    for name, field in model.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        below = _section(field.annotation)
        description = field.description or (about(below) if below else "")
        yield Key(field.alias or name, default, description, field)


def about(model: type[BaseModel]) -> str:
    """What a section is for: the docstring of its model."""
    return inspect.cleandoc(model.__doc__ or "")


def explain(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    """What pydantic found wrong in a model, a line each: the key, what was found, what is wanted."""
    for place, words in problems(error, model):
        where = in_words(place)
        yield f"{where}: {words}" if where else words


def problems(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[Place, str]]:
    """The same as places, and what is wrong there in words."""
    for problem in error.errors(include_url=False):
        place = problem["loc"]
        reason = problem.get("ctx", {}).get("error")
        if isinstance(reason, Disagreement):
            yield from ((place + below, words) for below, words in reason.problems)
        elif problem["type"] == "value_error":  # raised by a validator of ours
            yield place, str(reason)
        elif problem["type"] == "extra_forbidden":
            yield place, f"no such key here; {_instead(model, place)}"
        elif problem["type"] == "missing":
            wanted = _wanted(model, place, None)
            yield place, f"missing; it has no default{f': {wanted}' if wanted else ''}"
        else:
            wanted = _wanted(model, place, problem["input"])
            if not wanted:
                wanted = problem["msg"].replace("Input should be", "want")
                wanted = wanted.replace("String should", "want a string that can")
            yield place, f"found {shown(problem['input'])}; {wanted}"


def in_words(place: Place, content: object = None) -> str:
    """A place as people say it: `dataplane.queue`, `rules #2 'branch', source #1`. `content` has the entries' names."""
    words = ""
    for before, part in zip((None, *place), place, strict=False):
        content = _entry(content, part)
        if isinstance(part, int):
            name = _entry(content, "name")
            words += f" #{part + 1}" + (f" '{name}'" if isinstance(name, str) else "")
        else:
            words += (", " if isinstance(before, int) else "." if words else "") + part
    return words


def nearest(name: str, names: Iterable[str]) -> str:
    """A question that helps with a slip of the pen, or nothing."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f"did you mean '{near[0]}'? " if near else ""


def shown(value: Any) -> str:
    """A value as it was found, on one line and not endless."""
    try:
        text = ("false", "true")[value] if isinstance(value, bool) else repr(value)
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        return "too much to show"
    return text if len(text) <= 80 else text[:77] + "..."


def _entry(content: object, part: int | str) -> object:
    try:
        return content[part]  # type: ignore[index]  # what cannot be indexed raises, too
    except (KeyError, IndexError, TypeError):
        return None


def _instead(model: type[BaseModel], place: Place) -> str:
    """What there is instead of an unknown key: one like it, the same in another table, all of this table."""
    *above, name = place
    section = model
    for part in above:
        if isinstance(part, str):  # else it is one of a list
            below = next(key.section for key in keys(section) if key.name == part)
            assert below is not None  # an unknown key can only be within a section
            section = below
    names = [key.name for key in keys(section)]
    if elsewhere := [f"[{table.name}]" for table in keys(model) if name in _names(table.section)] if not above else []:
        return f"it belongs below {' or '.join(elsewhere)}"
    if above and name in _names(model):
        return "it belongs above the first [table]"
    return nearest(str(name), names) + (f"there are: {', '.join(names)}" if names else "there are none")


def _names(model: type[BaseModel] | None) -> list[str]:
    return [key.name for key in keys(model)] if model is not None else []


def _key_at(model: type[BaseModel], place: Place) -> Key | None:
    """The key that a place is, or is below of; None if the model has none there."""
    found = None
    for part in place:
        if isinstance(part, str):
            if found is not None:
                if found.section is None:
                    return found
                model = found.section
            found = next((key for key in keys(model) if key.name == part), None)
            if found is None:
                return None
    return found


def _wanted(model: type[BaseModel], place: Place, found: Any) -> str:
    """What is wanted at a place instead of what was found there; nothing if the model cannot say."""
    key = _key_at(model, place)
    if key is None:
        return ""
    last = place[-1]
    if key.section is not None:
        return f"want [[{key.name}]], a table with two brackets" if key.is_list else f"want [{key.name}], a table"
    if key.is_table_of_any_names and len(place) == 1:
        return f"want [{key.name}], a table"
    is_list = (key.is_list and last == key.name) or (key.is_table_of_any_names and isinstance(last, str))
    if is_list and last != "[key]":  # pydantic calls a table's key so
        meant = f", or to have {last} above the first [table]" if last != key.name and last in _names(model) else ""
        return f"want a list: [{json.dumps(found) if isinstance(found, str) else '...'}]{meant}"
    if key.choices:
        return f"want {_alternatives(key.choices)}"
    if _is_text(key.field.annotation):
        return "want text in quotes" if not isinstance(found, str) else ""
    quotes = ", without quotes" if isinstance(found, str) else ""
    if key.bounds:
        return f"want a whole number from {key.bounds[0]} to {key.bounds[1]}{quotes}"
    if key.field.annotation is bool:
        return f"want true or false{quotes}"
    return ""


def _alternatives(words: Sequence[str]) -> str:
    quoted = [f"'{word}'" for word in words]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if quoted[:-1] else quoted)


def _choices(annotation: Any) -> Sequence[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return next((found for kind in _below(annotation) if (found := _choices(kind))), ())


def _bounds(annotation: Any, metadata: Iterable[Any]) -> tuple[int, int] | None:
    if annotation is not int:
        return None
    limits = {side: getattr(mark, side) for mark in metadata for side in ("ge", "le") if hasattr(mark, side)}
    return (limits["ge"], limits["le"]) if len(limits) == 2 else None


def _is_text(annotation: Any) -> bool:
    return annotation is str or any(map(_is_text, _below(annotation)))


def _section(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, Section) else None
    return next((found for kind in _below(annotation) if (found := _section(kind))), None)


def _below(annotation: Any) -> list[Any]:
    """What a type is made of: entries of a list, values of a dict, members of a union."""
    if get_origin(annotation) is Literal:
        return []
    return [kind for kind in get_args(annotation) if kind is not NoneType]
