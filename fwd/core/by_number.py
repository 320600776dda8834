"""Things by number, and in the order of their numbers from any one on: long answers are given of them page by page."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import TypeVar

_T = TypeVar("_T")

#: The order is written anew when, beside so many numbers, more than half of it are nobody's any more.
_STALE = 64


class ByNumber(dict[int, _T]):
    """A dictionary by numbers, which mostly ascend as they come. What changes it is `put` and `drop`, alone."""

    __slots__ = ("_order",)

    def __init__(self) -> None:
        super().__init__()
        #: The numbers in ascending order, among others that were.
        self._order: list[int] = []

    def put(self, number: int, thing: _T) -> None:
        """The number is this thing's."""
        self[number] = thing
        order = self._order
        if not order or number > order[-1]:
            order.append(number)
        elif order[position := bisect_left(order, number)] != number:
            order.insert(position, number)

    def drop(self, number: int) -> None:
        """The number is nobody's any more. Raises KeyError if it was not before."""
        del self[number]
        if len(self._order) > 2 * len(self) + _STALE:
            self._order = sorted(self)

    def after(self, number: int) -> Iterator[_T]:
        """What has a higher number, in their order; nothing must change meanwhile."""
        order = self._order
        for position in range(bisect_right(order, number), len(order)):
            thing = self.get(order[position])
            if thing is not None:
                yield thing
