"""Gathers the facts. Each of them that cannot be had is the reason why (CannotLook) in its place."""

from __future__ import annotations

import ctypes
import grp
import gzip
import json
import os
import platform
import pwd
import re
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .. import __version__
from ..cli.client import Client, NoDaemon
from ..config import DEFAULT_PATH, Config, ConfigError, load
from ..edge.clients import Access
from ..edge.folders import strangers_on_the_way
from ..edge.programs import ProgramFailed, run
from ..edge.queue_stats import kernel_queue_stats, queue_reader
from ..edge.ruleset import TABLE, present
from ..edge.vici import charon_version
from ..rpc import FORBIDDEN, RpcError
from .facts import (
    CAP_DAC_OVERRIDE,
    CAP_NET_ADMIN,
    Accounts,
    Clock,
    Facts,
    FileState,
    Folder,
    Identity,
    Me,
    Process,
    Reader,
    Running,
    Silence,
    Trial,
    Vici,
    Way,
    Xfrm,
)
from .finding import CannotLook, Fact, known
from .firewalls import Chain, iptables_chains, nft_chains

_T = TypeVar("_T")

UNIT = "fwd.service"
USER, GROUP, VICI_GROUP = "fwd", "fwd", "fwd-vici"
AS_ROOT = "sudo fwctl doctor"

_ASK_S = 5.0

#: What fwd's rules and queue, and the kernel's ESP offload, are made of: modules, and the options that build them in.
MODULES = {
    "nf_tables": "CONFIG_NF_TABLES",
    "nfnetlink_queue": "CONFIG_NETFILTER_NETLINK_QUEUE",
    "nft_queue": "CONFIG_NFT_QUEUE",
    "nft_compat": "CONFIG_NFT_COMPAT",
    "xt_NFQUEUE": "CONFIG_NETFILTER_XT_TARGET_NFQUEUE",
    "esp4_offload": "CONFIG_INET_ESP_OFFLOAD",
    "esp6_offload": "CONFIG_INET6_ESP_OFFLOAD",
}

_PROPERTIES = (
    "LoadState,ActiveState,SubState,Result,ExecMainStatus,UnitFileState,NRestarts,NeedDaemonReload,MainPID,User,"
    "AmbientCapabilities,CapabilityBoundingSet"
)

#: Legacy iptables reads nothing but tables that are there; to name one would make it.
_SAVES = {
    "iptables": ("iptables-nft-save", "iptables-legacy-save"),
    "ip6tables": ("ip6tables-nft-save", "ip6tables-legacy-save"),
}

_STA_UNSYNC, _TIMEX_STATUS = 0x0040, struct.Struct("@illlli")  # linux/timex.h; modes ... status
_NETLINK_NETFILTER = 12


def look(path: str) -> Facts:
    """All facts about the fwd behind this control socket, and about its host."""
    me = _me()
    daemon = _daemon(path)
    unit = _fact(_unit)
    process = _fact(partial(_process, daemon, unit))
    runs_as = _runs_as(process, unit)
    config_path, is_default = _config_path(daemon)
    config_way = _way(config_path)
    faults: tuple[str, ...] = ()
    try:
        config = _fact(partial(_config, daemon, config_way, is_default))
    except ConfigError as error:
        config, faults = None, tuple(str(error).splitlines())
    settings = partial(_settings, config)
    net_admin = partial(_as_net_admin, me)
    return Facts(
        hostname=socket.gethostname(),
        release=platform.release(),
        version=__version__,
        me=me,
        socket=path,
        daemon=daemon,
        process=process,
        unit=unit,
        accounts=_fact(_accounts),
        runs_as=runs_as,
        config_way=config_way,
        config=config,
        config_faults=faults,
        missing_groups=_fact(lambda: _missing_groups(settings())),
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        modules=_modules(platform.release()),
        trial=_fact(partial(_trial, daemon, settings, me.identity.uid == 0)),
        tables=_fact(net_admin(present)),
        chains=_fact(net_admin(_chains)),
        firewall_services=tuple(_firewall_services()),
        reader=_fact(lambda: _reader(settings().dataplane.queue)),
        vici=_fact(lambda: _vici(settings().vici.socket)),
        xfrm=_fact(net_admin(_xfrm)),
        offloads=_fact(_offloads),
        sysctls=dict(_sysctls()),
        clock=_fact(_clock),
        state=_fact(lambda: _folder(settings().state.file, runs_as)),
        traffic_log=_fact(lambda: _folder(settings().traffic_log.file, runs_as)),
    )


