"""One run of a machine: files go in and out by a disk of its own, and it ends in time, whatever the guest does."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..root_folder import cache_folder
from ..sandbox import LabError
from .image import Image

_TREE = Path(__file__).parents[2]
_START = Path(__file__).parent / "start.sh"
_SIZE = "1G"  # sparse
_TRIAL_S = 15.0
_CONSOLE_BYTES = 6000
_LOST = ("Kernel panic - not syncing", "No init found", "(initramfs)", "You are in emergency mode")
#: Without a byte from a guest for so long, it hangs: longer than what a test may take.
SILENCE_S = 360.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: the command's exit status, and how many seconds the machine was on."""

    status: int
    took_s: float
    acceleration: str


class Machine:
    """A guest of an image, with this tree in it, and installed. Nothing that it does changes the image."""

    def __init__(self, image: Image, acceleration: str = "auto", memory_mib: int = 2048, processors: int = 2) -> None:
        for program, package in (("qemu-system-x86_64", "qemu-system-x86"), ("qemu-img", "qemu-utils")):
            if shutil.which(program) is None:
                raise LabError(f"{program} is not installed: apt-get install {package}")
        self._image = image
        self._size = ["-m", f"{memory_mib}", "-smp", f"{processors}"]
        self.acceleration = acceleration if acceleration != "auto" else "kvm" if kvm_boots(image) else "tcg"

    def run(
        self, command: Sequence[str], results: Path, say: Callable[[str], None], time_limit_s: float = 1800
    ) -> Outcome:
        """Run a command in the tree. What it prints is said; what it writes to /lab/out, and the logs, go to `results`.

        Raises LabError with the end of the console if the guest hangs, crashes or is not done in time; what can be
        saved of the results is there even so.
        """
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fwd-vm-") as folder:
            disk = self._exchange_disk(Path(folder), shlex.join(command))
            console, output = Path(folder) / "console", Path(folder) / "output"

            def boot() -> subprocess.Popen[str]:
                return self._start(
                    "fwd-lab=run",
                    Path(folder),
                    *("-chardev", f"file,id=console,path={console},append=on", "-serial", "chardev:console"),
                    *("-chardev", f"file,id=output,path={output},append=on", "-device", "virtio-serial"),
                    *("-device", "virtserialport,chardev=output,name=fwd.output"),
                    # It boots anew in another qemu: one that had emulated for half an hour took 2 min for 16 s of boot.
                    *("-action", "reboot=shutdown"),
                    start_new_session=True,  # Ctrl-C is for the one who called, who ends it in order
                    stdin=subprocess.DEVNULL,
                )

            trouble = _follow(boot, disk, console, output, say, time_limit_s)
            _read_back(disk, results)
            for path in (console, output):
                if path.exists():
                    shutil.copyfile(path, results / path.name)
        status = results / "status"
        if trouble is None and not status.exists():
            trouble = "the guest went off before the command was done"
        if trouble is not None:
            raise LabError(
                f"{trouble}; the end of its console (all of it: {results}/console):\n{_tail(results / 'console')}"
            )
        return Outcome(int(status.read_text()), time.monotonic() - started, self.acceleration)

    def shell(self) -> int:
        """A root shell on the guest's console, on this terminal; gives qemu's exit status."""
        with tempfile.TemporaryDirectory(prefix="fwd-vm-") as folder:
            self._exchange_disk(Path(folder), "")
            terminal = ("-chardev", "stdio,id=terminal,signal=off", "-serial", "chardev:terminal")
            qemu = self._start("fwd-lab=shell quiet", Path(folder), *terminal)
            try:
                return qemu.wait()
            finally:
                qemu.kill()
                qemu.wait(20)

    def _start(self, kernel_words: str, folder: Path, *options: str, **more: Any) -> subprocess.Popen[str]:
        changes = folder / "changes"  # what the guest writes to its root, for as many boots as there are
        if not changes.exists():
            create = ("qemu-img", "create", "-q", "-f", "qcow2", "-b", self._image.disk, "-F", "raw", changes)
            subprocess.run(create, check=True, capture_output=True)
        command = [
            *("setpriv", "--pdeathsig", "KILL"),  # it goes with the thread that started it
            *_qemu(self.acceleration),
            *self._size,
            *("-kernel", str(self._image.kernel), "-initrd", str(self._image.ram_disk)),
            *("-append", f"root=/dev/vda rw console=ttyS0 net.ifnames=0 mitigations=off {kernel_words}"),
            *("-drive", f"file={changes},format=qcow2,if=none,id=root,cache=unsafe"),
            *("-device", "virtio-blk-pci,drive=root"),
            *("-drive", f"file={folder}/disk,format=raw,if=none,id=lab"),
            *("-device", "virtio-blk-pci,drive=lab,serial=lab"),
            *options,
        ]
        return subprocess.Popen(command, text=True, **more)

    def _exchange_disk(self, folder: Path, command: str) -> Path:
        content = folder / "lab"
        (content / "out").mkdir(parents=True)
        listed = subprocess.run(
            ["git", "-C", str(_TREE), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            text=True,
            check=False,
        )
        if listed.returncode:
            raise LabError(f"what belongs to the tree is asked from git: {listed.stderr.strip()}")
        for name in listed.stdout.split("\0"):
            if name and (_TREE / name).is_file():  # not one that was deleted and is still in the index
                target = content / "tree" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(_TREE / name, target)
        self._image.install(content / "tree", folder).rename(content / "new")
        shutil.copyfile(_START, content / "start")
        (content / "command").write_text(command + "\n")
        columns, lines = shutil.get_terminal_size()
        (content / "terminal").write_text(f"COLUMNS={columns}\nLINES={lines}\nTERM={os.environ.get('TERM', 'vt220')}\n")
        disk = folder / "disk"
        subprocess.run(
            ["mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-d", content, disk, _SIZE],
            check=True,
            capture_output=True,
        )
        return disk


def kvm_boots(image: Image) -> bool:
    """Whether the kernel of the image boots with KVM here. It is tried, because a /dev/kvm that opens may still not do.

    The answer is kept until this machine boots anew.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    key = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    kept = cache_folder() / "kvm"
    if kept.exists() and kept.read_text().split()[:1] == [key]:
        return kept.read_text().split()[1] == "yes"
    command = [*("setpriv", "--pdeathsig", "KILL"), *_qemu("kvm"), "-m", "256", "-no-reboot", "-serial", "stdio"]
    command += ["-kernel", str(image.kernel), "-append", "console=ttyS0 panic=-1"]  # no disk: it panics, and is off
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TRIAL_S, check=False, stdin=subprocess.DEVNULL)
        boots = done.returncode == 0 and b"Linux version" in done.stdout
    except subprocess.TimeoutExpired:
        boots = False
    kept.write_text(f"{key} {'yes' if boots else 'no'}\n")
    return boots


def _qemu(acceleration: str) -> list[str]:
    how = {"kvm": ("kvm", "host"), "tcg": ("tcg,thread=multi", "max")}
    accelerator, processor = how[acceleration]
    return [
        *("qemu-system-x86_64", "-accel", accelerator, "-cpu", processor),
        *("-nodefaults", "-display", "none", "-nic", "none"),
        *("-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"),
    ]


def _follow(
    boot: Callable[[], subprocess.Popen[str]],
    disk: Path,
    console: Path,
    output: Path,
    say: Callable[[str], None],
    time_limit_s: float,
) -> str | None:
    """Boot, as often as the guest wants it, and say what it prints; gives what is wrong if it has to be ended."""
    end = time.monotonic() + time_limit_s
    heard_at, heard, said = time.monotonic(), 0, 0
    boots, qemu = 1, boot()
    is_over = False
    try:
        while not is_over:
            try:
                qemu.wait(0.5)
                is_over = qemu.returncode != 0 or _boots_asked_for(disk) < boots  # and one last look
            except subprocess.TimeoutExpired:
                pass
            printed = output.read_bytes()[said:] if output.exists() else b""
            whole = len(printed) if is_over else printed.rfind(b"\n") + 1
            for line in printed[:whole].splitlines():
                say(line.decode(errors="replace"))
            said += whole
            size = len(printed) + said + (console.stat().st_size if console.exists() else 0)
            if size != heard:
                heard_at, heard = time.monotonic(), size
                if any(words in _tail(console) for words in _LOST):
                    return "the guest does not boot, or its kernel has crashed"
            if time.monotonic() > end:
                return f"the guest was not done in {time_limit_s:g} s"
            if time.monotonic() - heard_at > SILENCE_S:
                return f"the guest hangs: not a byte from it for {SILENCE_S:g} s"
            if qemu.returncode is not None and not is_over:
                boots, qemu = boots + 1, boot()
    finally:
        qemu.kill()
        qemu.wait(20)
    return f"qemu ended with status {qemu.returncode}" if qemu.returncode else None


def _boots_asked_for(disk: Path) -> int:
    """After how many boots the guest wanted another one; it left the number on the disk."""
    command = ["debugfs", "-R", "cat /boot", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return int(done.stdout or "0")


def _read_back(disk: Path, results: Path) -> None:
    """Copy /out of the exchange disk to `results`, which is emptied first."""
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    # Of a guest that was ended the journal is still to be replayed.
    subprocess.run(["e2fsck", "-fp", disk], capture_output=True, timeout=120, check=False)
    subprocess.run(["debugfs", "-R", f'rdump /out "{results}"', disk], capture_output=True, timeout=120, check=False)
    for path in (results / "out").glob("*"):
        path.rename(results / path.name)
    shutil.rmtree(results / "out", ignore_errors=True)


def _tail(console: Path) -> str:
    if not console.exists():
        return "(empty)"
    return console.read_bytes()[-_CONSOLE_BYTES:].decode(errors="replace").replace("\r", "")
