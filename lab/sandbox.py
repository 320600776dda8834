"""Where a lab lives: a process tree in pid, mount and network namespaces of its own.

Its first process holds all of it. When that one dies, by whatever signal, the kernel ends every process of the
tree, and with the last of them go the network namespaces, the mounts and the tmpfs on /run with all files.
Nothing has to be cleaned up, so nothing can be left behind; and since no name is visible outside, any number of
labs run side by side.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A shell, because the first process of a pid namespace has to reap what others leave.
_FIRST_PROCESS = """
mount -t tmpfs -o mode=755 tmpfs /run && mkdir /run/netns /run/hosts /run/lock && ip link set lo up && echo ready
exec 1>&- ; while : ; do sleep 3600 & wait $! ; done
"""


class LabError(Exception):
    """The lab cannot do what it was asked to; the message says why and what to do."""


class Sandbox:
    """One tree of namespaces. Started with `is_detached` it outlives the process that started it."""

    def __init__(self, *, is_detached: bool = False) -> None:
        # --kill-child ends the first process with unshare, and setpriv ends unshare with the one who called it.
        leash = [] if is_detached else ["setpriv", "--pdeathsig", "KILL"]
        self._unshare = subprocess.Popen(
            [*leash, "unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--mount", "--net", "--uts"]
            + ["bash", "-c", _FIRST_PROCESS],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if not is_detached else subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the one who called: he ends us in order
            text=True,
        )
        assert self._unshare.stdout is not None
        if self._unshare.stdout.readline() != "ready\n":
            reason = self._unshare.stderr.read() if self._unshare.stderr else ""
            self.close()
            raise LabError(f"cannot make namespaces: run as root ({reason.strip()})")
        self._unshare.stdout.close()
        (self.first_pid,) = children(self._unshare.pid)

    @property
    def unshare_pid(self) -> int:
        """The process to end from outside."""
        return self._unshare.pid

    def close(self) -> None:
        """End everything in the sandbox."""
        self._unshare.kill()
        self._unshare.wait()
        for pipe in (self._unshare.stdout, self._unshare.stderr):
            if pipe is not None:
                pipe.close()


def enter(first_pid: int, host: str | None = None) -> list[str]:
    """What to put before a command so that it runs in the sandbox, on a host or outside all of them."""
    where = ["ip", "netns", "exec", host] if host else []
    return ["nsenter", "--target", str(first_pid), "--pid", "--mount", "--net", "--uts", *where]


def outside_path(first_pid: int, path: str) -> Path:
    """A path of the sandbox as it is reached from outside."""
    return Path(f"/proc/{first_pid}/root{path}")


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Process:
    """A program in the sandbox. `pid` is its own, as seen from here, not that of the `nsenter` around it."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        self.popen: subprocess.Popen[str] = subprocess.Popen(command, text=True, start_new_session=True, **options)

    @property
    def pid(self) -> int:
        """Raises LabError if it has ended."""
        found = children(self.popen.pid) if self.popen.poll() is None else []
        if not found:
            raise LabError(f"process {self.popen.pid} has ended")
        return found[0]

    def send(self, number: signal.Signals) -> None:
        """Send it a signal. Raises LabError if it has ended."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int:
        """Its exit status, when it has ended by then. Raises subprocess.TimeoutExpired."""
        return self.popen.wait(timeout_s)

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.popen.poll() is None

    def end(self) -> None:
        """End it and wait for that."""
        if self.is_running():
            try:
                self.send(signal.SIGKILL)
            except (LabError, ProcessLookupError):
                self.popen.kill()
        self.popen.wait(10)
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                pipe.close()
