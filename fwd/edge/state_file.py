"""The state file: the core's records in SQLite, so that a daemon that is stopped or killed has a successor that knows.

It lives as long as the machine is up: sessions, SAs and the kernel's maps are gone after a reboot. So nothing waits for
a disk: what was committed survives the process, not the kernel. Each row has a checksum. A file that is damaged, of
another layout, boot or network namespace is set aside, never read in part.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path

from .database import move, transaction
from .folders import strangers_on_the_way

log = logging.getLogger(__name__)

_APPLICATION = 0x66776431  # "fwd1" (SQLite's file header, application_id)
_PREPARE = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = OFF;
"""
_CREATE = """
BEGIN;
CREATE TABLE world (name TEXT NOT NULL);
CREATE TABLE record (key BLOB PRIMARY KEY, body BLOB NOT NULL, checksum INTEGER NOT NULL) WITHOUT ROWID;
PRAGMA application_id = {application};
PRAGMA user_version = {layout};
COMMIT;
"""


class StateError(Exception):
    """The file cannot be used; the message says why and what to do."""


class _Unfit(Exception):
    """What is there is not what this fwd wrote; the message says why."""


class StateFile:
    """The records under `path`. `layout` is the version of their form."""

    def __init__(self, path: Path, layout: int) -> None:
        self._path = path
        self._layout = layout
        self._database: sqlite3.Connection | None = None

    def open(self) -> dict[bytes, bytes]:
        """The records that a former daemon left, none if there is no file that can be trusted. Raises StateError."""
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            if whose := strangers_on_the_way(self._path.parent):
                raise StateError(f"{whose}, who could put another file there: [state] file chooses another")
            if os.path.lexists(self._path):
                try:
                    return self._read()
                except (_Unfit, sqlite3.DatabaseError) as error:
                    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                        raise StateError(f"{self._path}: another fwd has it: [state] file chooses another") from None
                    self.set_aside(str(error))
            else:
                self._begin()
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise StateError(f"{self._path}: {error}: [state] file chooses another") from None
        return {}

    def write(self, rows: Mapping[bytes, bytes | None]) -> None:
        """Take over these rows, all or none of them; None deletes one. Raises StateError."""
        if self._database is None:
            return
        kept = [(key, body, _checksum(key, body)) for key, body in rows.items() if body is not None]
        gone = [(key,) for key, body in rows.items() if body is None]
        try:
            with transaction(self._database):
                if kept:
                    self._database.executemany("INSERT OR REPLACE INTO record VALUES (?, ?, ?)", kept)
                if gone:
                    self._database.executemany("DELETE FROM record WHERE key = ?", gone)
        except sqlite3.Error as error:
            raise StateError(f"{self._path}: {error}") from None

    def set_aside(self, reason: str) -> None:
        """Begin anew; what is there is kept under another name, for whoever wants to know. Raises StateError."""
        self.close()
        aside = self._path.with_name(self._path.name + ".set-aside")
        log.error("%s is not used, sessions begin anew: %s; it is kept as %s", self._path, reason, aside)
        try:
            move(self._path, aside)
            self._begin()
        except (OSError, sqlite3.Error) as error:
            raise StateError(f"{self._path}: {error}: remove it, or choose another [state] file") from None

    def close(self) -> None:
        """Let go of the file."""
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def _read(self) -> dict[bytes, bytes]:
        """Raises _Unfit, OSError or sqlite3.DatabaseError."""
        there = os.lstat(self._path)
        if not stat.S_ISREG(there.st_mode) or there.st_nlink != 1 or there.st_uid not in (0, os.geteuid()):
            raise _Unfit("it is no plain file of root's or fwd's user")
        database = self._connect()
        for pragma, wanted, what in (
            ("application_id", _APPLICATION, "is no state file of fwd"),
            ("user_version", self._layout, "has the layout of another version of fwd"),
        ):
            ((found,),) = database.execute(f"PRAGMA {pragma}").fetchall()
            if found != wanted:
                raise _Unfit(f"it {what} ({found}, not {wanted})")
        if database.execute("SELECT name FROM world").fetchall() != [(_world(),)]:
            raise _Unfit("it is of another boot or network namespace")
        if (found := database.execute("PRAGMA quick_check(1)").fetchall()) != [("ok",)]:
            raise _Unfit(f"it is damaged: {found[0][0]}")
        rows = {}
        for key, body, checksum in database.execute("SELECT key, body, checksum FROM record"):
            if not isinstance(key, bytes) or not isinstance(body, bytes) or _checksum(key, body) != checksum:
                raise _Unfit("it is damaged: a row and its checksum do not agree")
            rows[key] = body
        return rows

    def _begin(self) -> None:
        """A new file. Raises OSError or sqlite3.Error."""
        database = self._connect()
        database.executescript(_CREATE.format(application=_APPLICATION, layout=self._layout))
        database.execute("INSERT INTO world VALUES (?)", (_world(),))

    def _connect(self) -> sqlite3.Connection:
        mask = os.umask(0o077)
        try:
            self._database = sqlite3.connect(self._path, isolation_level=None, timeout=1.0)
            self._database.executescript(_PREPARE)
        finally:
            os.umask(mask)
        return self._database


def _checksum(key: bytes, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(key))


def _world() -> str:
    """What the records are true in: this boot, and this network namespace with its interfaces and maps."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"boot {boot}, net {os.stat('/proc/self/ns/net').st_ino}"
