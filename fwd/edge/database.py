"""What the files of SQLite have in common: changes that are whole or not at all, and a file put out of the way."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

#: A database's own file, and those that SQLite may keep beside it (sqlite.org, "Temporary Files Used By SQLite").
_COMPANIONS = ("", "-wal", "-shm", "-journal")


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All that is done meanwhile, or nothing of it. Raises sqlite3.Error."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            database.execute("ROLLBACK")
        raise


def move(path: Path, to: Path) -> None:
    """Move a database that nobody has open, over another one if need be. Raises OSError."""
    for companion in _COMPANIONS:
        here, there = (place.with_name(place.name + companion) for place in (path, to))
        if os.path.lexists(here):
            os.replace(here, there)
        else:  # what is there would be taken for the other one's
            there.unlink(missing_ok=True)
