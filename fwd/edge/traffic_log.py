"""The traffic log on disk: entries in SQLite, written by a thread of its own, so that no packet waits for a disk.

What was committed survives any death of the process. What cannot be written, on a full disk say, is tried again until
it can, and waits with the core meanwhile. An entry that comes twice, because fwd was killed before it heard that the
first one was written, is known by its number and stays one. A file that is damaged is set aside, and a new one begun.

Sessions that live when fwd stops go on with the next one, or with nobody, if the machine boots anew in between. So they
have entries in a table of their own, and the next fwd says what becomes of these.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import NamedTuple

from ..core.traffic_log import LogRecord
from ..log_entry import COLUMNS, Entry, row_of
from ..log_filter import LogQuestion
from .database import move, transaction
from .folders import strangers_on_the_way

log = logging.getLogger(__name__)

_APPLICATION = 0x6677646C  # "fwdl" (SQLite's file header, application_id)
_LAYOUT = 1
_PREPARE = """
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
"""
_SET_UP = """
PRAGMA synchronous = NORMAL;
PRAGMA journal_size_limit = 4194304;
"""
_COLUMNS = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
_CREATE = (
    f"CREATE TABLE traffic ({_COLUMNS})",
    "CREATE INDEX by_time ON traffic (time)",
    "CREATE TABLE export (name TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_LAYOUT}",
)
_CREATE_LEFT = f"CREATE TABLE IF NOT EXISTS left_behind ({_COLUMNS})"
_VALUES = f"VALUES ({', '.join('?' for _ in COLUMNS)})"
_INSERT = f"INSERT OR IGNORE INTO traffic {_VALUES}"
_LEAVE = f"INSERT OR REPLACE INTO left_behind {_VALUES}"
_TAKE_LEFT = "INSERT OR IGNORE INTO traffic SELECT * FROM left_behind"
_FORGET_LEFT = "DELETE FROM left_behind"

#: After a failure the next try comes so much later, and the log is looked at for what is too old so often, in seconds.
RETRY_S = 2.0
ROTATE_S = 60.0
#: Entries that make room in one transaction, and the pages that are then given back to the file system.
_ROTATE_SLICE = 1000
_VACUUM_PAGES = 512
#: How long to wait for another one who writes to the file, in seconds.
_BUSY_S = 5.0
_READ_BUSY_S = 0.1
#: Rows that one page looks at, at most: some 10 ms' worth.
ROWS_LOOKED_AT = 1024
_MAX_NUMBER = 2**63 - 1


class LogError(Exception):
    """The log cannot be used; the message says why and what to do."""


class _Task(NamedTuple):
    """A statement of SQL, once for each of the records; with none of them it is done once, as it is."""

    sql: str
    records: Sequence[LogRecord] | None = None
    epoch: float = 0.0

    def do(self, database: sqlite3.Connection) -> None:
        if self.records is None:
            database.execute(self.sql)
        else:
            database.executemany(self.sql, (row_of(record, self.epoch) for record in self.records))


class TrafficLog:
    """The log under `path`, at most `max_bytes` large and `max_age_s` long (seconds).

    `exports` are the names of those that send it on. From its own thread it calls `written(number)` when all entries up
    to one are there for good, `failed()` when they could not be written, and `rotated(count, unsent)` when so many made
    room, of which so many had yet to be sent on.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        max_age_s: float,
        exports: Sequence[str],
        written: Callable[[int], None],
        failed: Callable[[], None],
        rotated: Callable[[int, int], None],
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._exports = exports
        self._written = written
        self._failed = failed
        self._rotated = rotated
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="traffic-log", daemon=True)
        self._leaving = threading.Event()
        self._news = threading.Condition()
        self._news_count = 0
        #: Why it cannot be written at the moment; None: it can.
        self.trouble: str | None = None
        #: All entries up to this one are there for good.
        self.written_number = 0

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def write(self, records: Sequence[LogRecord], epoch: float) -> None:
        """Write these soon; `epoch` is when the monotonic clock stood at 0, in seconds since the epoch."""
        self._tasks.put(_Task(_INSERT, records, epoch))

    def leave(self, records: Sequence[LogRecord], epoch: float) -> None:
        """Keep these of sessions that live, for the next fwd to judge."""
        self._tasks.put(_Task(_LEAVE, records, epoch))

    def judge_left(self, *, are_alive: bool) -> None:
        """Before the first record: sessions that a former fwd left live on, or have ended and are entries."""
        if not are_alive:
            self._tasks.put(_Task(_TAKE_LEFT))
        self._tasks.put(_Task(_FORGET_LEFT))

    def stop(self, within_s: float) -> bool:
        """Write what there is, if it takes no longer than that; whether that is all."""
        self._tasks.put(None)
        self._thread.join(within_s)
        self._leaving.set()
        return not self._thread.is_alive() and self.trouble is None

    def wait_for_news(self, known: int, timeout_s: float) -> int:
        """For readers in other threads: until more is written than at a former answer; gives what to ask with next."""
        with self._news:
            self._news.wait_for(lambda: self._news_count != known, timeout_s)
            return self._news_count

    def tell_news(self) -> None:
        """Let those who wait look again."""
        with self._news:
            self._news_count += 1
            self._news.notify_all()

    # --- its own thread -----------------------------------------------------------------------------

    def _work(self) -> None:
        database: sqlite3.Connection | None = None
        waiting: list[_Task] = []
        rotate_at = 0.0
        is_last = False
        while not self._leaving.is_set() and not (is_last and not waiting):
            if not waiting:
                is_last = not self._collect(waiting, max(0.0, rotate_at - time.monotonic())) or is_last
            try:
                if database is None:
                    database = open_log(self._path)
                    self._forget_exports(database)
                if waiting:
                    with transaction(database):
                        for task in waiting:
                            task.do(database)
                    numbers = [task.records[-1].number for task in waiting if task.sql == _INSERT and task.records]
                    waiting.clear()
                    if numbers:
                        self.written_number = numbers[-1]
                        self._written(self.written_number)
                    self.tell_news()
                if time.monotonic() >= rotate_at:
                    is_done = self._rotate(database)
                    rotate_at = time.monotonic() + (ROTATE_S if is_done else 0.0)
                self._note_trouble(None)
            except (OSError, sqlite3.Error, LogError) as error:
                if database is not None:
                    database.close()
                    database = None
                self._note_trouble(str(error))
                self._failed()
                if is_last:  # nobody waits any longer: the state file has what was not written
                    return
                self._leaving.wait(RETRY_S)
        if database is not None:
            database.close()

    def _collect(self, waiting: list[_Task], timeout_s: float) -> bool:
        """Wait for what there is to write, so long at most; False: there will be nothing more."""
        with contextlib.suppress(queue.Empty):
            task = self._tasks.get(timeout=timeout_s)
            while task is not None:
                waiting.append(task)
                task = self._tasks.get_nowait()
            return False
        return True

    def _note_trouble(self, trouble: str | None) -> None:
        if trouble is not None and self.trouble is None:
            log.error("the traffic log waits, and is tried again every %g s: %s: %s", RETRY_S, self._path, trouble)
        elif trouble is None and self.trouble is not None:
            log.info("the traffic log is written again")
        self.trouble = trouble

    def _forget_exports(self, database: sqlite3.Connection) -> None:
        """Nobody sends the log on under these names any more."""
        names = [name for (name,) in database.execute("SELECT name FROM export")]
        for name in set(names).difference(self._exports):
            database.execute("DELETE FROM export WHERE name = ?", (name,))

    def _rotate(self, database: sqlite3.Connection) -> bool:
        """Let the oldest entries go, some of them, if there are too many or they are too old; whether that is all."""
        (((oldest,),), ((page_size,),), ((pages,),), ((free,),)) = (
            database.execute(question).fetchall()
            for question in (
                "SELECT coalesce(min(time), 9e18) FROM traffic",
                "PRAGMA page_size",
                "PRAGMA page_count",
                "PRAGMA freelist_count",
            )
        )
        before = time.time() - self._max_age_s
        if (pages - free) * page_size > self._max_bytes:
            condition = "1"
        elif oldest < before:
            condition = f"time < {before!r}"
        else:
            return True
        with transaction(database):
            slice_ = f"SELECT number FROM traffic WHERE {condition} ORDER BY number LIMIT {_ROTATE_SLICE}"
            (unsent,) = database.execute(
                f"SELECT count(*) FROM ({slice_}) WHERE number > (SELECT min(number) FROM export)"
            ).fetchone()
            gone = database.execute(f"DELETE FROM traffic WHERE number IN ({slice_})").rowcount
        database.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()
        self._rotated(gone, unsent)
        return gone == 0


