"""strongSwan over VICI: what charon says of its CHILD_SAs, as the core's SA events.

Order matters (SPEC section 6). One thread does all of it: it subscribes on one connection, then asks for
`list-sas` on another, hands that snapshot over, and only then reads the events that came meanwhile. An event
that charon raised after it made the snapshot is therefore never overwritten by it; one that it raised before
is replayed on top of it, which does no harm: events are assignments, they come in order, so the last one for
an SA stands. The same goes for every later reconcile, which also finds what an event was lost for (charon
drops messages over 512 KiB, and raises no child-updown for an SA that was rekeyed before it is deleted).
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address
from typing import Any

from vici import Session
from vici.exception import EventUnknownException
from vici.protocol import RECV_TIMEOUT_DEFAULT, Transport

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
#: All SAs are read so soon after a rekey: charon does not tell when the old SA goes. It keeps the inbound half for five
#: seconds (delete_rekeyed_delay in strongswan.conf(5)), for packets that are late.
_AFTER_REKEY_S = 6.0
#: And so soon after a peer moved: charon tells that before it has changed the CHILD_SAs.
_AFTER_MOVE_S = 0.3
#: Pauses between attempts to connect: doubled from the first to the last.
_BACKOFF_S = (0.2, 2.0)

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
        return ip_address(text.partition("%")[0]).packed
    except ValueError:
        raise ViciAnswerError(f"'{key}' is '{text[:40]}', not an IP address") from None


# --- the connections ----------------------------------------------------------------------------------


class _BoundedTransport(Transport):  # type: ignore[misc]  # vici has no types
    """A connection on which no message takes longer than ANSWER_S, nor more than the protocol's 512 KiB.

    The package's own waits for ever once the first byte has come.
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
        #: What went wrong first; later errors only follow from it.
        self.failure = ""

    def _recvall(self, count: int, timeout: Any = RECV_TIMEOUT_DEFAULT) -> bytes:
        if count > self.MAX_SEGMENT:
            raise self._fail(f"charon announced a message of {count} bytes, the protocol allows {self.MAX_SEGMENT}")
        received = b""
        deadline = time.monotonic() + (ANSWER_S if timeout is RECV_TIMEOUT_DEFAULT else timeout)
        while len(received) < count:
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                chunk = self.socket.recv(count - len(received))
            except TimeoutError:
                if not received and timeout is not RECV_TIMEOUT_DEFAULT:
                    raise
                raise self._fail(f"charon did not answer within {ANSWER_S:g} s") from None
            except OSError as error:
                raise self._fail(str(error)) from None
            if not chunk:
                raise self._fail("charon closed the connection")
            if not received:
                deadline = time.monotonic() + ANSWER_S
            received += chunk
        return received

    def session(self) -> Session:
        """The package's session on this connection."""
        session = Session(self.socket)
        session.transport = self
        return session

    def close(self) -> None:
        """Close, however often, whether or not the other side is still there."""
        self.socket.close()

    def _fail(self, reason: str) -> ConnectionError:
        self.failure = self.failure or reason
        self.socket.close()  # whatever the package still wants to send fails at once
        return ConnectionError(self.failure)


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
            listening, asking = (stack.enter_context(contextlib.closing(self._connect())) for _ in range(2))
            try:
                yield from self._listen(listening.session(), asking.session())
            except EventUnknownException:
                if _EVENT_MOVED not in self._events:
                    raise
                self._events.remove(_EVENT_MOVED)  # and connect anew: a change of address shows at the next reconcile
            except Exception as error:
                raise ConnectionError(listening.failure or asking.failure or error) from error

    def _connect(self) -> _BoundedTransport:
        try:
            return _BoundedTransport(self._path)
        except FileNotFoundError:
            raise ConnectionError("no such socket: strongSwan is not running, or without its vici plugin") from None
        except ConnectionRefusedError:
            raise ConnectionError("nobody listens: strongSwan has stopped") from None
        except PermissionError:
            raise ConnectionError(
                f"permission denied: give it a group that fwd's user is in, now with 'chgrp fwd-vici {self._path}', for"
                " good with 'group = fwd-vici' in section charon of strongswan.conf (README: strongSwan)"
            ) from None
        except TimeoutError:
            raise ConnectionError(f"charon did not take the connection within {ANSWER_S:g} s") from None

    def _listen(self, listening: Session, asking: Session) -> Iterator[None]:
        probe_at = snapshot_at = 0.0
        # The first item, even an empty one, comes when all registrations are done: the time for a snapshot.
        with contextlib.closing(listening.listen(self._events, _POLL_S)) as events:
            for name, message in events:
                if self._stopping.is_set():
                    return
                now = time.monotonic()
                if now >= snapshot_at:
                    answers = list(asking.list_sas())
                    self._deliver(SaSnapshot(tuple(sa for answer in answers for sa in parse_sas(answer))))
                    self._lost_reason = ""
                    again_s = _AFTER_REKEY_S if any(map(is_leaving, answers)) else _RECONCILE_S
                    probe_at, snapshot_at = now + _PROBE_S, now + again_s
                    yield
                elif now >= probe_at:
                    asking.version()
                    self._deliver(SaSourceAlive())
                    probe_at = now + _PROBE_S
                if name == _EVENT_MOVED.encode():
                    snapshot_at = min(snapshot_at, now + _AFTER_MOVE_S)
                elif name is not None:
                    try:
                        for event in parse_event(name.decode(), message):
                            self._deliver(event)
                            if isinstance(event, SaRekeyed):
                                snapshot_at = min(snapshot_at, now + _AFTER_REKEY_S)
                    except ViciAnswerError as error:
                        log.warning("VICI event %s cannot be read (%s): reading all SAs instead", name.decode(), error)
                        snapshot_at = 0.0
