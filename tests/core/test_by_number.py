from hypothesis import given
from hypothesis import strategies as st

from fwd.core.by_number import ByNumber

NUMBERS = st.integers(1, 30)


@given(st.lists(st.tuples(NUMBERS, st.booleans()), max_size=80), NUMBERS)
def test_it_is_a_dictionary_that_goes_on_in_order_after_any_number(steps, after):
    things, model = ByNumber(), {}
    for number, is_put in steps:
        if is_put:
            model[number] = f"thing {number}"
            things.put(number, model[number])
        elif number in model:
            del model[number]
            things.drop(number)
        assert things == model
        assert list(things.after(after)) == [model[n] for n in sorted(model) if n > after]


def test_its_order_outlives_many_numbers_and_stays_small():
    things = ByNumber()
    for number in range(1, 1001):
        things.put(number, number)
        if number > 10:
            things.drop(number - 10)
    assert list(things.after(995)) == [996, 997, 998, 999, 1000]
    assert len(things._order) < 100
