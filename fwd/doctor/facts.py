"""What the checks judge by. Sizes are in bytes, times in seconds."""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..edge.queue_stats import QueueStats
from ..edge.ruleset import PresentTable
from .finding import Fact
from .firewalls import Chain

READ, WRITE, SEARCH = 4, 2, 1

#: linux/capability.h
CAP_DAC_OVERRIDE, CAP_NET_ADMIN = 1, 12


@dataclass(frozen=True, slots=True)
class Identity:
    """A user with the groups that a process of his has, and whether file modes do not bind him."""

    name: str
    uid: int
    gids: frozenset[int]
    is_above_modes: bool = False


@dataclass(frozen=True, slots=True)
class FileState:
    """One step of a path, as stat(2) has it."""

    path: str
    uid: int
    gid: int
    mode: int

    @property
    def is_socket(self) -> bool:
        """Whether it is a unix socket."""
        return stat.S_ISSOCK(self.mode)

    def lets(self, who: Identity, want: int) -> bool:
        """Whether its mode lets somebody do that (READ, WRITE, SEARCH)."""
        shift = 6 if who.uid == self.uid else 3 if self.gid in who.gids else 0
        return who.is_above_modes or (self.mode >> shift) & want == want


@dataclass(frozen=True, slots=True)
class Way:
    """A path from / on as far as it exists."""

    path: str
    steps: tuple[FileState, ...]

    @property
    def end(self) -> FileState | None:
        """What is at its end; None if nothing is."""
        return self.steps[-1] if self.steps and self.steps[-1].path == self.path else None

    def obstacle(self, who: Identity, want: int) -> FileState | None:
        """The first step that does not let somebody do what he wants at the end of it."""
        for step in self.steps:
            if not step.lets(who, want if step.path == self.path else SEARCH):
                return step
        return None


@dataclass(frozen=True, slots=True)
class Me:
    """Who asks."""

    identity: Identity
    has_net_admin: bool


@dataclass(frozen=True, slots=True)
class Running:
    """What the daemon says of itself (`system.info`, `counter.list`)."""

    info: Mapping[str, Any]
    counters: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Silence:
    """The daemon does not answer this user: the client's reason, and whether it was the daemon who said no."""

    reason: str
    is_denied: bool


@dataclass(frozen=True, slots=True)
class Process:
    """The daemon's process. `is_here`: in this network namespace; None if that cannot be seen."""

    pid: int
    identity: Identity
    capabilities: int
    is_here: bool | None


@dataclass(frozen=True, slots=True)
class Accounts:
    """What fwd's user and groups are: their numbers; None if they do not exist."""

    uid: int | None
    group: int | None
    vici_group: int | None
    #: Who is in group fwd-vici, fwd's user not left out.
    vici_members: frozenset[str]


@dataclass(frozen=True, slots=True)
class Trial:
    """Rules and a queue as fwd makes them, in an empty network namespace: how, and what would not do."""

    backend: str
    words: str
    queue_refusal: str


@dataclass(frozen=True, slots=True)
class Vici:
    """strongSwan's socket, who answers on it (daemon and version), and the processes of charon that run."""

    way: Way
    answer: Fact[tuple[str, str]]
    charons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reader:
    """Who has fwd's queue: its numbers, and the process if it can be told."""

    stats: QueueStats
    port_id: int
    process: str


@dataclass(frozen=True, slots=True)
class Xfrm:
    """What of IPsec is in the kernel: how many SAs and policies, and the SAs' offloads (device, kind)."""

    states: int
    policies: int
    offloads: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Clock:
    """The wall clock, when this fwd was installed, whether NTP keeps it, and how long the machine slept."""

    wall: float
    installed: float
    is_synchronised: bool
    slept: float


@dataclass(frozen=True, slots=True)
class Folder:
    """Where a file of fwd's is: the way to the folder, whom it must not belong to, room, and the file's own size."""

    file: str
    way: Way
    strangers: str | None
    free: int
    total: int
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All of it. A service, a process, a reader or a folder that is None is not there, or not wanted."""

    hostname: str
    release: str
    version: str
    me: Me
    socket: str
    daemon: Running | Silence
    process: Fact[Process | None]
    unit: Fact[Mapping[str, str] | None]
    accounts: Fact[Accounts]
    #: Whom the daemon runs as, or would.
    runs_as: Identity
    config_way: Way
    #: None if the file is wrong, which `config_faults` tells of.
    config: Fact[Config | None]
    config_faults: tuple[str, ...]
    missing_groups: Fact[tuple[str, ...]]
    interfaces: tuple[str, ...]
    modules: Mapping[str, str]
    #: None if the daemon answers, which knows better.
    trial: Fact[Trial | None]
    tables: Fact[Mapping[str, PresentTable]]
    chains: Fact[Sequence[Chain]]
    firewall_services: tuple[str, ...]
    reader: Fact[Reader | None]
    vici: Fact[Vici]
    xfrm: Fact[Xfrm]
    #: Offloads that are on, by interface.
    offloads: Fact[Mapping[str, frozenset[str]]]
    sysctls: Mapping[str, int]
    clock: Fact[Clock]
    state: Fact[Folder | None]
    traffic_log: Fact[Folder | None]
