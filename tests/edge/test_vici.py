"""VICI: messages as charon sends them, garbage, and a charon that misbehaves in ways a real one cannot be made to."""

import socket
import struct
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vici.protocol import FiniteStream, Message

from fwd.core.sa import SaDeleted, SaEstablished, SaRekeyed, SaSnapshot, SaSourceAlive, SaSourceLost
from fwd.edge import vici
from fwd.edge.vici import ViciAnswerError, ViciListener, parse_event, parse_sas
from tests.builders import packed
from tests.waiting import until

#: As strongSwan 6.0.1 sends them, shortened to what is read here and a few keys that are not.
CHILD = {
    "name": b"net",
    "uniqueid": b"1",
    "reqid": b"1",
    "state": b"INSTALLED",
    "mode": b"TUNNEL",
    "protocol": b"ESP",
    "spi-in": b"c5786ca1",
    "spi-out": b"0118dcf0",
    "encr-alg": b"AES_CBC",
    "install-time": b"12",
    "local-ts": [b"10.9.0.1/32"],
}
IKE = {
    "uniqueid": b"7",
    "version": b"2",
    "state": b"ESTABLISHED",
    "local-host": b"192.0.2.1",
    "local-port": b"500",
    "local-id": b"fwd.lab",
    "remote-host": b"192.0.2.2",
    "remote-port": b"500",
    "remote-id": b"peer.lab",
    "initiator": b"yes",
}


def message(children, ike=None, **extra):
    return {**extra, "gw": {**IKE, **(ike or {}), "child-sas": children}}


def one(child=None, ike=None):
    (sa,) = parse_sas(message({"net-1": {**CHILD, **(child or {})}}, ike))
    return sa


def test_a_child_sa_in_full():
    sa = one()
    assert (sa.ike_name, sa.child_name, sa.uniqueid, sa.reqid) == ("gw", "net", 1, 1)
    assert (sa.local, sa.remote, sa.local_port) == (packed("192.0.2.1"), packed("192.0.2.2"), 500)
    assert (sa.spi_in, sa.spi_out) == (0xC5786CA1, 0x0118DCF0)
    assert (sa.encap, sa.is_initiator, sa.local_id, sa.age_s) == (False, True, "fwd.lab", 12)


def test_nat_t_and_ipv6_and_a_link_local_scope():
    assert one({"encap": b"yes"}, {"remote-port": b"61000"}).remote_port == 61000
    assert one(ike={"local-host": b"fe80::1%eth0"}).local == packed("fe80::1")


@pytest.mark.parametrize(
    ("child", "counts"),
    [
        ({}, True),
        ({"state": b"REKEYING"}, True),
        ({"state": b"REKEYED"}, True),
        ({"state": b"DELETING"}, True),
        ({"state": b"DELETED"}, True),  # its inbound half stays for a while
        ({"state": b"CREATED"}, False),
        ({"protocol": b"AH"}, False),
    ],
)
def test_which_of_them_carry_esp(child, counts):
    assert len(list(parse_sas(message({"net-1": {**CHILD, **child}})))) == counts


def test_events():
    new = {**CHILD, "uniqueid": b"2", "spi-in": b"c0000002"}
    (up,) = parse_event("child-updown", message({"net-1": CHILD}, up=b"yes"))
    (down,) = parse_event("child-updown", message({"net-1": {**CHILD, "state": b"DELETING"}}))
    (rekey,) = parse_event("child-rekey", message({"net": {"old": CHILD, "new": new}}))
    assert isinstance(up, SaEstablished) and isinstance(down, SaDeleted) and isinstance(rekey, SaRekeyed)
    assert up.sa == down.sa == rekey.old and rekey.new.spi_in == 0xC0000002


@pytest.mark.parametrize(
    "child",
    [
        {"spi-in": b"xyz"},
        {"spi-in": b"123456789"},
        {"spi-out": {}},
        {"reqid": b"-1"},
        {"uniqueid": []},
        {"state": None},
    ],
)
def test_what_makes_no_sense_is_the_declared_error(child):
    with pytest.raises(ViciAnswerError):
        one(child)


VALUES = st.recursive(
    st.binary(max_size=9) | st.lists(st.binary(max_size=5), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from([*CHILD, *IKE, "child-sas", "old", "new", "gw"]), inner, max_size=8),
    max_leaves=25,
)


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), st.sampled_from(["child-updown", "child-rekey"]))
def test_garbage_gives_events_or_the_declared_error(garbage, name):
    for parse in (lambda: list(parse_sas(garbage)), lambda: parse_event(name, garbage)):
        try:
            parse()
        except ViciAnswerError:
            pass


