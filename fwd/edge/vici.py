"""strongSwan over VICI: what charon says of its CHILD_SAs, as the core's SA events.

Order matters (SPEC section 6). One thread does all of it: it subscribes on one connection, then asks for
`list-sas` on another, hands that snapshot over, and only then reads the events that came meanwhile. An event
that charon raised after it made the snapshot is therefore never overwritten by it; one that it raised before
is replayed on top of it, which does no harm: events are assignments, they come in order, so the last one for
an SA stands. The same goes for every later reconcile, which also finds what an event was lost for (charon
drops messages over 512 KiB, and raises no child-updown for an SA that was rekeyed before it is deleted). An IKE_SA
with a thousand CHILD_SAs or more is such a message: that one is missing shows by charon's own count of them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vici import Session
from vici.exception import EventUnknownException
from vici.protocol import RECV_TIMEOUT_DEFAULT, Packet, Transport

from ..core.sa import ChildSa, SaDeleted, SaEstablished, SaEvent, SaRekeyed, SaSnapshot, SaSourceAlive, SaSourceLost

log = logging.getLogger(__name__)

_EVENTS = ("child-updown", "child-rekey")

#: Raised when a peer's address changes (MOBIKE); strongSwan before 5.9.9 does not know it.
_EVENT_MOVED = "ike-update"

#: How long charon may take for an answer, and for the rest of a message that it began, in seconds.
ANSWER_S = 5.0
#: How often the events' connection looks up from waiting, charon is asked whether it lives, and all SAs are read.
_POLL_S = 0.2
_PROBE_S = 5.0
_RECONCILE_S = 30.0
#: In any case not before so many times as long as it took: charon handles no IKE while it lists its SAs.
_LISTING_REST = 10.0
#: All SAs are read so soon after a rekey: charon does not tell when the old SA goes. It keeps the inbound half for five
#: seconds (delete_rekeyed_delay in strongswan.conf(5)), for packets that are late.
_AFTER_REKEY_S = 6.0
#: And so soon after a peer moved: charon tells that before it has changed the CHILD_SAs.
_AFTER_MOVE_S = 0.3
#: And so soon after an event that cannot be read, of which there may be many.
_AFTER_GARBAGE_S = 1.0
#: Pauses between attempts to connect: doubled from the first to the last.
_BACKOFF_S = (0.2, 0.4)

#: What the registrations, and then all SAs together, may take, in seconds and bytes (some 200,000 SAs' worth): a charon
#: that never comes to an end is as good as none.
_LONG_ANSWER_S = 120.0
_LONG_ANSWER_BYTES = 256 << 20
_CHUNK_BYTES = 64 << 10
#: How often fwd looks whether the socket is still the one that it connected to.
_SOCKET_LOOK_S = 0.5

#: The elements of a message (README.md of libcharon's vici plugin).
_SECTION, _SECTION_END, _VALUE, _LIST, _ITEM, _LIST_END = range(1, 7)
_NAMED = frozenset({_SECTION, _VALUE, _LIST})
_WITH_VALUE = frozenset({_VALUE, _ITEM})

_EVENT_PACKET = bytes([Packet.EVENT])

#: CHILD_SA states (libcharon/sa/child_sa.h) in which SAs are installed. One that is being replaced or deleted carries
#: packets until it is gone.
_LEAVING = frozenset({"REKEYED", "DELETING", "DELETED"})
_INSTALLED = frozenset({"INSTALLED", "UPDATING", "REKEYING", *_LEAVING})


class ViciAnswerError(ValueError):
    """Charon said something that is no CHILD_SA; the message says what."""


# --- what the messages mean ---------------------------------------------------------------------------


def parse_sas(message: Mapping[str, Any]) -> Iterator[ChildSa]:
    """The ESP CHILD_SAs of one `list-sas` message that carry traffic. Raises ViciAnswerError."""
    for ike_name, ike, child in _children(message):
        if _is_esp(child) and _text(child, "state") in _INSTALLED:
            yield _child_sa(ike_name, ike, child)


def is_leaving(message: Mapping[str, Any]) -> bool:
    """Whether a `list-sas` message has CHILD_SAs that will be gone soon, of which charon will not tell."""
    return any(_text(child, "state") in _LEAVING for _, _, child in _children(message))


def parse_event(name: str, message: Mapping[str, Any]) -> list[SaEvent]:
    """What a `child-updown` or `child-rekey` message says. Raises ViciAnswerError."""
    events: list[SaEvent] = []
    for ike_name, ike, child in _children(message):
        if name == "child-rekey":
            old, new = _section(child, "old"), _section(child, "new")
            if _is_esp(new):
                events.append(SaRekeyed(_child_sa(ike_name, ike, old), _child_sa(ike_name, ike, new)))
        elif _is_esp(child):
            sa = _child_sa(ike_name, ike, child)
            events.append(SaEstablished(sa) if message.get("up") == b"yes" else SaDeleted(sa))
    return events


def _children(message: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Each CHILD_SA section with the IKE_SA section around it and that one's name."""
    for ike_name, ike in message.items():
        if isinstance(ike, Mapping):
            for child in _section(ike, "child-sas").values() if "child-sas" in ike else ():
                if not isinstance(child, Mapping):
                    raise ViciAnswerError(f"a CHILD_SA of '{ike_name}' is no section")
                yield ike_name, ike, child