def _fact(look_at: Callable[[], _T]) -> Fact[_T]:
    """What there is to see, or why it cannot be seen."""
    try:
        return look_at()
    except CannotLook as reason:
        return reason
    except ConfigError:
        raise
    except PermissionError as error:
        return CannotLook(f"{error.filename or 'the kernel'}: permission denied", AS_ROOT)
    except Exception as error:  # whatever it is, the other facts are worth having
        return CannotLook(str(error) or type(error).__name__)


def _as_net_admin(me: Me, look_at: Callable[[], _T]) -> Callable[[], _T]:
    """The same for those who may."""

    def guarded() -> _T:
        if not me.has_net_admin:
            raise CannotLook("only root may (CAP_NET_ADMIN)", AS_ROOT)
        return look_at()

    return guarded


def _run(*command: str) -> str:
    """What a program prints. Raises CannotLook."""
    try:
        return run(command)
    except ProgramFailed as failure:
        raise CannotLook(str(failure)) from None


# --- who -------------------------------------------------------------------------------------------------


def _me() -> Me:
    uid = os.geteuid()
    capabilities = _status("self")["CapEff"]
    name = _user_name(uid)
    gids = frozenset([os.getegid(), *os.getgroups()])
    return Me(Identity(name, uid, gids, _has(capabilities, CAP_DAC_OVERRIDE)), _has(capabilities, CAP_NET_ADMIN))


def _has(capabilities: str, number: int) -> bool:
    return bool(int(capabilities, 16) >> number & 1)


