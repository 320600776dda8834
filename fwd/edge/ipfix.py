"""The way to a collector of IPFIX, over UDP or TCP (RFC 7011 section 10): it never waits for anybody.

What the core wants told is saved as told, then sent; so a kill in between loses one turn's records at most, and says so
(`ipfix_records_unsure`). What is known not to have arrived goes back to the core. Over TCP that is what the collector's
host has not acknowledged when the connection breaks; over UDP what was refused. Whatever else is lost over UDP, the
collector alone can tell, by the sequence numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import inf

from ..core.firewall import Firewall
from ..core.records import FlowDelta
from ..core.session import Session
from ..ipfix import Encoder, Message, Statistics
from .endpoint import Endpoint, unacknowledged_bytes

log = logging.getLogger(__name__)

#: The largest message, in bytes, on whatever way; a path that carries less has less.
MESSAGE_BYTES = 1400
#: IP and UDP headers, the longer ones.
_HEADERS_BYTES = 48
#: Below that, messages are fragmented: all templates fit.
_LEAST_MESSAGE_BYTES = 900

#: After a turn that left nothing for the next one, and after one that did, in seconds.
_IDLE_S = 0.25
_PAUSE_S = 0.02
#: The same when fwd stops and nobody waits.
_LAST_PAUSE_S = 0.001

#: A collector that could not be reached is tried again so much later, in seconds; TCP gives up what nobody
#: acknowledges for so long, in milliseconds.
_RETRY_S = 2.0
_CONNECT_S = 10.0
_UNACKNOWLEDGED_MS = 20_000

#: If nobody listens on a UDP port its host says so at once: what it did not refuse in so many seconds has arrived.
_REFUSAL_S = 0.5

#: More bytes than these are not sent before some have arrived.
_ON_THE_WAY_BYTES = 65536

#: linux/in.h, linux/in6.h, linux/errqueue.h: Python's socket does not name all of them.
_IP_MTU, _IP_RECVERR, _IPV6_MTU, _IPV6_RECVERR = 14, 11, 24, 25
_ORIGIN_LOCAL = 1

#: The kernel has no room just now.
_FULL = (errno.EAGAIN, errno.ENOBUFS)

#: How it goes, in words, unless the collector is away.
_CONNECTING, _SENDING = "connecting", "sending"

#: A message's header, which no other message has.
_HEADER_BYTES = 16


@dataclass(frozen=True, slots=True)
class Options:
    """What the configuration says. Seconds, and the number of the observation domain (RFC 7011 section 3.1)."""

    collector: Endpoint
    template_refresh_s: int
    domain: int


class _Way:
    """An open socket to a collector, and the messages on their way, each with a mark by which it is told arrived."""

    def __init__(self, made: socket.socket) -> None:
        self._socket = made
        self._messages: deque[tuple[float, Message]] = deque()
        self._bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether nothing is to be sent now."""
        return self._bytes > _ON_THE_WAY_BYTES

    @property
    def is_empty(self) -> bool:
        """Whether all that was sent has arrived."""
        return not self._messages

    def room(self) -> int:
        """The largest message that may be sent, in bytes."""
        raise NotImplementedError

    def send(self, message: Message) -> None:
        """Hand a message to the kernel. Raises OSError, and then it is not on its way."""
        raise NotImplementedError

    def arrived(self) -> list[FlowDelta]:
        """The flow records that have arrived since this was asked last. Raises OSError if the way is closed."""
        raise NotImplementedError

    def close(self, *, is_broken: bool) -> tuple[list[FlowDelta], list[FlowDelta]]:
        """Give up; gives the flow records that arrived, or are as good as that, and those that did not."""
        arrived = self._take_up_to(self._end(is_broken))
        self._socket.close()
        return arrived, self._take_up_to(inf)

    def _end(self, is_broken: bool) -> float:
        """Up to which mark messages arrive if nothing more is done."""
        raise NotImplementedError

    def _put(self, mark: float, message: Message) -> None:
        self._messages.append((mark, message))
        self._bytes += len(message.octets)

    def _take_up_to(self, mark: float) -> list[FlowDelta]:
        deltas: list[FlowDelta] = []
        while self._messages and self._messages[0][0] <= mark:
            message = self._messages.popleft()[1]
            self._bytes -= len(message.octets)
            deltas += message.deltas
        return deltas