def _child_sa(ike_name: str, ike: Mapping[str, Any], child: Mapping[str, Any]) -> ChildSa:
    return ChildSa(
        ike_name=ike_name,
        child_name=_text(child, "name"),
        uniqueid=_integer(child, "uniqueid"),
        reqid=_integer(child, "reqid"),
        local=_address(ike, "local-host"),
        remote=_address(ike, "remote-host"),
        local_port=_integer(ike, "local-port"),
        remote_port=_integer(ike, "remote-port"),
        spi_in=_integer(child, "spi-in", 16),
        spi_out=_integer(child, "spi-out", 16),
        encap=_text(child, "encap", "no") == "yes",
        is_initiator=_text(ike, "initiator", "no") == "yes",
        local_id=_text(ike, "local-id", ""),
        remote_id=_text(ike, "remote-id", ""),
        mode=_text(child, "mode", "TUNNEL"),
        esn=_text(child, "esn", "0") == "1",
        age_s=_integer(child, "install-time") if "install-time" in child else 0,
        packets_in=_count(child, "packets-in"),
        packets_out=_count(child, "packets-out"),
    )


def decode(octets: bytes) -> dict[str, Any]:
    """A VICI message: sections as dicts, values as bytes, lists of them. Raises ViciAnswerError."""
    message: dict[str, Any] = {}
    around: list[dict[str, Any]] = []
    section, items = message, None
    position, end = 0, len(octets)
    try:
        while position < end:
            kind, position = octets[position], position + 1
            if kind == _SECTION_END:
                section = around.pop()
                continue
            if kind in _NAMED:
                start = position + 1
                position = start + octets[position]
                name = octets[start:position].decode()
            if kind in _WITH_VALUE:
                start = position + 2
                position = start + (octets[position] << 8 | octets[position + 1])
                if kind == _VALUE:
                    section[name] = octets[start:position]
                elif items is not None:
                    items.append(octets[start:position])
            elif kind == _SECTION:
                around.append(section)
                section[name] = section = {}
            elif kind == _LIST:
                items = section[name] = []
            elif kind != _LIST_END:
                raise ViciAnswerError(f"a message has an element of the unknown kind {kind}")
    except (IndexError, UnicodeDecodeError):
        raise ViciAnswerError("a message is garbled") from None
    if around or position != end:
        raise ViciAnswerError("a message is cut short")
    return message


def _is_esp(child: Mapping[str, Any]) -> bool:
    return _text(child, "protocol", "") == "ESP"