MESSAGES = st.recursive(
    st.binary(max_size=300) | st.lists(st.binary(max_size=5), max_size=3),
    lambda inner: st.dictionaries(st.text(max_size=20), inner, max_size=5),
    max_leaves=20,
)


@given(st.dictionaries(st.text(max_size=20), MESSAGES, max_size=4))
def test_messages_are_read_as_strongswans_own_package_reads_them(message):
    octets = Message.serialize(message)
    assert vici.decode(octets) == Message.deserialize(FiniteStream(octets)) == message


@given(st.dictionaries(st.text(max_size=5), MESSAGES, max_size=3), st.data())
def test_a_message_that_is_cut_or_changed_is_read_as_another_or_is_the_declared_error(message, data):
    octets = bytearray(Message.serialize(message))
    for _ in range(data.draw(st.integers(0, 3))):
        if octets:
            octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(octets[: data.draw(st.integers(0, len(octets)))])
    try:
        assert isinstance(vici.decode(cut), dict)
    except ViciAnswerError:
        pass


# --- a charon that misbehaves ---------------------------------------------------------------------------


class FakeCharon:
    """A unix socket that treats every connection with `behave(connection)` in a thread of its own."""

    def __init__(self, path, behave):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._behave = behave
        self._open = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        try:
            self._behave(connection)
        except OSError:
            pass

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)
        for connection in self._open:
            connection.close()


def confirm(connection):
    """Confirm every registration, answer every command with nothing."""
    while header := connection.recv(4):
        body = connection.recv(struct.unpack("!I", header)[0])
        connection.sendall(struct.pack("!IB", 1, 5 if body[0] in (3, 4) else 1))


def half(connection):
    connection.recv(100)
    connection.sendall(struct.pack("!I", 50) + b"\x05half")
    time.sleep(30)


def lies(connection):
    connection.recv(100)
    connection.sendall(struct.pack("!I", 2**31))
    time.sleep(30)


def garbage(connection):
    connection.recv(100)
    connection.sendall(struct.pack("!I", 4) + b"\xff\xff\xff\xff")
    time.sleep(30)


def listen_to(path, events):
    listener = ViciListener(str(path), events.append)
    listener.start()
    return listener


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (lambda connection: time.sleep(30), "did not answer within 0.5 s"),
        (half, "did not answer within 0.5 s"),
        (lies, "announced a message of 2147483648 bytes"),
        (garbage, ""),
        (lambda connection: connection.close(), ""),
    ],
)
def test_faults_are_told_once_and_recovered_from(tmp_path, monkeypatch, behave, reason):
    monkeypatch.setattr(vici, "ANSWER_S", 0.5)
    events = []
    bad = FakeCharon(tmp_path / "vici", behave)
    listener = listen_to(tmp_path / "vici", events)
    try:
        # A charon that is slow beside that may be told of, too.
        until(lambda: any(isinstance(e, SaSourceLost) and e.reason and reason in e.reason for e in [*events]))
        assert all(isinstance(event, SaSourceLost) for event in events)
        bad.close()
        (tmp_path / "vici").unlink()
        good = FakeCharon(tmp_path / "vici", confirm)
        until(lambda: SaSnapshot(()) in events)
        good.close()
        (tmp_path / "vici").unlink()
        until(lambda: isinstance(events[-1], SaSourceLost))
        reasons = [event.reason for event in events if isinstance(event, SaSourceLost)]
        assert len(reasons) <= 6
    finally:
        started = time.monotonic()
        listener.stop()
        assert time.monotonic() - started < 10  # the charon behaves for 30 s


def test_a_probe_that_is_answered_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(vici, "_PROBE_S", 0.1)
    events = []
    charon = FakeCharon(tmp_path / "vici", confirm)
    listener = listen_to(tmp_path / "vici", events)
    until(lambda: len(events) >= 3)
    listener.stop()
    charon.close()
    assert events[:3] == [SaSnapshot(()), SaSourceAlive(), SaSourceAlive()]


def test_without_a_socket_it_says_what_that_means(tmp_path):
    events = []
    listener = listen_to(tmp_path / "none", events)
    until(lambda: events)
    listener.stop()
    assert events == [SaSourceLost("no such socket: strongSwan is not running, or without its vici plugin")]
