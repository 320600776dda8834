import pytest

from fwd.core.state import TRANSITIONS, IllegalTransition, State, Trigger, next_state
from tests.builders import LEFT, RIGHT, Bench, esp

LEGAL = {(state, trigger) for state, row in TRANSITIONS.items() for trigger in row}
ILLEGAL = [(state, trigger) for state in State for trigger in Trigger if (state, trigger) not in LEGAL]


@pytest.mark.parametrize(("state", "trigger"), ILLEGAL)
def test_every_illegal_transition_is_refused_and_changes_nothing(state, trigger):
    bench = Bench()
    bench.forward(esp(LEFT, RIGHT, 1))
    session = bench.session
    session.state = state
    with pytest.raises(IllegalTransition, match=f"{state} by {trigger}"):
        session.move(trigger)
    assert session.state is state


def test_every_state_has_a_row_and_every_row_leads_on():
    assert set(TRANSITIONS) == set(State)
    assert all(TRANSITIONS.values())


def test_every_session_can_come_back_to_init():
    for start in State:
        reached, frontier = {start}, [start]
        while frontier:
            for state in TRANSITIONS[frontier.pop()].values():
                if state not in reached:
                    reached.add(state)
                    frontier.append(state)
        assert State.INIT in reached


def test_discard_only_ends():
    assert [next_state(State.DISCARD, trigger) for trigger in TRANSITIONS[State.DISCARD]] == [State.CLOSED]
