"""What sequence numbers tell, against packets that are lost, late and doubled on purpose."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwd.core.session import SpiUse


def use():
    return SpiUse(7, SimpleNamespace(), 0.0, 0.0)


def told(numbers, kernel=()):
    """What is told of these numbers; those whose index is in `kernel` are not looked at."""
    record = use()
    for index, number in enumerate(numbers):
        if index in kernel:
            record.unseen_count += 1
        else:
            record.look(number)
        record.packet_count += 1
    return record.sequence


def figures(sequence, *names):
    return tuple(getattr(sequence, name) for name in names)


def test_packets_in_order_need_no_record():
    assert told(range(1, 200)) is None


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([1, 2, 5, 6], {"lost": 2}),
        ([1, 2, 4, 3, 5], {"lost": 0, "late": 1, "depth": 1}),
        ([1, *range(3, 50), 2, 50], {"lost": 0, "late": 1, "depth": 47}),
        ([1, 2, 2, 3, 3, 3], {"lost": 0, "duplicates": 3}),
        ([1, 2, 4, 3, 3, 4, 1], {"lost": 0, "late": 1, "duplicates": 3}),
        ([*range(1, 200), 5, 200], {"outliers": 1, "lost": 0, "resets": 0}),
        ([*range(1000, 1200), 1, 2, 3, 5], {"resets": 1, "outliers": 1, "lost": 1}),
        ([1, 2, 3_000_000_000, 3, 4], {"outliers": 1, "lost": 0, "resets": 0}),
        ([2**32 - 3, 2**32 - 2, 2**32 - 1, 0, 1, 2], {"wraps": 1, "lost": 0, "resets": 0}),
        ([2**32 - 3, 2**32 - 1, 2, 1], {"wraps": 1, "lost": 2, "late": 1}),
        ([2, 1, 3, 4], {"late": 1, "surplus": 0, "lost": 0}),  # the very first was overtaken
        ([3, 1, 2, 6, 5], {"late": 3, "surplus": 0, "lost": 1}),
    ],
)
def test_each_trouble_has_its_name(numbers, expected):
    sequence = told(numbers)
    everything = {"lost": 0, "late": 0, "duplicates": 0, "outliers": 0, "resets": 0, "wraps": 0} | expected
    assert {name: getattr(sequence, name) for name in everything} == everything


def test_packets_that_overtake_others_all_the_time_lose_none():
    record = use()
    for number in [1, *(first + n for first in range(2, 3000, 3) for n in (2, 0, 1))]:
        record.look(number)
        assert record.sequence is None or record.sequence.settled == 0
    assert figures(record.sequence, "lost", "late", "depth", "surplus") == (0, 2000, 2, 0)


def test_what_the_kernel_saw_alone_is_balanced_at_the_next_look():
    numbers = [n for n in range(1, 101) if n not in (10, 20, 30)]
    assert told(numbers, kernel=range(1, 96)).lost == 3
    assert told([*numbers, 101], kernel=range(1, 96)).lost == 3
    assert told([1, 2, 2, 3, 4, 5], kernel=range(1, 5)).surplus == 1


def test_a_look_at_a_late_packet_is_set_right_by_the_next():
    numbers = [1, 2, 3, 5, 6, 7, 4, 8, 9, 10]
    assert figures(told(numbers, kernel={1, 2, 3, 4, 5, 7, 8}), "lost", "surplus", "resets") == (0, 0, 0)


def test_a_count_that_begins_anew_under_the_kernels_eyes_takes_two_looks():
    numbers = [*range(1000, 1100), *range(1, 400)]
    sequence = told(numbers, kernel=set(range(len(numbers))) - {0, 99, 200, 400, len(numbers) - 1})
    assert figures(sequence, "resets", "outliers", "lost", "surplus") == (1, 1, 0, 0)


@given(st.data())
def test_the_balance_is_exact_however_few_packets_are_looked_at(data):
    """An independent count: which numbers never came, of those below the highest."""
    sent = list(range(1, 121))
    kept = [n for n in sent if n in (1, 120) or data.draw(st.booleans())]
    order = sorted(kept, key=lambda n: n if n in (1, 120) else n + data.draw(st.integers(-5, 5)))
    order = [1, *(n for n in order if n not in (1, 120)), 120]
    unseen = {index for index in range(1, len(order) - 1) if data.draw(st.booleans())}
    record = use()
    for index, number in enumerate(order):
        if index in unseen:
            record.unseen_count += 1
        else:
            record.look(number)
    lost = record.sequence.lost if record.sequence else 0
    assert lost == 120 - len(order) and (record.sequence is None or not record.sequence.surplus)
