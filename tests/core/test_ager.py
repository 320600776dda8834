import pytest

from fwd.core.ager import Ager
from fwd.core.constants import AGER_WORK_PER_TURN
from fwd.core.table import SessionTable
from tests.core.test_table import new_session


@pytest.fixture
def table():
    return SessionTable(100_000, 0)


@pytest.fixture
def ager(table):
    return Ager(table, 100.0)


def add(table):
    session = new_session(table.allocate_id())
    table.add(session, {})
    return session


def test_a_session_is_due_when_its_time_is_up_and_only_once(table, ager):
    session = add(table)
    ager.arm(session, 10, 100.0)
    assert ager.next_deadline() == 110.0
    assert list(ager.due(109.9)) == []
    assert list(ager.due(110.0)) == [session]
    assert list(ager.due(200.0)) == []


def test_a_packet_prolongs_by_writing_one_field(table, ager):
    session = add(table)
    ager.arm(session, 10, 100.0)
    session.expires_at = ager.age(105.0) + 10
    assert list(ager.due(114.9)) == []
    assert ager.time_to_live_s(session, 106.0) == 9.0
    assert list(ager.due(115.0)) == [session]


def test_an_earlier_deadline_takes_the_place_of_a_later_one(table, ager):
    session = add(table)
    ager.arm(session, 3600, 100.0)
    ager.arm(session, 60, 100.0)
    assert list(ager.due(160.0)) == [session]
    assert list(ager.due(4000.0)) == []


def test_accelerated_ageing_shrinks_every_time_to_live_at_once(table, ager):
    session = add(table)
    ager.arm(session, 100, 100.0)
    ager.set_factor(2, 120.0)
    assert ager.time_to_live_s(session, 120.0) == 40.0
    assert ager.next_deadline() == 160.0
    ager.set_factor(1, 140.0)
    assert ager.time_to_live_s(session, 140.0) == 40.0
    assert list(ager.due(179.9)) == []
    assert list(ager.due(180.0)) == [session]


def test_the_work_of_a_turn_is_bounded_and_nothing_is_forgotten(table, ager):
    sessions = [add(table) for _ in range(3 * AGER_WORK_PER_TURN)]
    for session in sessions:
        ager.arm(session, 10, 100.0)
    turns = [list(ager.due(110.0)) for _ in range(4)]
    assert [len(turn) for turn in turns] == [AGER_WORK_PER_TURN] * 3 + [0]
    assert sum(turns, []) == sessions


def test_deadlines_of_sessions_that_ended_otherwise_do_not_pile_up(table, ager):
    for _ in range(20_000):
        session = add(table)
        ager.arm(session, 3600, 100.0)
        table.remove(session)
    assert len(ager._heap) < 5000
