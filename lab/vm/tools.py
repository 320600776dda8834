"""The programs that make a machine and run it: what they say when they fail is what the user is told."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from ..sandbox import LabError

#: Which of Debian's packages has each.
_PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "git": "git",
}


def need() -> None:
    """Raises LabError if one of them is not there, before minutes have gone by."""
    missing = [program for program in _PACKAGES if shutil.which(program) is None]
    if missing:
        packages = " ".join(sorted({_PACKAGES[program] for program in missing}))
        raise LabError(f"not installed: {', '.join(missing)}; try: apt-get install {packages}")


def run(command: Sequence[object], aim: str, timeout_s: float = 900) -> str:
    """Run one, and give what it prints. Raises LabError with the `aim` it did not reach, and its last words."""
    words = [str(word) for word in command]
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise LabError(f"cannot {aim}: {words[0]} was not done in {timeout_s:g} s") from None
    if done.returncode:
        raise LabError(f"cannot {aim}: {(done.stderr.strip() or done.stdout.strip())[-2000:]}")
    return done.stdout
