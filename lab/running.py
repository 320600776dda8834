"""Labs that run detached: a small file for each, by which `list`, `shell` and `down` find them again."""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from .sandbox import LabError

FOLDER = Path("/run/fwd-lab")

_END_S = 20


@dataclass(frozen=True, slots=True)
class Running:
    """A detached lab: its name, its topology, its first process and when that started (clock ticks after boot)."""

    name: str
    topology: str
    first_pid: int
    started: int

    @classmethod
    def of(cls, name: str, topology: str, first_pid: int) -> Running:
        """The lab that this process holds. Raises LabError if there is no such process."""
        started = _started(first_pid)
        if started is None:
            raise LabError(f"lab {name} has ended: its first process {first_pid} is gone")
        return cls(name, topology, first_pid, started)

    def save(self) -> None:
        """Let others find it. Raises LabError if the name is taken."""
        unfinished = FOLDER / f".{self.name}.{os.getpid()}"
        try:
            self._write(unfinished)
            os.link(unfinished, _file(self.name))  # whole or not at all, and never over another's
        except FileExistsError:
            raise LabError(f"a lab {self.name} runs already: end it (down {self.name}) or choose a --name") from None
        finally:
            unfinished.unlink(missing_ok=True)

    def _write(self, path: Path) -> None:
        while True:
            FOLDER.mkdir(mode=0o755, exist_ok=True)
            with suppress(FileNotFoundError):  # another lab ended right then, and took the empty folder away
                path.write_text(json.dumps(asdict(self)))
                return

    def is_running(self) -> bool:
        """Whether it is still there; a later process with the same pid does not count."""
        return _started(self.first_pid) == self.started

    def end(self) -> None:
        """End it and wait until the last of its processes is gone. Raises LabError."""
        with suppress(ProcessLookupError):
            process = os.pidfd_open(self.first_pid)
            try:
                if self.is_running():  # asked only now: what the descriptor holds cannot become another process
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    # The kernel lets a first process go only after all others of its pid namespace.
                    if not select.select([process], [], [], _END_S)[0]:
                        raise LabError(f"lab {self.name} (process {self.first_pid}) does not end")
            finally:
                os.close(process)
        _forget(self.name)


def running() -> Iterator[Running]:
    """All detached labs that run; the files of those that ended otherwise are removed."""
    for path in sorted(FOLDER.glob("*.json")):
        with suppress(FileNotFoundError):
            lab = Running(**json.loads(path.read_text()))
            if lab.is_running():
                yield lab
            else:
                _forget(lab.name)


def find(name: str) -> Running:
    """The lab of that name. Raises LabError that says which there are."""
    labs = {lab.name: lab for lab in running()}
    if name not in labs:
        there = f"there are: {', '.join(labs)}" if labs else "none runs, 'up' starts one"
        raise LabError(f"no lab {name} runs; {there}")
    return labs[name]


def _file(name: str) -> Path:
    return FOLDER / f"{name}.json"


def _forget(name: str) -> None:
    _file(name).unlink(missing_ok=True)
    with suppress(OSError):  # not empty: others run
        FOLDER.rmdir()


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks after boot (proc(5), stat field 22); None if it is not there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # from field 3, the state, on
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
