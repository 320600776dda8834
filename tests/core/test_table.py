from collections import Counter

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fwd.core.session import Application, Flow, Generation, Session
from fwd.core.state import State, Trigger
from fwd.core.table import MAX_ID, KeyInUse, SessionTable, TableFull
from tests.builders import ALLOW_ALL, child_sa

#: The names of the IKE_SA and of the CHILD_SA of a tunnel that a session may be.
TUNNELS = st.none() | st.tuples(st.sampled_from(["gw", "hub"]), st.sampled_from(["net", "hub"]))
KEYS = st.lists(st.tuples(st.just(b"addr"), st.booleans(), st.integers(1, 12)), min_size=1, max_size=3, unique=True)


def new_session(session_id, tunnel=None):
    ends = Flow(b"\1" * 4, "any", 1), Flow(b"\2" * 4, "any", 2)
    session = Session(session_id, Application.IPSEC_ESP, *ends, ALLOW_ALL, False, "a", "b", 3600, 0.0)
    if tunnel is not None:
        session.generations = (Generation(child_sa(ike_name=tunnel[0], child_name=tunnel[1]), 0.0),)
    return session


class TableMachine(RuleBasedStateMachine):
    """The table against plain dictionaries."""

    @initialize(capacity=st.integers(1, 6), keep=st.integers(0, 4))
    def begin(self, capacity, keep):
        self.table = SessionTable(capacity, keep)
        self.capacity, self.keep = capacity, keep
        self.live = {}
        self.keys = {}
        self.ended = {}
        self.now = 0.0

    @rule(keys=KEYS, tunnel=TUNNELS)
    def add(self, keys, tunnel):
        session_id = self.table.allocate_id()
        assert session_id not in self.live and session_id not in self.ended and session_id > 0
        session = new_session(session_id, tunnel)
        entries = {key: session.c2s if index % 2 == 0 else session.s2c for index, key in enumerate(keys)}
        if len(self.live) >= self.capacity:
            with pytest.raises(TableFull):
                self.table.add(session, entries)
            assert session.state is State.INIT
        elif any(key in self.keys for key in keys):
            with pytest.raises(KeyInUse):
                self.table.add(session, entries)
            assert session.state is State.INIT and not session.keys
        else:
            self.table.add(session, entries)
            self.live[session_id] = session
            self.keys.update(entries)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), keys=KEYS)
    def index_more(self, which, keys):
        session = list(self.live.values())[which % len(self.live)]
        entries = dict.fromkeys(keys, session.s2c)
        if any(key in self.keys and self.keys[key].session is not session for key in keys):
            with pytest.raises(KeyInUse):
                self.table.index(session, entries)
        else:
            self.table.index(session, entries)
            self.keys.update(dict.fromkeys(keys, session.s2c))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), keys=KEYS)
    def unindex(self, which, keys):
        session = list(self.live.values())[which % len(self.live)]
        self.table.unindex(session, keys)
        for key in keys:
            if key in self.keys and self.keys[key].session is session:
                del self.keys[key]

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), leaves_trace=st.booleans())
    def end(self, which, leaves_trace):
        session = list(self.live.values())[which % len(self.live)]
        self.now += 1
        if leaves_trace:
            session.move(Trigger.PERMIT)
            self.table.end(session, self.now)
            assert session.state is State.INIT
            self.ended[session.id] = (self.now, session)
            while len(self.ended) > self.keep:
                del self.ended[next(iter(self.ended))]
        else:
            self.table.remove(session)
        del self.live[session.id]
        self.keys = {key: entry for key, entry in self.keys.items() if entry.session is not session}

    @rule(age=st.integers(0, 5))
    def forget(self, age):
        self.table.forget_ended(self.now - age)
        self.ended = {key: entry for key, entry in self.ended.items() if entry[0] >= self.now - age}

    @invariant()
    def agrees_with_the_model(self):
        if not hasattr(self, "table"):
            return
        assert list(self.table) == list(self.live.values())
        assert len(self.table) == len(self.live)
        assert +Counter(self.table.tally) == Counter((s.application, s.state, s.type) for s in self.live.values())
        for after in (0, 7, 15):
            assert [session.id for session in self.table.after(after)] == sorted(n for n in self.live if n > after)
        readable = {**self.live, **{number: session for number, (_, session) in self.ended.items()}}
        tunnels = [readable[number] for number in sorted(readable) if readable[number].sa is not None]
        assert list(self.table.tunnels_after(0)) == tunnels
        assert list(self.table.tunnels_after(7)) == [session for session in tunnels if session.id > 7]
        for name in ("gw", "net", "hub", "nobody"):
            named = [session for session in tunnels if name in (session.sa.ike_name, session.sa.child_name)]
            assert list(self.table.tunnels_after(0, name)) == named
        assert self.table.utilisation == len(self.live) / self.capacity
        assert list(self.table.ended) == [session for _, session in self.ended.values()]
        for number in range(1, 13):
            for flag in (True, False):
                assert self.table.lookup((b"addr", flag, number)) == self.keys.get((b"addr", flag, number))
        for session in self.live.values():
            assert self.table.find(session.id) is session is self.table.live(session.id)
            assert set(session.keys) == {key for key, entry in self.keys.items() if entry.session is session}
            assert len(session.keys) == len(set(session.keys))
        for session_id, (_, session) in self.ended.items():
            assert self.table.find(session_id) is session
            assert self.table.live(session_id) is None


TestTable = TableMachine.TestCase
TestTable.settings = hypothesis_settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_ids_begin_at_one_and_wrap_without_meeting_one_that_is_there():
    table = SessionTable(10, 10)
    sessions = [new_session(table.allocate_id()) for _ in range(3)]
    for session in sessions:
        table.add(session, {})
    assert [session.id for session in sessions] == [1, 2, 3]
    table.remove(sessions[1])
    table.last_id = MAX_ID
    assert table.allocate_id() == 2
