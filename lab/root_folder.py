"""Root folders with packages of Debian in them, made once and kept in a cache: programs newer than those here, say."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from .sandbox import LabError

# In a pid namespace of its own nothing of a build goes on when the process that wanted it is killed.
LEASH = ("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")


def cache_folder() -> Path:
    """Where the lab keeps what takes long to make."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fwd-lab"


def root_folder(name: str, packages: str, say: Callable[[str], None] = lambda _: None, release: str = "trixie") -> Path:
    """The root folder of that name, with these packages of a release; makes it if there is none. Raises LabError."""
    folder = cache_folder()
    root = folder / name
    if root.exists():  # it got its name when it was whole; while another one is made, nobody waits for this one
        return root
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two labs that start at once make it once
        if root.exists():
            return root
        if shutil.which("mmdebstrap") is None:
            raise LabError("mmdebstrap is not installed: apt-get install mmdebstrap")
        say(f"making the root folder {root}, once (about 30 s) ...")
        unfinished = folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)  # of one that was killed: who holds the lock is alone
        unfinished.mkdir()
        try:
            command = [*LEASH, "mmdebstrap", "--variant=apt", f"--include={packages}", release, str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
            if done.returncode:
                raise LabError(f"mmdebstrap failed, is Debian's mirror reachable? {done.stderr[-1000:]}")
            unfinished.chmod(0o755)
            unfinished.rename(root)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return root
