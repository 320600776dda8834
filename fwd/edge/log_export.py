"""What sends the traffic log on, to syslog or the journal: a thread that reads the log, and remembers how far it came.

So nothing that was written is skipped, however long a server is away, unless the log itself has no more room for it.
What was under way when fwd was killed, or a connection broke, is sent again: a batch at most.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import sqlite3
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ..log_entry import Entry, journal_fields, syslog_message
from .database import transaction
from .endpoint import Endpoint, unacknowledged_bytes
from .traffic_log import LogError, TrafficLog, open_log

log = logging.getLogger(__name__)

_BATCH = 64
#: After a failure the next try comes so much later, and a server has so long to take what it is sent, in seconds.
RETRY_S = 2.0
TIMEOUT_S = 10.0
#: How long nothing new may be written before it is looked at all the same, in seconds.
_LOOK_S = 5.0


class Receiver(Protocol):
    """Where entries go."""

    def send(self, entries: Sequence[Entry]) -> None:
        """Send these; when it returns they are there, as far as one can know. Raises OSError."""

    def close(self) -> None:
        """Hang up."""


class LogExport:
    """Sends what is in `traffic_log`, the file of which is `path`, to a receiver, under a name of its own.

    A new name begins with what is written from now on. From its own thread it calls `sent(count)` and `failed()`.
    """

    def __init__(
        self,
        name: str,
        traffic_log: TrafficLog,
        path: Path,
        receiver: Receiver,
        sent: Callable[[int], None],
        failed: Callable[[], None],
    ) -> None:
        self.name = name
        self._log = traffic_log
        self._path = path
        self._receiver = receiver
        self._sent = sent
        self._failed = failed
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"log-{name}", daemon=True)
        #: Why nothing can be sent at the moment; None: it can.
        self.trouble: str | None = None

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self, within_s: float) -> None:
        """Stop, after the batch that is under way if it takes no longer than that."""
        self._leaving.set()
        self._log.tell_news()
        self._thread.join(within_s)

    def _work(self) -> None:
        database: sqlite3.Connection | None = None
        news = 0
        while not self._leaving.is_set():
            try:
                if database is None:
                    database = open_log(self._path)
                    database.row_factory = sqlite3.Row
                if not self._step(database):
                    news = self._log.wait_for_news(news, _LOOK_S)
                self._note_trouble(None)
            except (OSError, sqlite3.Error, LogError) as error:
                self._receiver.close()
                if database is not None and isinstance(error, sqlite3.Error):
                    database.close()
                    database = None
                self._note_trouble(str(error.strerror or error) if isinstance(error, OSError) else str(error))
                self._failed()
                self._leaving.wait(RETRY_S)
        self._receiver.close()
        if database is not None:
            database.close()

    def _step(self, database: sqlite3.Connection) -> bool:
        """Send the next batch; False: there is none. Raises OSError or sqlite3.Error."""
        row = database.execute("SELECT number FROM export WHERE name = ?", (self.name,)).fetchone()
        if row is None:
            with transaction(database):
                database.execute("INSERT INTO export SELECT ?, coalesce(max(number), 0) FROM traffic", (self.name,))
            return True
        rows = database.execute(
            "SELECT * FROM traffic WHERE number > ? ORDER BY number LIMIT ?", (row["number"], _BATCH)
        ).fetchall()
        if not rows:
            return False
        entries = [dict(row) for row in rows]
        self._receiver.send(entries)
        with transaction(database):
            database.execute("UPDATE export SET number = ? WHERE name = ?", (entries[-1]["number"], self.name))
        self._sent(len(entries))
        return True

    def _note_trouble(self, trouble: str | None) -> None:
        if trouble is not None and self.trouble is None:
            log.warning("%s cannot be reached, what is logged waits for it: %s", self.name, trouble)
        elif trouble is None and self.trouble is not None:
            log.info("%s is reached again", self.name)
        self.trouble = trouble


class SyslogServer:
    """A syslog server: UDP (RFC 5426), TCP or TLS with octet counting (RFC 6587, RFC 5425)."""

    def __init__(
        self,
        endpoint: Endpoint,
        hostname: str,
        facility: str,
        *,
        is_ietf: bool,
        tls: Callable[[], ssl.SSLContext],
        tls_name: str,
    ) -> None:
        self._endpoint = endpoint
        self._hostname = hostname
        self._facility = facility
        self._is_ietf = is_ietf
        self._tls = tls
        self._tls_name = tls_name or endpoint.address
        self._socket: socket.socket | None = None

    def send(self, entries: Sequence[Entry]) -> None:
        """Send these. Over TCP it returns when the server's kernel has acknowledged them. Raises OSError."""
        messages = [syslog_message(entry, self._hostname, self._facility, self._is_ietf) for entry in entries]
        connection = self._socket = self._socket or self._connect()
        if self._endpoint.transport == "udp":
            for message in messages:
                connection.send(message)
            return
        _refuse_if_gone(connection)
        connection.sendall(b"".join(b"%d %b" % (len(message), message) for message in messages))
        _wait_until_acknowledged(connection)

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None

    def _connect(self) -> socket.socket:
        connection = self._endpoint.socket()
        try:
            connection.settimeout(TIMEOUT_S)
            connection.connect((self._endpoint.address, self._endpoint.port))
            if self._endpoint.transport == "tls":
                connection = self._tls().wrap_socket(connection, server_hostname=self._tls_name)
        except BaseException:
            connection.close()
            raise
        return connection


def _refuse_if_gone(connection: socket.socket) -> None:
    """Raises ConnectionResetError if the peer has hung up: what is sent now nobody reads."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    if poll.poll(0):
        raise ConnectionResetError(errno.ECONNRESET, "the server hung up")


def _wait_until_acknowledged(connection: socket.socket) -> None:
    """Until the peer's kernel has all that was sent. Raises OSError if that cannot be said."""
    deadline = time.monotonic() + TIMEOUT_S
    while unacknowledged_bytes(connection):
        _refuse_if_gone(connection)
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, f"the server acknowledged nothing for {TIMEOUT_S:g} s")
        time.sleep(0.001)
    _refuse_if_gone(connection)  # after that look, for it may have been reset


class Journal:
    """systemd's journal, by its own protocol: a datagram of fields for each entry."""

    def __init__(self, path: str = "/run/systemd/journal/socket") -> None:
        self._path = path
        self._socket: socket.socket | None = None

    def send(self, entries: Sequence[Entry]) -> None:
        """Send these. Raises OSError."""
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.settimeout(TIMEOUT_S)
            self._socket.connect(self._path)
        for entry in entries:
            self._socket.send(_datagram(journal_fields(entry)))

    def close(self) -> None:
        """Let go of the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _datagram(fields: Mapping[str, str]) -> bytes:
    """Fields as systemd's native journal protocol has them: with a length where the value has line breaks."""
    octets = bytearray()
    for name, text in fields.items():
        value = text.encode()
        if b"\n" in value:
            octets += name.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
        else:
            octets += name.encode() + b"=" + value + b"\n"
    return bytes(octets)
