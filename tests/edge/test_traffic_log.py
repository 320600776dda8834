"""The traffic log on a real disk, and what it is sent to: real sockets, a real full file system, real deaths."""

from __future__ import annotations

import os
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import trustme

from fwd.core.policy import Action
from fwd.core.state import EndReason
from fwd.core.traffic_log import LogRecord, Subtype
from fwd.edge.endpoint import Endpoint
from fwd.edge.log_export import Journal, LogExport, SyslogServer
from fwd.edge.traffic_log import LogError, LogReader, TrafficLog
from fwd.log_entry import entry_of
from fwd.log_filter import LogQuestion
from tests.ports import free_port
from tests.waiting import until

EPOCH = 1_700_000_000.0
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")


def record(number: int, **changes) -> LogRecord:
    fields = {
        "number": number,
        "subtype": Subtype.END,
        "at": 100.0,
        "session_id": number,
        "application": "ipsec-udp",
        "protocol": 50,
        "source": bytes([192, 0, 2, 2]),
        "source_port": 4055664155,
        "source_zone": "untrust",
        "destination": bytes([192, 0, 2, 1]),
        "destination_port": 1693871936,
        "destination_zone": "untrust",
        "ingress": "wan",
        "egress": "wan",
        "rule": "our-tunnels",
        "action": Action.ALLOW,
        "end_reason": EndReason.TUNNEL_DOWN,
        "started_at": 40.0,
        "packets_c2s": 8,
        "packets_s2c": 5,
        "bytes_c2s": 1080,
        "bytes_s2c": 1014,
        "is_terminated": True,
        "ike_sa": "gw",
        "child_sa": "net",
        "rekeys": 1,
        "udp_ports": None,
        "spis_c2s": (1, 1693871936),
        "spis_s2c": (2, 4055664155),
    }
    return LogRecord(**(fields | changes))


class Log:
    """A traffic log, and what it said."""

    def __init__(self, path: Path, *, max_bytes: int = 1 << 30, max_age_s: float = 1e12, exports=()) -> None:
        self.path = path
        self.written = 0
        self.failures = 0
        self.rotated = self.unsent = 0
        self.log = TrafficLog(path, max_bytes, max_age_s, exports, self._written, self._failed, self._rotated)
        self.log.start()

    def _written(self, number: int) -> None:
        self.written = number

    def _failed(self) -> None:
        self.failures += 1

    def _rotated(self, count: int, unsent: int) -> None:
        self.rotated += count
        self.unsent += unsent

    def write(self, *numbers: int, **changes) -> None:
        self.log.write([record(number, **changes) for number in numbers], EPOCH)

    @property
    def used_bytes(self) -> int:
        with closing(sqlite3.connect(self.path)) as database:
            size, pages, free = (
                database.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_size", "page_count", "freelist_count")
            )
        return size * (pages - free)

    @property
    def numbers(self) -> list[int]:
        with closing(sqlite3.connect(self.path)) as database:
            return [number for (number,) in database.execute("SELECT number FROM traffic ORDER BY number")]


@contextmanager
def a_log(path: Path, **options):
    log = Log(path, **options)
    try:
        yield log
    finally:
        assert log.log.stop(60) or log.failures, "not all was written in time"


def question(matches=lambda row: True, since=None, until=None, is_forward=True, after=None, limit=100):
    return LogQuestion(matches, since, until, is_forward, after, limit)


def read(reader: LogReader, **asked) -> list[int]:
    """All that a reader finds, page by page."""
    numbers: list[int] = []
    after = None
    while True:
        entries, after = reader.page(question(after=after, **asked))
        numbers += [entry["number"] for entry in entries]
        if after is None:
            return numbers


