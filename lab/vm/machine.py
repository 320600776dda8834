"""One run of a machine: files go in and out by a disk of its own, and it ends in time, whatever the guest does."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..root_folder import cache_folder
from ..sandbox import LabError
from . import tools
from .image import Image

_TREE = Path(__file__).parents[2]
_START = Path(__file__).parent / "start.sh"
_SIZE = "1G"  # sparse
#: A file in the folder of results, by which the next run knows that it may empty it.
_MARK = ".fwd-vm"
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
        _empty(results)
        with self._image.in_use(), _workspace() as folder:
            disk = self._exchange_disk(folder, shlex.join(command))
            console, output = folder / "console", folder / "output"

            def boot() -> subprocess.Popen[str]:
                return self._start(
                    "fwd-lab=run",
                    folder,
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
        status = (results / "status").read_text().strip() if (results / "status").exists() else ""
        if trouble is None and not status.isdigit():
            trouble = "the guest went off before the command was done, or had no room to tell of it"
        if trouble is not None:
            raise LabError(
                f"{trouble}; the end of its console (all of it: {results}/console):\n{_tail(results / 'console')}"
            )
        return Outcome(int(status), time.monotonic() - started, self.acceleration)

    def shell(self) -> int:
        """A root shell on the guest's console, on this terminal; gives qemu's exit status."""
        with self._image.in_use(), _workspace() as folder, _terminal_as_it_was():
            self._exchange_disk(folder, "")
            terminal = ("-chardev", "stdio,id=terminal,signal=off,mux=on", "-serial", "chardev:terminal")
            qemu = self._start("fwd-lab=shell quiet", folder, *terminal)
            try:
                return qemu.wait()
            finally:
                qemu.kill()
                qemu.wait(20)

    def _start(self, kernel_words: str, folder: Path, *options: str, **more: Any) -> subprocess.Popen[str]:
        changes = folder / "changes"  # what the guest writes to its root, for as many boots as there are
        if not changes.exists():
            create = ("qemu-img", "create", "-q", "-f", "qcow2", "-b", self._image.disk, "-F", "raw", changes)
            tools.run(create, "make a disk for the machine")
        command = [
            *("setpriv", "--pdeathsig", "KILL"),  # it goes with the thread that started it
            *_qemu(self.acceleration),
            *self._size,
            *("-kernel", str(self._image.kernel), "-initrd", str(self._image.ram_disk)),
            *("-append", f"root=/dev/vda rw console=ttyS0 net.ifnames=0 mitigations=off {kernel_words}"),
            # Where there is no room here, the guest hears of it; else qemu would stop it without a word.
            *("-drive", f"file={changes},format=qcow2,if=none,id=root,cache=unsafe,werror=report"),
            *("-device", "virtio-blk-pci,drive=root"),
            *("-drive", f"file={folder}/disk,format=raw,if=none,id=lab,werror=report"),
            *("-device", "virtio-blk-pci,drive=lab,serial=lab"),
            *options,
        ]
        return subprocess.Popen(command, text=True, **more)

    def _exchange_disk(self, folder: Path, command: str) -> Path:
        content = folder / "lab"
        (content / "out").mkdir(parents=True)
        # Root asks of a tree that is somebody else's.
        git = ("git", "-c", f"safe.directory={_TREE}", "-C", _TREE)
        listed = tools.run(
            [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"], "list the tree's files"
        )
        for name in listed.split("\0"):
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
        make = ["mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-d", content, disk, _SIZE]
        tools.run(make, "bring the tree to the machine")
        shutil.rmtree(content)
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
    except subprocess.TimeoutExpired:
        return False  # or it is slow today
    boots = done.returncode == 0 and b"Linux version" in done.stdout
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
            with contextlib.suppress(subprocess.TimeoutExpired):
                qemu.wait(0.5)
            if qemu.returncode is not None:
                is_over = qemu.returncode != 0 or _boots_asked_for(disk) < boots  # and one last look
            printed = output.read_bytes()[said:] if output.exists() else b""
            whole = len(printed) if is_over else printed.rfind(b"\n") + 1
            for line in printed[:whole].splitlines():
                say(line.decode(errors="replace"))
            said += whole
            size = len(printed) - whole + said + (console.stat().st_size if console.exists() else 0)
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
    asked = tools.run(["debugfs", "-R", "cat /boot", disk], "read what the guest left", 60).strip()
    return int(asked) if asked.isdigit() else 0


def _read_back(disk: Path, results: Path) -> None:
    """Copy /out of the exchange disk to `results`."""
    # Of a guest that was ended the journal is still to be replayed.
    subprocess.run(["e2fsck", "-fp", disk], capture_output=True, timeout=120, check=False)
    subprocess.run(["debugfs", "-R", f'rdump /out "{results}"', disk], capture_output=True, timeout=120, check=False)
    for path in (results / "out").glob("*"):
        path.rename(results / path.name)
    shutil.rmtree(results / "out", ignore_errors=True)


def _empty(results: Path) -> None:
    """A folder for the results of this run, without those of another one. Raises LabError if it is somebody else's."""
    mark = results / _MARK
    if results.exists() and any(results.iterdir()) and not mark.exists():
        raise LabError(f"{results} has other files than a run's results: name another folder with --results")
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    mark.write_text("What is in this folder goes with the next run.\n")


@contextlib.contextmanager
def _workspace() -> Iterator[Path]:
    """A folder for one machine, beside the images: it grows to gigabytes. Those of runs that were killed go."""
    for former in cache_folder().glob("run-*"):
        if not Path(f"/proc/{former.name.split('-')[1]}").exists():
            shutil.rmtree(former, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"run-{os.getpid()}-", dir=cache_folder()) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _terminal_as_it_was() -> Iterator[None]:
    """qemu makes the terminal raw, and leaves it so if it is killed."""
    before = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    try:
        yield
    finally:
        if before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _tail(console: Path) -> str:
    if not console.exists():
        return "(empty)"
    return console.read_bytes()[-_CONSOLE_BYTES:].decode(errors="replace").replace("\r", "")
