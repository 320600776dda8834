"""Programs of this host that are run for what they print."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

_TIMEOUT_S = 10.0


class ProgramFailed(Exception):
    """A program is missing, failed or hung; the message says which one and, in its own words, why."""


def run(command: Sequence[str], stdin: str = "") -> str:
    """Run a program; gives what it prints. Raises ProgramFailed."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise ProgramFailed(f"{command[0]} is not installed") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProgramFailed(f"{command[0]}: {error}") from None
    if done.returncode:
        words = next((line for line in done.stderr.splitlines() if line.strip()), f"exit status {done.returncode}")
        raise ProgramFailed(f"{command[0]}: {words.strip()}")
    return done.stdout