def _user_name(uid: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return f"uid {uid}"


def _status(pid: int | str) -> dict[str, str]:
    """The lines of /proc/PID/status (proc(5)). Raises OSError."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _accounts() -> Accounts:
    uid = group = vici_group = None
    members: set[str] = set()
    with suppress(KeyError):
        uid = pwd.getpwnam(USER).pw_uid
    with suppress(KeyError):
        group = grp.getgrnam(GROUP).gr_gid
    with suppress(KeyError):
        found = grp.getgrnam(VICI_GROUP)
        vici_group, members = found.gr_gid, set(found.gr_mem)
        if uid is not None and vici_group in os.getgrouplist(USER, pwd.getpwnam(USER).pw_gid):
            members.add(USER)
    return Accounts(uid, group, vici_group, frozenset(members))


def _daemon(path: str) -> Running | Silence:
    try:
        with closing(Client(path, _ASK_S)) as client:
            return Running(client.call("system.info"), client.call("counter.list")["counters"])
    except RpcError as error:
        return Silence(error.message, error.code == FORBIDDEN)
    except NoDaemon as error:
        return Silence(str(error), False)
    except Exception as error:  # an answer of another version, say
        return Silence(f"{path}: this is not fwd's answer ({error})", False)


def _unit() -> Mapping[str, str] | None:
    if not Path("/run/systemd/system").exists():  # sd_booted(3)
        return None
    printed = _run("systemctl", "show", UNIT, f"--property={_PROPERTIES}")
    return dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)


def _process(daemon: Running | Silence, unit: Fact[Mapping[str, str] | None]) -> Process | None:
    pid = int(daemon.info["pid"]) if isinstance(daemon, Running) else 0
    if not pid and isinstance(unit, Mapping):
        pid = int(unit.get("MainPID", 0))
    if not pid:
        return None
    if b"fwd" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        raise CannotLook(f"process {pid} is not in sight: fwd runs in a container of its own")
    status = _status(pid)
    uid = int(status["Uid"].split()[1])
    gids = frozenset(map(int, [status["Gid"].split()[1], *status["Groups"].split()]))
    identity = Identity(_user_name(uid), uid, gids, _has(status["CapEff"], CAP_DAC_OVERRIDE))
    return Process(pid, identity, int(status["CapEff"], 16), _is_here(pid))


def _is_here(pid: int | str) -> bool | None:
    """Whether a process is in this network namespace; None if that cannot be seen."""
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net")
    return None


def _runs_as(process: Fact[Process | None], unit: Fact[Mapping[str, str] | None]) -> Identity:
    """Whom fwd runs as, or would: as its unit says, else root."""
    if isinstance(process, Process):
        return process.identity
    with suppress(KeyError):
        is_unit = isinstance(unit, Mapping) and unit.get("LoadState") == "loaded"
        user = pwd.getpwnam((unit.get("User") or "root") if is_unit and isinstance(unit, Mapping) else USER)
        return Identity(
            user.pw_name, user.pw_uid, frozenset(os.getgrouplist(user.pw_name, user.pw_gid)), user.pw_uid == 0
        )
    return Identity("root", 0, frozenset([0]), True)


# --- files -----------------------------------------------------------------------------------------------


def _way(path: str) -> Way:
    """The steps to a path, as far as there are any that can be seen."""
    steps = []
    for step in [*reversed(Path(path).parents), Path(path)]:
        try:
            found = os.stat(step)
        except OSError:
            break
        steps.append(FileState(str(step), found.st_uid, found.st_gid, found.st_mode))
    return Way(path, tuple(steps))


def _config_path(daemon: Running | Silence) -> tuple[str, bool]:
    """The file that fwd reads, and whether it may be missing."""
    said = str(daemon.info.get("configuration", "")) if isinstance(daemon, Running) else ""
    return (said, False) if said.startswith("/") else (str(DEFAULT_PATH), True)


def _config(daemon: Running | Silence, way: Way, is_default: bool) -> Config | None:
    """What the file says; None if it is wrong (see `look`). Raises ConfigError or CannotLook."""
    if way.end is not None and not os.access(way.path, os.R_OK):
        raise CannotLook(f"{way.path}: permission denied", AS_ROOT)
    if way.end is None and isinstance(daemon, Silence) and daemon.is_denied:
        raise CannotLook("fwd tells only those who may ask which file it has read", AS_ROOT)
    return load(None if is_default else Path(way.path))


def _settings(config: Fact[Config | None]) -> Config:
    """What fwd is to go by; the default, if the file is wrong."""
    return known(config) or Config()


def _missing_groups(config: Config) -> tuple[str, ...]:
    return tuple(Access(config.control.read_groups, config.control.change_groups).missing_groups())


def _folder(file: str, runs_as: Identity) -> Folder | None:
    if not file:
        return None
    way = _way(str(Path(file).parent))
    there = Path(way.steps[-1].path)
    strangers = strangers_on_the_way(there, runs_as.uid) if way.end else None
    room = os.statvfs(there)
    used = 0
    with suppress(OSError):
        used = sum(found.stat().st_size for found in there.glob(f"{Path(file).name}*")) if way.end else 0
    return Folder(file, way, strangers, room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize, used)


# --- the kernel --------------------------------------------------------------------------------------------


def _modules(release: str) -> dict[str, str]:
    """Of each module: loaded, builtin, available, absent, or unknown."""
    folder = Path("/lib/modules") / release
    loaded = {line.split()[0] for line in _text("/proc/modules").splitlines()}
    builtin = {Path(line).name for line in _text(folder / "modules.builtin").splitlines()}
    available = {
        Path(line.partition(":")[0]).name.partition(".ko")[0] for line in _text(folder / "modules.dep").splitlines()
    }
    options = dict(re.findall(r"^(CONFIG_\w+)=(\w)", _kernel_options(release), re.MULTILINE))
    states = {}
    for module, option in MODULES.items():
        if module in loaded:
            states[module] = "loaded"
        elif f"{module}.ko" in builtin or options.get(option) == "y":
            states[module] = "builtin"
        elif module in available:
            states[module] = "available"
        else:
            states[module] = "absent" if available or options else "unknown"
    return states


def _kernel_options(release: str) -> str:
    with suppress(OSError), gzip.open("/proc/config.gz", "rt") as file:
        return file.read()
    return _text(f"/boot/config-{release}")


def _text(path: str | Path) -> str:
    with suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def _trial(daemon: Running | Silence, settings: Callable[[], Config], is_root: bool) -> Trial | None:
    if isinstance(daemon, Running):
        return None
    backend = "auto"
    with suppress(CannotLook):
        backend = settings().dataplane.backend
    unshare = ["unshare", "--net", *([] if is_root else ["--user", "--map-root-user"])]
    try:
        return Trial(**json.loads(_run(*unshare, sys.executable, "-m", f"{__package__}.trial", backend)))
    except CannotLook as reason:
        raise CannotLook(f"no network namespace to try in ({reason.why})", "" if is_root else AS_ROOT) from None


def _chains() -> list[Chain]:
    """The chains of all others; fwd's own only where iptables has them."""
    chains: list[Chain] = []
    saved_tables: set[tuple[str, str]] = set()
    refusals = []
    for program, saves in _SAVES.items():
        for save in filter(shutil.which, saves):
            try:
                found = iptables_chains(program, _run(save))
            except CannotLook as reason:  # the kernel is not made for it
                refusals.append(reason)
                continue
            chains += found
            if "-nft-" in save:
                saved_tables |= {("ip6" if program == "ip6tables" else "ip", chain.table) for chain in found}
    try:
        listed = json.loads(_run("nft", "--json", "list", "tables"))["nftables"]
    except CannotLook as reason:
        if not chains:
            raise CannotLook("; ".join(refusal.why for refusal in (*refusals, reason))) from None
        listed = []
    for table in (item["table"] for item in listed if "table" in item):
        family, name = table["family"], table["name"]
        if name != TABLE and (family, name) not in saved_tables:
            chains += nft_chains(json.loads(_run("nft", "--json", "list", "table", family, name)))
    return chains


def _firewall_services() -> Iterator[str]:
    with suppress(CannotLook):
        if _run("systemctl", "show", "firewalld", "--property=ActiveState").strip() == "ActiveState=active":
            yield "firewalld"
    if re.search(r"^ENABLED=yes", _text("/etc/ufw/ufw.conf"), re.MULTILINE):
        yield "ufw"


def _reader(queue: int) -> Reader | None:
    try:
        port_id, stats = queue_reader(queue), kernel_queue_stats(queue)
    except FileNotFoundError:  # the kernel's part is not loaded yet
        return None
    return None if port_id is None or stats is None else Reader(stats, port_id, _process_with(port_id))


def _process_with(port_id: int) -> str:
    """The process that has a netfilter socket of this port id, in words; empty if it cannot be told."""
    for line in _text("/proc/net/netlink").splitlines()[1:]:
        fields = line.split()
        if (int(fields[1]), int(fields[2])) == (_NETLINK_NETFILTER, port_id & 0xFFFFFFFF):
            wanted = f"socket:[{fields[9]}]"
            for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
                with suppress(OSError):
                    if os.readlink(descriptor) == wanted:
                        pid = descriptor.parts[2]
                        return f"{_text(f'/proc/{pid}/comm').strip()} (pid {pid})"
    return ""


def _vici(path: str) -> Vici:
    charons = []
    for name in Path("/proc").glob("[0-9]*/comm"):
        if (word := _text(name).strip()).startswith("charon") and _is_here(name.parts[2]) is not False:
            charons.append(f"{word} (pid {name.parts[2]})")
    return Vici(_way(path), _fact(lambda: charon_version(path)), tuple(charons))


def _xfrm() -> Xfrm:
    states = re.search(r"count (\d+)", _run("ip", "xfrm", "state", "count"))
    policies = re.findall(r"(?:IN|OUT|FWD)\s+(\d+)", _run("ip", "xfrm", "policy", "count"))
    if states is None:
        raise CannotLook("ip xfrm state count prints no count")
    offloads = re.findall(r"offload parameters: dev (\S+) dir \w+(?: mode (\w+))?", _run("ip", "xfrm", "state"))
    found = tuple(sorted({(device, mode or "crypto") for device, mode in offloads}))
    return Xfrm(int(states[1]), sum(map(int, policies)), found)


def _offloads() -> dict[str, frozenset[str]]:
    from pyroute2 import Ethtool  # takes a third of a second

    found = {}
    with closing(Ethtool()) as ethtool:
        for _, name in socket.if_nameindex():
            features: Any = ethtool.get_features(name).features
            found[name] = frozenset(feature for feature, state in features.items() if state.enable)
    return found


def _sysctls() -> Iterator[tuple[str, int]]:
    """Forwarding and reverse-path filters by their names, and what conntrack has and may have."""
    folder = Path("/proc/sys/net")
    paths: Sequence[Path] = [
        *(folder / "ipv4/conf").glob("*/rp_filter"),
        *(folder / name for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding")),
        *(folder / f"netfilter/nf_conntrack_{name}" for name in ("count", "max")),
    ]
    for path in paths:
        with suppress(OSError, ValueError):
            yield "/".join(path.parts[3:]), int(path.read_text())


def _clock() -> Clock:
    timex = ctypes.create_string_buffer(512)  # struct timex, which is smaller; no mode: it is only read
    ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    *_, status = _TIMEX_STATUS.unpack_from(timex.raw)
    slept = time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    return Clock(time.time(), Path(__file__).stat().st_mtime, not status & _STA_UNSYNC, slept)