def test_reading_in_pages_both_ways_by_time_and_by_what_matches(tmp_path):
    with a_log(tmp_path / "traffic") as log:
        log.log.write([record(number, at=float(number)) for number in range(1, 3001)], EPOCH)
    reader = LogReader(log.path)
    assert read(reader) == [*range(1, 3001)]
    assert read(reader, is_forward=False) == [*range(3000, 0, -1)]
    assert read(reader, since=EPOCH + 100, until=EPOCH + 110) == [*range(100, 111)]
    assert read(reader, since=EPOCH + 100, until=EPOCH + 110, is_forward=False, limit=3) == [*range(110, 99, -1)]
    assert read(reader, matches=lambda row: row["number"] in (5, 2900)) == [5, 2900]
    assert read(reader, since=EPOCH + 9999) == [] and read(reader, until=EPOCH) == []
    reader.close()


def test_reading_what_is_not_there_or_broken(tmp_path):
    reader = LogReader(tmp_path / "traffic")
    assert reader.page(question()) == ([], None)
    (tmp_path / "traffic").write_bytes(b"no database" * 1000)
    with pytest.raises(LogError, match="cannot be read"):
        reader.page(question())


def test_what_is_written_is_there_with_all_its_columns(tmp_path):
    with a_log(tmp_path / "log" / "traffic") as log:
        log.write(7, 8)
        until(lambda: log.written == 8)
    rows, more = LogReader(log.path).page(question())
    assert more is None and rows == [entry_of(record(number), EPOCH) for number in (7, 8)]
    assert rows[0]["time"] == EPOCH + 100 and rows[0]["elapsed_s"] == 60 and rows[0]["spis_c2s"] == "1 1693871936"
    assert log.path.stat().st_mode & 0o777 == 0o600


def test_a_record_that_comes_again_stays_one(tmp_path):
    for numbers in ((1, 2), (2, 3)):
        with a_log(tmp_path / "traffic") as log:
            log.write(*numbers)
        assert log.written == numbers[-1]
    assert log.numbers == [1, 2, 3]


_WRITER = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from tests.edge.test_traffic_log import Log
log = Log(Path(sys.argv[1]))
log._written = log.log._written = lambda number: print(number, flush=True)
for number in range(1, 20_000):
    log.write(number)
