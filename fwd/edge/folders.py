"""Whoever may change a folder on the way to a file can put another one in its place."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def strangers_on_the_way(folder: Path, owner: int | None = None) -> str | None:
    """Which folder can be changed by whom besides root and fwd's own user, in words; None if it is safe.

    `owner` is fwd's user, if that is not who asks. A sticky folder such as /tmp is safe for what stands in it already.
    Raises OSError.
    """
    owner = os.geteuid() if owner is None else owner
    for way in (folder.absolute(), folder.resolve()):
        for step in (way, *way.parents):
            found = os.stat(step)
            if found.st_uid not in (0, owner):
                return f"{step} can be changed by uid {found.st_uid}"
            if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
                return f"{step} can be changed by others"
    return None
