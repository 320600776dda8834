"""Where a lab lives: a process tree in pid, mount and network namespaces of its own.

Its first process holds all of it. When that one dies, by whatever signal, the kernel ends every process of the
tree, and with the last of them go the network namespaces, the mounts and the tmpfs on /run and /var/log with all files.
Nothing has to be cleaned up, so nothing can be left behind; and since no name is visible outside, any number of
labs run side by side.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A shell, because the first process of a pid namespace has to reap what others leave. If nobody reads its `ready`
# any more it leaves. A detached one (it is told `wait`) leaves too if its caller goes before `release` was called.
_FIRST_PROCESS = """
for folder in /run /var/log ; do mount -t tmpfs -o mode=755 tmpfs "$folder" || exit ; done
mkdir /run/netns /run/hosts /run/lock && ip link set lo up || exit
echo ready || exit
exec 1>&- ; [ -z "$1" ] || read -r || exit
while : ; do sleep 3600 & wait $! ; done
"""
#: How many times as long as usual things may take, from FWD_LAB_PATIENCE: more than 1 on an emulated machine.
PATIENCE = float(os.environ.get("FWD_LAB_PATIENCE", "1"))

#: For a killed process to be gone, with all its namespaces.
_END_S = 60.0 * PATIENCE

_UNSHARE = ("unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--mount", "--net", "--uts")


class LabError(Exception):
    """The lab cannot do what it was asked to; the message says why and what to do."""


class Sandbox:
    """One tree of namespaces; it ends with the process that made it. A detached one does until it is released."""

    def __init__(self, *, is_detached: bool = False) -> None:
        # --kill-child ends the first process with unshare, and the leash ends unshare with the one who called it.
        self._process = Process(
            [*_UNSHARE, "bash", "-c", _FIRST_PROCESS, "lab", *(["wait"] if is_detached else [])],
            is_leashed=not is_detached,
            stdin=subprocess.PIPE if is_detached else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if not is_detached else subprocess.DEVNULL,
        )
        stdout, stderr = self._process.popen.stdout, self._process.popen.stderr
        assert stdout is not None
        if stdout.readline() != "ready\n":
            reason = stderr.read() if stderr else ""
            self.close()
            raise LabError(f"cannot make namespaces: run as root ({reason.strip()})")
        stdout.close()
        self.first_pid = self._process.pid

    def release(self) -> None:
        """Let a detached sandbox outlive this process."""
        stdin = self._process.popen.stdin
        assert stdin is not None
        stdin.write("stay\n")
        stdin.close()

    def close(self) -> None:
        """End everything in the sandbox and wait until the last process is gone."""
        # unshare stays until its child is gone, and the kernel lets a first process go last.
        self._process.end()


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
    """A program in the sandbox. `pid` is its own, as seen from here, not that of the `nsenter` around it.

    On its leash the process around it ends with the thread that started it. `nsenter` needs that too: it is outside
    the pid namespace, and one that has stopped with its child would stay for ever when the sandbox goes.
    """

    def __init__(self, command: Sequence[str], *, is_leashed: bool = True, **options: Any) -> None:
        leash = ["setpriv", "--pdeathsig", "KILL"] if is_leashed else []
        # A session of its own: Ctrl-C is for the one who called, who ends it in order.
        self.popen: subprocess.Popen[str] = subprocess.Popen(
            [*leash, *command], text=True, start_new_session=True, **options
        )

    @property
    def pid(self) -> int:
        """Raises LabError if it has ended."""
        while self.popen.poll() is None:
            if found := children(self.popen.pid):
                return found[0]
            time.sleep(0.005)  # the one around it has yet to start it
        raise LabError(f"process {self.popen.pid} has ended")

    def send(self, number: signal.Signals) -> None:
        """Send it a signal. Raises LabError if it has ended."""
        os.kill(self.pid, number)
        if number == signal.SIGCONT:
            self.popen.send_signal(number)  # nsenter stops itself with its child, but does not go on with it

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
                self.popen.send_signal(signal.SIGCONT)
            except (LabError, ProcessLookupError):
                self.popen.kill()
        self.popen.wait(_END_S)
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                pipe.close()