def _section(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = parent.get(key)
    if not isinstance(section, Mapping):
        raise ViciAnswerError(f"'{key}' is no section")
    return section


def _text(section: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = section.get(key, default)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise ViciAnswerError(f"'{key}' is missing or no text")
    return value


def _integer(section: Mapping[str, Any], key: str, base: int = 10) -> int:
    text = _text(section, key)
    try:
        number = int(text, base)
    except ValueError:
        number = -1
    if not 0 <= number < 2**32:
        raise ViciAnswerError(f"'{key}' is '{text[:40]}', not a number of 32 bit")
    return number


def _count(section: Mapping[str, Any], key: str) -> int:
    """A counter of 64 bit, -1 if charon does not give it."""
    text = _text(section, key, "")
    return int(text) if text.isdecimal() else -1


def _address(section: Mapping[str, Any], key: str) -> bytes:
    text = _text(section, key)
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text.partition("%")[0])
    except (OSError, ValueError):
        raise ViciAnswerError(f"'{key}' is '{text[:40]}', not an IP address") from None


# --- the connections ----------------------------------------------------------------------------------


class _BoundedTransport(Transport):  # type: ignore[misc]  # vici has no types
    """A connection on which no message takes longer than ANSWER_S, nor more than the protocol's 512 KiB.

    But for lists of SAs, each of which charon asks the kernel for: as long as it answers others meanwhile, it lives.
    The package's own waits for ever once the first byte has come, reads lists without end, and passes over what is no
    event where it listens for events.
    """

    def __init__(self, path: str) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(ANSWER_S)
        try:
            connection.connect(path)
        except BaseException:
            connection.close()
            raise
        super().__init__(connection)
        self._path, self._is_listing = path, False
        #: What went wrong first; later errors only follow from it.
        self.failure = ""
        self._received, self._taken = b"", 0
        self.bound(True)

    def bound(self, is_bounded: bool) -> None:
        """Whether all that comes from now on has to be over within _LONG_ANSWER_S and _LONG_ANSWER_BYTES."""
        self._octets_left = float(_LONG_ANSWER_BYTES) if is_bounded else math.inf
        self._ends_at = time.monotonic() + _LONG_ANSWER_S if is_bounded else math.inf

    def receive(self, timeout: Any = RECV_TIMEOUT_DEFAULT) -> bytes:
        """The next packet; with a timeout the next event, or TimeoutError. Raises ConnectionError."""
        packet: bytes = super().receive(timeout)
        self._octets_left -= len(packet)
        if self._octets_left < 0 or time.monotonic() > self._ends_at:
            raise self._fail("what charon answers does not come to an end")
        if timeout is not RECV_TIMEOUT_DEFAULT and packet[:1] != _EVENT_PACKET:  # only `listen` waits so
            raise self._fail("charon sent something else than an event")
        return packet

    def _recvall(self, count: int, timeout: Any = RECV_TIMEOUT_DEFAULT) -> bytes:
        """So many bytes. What came with them is kept: one call of the kernel brings very many short messages."""
        if count > self.MAX_SEGMENT:
            raise self._fail(f"charon announced a message of {count} bytes, the protocol allows {self.MAX_SEGMENT}")
        deadline = time.monotonic() + (ANSWER_S if timeout is RECV_TIMEOUT_DEFAULT else timeout)
        while len(self._received) - self._taken < count:
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            is_begun = self._taken < len(self._received)
            try:
                chunk = self.socket.recv(_CHUNK_BYTES)
            except TimeoutError:
                if not is_begun and timeout is not RECV_TIMEOUT_DEFAULT:
                    raise
                if self._is_listing and time.monotonic() < self._ends_at and _lives(self._path):
                    deadline = time.monotonic() + ANSWER_S
                    continue
                raise self._fail(f"charon did not answer within {ANSWER_S:g} s") from None
            except OSError as error:
                raise self._fail(str(error)) from None
            if not chunk:
                raise self._fail("charon closed the connection")
            if not is_begun:
                deadline = time.monotonic() + ANSWER_S
            self._received = self._received[self._taken :] + chunk
            self._taken = 0
        self._taken += count
        return self._received[self._taken - count : self._taken]

    def session(self) -> Session:
        """The package's session on this connection."""
        session = Session(self.socket)
        session.transport = self
        return session

    def list_sas(self) -> Iterator[dict[str, Any]]:
        """The messages that `list-sas` is answered with. Raises ViciAnswerError or ConnectionError.

        The package's own reads an answer to its end, come what may, and takes three times as long, which matters for
        thousands of SAs.
        """
        self.bound(True)
        self._is_listing = True
        for request, wanted in (
            (Packet.register_event("list-sa"), Packet.EVENT_CONFIRM),
            (Packet.request("list-sas"), Packet.CMD_RESPONSE),
            (Packet.unregister_event("list-sa"), Packet.EVENT_CONFIRM),
        ):
            self.send(request)
            while (answer := self.receive())[:1] == _EVENT_PACKET:
                yield decode(answer[2 + answer[1] :])
            if answer[:1] != bytes([wanted]):
                raise self._fail(f"charon answered a request for all SAs with {answer[:40]!r}")
        self._is_listing = False
        self.bound(False)

    def close(self) -> None:
        """Close, however often, whether or not the other side is still there."""
        self.socket.close()

    def _fail(self, reason: str) -> ConnectionError:
        self.failure = self.failure or reason
        self.socket.close()  # whatever the package still wants to send fails at once
        return ConnectionError(self.failure)


def _connect(path: str) -> _BoundedTransport:
    """Raises ConnectionError that says what to do."""
    try:
        return _BoundedTransport(path)
    except FileNotFoundError:
        raise ConnectionError("no such socket: strongSwan is not running, or without its vici plugin") from None
    except ConnectionRefusedError:
        raise ConnectionError("nobody listens: strongSwan has stopped") from None
    except PermissionError:
        raise ConnectionError(
            f"permission denied: give it a group that fwd's user is in, now with 'chgrp fwd-vici {path}', for"
            " good with 'group = fwd-vici' in section charon of strongswan.conf (README: strongSwan)"
        ) from None
    except TimeoutError:
        raise ConnectionError(f"charon did not take the connection within {ANSWER_S:g} s") from None


def _ike_sas(asking: _BoundedTransport) -> int:
    """How many IKE_SAs charon has; 0 if it does not say."""
    counts = asking.session().stats().get("ikesas")
    return max(0, _count(counts, "total")) if isinstance(counts, Mapping) else 0


def charon_version(path: str) -> tuple[str, str]:
    """The program that answers on a VICI socket, and its version. Raises ConnectionError or ViciAnswerError."""
    with contextlib.closing(_connect(path)) as transport:
        try:
            answer = transport.session().version()
        except Exception as error:  # whatever it sent
            raise ConnectionError(transport.failure or error) from error
        return _text(answer, "daemon"), _text(answer, "version")


def _lives(path: str) -> bool:
    """Whether charon answers anything."""
    try:
        charon_version(path)
    except (ConnectionError, ViciAnswerError):
        return False
    return True


class ViciListener:
    """Keeps the core told about the SAs of one charon, for ever, from a thread of its own.

    `deliver` is called from that thread with each event; it must not block.
    """

    def __init__(self, path: str, deliver: Callable[[SaEvent], None]) -> None:
        self._path = path
        self._deliver = deliver
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vici", daemon=True)
        self._lost_reason = ""
        self._events = [*_EVENTS, _EVENT_MOVED]
        self._connected_to = (0, 0, 0)
        #: How many IKE_SAs charon did not tell of.
        self._untold = 0

    def start(self) -> None:
        """Begin to listen; charon need not be there yet."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; returns when it is gone, or after a second if charon keeps it waiting."""
        self._stopping.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        pause = _BACKOFF_S[0]
        while not self._stopping.is_set():
            try:
                for _ in self._follow():
                    pause = _BACKOFF_S[0]
            except Exception as error:  # whatever charon sent: this connection is over, the next one may do
                self._lose(str(error) or type(error).__name__)
            self._stopping.wait(pause * random.uniform(0.8, 1.2))
            pause = min(2 * pause, _BACKOFF_S[1])

    def _lose(self, reason: str) -> None:
        if reason != self._lost_reason and not self._stopping.is_set():
            self._lost_reason = reason
            self._deliver(SaSourceLost(reason))

    def _follow(self) -> Iterator[None]:
        """Hand over a snapshot and then what happens; yields after each snapshot, raises when charon is lost."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # `_connect` says what that means
                self._connected_to = self._socket()
            listening, asking = (stack.enter_context(contextlib.closing(_connect(self._path))) for _ in range(2))
            try:
                yield from self._listen(listening, asking)
            except EventUnknownException:
                if _EVENT_MOVED not in self._events:
                    raise
                self._events.remove(_EVENT_MOVED)  # and connect anew: a change of address shows at the next reconcile
            except Exception as error:
                raise ConnectionError(listening.failure or asking.failure or error) from error

    def _snapshot(self, asking: _BoundedTransport) -> tuple[SaSnapshot, float]:
        """All SAs, and in how many seconds they are to be read again. Raises ViciAnswerError or ConnectionError."""
        sas: list[ChildSa] = []
        again_s, told_of = _RECONCILE_S, 0
        expected = _ike_sas(asking)
        for answer in asking.list_sas():
            told_of += len(answer)
            sas += parse_sas(answer)
            if is_leaving(answer):
                again_s = _AFTER_REKEY_S
        if told_of < expected:  # or some have just ended
            expected = min(expected, _ike_sas(asking))
        untold = max(0, expected - told_of)
        if untold > self._untold:
            log.warning(
                "%s: charon has %d IKE_SAs and tells of %d: the others have more CHILD_SAs than its messages hold;"
                " what is known of those stays in use, and only events tell more. Spread them over more IKE_SAs",
                *(self._path, expected, told_of),
            )
        self._untold = untold
        return SaSnapshot(tuple(sas), is_whole=not untold), again_s

    def _socket(self) -> tuple[int, int, int]:
        """What tells the socket that is there from one that takes its place. Raises OSError."""
        found = os.stat(self._path)
        return found.st_dev, found.st_ino, found.st_ctime_ns

    def _listen(self, listening: _BoundedTransport, asking: _BoundedTransport) -> Iterator[None]:
        # The first item, even an empty one, comes when all registrations are done: the time for a snapshot.
        with contextlib.closing(listening.session().listen(self._events, _POLL_S)) as events:
            try:
                yield from self._hear(events, listening, asking)
            except BaseException:
                listening.close()  # else the generator asks a charon that is lost to register no more, and waits
                raise

    def _hear(
        self, events: Iterator[tuple[Any, Any]], listening: _BoundedTransport, asking: _BoundedTransport
    ) -> Iterator[None]:
        probe_at = snapshot_at = rests_until = look_at = 0.0
        for name, message in events:
            if self._stopping.is_set():
                return
            listening.bound(False)
            now = time.monotonic()
            if now >= max(snapshot_at, rests_until):
                snapshot, again_s = self._snapshot(asking)
                self._deliver(snapshot)
                self._lost_reason = ""
                begun, now = now, time.monotonic()
                probe_at, snapshot_at = now + _PROBE_S, now + again_s
                rests_until = now + _LISTING_REST * (now - begun)
                yield
            elif now >= probe_at:
                asking.session().version()
                self._deliver(SaSourceAlive())
                probe_at = now + _PROBE_S
            if now >= look_at:
                look_at = now + _SOCKET_LOOK_S
                self._look_at_socket()
            if name == _EVENT_MOVED.encode():
                snapshot_at = min(snapshot_at, now + _AFTER_MOVE_S)
            elif name is not None:
                try:
                    for event in parse_event(name.decode(errors="replace"), message):
                        self._deliver(event)
                        if isinstance(event, SaRekeyed):
                            snapshot_at = min(snapshot_at, now + _AFTER_REKEY_S)
                except ViciAnswerError as error:
                    if snapshot_at > now + _AFTER_GARBAGE_S:
                        log.warning("VICI event %.40r cannot be read (%s): reading all SAs instead", name, error)
                        snapshot_at = now + _AFTER_GARBAGE_S

    def _look_at_socket(self) -> None:
        """Raises ConnectionError if another process has taken the path: what it says counts from now on.

        While nobody has, the charon that is connected goes on being asked.
        """
        try:
            is_another = self._socket() != self._connected_to
        except OSError:
            return
        if is_another:
            raise ConnectionError("another process listens on the socket")