class _Datagrams(_Way):
    """UDP. A message has arrived if nobody refused it for a while; its mark is when it was sent."""

    def __init__(self, made: socket.socket) -> None:
        super().__init__(made)
        is_v6 = made.family == socket.AF_INET6
        self._level = socket.IPPROTO_IPV6 if is_v6 else socket.IPPROTO_IP
        self._mtu = _IPV6_MTU if is_v6 else _IP_MTU
        self._refused: list[bytes] = []  # how they began
        made.setsockopt(self._level, _IPV6_RECVERR if is_v6 else _IP_RECVERR, 1)  # refusals say what was refused

    def room(self) -> int:
        mtu = self._socket.getsockopt(self._level, self._mtu)
        return max(_LEAST_MESSAGE_BYTES, min(MESSAGE_BYTES, mtu - _HEADERS_BYTES))

    def send(self, message: Message) -> None:
        self._socket.send(message.octets)
        self._put(time.monotonic(), message)

    def arrived(self) -> list[FlowDelta]:
        self._hear_refusals()
        if self._refused:
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        return self._take_up_to(time.monotonic() - _REFUSAL_S)

    def _end(self, is_broken: bool) -> float:
        self._hear_refusals()
        if not self._refused:
            return inf
        refused = (mark for mark, message in self._messages if message.octets.startswith(tuple(self._refused)))
        first = next(refused, 0.0)
        return max((mark for mark, _ in self._messages if mark < first), default=0.0)

    def _hear_refusals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:  # ip(7), IP_RECVERR: what was sent, and a sock_extended_err
                octets, ancillary, _, _ = self._socket.recvmsg(_HEADER_BYTES, 512, socket.MSG_ERRQUEUE)
                if any(content[4] != _ORIGIN_LOCAL for _, _, content in ancillary):
                    self._refused.append(octets)


