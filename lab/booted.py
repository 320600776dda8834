"""A root folder that is booted: systemd is its first process, in namespaces of its own, as on a machine.

The folder itself is not written to: what the machine writes lies in memory and is gone with it. There is no network but
what is made inside. The kernel is this machine's.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

from .sandbox import LabError, Process, outside_path

# $1 is the root folder. What follows the first process's name are words that systemd takes for the kernel's.
_FIRST_PROCESS = """
set -e
mount -t tmpfs tmpfs /mnt
mkdir /mnt/written /mnt/work /mnt/root
mount -t overlay -o "lowerdir=$1,upperdir=/mnt/written,workdir=/mnt/work" overlay /mnt/root
cd /mnt/root
hostname fwd
ip link set lo up
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount --bind dev dev
mkdir .outside
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
mount -t tmpfs tmpfs dev/shm
pivot_root . .outside
umount -l /.outside
exec /lib/systemd/systemd --system systemd.mask=console-getty.service
"""
_UNSHARE = ("unshare", "--pid", "--fork", "--kill-child=KILL", "--mount", "--net", "--uts", "--ipc", "--cgroup")
_START_S = 60.0


class Booted:
    """A booted root folder; a context manager. It ends, whatever happens, with the thread that made it.

    Killed, that one leaves an empty control group behind: `rmdir` takes it away.
    """

    def __init__(self, root: Path) -> None:
        """Raises LabError if systemd does not come up."""
        # In a control group of its own, because systemd takes the one that it is in for the root of all.
        self._group = _control_groups() / f"fwd-lab-{os.getpid()}"
        self._group.mkdir(exist_ok=True)
        join = f'echo $$ > {self._group}/cgroup.procs && exec "$@"'
        self._process = Process(
            ["bash", "-c", join, "bash", *_UNSHARE, "bash", "-c", _FIRST_PROCESS, "boot", str(root)],
            env={"PATH": os.environ["PATH"], "container": "fwd-lab"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            self._wait_until_up()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Booted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it however it is."""
        self._process.end()
        deadline = time.monotonic() + 5
        while self._group.exists() and time.monotonic() < deadline:
            for folder, _, _ in os.walk(self._group, topdown=False):
                with contextlib.suppress(OSError):  # the kernel may not have buried the last process yet
                    os.rmdir(folder)
            time.sleep(0.05)

    def path(self, path: str) -> Path:
        """A path of the machine as it is reached from outside."""
        return outside_path(self._process.pid, path)

    def run(self, *command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command on it, as root; gives what it said, and does not mind its exit status."""
        enter = ["nsenter", "--all", "--target", str(self._process.pid)]
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return subprocess.run(
            [*enter, *command],
            env={"PATH": path, "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + _START_S
        state = "nothing"
        while self._process.is_running() and time.monotonic() < deadline:
            with contextlib.suppress(LabError):  # its first process is yet to come
                state = self.run("systemctl", "is-system-running").stdout.strip()
            if state in ("running", "degraded"):
                return
            time.sleep(0.1)
        self._process.popen.kill()  # and all of it with that
        assert self._process.popen.stderr is not None
        reason = self._process.popen.stderr.read().strip()
        raise LabError(f"systemd did not come up, run as root? Its last state: {state!r}. {reason}")


def _control_groups() -> Path:
    """Where the kernel's control groups, version 2, are mounted. Raises LabError."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise LabError("no control groups of version 2 are mounted here")