class LogReader:
    """Reads the log under `path`, in pages, some 10 ms' worth each; it may be written meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None

    def page(self, question: LogQuestion) -> tuple[list[Entry], int | None]:
        """Entries that match, and what to go on after (None: that is all). There may be none, and yet more to come.

        Where the clock was set back, times are out of order, and some are not found by them. Raises LogError.
        """
        try:
            return self._page(question)
        except sqlite3.Error as error:
            self.close()
            if not self._path.exists():  # nobody has written anything yet
                return [], None
            raise LogError(f"{self._path} cannot be read: {error}") from None

    def _page(self, question: LogQuestion) -> tuple[list[Entry], int | None]:
        if self._database is None:
            self._database = sqlite3.connect(
                f"{self._path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=_READ_BUSY_S
            )
            self._database.row_factory = sqlite3.Row
        first = self._edge(">=", question.since, "ASC", 0)
        last = self._edge("<=", question.until, "DESC", _MAX_NUMBER)
        if first is None or last is None:
            return [], None
        if question.is_forward:
            first = max(first, question.after + 1 if question.after is not None else 0)
        elif question.after is not None:
            last = min(last, question.after - 1)
        order = "ASC" if question.is_forward else "DESC"
        entries = []
        number = None
        rows = self._database.execute(
            f"SELECT * FROM traffic WHERE number BETWEEN ? AND ? ORDER BY number {order} LIMIT ?",
            (first, last, ROWS_LOOKED_AT),
        ).fetchall()
        since = question.since if question.since is not None else -inf
        until = question.until if question.until is not None else inf
        for row in rows:
            number = row["number"]
            if since <= row["time"] <= until and question.matches(row):
                entries.append(dict(row))
                if len(entries) == question.limit:
                    return entries, number
        return entries, number if len(rows) == ROWS_LOOKED_AT else None

    def _edge(self, comparison: str, at: float | None, order: str, otherwise: int) -> int | None:
        """The first or the last number of a time; None if there is nothing within it."""
        if at is None:
            return otherwise
        assert self._database is not None
        row = self._database.execute(
            f"SELECT number FROM traffic WHERE time {comparison} ? ORDER BY time {order} LIMIT 1", (at,)
        ).fetchone()
        return None if row is None else row["number"]

    def close(self) -> None:
        """Let go of the file."""
        if self._database is not None:
            self._database.close()
            self._database = None


def open_log(path: Path) -> sqlite3.Connection:
    """The log, as a database to write to; one that is not there is made. Raises LogError, OSError or sqlite3.Error."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if whose := strangers_on_the_way(path.parent):
        raise LogError(f"{whose}, who could put another file there: [traffic-log] file chooses another")
    try:
        return _open(path)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise
        aside = path.with_name(f"{path.name}.set-aside-{time.strftime('%Y%m%d-%H%M%S')}")
        log.error("%s is damaged (%s): it is kept as %s, and the log begins anew", path, error, aside)
        move(path, aside)
        return _open(path)


def _open(path: Path) -> sqlite3.Connection:
    # SQLite would make it with everybody's rights; its companions get the file's own.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    database = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_S)
    try:
        if not _has_tables(database):  # new, or a former one got no further
            database.executescript(_PREPARE)
            with transaction(database):
                for statement in () if _has_tables(database) else _CREATE:  # another thread may have been faster
                    database.execute(statement)
        ((application,),) = database.execute("PRAGMA application_id").fetchall()
        if application != _APPLICATION:
            raise LogError("this is another program's database: [traffic-log] file chooses another")
        ((layout,),) = database.execute("PRAGMA user_version").fetchall()
        if layout != _LAYOUT:
            raise LogError(f"another version of fwd wrote it (layout {layout}): move it away")
        database.executescript(_SET_UP)
        database.execute(_CREATE_LEFT)
    except BaseException:
        database.close()
        raise
    return database


def _has_tables(database: sqlite3.Connection) -> bool:
    ((count,),) = database.execute("SELECT count(*) FROM sqlite_master").fetchall()
    return bool(count)