log.log.stop(60)
"""


@pytest.mark.parametrize("after", [1, 40, 300])
def test_what_was_said_to_be_written_outlives_a_kill(tmp_path, after):
    path = tmp_path / "traffic"
    command = [sys.executable, "-c", _WRITER, str(path), str(Path(__file__).parents[2])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        told = 0
        while told < after:
            told = int(writer.stdout.readline())
        writer.kill()
        told = max([told, *map(int, writer.stdout.read().split("\n")[:-1])])
    with a_log(path) as log:
        log.write(100_001)
    *numbers, last = log.numbers
    assert last == 100_001 and numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= told


@needs_root
@pytest.mark.parametrize("are_alive", [True, False])
def test_sessions_that_a_stop_left_go_on_or_have_ended(tmp_path, are_alive):
    path = tmp_path / "traffic"
    with a_log(path, exports=["syslog"]) as log:
        log.write(1)
        log.log.leave([record(number) for number in (2, 3)], EPOCH)
    assert log.numbers == [1]
    server = Server()
    with a_log(path, exports=["syslog"]) as log, an_export(log, syslog("tcp", server.port)):
        log.log.judge_left(are_alive=are_alive)
        log.write(7)
        until(lambda: log.written == 7)
        until(lambda: server.messages and ",7," in server.messages[-1])
    numbers = [7] if are_alive else [2, 3, 7]
    assert log.numbers == [1, *numbers]
    assert [int(message.split(",")[22]) for message in server.messages] == numbers
    server.close()
    with a_log(path) as log:  # once
        log.log.judge_left(are_alive=False)
    assert log.numbers == [1, *numbers]


def test_a_full_disk_makes_the_log_wait_and_lose_nothing(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=755", "tmpfs", tmp_path], check=True)
    try:
        with a_log(tmp_path / "traffic") as log:
            log.write(1)
            until(lambda: log.written == 1)
            ballast = tmp_path / "ballast"
            with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
            log.write(*range(2, 300))
            until(lambda: log.failures)
            assert log.log.trouble is not None and "full" in log.log.trouble
            ballast.unlink()
            until(lambda: log.written == 299)
            until(lambda: log.log.trouble is None)
        assert log.numbers == [*range(1, 300)]
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_damaged_file_is_kept_under_another_name(tmp_path, caplog):
    path = tmp_path / "traffic"
    path.write_bytes(b"no database at all" * 400)
    with a_log(path) as log:
        log.write(1)
    assert log.numbers == [1] and "is damaged" in caplog.text
    assert any(name.name.startswith("traffic.set-aside-") for name in tmp_path.iterdir())


def test_another_programs_database_is_left_alone(tmp_path):
    path = tmp_path / "traffic"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE precious (x)")
    with a_log(path) as log:
        until(lambda: log.failures)
        assert "another program's" in str(log.log.trouble)
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM precious").fetchall() == [(0,)]


def test_too_large_or_too_old_the_oldest_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr("fwd.edge.traffic_log.ROTATE_S", 0.01)
    with a_log(tmp_path / "traffic", max_bytes=400_000, exports=["syslog"]) as log:
        for first in range(1, 5001, 500):
            log.write(*range(first, first + 500))
        until(lambda: log.written == 5000 and log.rotated and log.used_bytes <= 400_000)
        until(lambda: log.rotated == 5000 - len(log.numbers))  # the last of it is told, too
        numbers = log.numbers
        assert numbers and numbers == [*range(5001 - len(numbers), 5001)]
        assert log.unsent == 0  # nobody has begun to send it on
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1_000_000
    with a_log(tmp_path / "traffic", max_age_s=600.0) as log:
        log.log.write([record(6000)], time.time() - 100)
        until(lambda: log.rotated == len(numbers))
    assert log.numbers == [6000]


# --- what it is sent to ---------------------------------------------------------------------------------


class Server:
    """A syslog server over TCP, with TLS or without, which remembers what it was sent."""

    def __init__(self, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.port = port or free_port()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._tls = tls
        self.octets = b""
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        try:
            while True:
                connection, _ = self._listener.accept()
                if self._tls:
                    connection = self._tls.wrap_socket(connection, server_side=True)
                self._connections.append(connection)
                while octets := connection.recv(65536):
                    self.octets += octets
        except OSError:
            pass

    @property
    def messages(self) -> list[str]:
        """Those that have come as a whole."""
        found, octets = [], self.octets
        while True:
            length, _, octets = octets.partition(b" ")
            if not length or len(octets) < int(length):
                return found
            found.append(octets[: int(length)].decode())
            octets = octets[int(length) :]

    def close(self) -> None:
        for held in (self._listener, *self._connections):
            with suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)
            held.close()


@contextmanager
def an_export(log: Log, receiver, name: str = "syslog"):
    counts = {"sent": 0, "failed": 0}

    def sent(count: int) -> None:
        counts["sent"] += count

    def failed() -> None:
        counts["failed"] += 1

    export = LogExport(name, log.log, log.path, receiver, sent, failed)
    export.start()
    try:
        until(lambda: _cursor(log.path, name) is not None)
        yield counts
    finally:
        export.stop(60)


def _cursor(path: Path, name: str) -> int | None:
    try:
        with closing(sqlite3.connect(path)) as database:
            row = database.execute("SELECT number FROM export WHERE name = ?", (name,)).fetchone()
            return row and row[0]
    except sqlite3.OperationalError:
        return None


def syslog(transport: str, port: int, *, is_ietf: bool = False, tls=ssl.create_default_context, tls_name: str = ""):
    return SyslogServer(
        Endpoint(transport, "127.0.0.1", port), "fw1", "local3", is_ietf=is_ietf, tls=tls, tls_name=tls_name
    )


def test_udp_in_the_old_form(tmp_path):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)
        receiver = syslog("udp", server.getsockname()[1])
        with a_log(tmp_path / "traffic", exports=["syslog"]) as log, an_export(log, receiver):
            log.write(1, 2)
            first, second = server.recv(4096).decode(), server.recv(4096).decode()
    assert first.startswith("<158>Nov 14 ") and " fw1 1,2023/11/14 " in first
    assert ",TRAFFIC,end," in first and ",192.0.2.2,192.0.2.1," in first
    assert first.split(",")[24:26] == ["4055664155", "1693871936"] and ",tunnel-down," in first
    assert second.split(",")[22] == "2"


def test_tls_in_the_new_form_and_nobody_else_is_believed(tmp_path):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("log.example").configure_cert(context)

    def trusting() -> ssl.SSLContext:
        ours = ssl.create_default_context()
        authority.configure_trust(ours)
        return ours

    server = Server(context)
    with a_log(tmp_path / "traffic", exports=["syslog"]) as log:
        with an_export(log, syslog("tls", server.port, is_ietf=True, tls=trusting, tls_name="other.example")) as counts:
            log.write(1)
            until(lambda: counts["failed"])
        assert server.octets == b"" and counts["sent"] == 0
        server.close()
        server = Server(context)
        with an_export(log, syslog("tls", server.port, is_ietf=True, tls=trusting, tls_name="log.example")) as counts:
            until(lambda: counts["sent"] == 1 and server.messages)
        (message,) = server.messages
        assert message.startswith("<158>1 2023-11-14T22:15:00.000Z fw1 fwd - TRAFFIC - 1,")
        server.close()


def test_a_server_that_goes_away_gets_everything_when_it_is_back(tmp_path, monkeypatch):
    monkeypatch.setattr("fwd.edge.log_export.RETRY_S", 0.05)
    server = Server()
    receiver = syslog("tcp", server.port)
    with a_log(tmp_path / "traffic", exports=["syslog"]) as log, an_export(log, receiver) as counts:
        log.write(*range(1, 201))
        until(lambda: counts["sent"] == 200)
        until(lambda: len(server.messages) == 200)
        before = [int(message.split(",")[22]) for message in server.messages]
        server.close()
        log.write(*range(201, 401))
        until(lambda: counts["failed"] >= 2)
        back = Server(port=server.port)
        until(lambda: counts["sent"] == 400)
        until(lambda: back.messages and ",400," in back.messages[-1])
        after = [int(message.split(",")[22]) for message in back.messages]
        back.close()
    assert before == [*range(1, 201)] and after[-200:] == [*range(201, 401)]


def test_an_export_goes_on_where_it_was_and_a_new_one_begins_now(tmp_path):
    path = tmp_path / "traffic"
    server = Server()
    with a_log(path, exports=["syslog"]) as log:
        log.write(1)
        until(lambda: log.written == 1)
        with an_export(log, syslog("tcp", server.port)) as counts:
            log.write(2)
            until(lambda: counts["sent"] == 1)
        log.write(3)
        until(lambda: log.written == 3)
        with an_export(log, syslog("tcp", server.port)) as counts:
            until(lambda: counts["sent"] == 1)
    until(lambda: len(server.messages) == 2)
    assert [message.split(",")[22] for message in server.messages] == ["2", "3"]
    server.close()
    with a_log(path) as log:  # which nobody sends on any more
        until(lambda: _cursor(path, "syslog") is None)


def test_the_journal_gets_fields(tmp_path):
    path = tmp_path / "journal"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(path))
        journal.settimeout(10)
        receiver = Journal(str(path))
        with a_log(tmp_path / "traffic", exports=["journal"]) as log, an_export(log, receiver, "journal"):
            log.write(1, rule="two\nlines")
            datagram = journal.recv(65536)
    assert b"FWD_SOURCE_PORT=4055664155\n" in datagram and b"FWD_END_REASON=tunnel-down\n" in datagram
    assert b"FWD_RULE\n\x09\0\0\0\0\0\0\0two\nlines\n" in datagram