class _Stream(_Way):
    """TCP. A message has arrived if the collector's host has acknowledged it; its mark is where it ends."""

    def __init__(self, made: socket.socket) -> None:
        super().__init__(made)
        self._sent = 0
        self._rest = b""  # of a message of which the kernel took a part only

    @property
    def is_full(self) -> bool:
        return bool(self._rest) or super().is_full

    def room(self) -> int:
        return MESSAGE_BYTES

    def send(self, message: Message) -> None:
        self._rest += message.octets
        self._sent += len(message.octets)
        self._push()
        self._put(self._sent, message)

    def arrived(self) -> list[FlowDelta]:
        self._push()
        with contextlib.suppress(BlockingIOError):
            if not self._socket.recv(4096):
                raise ConnectionResetError(errno.ECONNRESET, "the collector closed the connection")
        return self._take_up_to(self._acknowledged())

    def _end(self, is_broken: bool) -> float:
        # What the kernel has of it still goes out if nothing is wrong.
        return self._acknowledged() if is_broken else self._sent - len(self._rest)

    def _push(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._rest:
                self._rest = self._rest[self._socket.send(self._rest) :]

    def _acknowledged(self) -> int:
        return self._sent - len(self._rest) - unacknowledged_bytes(self._socket)


class Exporter:
    """Sends what the core wants told to a collector. `save` writes what changed of sessions to the state file."""

    def __init__(self, firewall: Firewall, save: Callable[[Collection[Session]], None]) -> None:
        self._firewall = firewall
        self._export = firewall.flow_export
        self._save = save
        self._options: Options | None = None
        self._way: _Way | None = None
        self._encoder: Encoder | None = None
        self._task: asyncio.Task[None] | None = None
        self._next_preamble_at = 0.0
        self._options_sequence = 0
        self._standing = _CONNECTING

    def start(self, options: Options | None) -> None:
        """Export to that collector from now on, or to none. What is told already stays as it is."""
        if options == self._options:
            return
        self.stop()
        self._options = options
        self._standing = _CONNECTING
        if options is not None:
            self._task = asyncio.get_running_loop().create_task(self._run(options))

    def stop(self) -> None:
        """Send nothing more by itself, and let go of the collector."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._options = None
        self._close(is_broken=False)

    def finish(self, deadline: float) -> None:
        """Tell of all sessions what is to be told, until then at most (monotonic seconds): nobody counts any more."""
        if self._task is not None:
            self._task.cancel()
        try:
            while self._standing == _SENDING and time.monotonic() < deadline and self._turn():
                time.sleep(_LAST_PAUSE_S)
        except OSError as error:
            self._lose(error)
        self.stop()

    def describe(self) -> str:
        """Where to, and how it goes, in words."""
        if self._options is None:
            return "none by configuration"
        collector = self._options.collector
        values = self._firewall.counters.values
        waiting = self._export.waiting_count
        return (
            f"{collector}, {self._standing}; {values['ipfix_records_sent']} records sent"
            f"{f', {waiting} ended sessions wait' if waiting else ''}"
        )

    async def _run(self, options: Options) -> None:
        while True:
            try:
                self._way = await _open(options.collector)
                self._encoder = Encoder(options.domain, self._way.room())
                if isinstance(self._way, _Stream):
                    self._export.sequence = 0  # of each connection (RFC 7011 section 3.1)
                self._options_sequence = 0
                self._send_preamble(options)
                while not self._way.is_empty:  # before nobody is there, nothing is worth sending
                    await asyncio.sleep(_PAUSE_S)
                    self._export.confirm(self._way.arrived())
                log.info("flows are exported to %s", options.collector)
                self._standing = _SENDING
                while True:
                    await asyncio.sleep(_PAUSE_S if self._turn() else _IDLE_S)
            except OSError as error:
                self._lose(error)
            except Exception:
                log.exception("the export of flows met a defect of fwd; it goes on in %g s", _RETRY_S)
                self._close(is_broken=True)
            await asyncio.sleep(_RETRY_S)

    def _turn(self) -> bool:
        """Send the next flow records. Gives whether there may be more at once. Raises OSError."""
        assert self._way is not None and self._encoder is not None and self._options is not None
        way, export = self._way, self._export
        export.confirm(way.arrived())
        now = time.monotonic()
        if self._options.collector.transport == "udp" and now >= self._next_preamble_at:
            self._send_preamble(self._options)
        if way.is_full:
            return True
        deltas, sessions = export.take(now)
        if not deltas:
            return export.has_more
        at = time.time()
        messages = list(self._encoder.messages(deltas, export.sequence, at, at - now))
        export.sequence += sum(message.count for message in messages)
        self._save(sessions)
        trouble: OSError | None = None
        for number, message in enumerate(messages):
            try:
                way.send(message)
            except OSError as error:
                trouble = error
                unsent = messages[number:]
                export.sequence -= sum(message.count for message in unsent)
                export.take_back([delta for message in unsent for delta in message.deltas])
                break
        export.handed_over()
        self._save(())
        if trouble is not None and trouble.errno not in _FULL:
            raise trouble
        return export.has_more or trouble is not None

    def _send_preamble(self, options: Options) -> None:
        """What a collector has to know before it can read anything. Raises OSError."""
        assert self._way is not None and self._encoder is not None
        self._next_preamble_at = time.monotonic() + options.template_refresh_s
        values, interfaces = self._firewall.counters.values, self._firewall.interfaces
        not_sent = (values["ipfix_records_not_sent"], values["ipfix_packets_not_sent"], values["ipfix_bytes_not_sent"])
        statistics = Statistics(values["ipfix_records_sent"], not_sent)
        names = {index: interfaces.name_of(index) for index in interfaces.indices}
        at = time.time()
        self._way.send(self._encoder.templates(self._export.sequence, at))
        message = self._encoder.options(statistics, names, self._options_sequence, at)
        self._way.send(message)
        self._options_sequence += message.count

    def _lose(self, error: OSError) -> None:
        """The collector is away."""
        before, self._standing = self._standing, f"away: {error.strerror or error}"
        if before in (_CONNECTING, _SENDING):
            self._firewall.counters.add("ipfix_collector_lost")
        if before != self._standing and self._options is not None:
            log.warning("flows are kept: the collector %s is %s", self._options.collector, self._standing)
        self._close(is_broken=True)

    def _close(self, *, is_broken: bool) -> None:
        if self._way is None:
            return
        arrived, lost = self._way.close(is_broken=is_broken)
        self._way = None
        self._export.confirm(arrived)
        self._export.take_back(lost)
        self._save(())


async def _open(collector: Endpoint) -> _Way:
    """Raises OSError."""
    made = collector.socket()
    made.setblocking(False)
    try:
        if collector.transport == "udp":
            made.connect((collector.address, collector.port))
            return _Datagrams(made)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        loop = asyncio.get_running_loop()
        await asyncio.wait_for(loop.sock_connect(made, (collector.address, collector.port)), _CONNECT_S)
        return _Stream(made)
    except OSError as error:
        made.close()
        number = error.errno or errno.ETIMEDOUT  # asyncio has words of its own
        raise OSError(number, os.strerror(number)) from None
    except BaseException:
        made.close()
        raise
