"""The checks: each judges facts and says what it found. They do nothing else, and none raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from ..edge.ruleset import Backend
from .facts import CAP_NET_ADMIN, READ, SEARCH, WRITE, Facts, Folder, Identity, Running, Silence, Vici
from .finding import CannotLook, Finding, Level, Told, known
from .firewalls import KINDS, Chain, Kind, Passes, fate

OK, NOTE, WARNING, PROBLEM, UNKNOWN = Level

Check: TypeAlias = Callable[[Facts], Iterator[Told]]

#: Area, name and check, in the order in which they are shown.
CHECKS: list[tuple[str, str, Check]] = []

_JOURNAL = "journalctl -u fwd -n 50"
_FOLLOW = "fwctl show counter global"
_USE = "fwctl show session info"
_SET_CLOCK = "sudo timedatectl set-ntp true"
_RESTART = "sudo systemctl restart fwd"

#: strongSwan before it names its socket's events and answers otherwise (README, Install).
_OLDEST_STRONGSWAN = (5, 9, 8)

#: A monotonic clock that is so far behind, in seconds, has slept.
_SLEPT_S = 60
#: Where fwd's chains stand at a hook: NF_IP_PRI_MANGLE.
_FWD_PRIORITY = -150
#: Shares of a queue, of the conntrack table and of a file system from which on there is little room left.
_QUEUE_FULL, _CONNTRACK_FULL, _LITTLE_ROOM = 0.5, 0.9, 0.05


def examine(facts: Facts) -> list[Finding]:
    """What all checks find. A check that cannot do its work is a finding, too."""
    found = []
    for area, name, check in CHECKS:
        try:
            told = list(check(facts))
        except CannotLook as reason:
            told = [Told(UNKNOWN, f"could not look: {reason.why}", reason.action)]
        except Exception as error:  # a defect of one check is not to hide the others
            told = [Told(UNKNOWN, f"could not look: a defect of fwctl ({type(error).__name__}: {error})")]
        found += [Finding(area, name, *words) for words in told]
    return found


def _check(area: str, name: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS.append((area, name, check))
        return check

    return register


def _list(words: Iterable[object]) -> str:
    return ", ".join(map(str, words))


def _are(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# --- the daemon --------------------------------------------------------------------------------------------


@_check("daemon", "service")
def _service(facts: Facts) -> Iterator[Told]:
    unit = known(facts.unit)
    runs = isinstance(facts.daemon, Running)
    if unit is None or unit.get("LoadState") != "loaded":
        where = "no systemd here" if unit is None else "fwd.service is not installed"
        yield Told(NOTE, f"{where}: fwd is started by hand")
        return
    state = f"fwd.service: {unit['ActiveState']} ({unit['SubState']}), {unit.get('UnitFileState') or 'not enabled'}"
    if unit["ActiveState"] == "failed":
        why = f"{unit.get('Result')}, exit status {unit.get('ExecMainStatus')}"
        yield Told(PROBLEM, f"{state}; it failed: {why}", _JOURNAL)
    elif unit["ActiveState"] in ("activating", "deactivating", "reloading"):
        yield Told(WARNING, f"{state}: look again in a moment", _JOURNAL)
    elif unit["ActiveState"] != "active" and runs:
        yield Told(NOTE, f"{state}; fwd runs, but not as a service", "sudo systemctl enable --now fwd")
    elif unit["ActiveState"] != "active":
        yield Told(PROBLEM, state, "sudo systemctl enable --now fwd")
    elif unit.get("UnitFileState") != "enabled":
        yield Told(WARNING, f"{state}: it will not be there after a reboot", "sudo systemctl enable fwd")
    else:
        yield Told(OK, state)
    if int(unit.get("NRestarts") or 0):
        times = _are(int(unit["NRestarts"]), "time")
        yield Told(WARNING, f"systemd has had to start fwd again {times}", _JOURNAL)
    if unit.get("NeedDaemonReload") == "yes":
        yield Told(WARNING, "the unit's file is newer than what systemd knows of it", "sudo systemctl daemon-reload")


@_check("daemon", "socket")
def _control(facts: Facts) -> Iterator[Told]:
    daemon, me = facts.daemon, facts.me.identity
    if isinstance(daemon, Silence):
        if daemon.is_denied:
            has_group = not isinstance(facts.accounts, CannotLook) and facts.accounts.group is not None
            action = f"sudo usermod -aG fwd {me.name}, and log in anew" if has_group else "sudo fwctl doctor"
            yield Told(PROBLEM, f"{facts.socket}: {daemon.reason}", action)
        else:
            start = "sudo systemctl start fwd" if _is_service(facts) else "sudo fwd"
            action = start if "start it" in daemon.reason else _JOURNAL
            yield Told(PROBLEM, daemon.reason.split(": start it")[0], action)
        return
    info = daemon.info
    yield Told(OK, f"fwd {info.get('fwd-version')} answers {me.name} on {facts.socket}, up {info.get('uptime')}")
    if info.get("fwd-version") != facts.version:
        words = f"fwd is version {info.get('fwd-version')}, fwctl {facts.version}"
        yield Told(WARNING, words, _RESTART)


def _is_service(facts: Facts) -> bool:
    return isinstance(facts.unit, Mapping) and facts.unit.get("LoadState") == "loaded"


@_check("daemon", "capabilities")
def _capabilities(facts: Facts) -> Iterator[Told]:
    if _is_service(facts):
        unit = known(facts.unit) or {}
        is_root = unit.get("User", "") in ("", "root")
        lacks = [
            name
            for name in ("CapabilityBoundingSet", *(() if is_root else ("AmbientCapabilities",)))
            if "cap_net_admin" not in unit.get(name, "")
        ]
        if lacks:
            words = f"{_list(lacks)} of fwd.service is without CAP_NET_ADMIN: no rules, no queue"
            yield Told(PROBLEM, words, "sudo systemctl edit fwd")
    process = known(facts.process)
    if process is None:
        return
    if not process.capabilities >> CAP_NET_ADMIN & 1:
        yield Told(PROBLEM, f"fwd (pid {process.pid}) is without CAP_NET_ADMIN", "README: Rights, and strongSwan")
    else:
        yield Told(OK, f"fwd (pid {process.pid}) runs as {process.identity.name}, with CAP_NET_ADMIN")
    if process.is_here is False:
        yield Told(
            PROBLEM,
            f"fwd (pid {process.pid}) is in another network namespace: rules and interfaces here are not its",
            f"sudo nsenter --net -t {process.pid} fwctl doctor",
        )


@_check("daemon", "accounts")
def _users(facts: Facts) -> Iterator[Told]:
    accounts = known(facts.accounts)
    make = "sudo systemd-sysusers"
    missing = facts.missing_groups if not isinstance(facts.missing_groups, CannotLook) else ()
    groups = f", nor a group {_list(missing)} that [control] names" if missing else ""
    if accounts.uid is None:
        words = f"there is no user fwd{groups}: fwd runs as {facts.runs_as.name}"
        yield Told(NOTE, f"{words}, and only root may ask" if missing else words, make)
        return
    if missing:
        yield Told(NOTE, f"there is no group {_list(missing)} that [control] names", make)
    if accounts.vici_group is None or "fwd" not in accounts.vici_members:
        words = "group fwd-vici, by which fwd reaches strongSwan, " + (
            "does not exist" if accounts.vici_group is None else "is without user fwd"
        )
        yield Told(WARNING, words, make if accounts.vici_group is None else "sudo usermod -aG fwd-vici fwd")
    else:
        yield Told(OK, "user fwd, groups fwd and fwd-vici")
    if others := accounts.vici_members - {"fwd"}:
        words = f"{_list(sorted(others))} in group fwd-vici may do with strongSwan what root may"
        yield Told(WARNING, words, f"sudo gpasswd -d {min(others)} fwd-vici")


@_check("daemon", "configuration")
def _configuration(facts: Facts) -> Iterator[Told]:
    way = facts.config_way
    for fault in facts.config_faults:
        yield Told(PROBLEM, fault, f"fwd --check --config {way.path}")
    obstacle = way.obstacle(facts.runs_as, READ)
    if way.end is not None and obstacle is not None:
        words = f"{obstacle.path} is not to be read by {facts.runs_as.name}, whom fwd runs as"
        yield Told(PROBLEM, words, f"sudo chmod a+{'r' if obstacle is way.end else 'x'} {obstacle.path}")
    config = known(facts.config)
    if config is None:
        return
    rules = _are(len(config.rules), "rule")
    where = f"{way.path}: right" if way.end is not None else f"no {way.path}, so the built-in default"
    yield Told(OK, f"{where}, {rules}")
    missing = {
        zone: [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in facts.interfaces)]
        for zone, patterns in config.zones.items()
    }
    if absent := [f"{_list(patterns)} (zone {zone})" for zone, patterns in missing.items() if patterns]:
        yield Told(NOTE, f"zones name interfaces that are not there now: {_list(absent)}", "ip link")


@_check("daemon", "troubles")
def _troubles(facts: Facts) -> Iterator[Told]:
    """What `show system info` says that it cannot do."""
    if isinstance(facts.daemon, Silence):
        return
    for name, value in facts.daemon.info.items():
        is_none = f"{value}".startswith("none: ") and name != "fast-path"
        if is_none or ("cannot be" in f"{value}" and name != "strongswan"):
            yield Told(WARNING, f"{name}: {value}", _JOURNAL)
        elif f"{value}".startswith("unknown: ") and "chgrp" in str(value):
            yield Told(NOTE, f"{name}: {value}", "sudo chgrp fwd /proc/net/netfilter/nfnetlink_queue")


#: What a counter above zero means, and where to look; those that are not here are named together.
_COUNTERS = {
    "flow_internal_error": (PROBLEM, "packets dropped by a defect of fwd: report it with its log", _JOURNAL),
    "timer_internal_error": (PROBLEM, "timers that met a defect of fwd: report it with its log", _JOURNAL),
    "log_lost": (PROBLEM, "records of the traffic log lost", "df -h /var/log/fwd"),
    "log_write_failed": (WARNING, "times the traffic log could not be written", "df -h /var/log/fwd"),
    "log_send_failed": (WARNING, "times syslog or the journal could not be reached", "fwctl show system info"),
    "log_not_sent": (WARNING, "records made room before they could be sent on", "fwctl show system info"),
    "state_not_saved": (WARNING, "times the state file could not be written", _JOURNAL),
    "queue_kernel_drop": (WARNING, "packets dropped because the queue was full ([dataplane] queue-length)", _FOLLOW),
    "queue_socket_drop": (WARNING, "packets dropped because fwd's socket was full", _FOLLOW),
    "flow_table_full": (WARNING, "packets dropped for want of room ([dataplane] max-sessions)", _USE),
    "fast_path_full": (WARNING, "decisions too many for the kernel ([dataplane] max-sessions)", _USE),
    "fast_path_refused": (WARNING, "decisions that the kernel would not take", _JOURNAL),
    "fast_path_lost": (WARNING, "decisions that vanished from the kernel: somebody changes fwd's tables", _JOURNAL),
    "rules_restored": (WARNING, "times somebody removed fwd's rules: a reload of nftables.service does", _JOURNAL),
    "sa_spi_conflict": (WARNING, "SAs without a session: their SPI is another's", "fwctl show tunnel detail"),
    "pkt_unseen": (NOTE, "packets passed or were dropped while no fwd ran", _FOLLOW),
    "flow_limit_source": (NOTE, "packets refused: their source has too many sessions ([limits] source)", _FOLLOW),
    "flow_limit_peers": (NOTE, "packets refused: their peers have too many sessions ([limits] peers)", _FOLLOW),
    "flow_limit_half_open": (NOTE, "packets refused: too many sessions unanswered ([limits] half-open)", _FOLLOW),
}

#: What is a client's affair, or the traffic's.
_OF_CLIENTS = ("control_", "metrics_")
_EVERYDAY = ("tunnel_", "flow_parse_", "flow_policy_", "flow_ike_", "pkt_", "ike_", "session_", "sa_", *_OF_CLIENTS)


@_check("daemon", "counters")
def _counters(facts: Facts) -> Iterator[Told]:
    if isinstance(facts.daemon, Silence):
        raise CannotLook("the daemon does not answer")
    counted = [counter for counter in facts.daemon.counters if counter["value"] and counter["severity"] != "info"]
    others = []
    for counter in counted:
        name, value = counter["name"], counter["value"]
        if name in _COUNTERS:
            level, words, action = _COUNTERS[name]
            now = f", {counter['rate']:g}/s now" if counter["rate"] >= 1 else ""
            yield Told(level, f"{name} {value}{now}: {words}", action)
        elif not name.startswith(_EVERYDAY):
            others.append(f"{name} {value} ({counter['description']})")
    if others:
        yield Told(WARNING, _list(others), _FOLLOW)
    tunnels = [counter for counter in counted if counter["name"].startswith("tunnel_")]
    if troubles := [f"{counter['name'].removeprefix('tunnel_')} {counter['value']}" for counter in tunnels]:
        yield Told(NOTE, f"troubles of tunnels so far: {_list(troubles)}", "fwctl show tunnel detail")
    if not counted:
        yield Told(OK, "no counter of drops or warnings has counted anything")


# --- the kernel --------------------------------------------------------------------------------------------


@_check("kernel", "features")
def _features(facts: Facts) -> Iterator[Told]:
    if isinstance(facts.daemon, Running):
        rules, path = (str(facts.daemon.info.get(key, "")) for key in ("queue-rules", "fast-path"))
        if path.startswith("none"):
            yield Told(WARNING, f"{rules}: fast path {path}", "sudo modprobe nf_tables")
        else:
            yield Told(OK, f"NFQUEUE, verdict maps, {rules}; {path}")
        return
    trial = known(facts.trial)
    if trial is None:
        return
    if trial.queue_refusal:
        yield Told(PROBLEM, f"NFQUEUE: {trial.queue_refusal}", "sudo modprobe nfnetlink_queue")
    if not trial.backend:
        yield Told(PROBLEM, trial.words, "sudo modprobe -a nf_tables nft_queue; sudo apt install iptables")
    elif not Backend(trial.backend).has_maps:
        words = f"no nf_tables ({trial.words}): every packet passes through the daemon, there is no fast path"
        yield Told(WARNING, words, "sudo modprobe nf_tables")
    else:
        yield Told(OK, f"NFQUEUE, verdict maps, {trial.words} (tried in a namespace of its own)")


@_check("kernel", "modules")
def _modules(facts: Facts) -> Iterator[Told]:
    wanted = {name: state for name, state in facts.modules.items() if "offload" not in name}
    words = f"Linux {facts.release}; {_list(f'{name} {state}' for name, state in wanted.items())}"
    lacks = [name for name in ("nf_tables", "nfnetlink_queue") if wanted[name] == "absent"]
    if wanted["nft_queue"] == wanted["xt_NFQUEUE"] == "absent":
        lacks.append("nft_queue or xt_NFQUEUE")
    if lacks and isinstance(facts.trial, CannotLook):
        yield Told(PROBLEM, f"{words}: this kernel lacks {_list(lacks)}", "apt-cache search linux-modules")
    else:
        yield Told(OK, words)


@_check("kernel", "clock")
def _clock(facts: Facts) -> Iterator[Told]:
    clock = known(facts.clock)
    if clock.wall < clock.installed - 86400:
        yield Told(PROBLEM, "the clock stands before the day that fwd was installed on", _SET_CLOCK)
    elif not clock.is_synchronised:
        words = "NTP does not keep the clock: times in logs, and strongSwan's certificates, depend on it"
        yield Told(WARNING, words, _SET_CLOCK)
    else:
        yield Told(OK, "NTP keeps the clock")
    if clock.slept > _SLEPT_S:
        words = f"this machine slept for {clock.slept:.0f} s since its boot: timers of sessions stood still meanwhile"
        yield Told(NOTE, words, "systemctl mask sleep.target suspend.target hibernate.target")


@_check("kernel", "forwarding")
def _forwarding(facts: Facts) -> Iterator[Told]:
    keys = {"IPv4": "net/ipv4/ip_forward", "IPv6": "net/ipv6/conf/all/forwarding"}
    off = {name: key.replace("/", ".") for name, key in keys.items() if facts.sysctls.get(key) == 0}
    if not off:
        yield Told(OK, "IPv4 and IPv6 are forwarded")
    else:
        words = f"no {' and no '.join(off)} is forwarded: nothing is in transit; tunnels that end here do not mind"
        yield Told(NOTE, words, f"sudo sysctl -w {' '.join(f'{key}=1' for key in off.values())}")


@_check("kernel", "reverse path")
def _reverse_path(facts: Facts) -> Iterator[Told]:
    prefix = "net/ipv4/conf/"
    filters = {
        key[len(prefix) :].split("/")[0]: value for key, value in facts.sysctls.items() if key.endswith("/rp_filter")
    }
    everywhere = filters.pop("all", 0)
    strict = [name for name, value in filters.items() if max(value, everywhere) == 1 and name not in ("lo", "default")]
    if strict:
        words = f"rp_filter is strict on {_list(sorted(strict))}: what comes another way than back is lost before fwd"
        yield Told(NOTE, words, "sudo sysctl -w net.ipv4.conf.all.rp_filter=2")


@_check("kernel", "conntrack")
def _conntrack(facts: Facts) -> Iterator[Told]:
    count, most = (facts.sysctls.get(f"net/netfilter/nf_conntrack_{name}", 0) for name in ("count", "max"))
    if most and count > _CONNTRACK_FULL * most:
        words = f"conntrack has {count} entries of {most}: the kernel drops what has no room, before fwd"
        yield Told(WARNING, words, f"sudo sysctl -w net.netfilter.nf_conntrack_max={2 * most}")


# --- rules, and who else has some ------------------------------------------------------------------------------


@_check("rules", "fwd's rules")
def _rules(facts: Facts) -> Iterator[Told]:
    tables = known(facts.tables)
    chains = known(facts.chains)
    jumps = {
        f"{chain.program} {chain.name}": count
        for chain in chains
        if chain.table == "mangle"
        and chain.hook
        and (count := sum(rule.target == f"FWD-{chain.name}" for rule in chain.rules))
    }
    daemon = facts.daemon
    queue = known(facts.config).dataplane.queue if not isinstance(facts.config, CannotLook) and facts.config else None
    restored = "fwd puts them back within ten seconds; look again, and in its log"
    if not tables and not jumps:
        if isinstance(daemon, Running):
            yield Told(PROBLEM, f"fwd runs, and its rules are not there: somebody flushed them; {restored}", _JOURNAL)
        else:
            yield Told(NOTE, "no rules of fwd are in place: IPsec passes by it")
        return
    if isinstance(daemon, Silence) and not daemon.is_denied:
        words = "rules of fwd are in place, and none answers: by 'fail' packets pass, or are dropped"
        yield Told(WARNING, words, "sudo systemctl start fwd; or take them out: sudo fwd --remove-rules")
    is_whole = True
    for family, table in tables.items():
        if table.wanted_rules is None:
            words = f"{family}: the table is of another version of fwd ({table.label or 'no label'})"
            yield Told(WARNING, words, _RESTART)
        elif table.rules != table.wanted_rules:
            how = "were removed" if table.rules < table.wanted_rules else "are there twice"
            words = f"{family}: {table.rules} rules of fwd instead of {table.wanted_rules}: some {how}; {restored}"
            yield Told(PROBLEM, words, _JOURNAL)
        elif queue is not None and table.queues and table.queues != {queue}:
            words = f"{family}: the rules send to NFQUEUE {_list(sorted(table.queues))}, the configuration says {queue}"
            yield Told(WARNING, words, _RESTART)
        else:
            continue
        is_whole = False
    for where, count in jumps.items():
        if count > 1:
            words = f"{where} leads to fwd's chain {count} times: packets are queued again and again"
            yield Told(PROBLEM, words, _RESTART)
            is_whole = False
    backends = sorted({str(table.backend) for table in tables.values()}) or [str(Backend.IPTABLES)]
    if jumps and is_whole and any(table.backend and "iptables" not in table.backend for table in tables.values()):
        yield Told(PROBLEM, "fwd's chains of iptables are in place beside its nft rules", _RESTART)
    elif is_whole:
        yield Told(OK, f"fwd's rules are in place: {_list(backends)}, {_list(tables or jumps)}")


@_check("rules", "queue")
def _queue(facts: Facts) -> Iterator[Told]:
    config = facts.config if not isinstance(facts.config, CannotLook) else None
    number = config.dataplane.queue if config else 20
    if not isinstance(facts.chains, CannotLook):
        for chain in facts.chains:
            if not chain.name.startswith("FWD-") and any(
                rule.does == "queue" and rule.target == str(number) for rule in chain.rules
            ):
                words = f"{chain.words}: sends packets of its own to NFQUEUE {number}, which is fwd's"
                yield Told(PROBLEM, words, f"another [dataplane] queue than {number}; or {_list_command(chain)}")
    reader = known(facts.reader)
    if reader is None:
        if isinstance(facts.daemon, Running):
            yield Told(PROBLEM, f"nobody reads NFQUEUE {number} here, although fwd runs", _RESTART)
        else:
            yield Told(OK, f"NFQUEUE {number} is free")
        return
    pid = facts.daemon.info.get("pid") if isinstance(facts.daemon, Running) else None
    who = reader.process or f"netlink port {reader.port_id}"
    if pid is None or (reader.process and f"(pid {pid})" not in reader.process):
        words = f"NFQUEUE {number} is read by another process than this fwd: {who}"
        yield Told(PROBLEM, words, f"stop it, or choose another [dataplane] queue than {number}")
        return
    length = config.dataplane.queue_length if config else 0
    if length and reader.stats.waiting > _QUEUE_FULL * length:
        words = f"{reader.stats.waiting} of {length} packets wait in NFQUEUE {number}: fwd does not keep up"
        yield Told(WARNING, words, _FOLLOW)
    else:
        yield Told(OK, f"NFQUEUE {number} is read by {who}")


@_check("rules", "other firewalls")
def _firewalls(facts: Facts) -> Iterator[Told]:
    chains = known(facts.chains)
    base = [chain for chain in chains if chain.hook in ("ingress", "prerouting", "input", "forward", "output")]
    is_quiet = True
    for chain in base:
        fates = {kind: fate(chains, chain, kind) for kind in KINDS}
        is_before = chain.hook in ("ingress", "prerouting") or chain.priority < _FWD_PRIORITY
        when = "before fwd sees it" if is_before else "although fwd let it pass"
        for passes in (Passes.NONE, Passes.PERHAPS):
            kinds = [kind for kind, found in fates.items() if found.verdict == "drop" and found.passes is passes]
            if kinds:
                unless = ", but for what passes by address or interface" if passes else ""
                words = f"{chain.words} ({chain.hook}) drops {_list(kind.name for kind in kinds)}, {when}{unless}"
                yield Told(NOTE if passes else WARNING, words, _let_in(facts, chain, kinds))
                is_quiet = False
    for chain in chains:
        concerned = [rule for rule in chain.rules if any(rule.holds[kind] is not False for kind in KINDS)]
        if any(rule.does == "notrack" for rule in concerned):
            words = f"{chain.words}: IPsec is not tracked, so rules on 'ct state' do not know it"
            yield Told(NOTE, words, _list_command(chain))
        if any(rule.does == "flow" for rule in concerned):
            words = f"{chain.words}: offloaded flows pass by all rules, ESP in UDP (4500) in transit among them"
            yield Told(WARNING, words, _list_command(chain))
    invalid = [chain.words for chain in chains if any(r.does == "drop" and r.is_about_invalid for r in chain.rules)]
    if invalid:
        words = f"what conntrack finds invalid is dropped, behind or before fwd: {'; '.join(invalid)}"
        yield Told(NOTE, words, "conntrack -S")
    if is_quiet:
        others = f" ({_list(facts.firewall_services)} is active)" if facts.firewall_services else ""
        yield Told(OK, f"no other firewall drops ESP, UDP 500 or 4500{others}")


@_check("rules", "firewall services")
def _services(facts: Facts) -> Iterator[Told]:
    if isinstance(facts.chains, CannotLook):
        for name in facts.firewall_services:
            words = f"{name} is active: it drops IPsec unless told otherwise"
            yield Told(WARNING, words, _OPEN[name])


_OPEN = {
    "firewalld": "sudo firewall-cmd --permanent --add-service=ipsec; sudo firewall-cmd --reload",
    "ufw": "sudo ufw allow proto esp from any; sudo ufw allow 500,4500/udp",
}


def _let_in(facts: Facts, chain: Chain, kinds: Sequence[Kind]) -> str:
    if "firewalld" in chain.table:
        return _OPEN["firewalld"]
    if "ufw" in facts.firewall_services and chain.program != "nft":
        return _OPEN["ufw"]
    ports = _list(kind.port for kind in kinds if kind.port)
    matches = ["meta l4proto esp"] if any(kind.port is None for kind in kinds) else []
    if chain.program == "nft":
        matches += [f"udp dport {{ {ports} }}" if "," in ports else f"udp dport {ports}"] if ports else []
        return "; ".join(f"sudo nft 'insert rule {chain.table} {chain.name} {match} accept'" for match in matches)
    matches = ["-p esp"] if matches else []
    matches += [f"-p udp -m multiport --dports {ports.replace(' ', '')}"] if ports else []
    on = f"-t {chain.table} -I {chain.name}"
    return "; ".join(f"sudo {chain.program} {on} {match} -j ACCEPT" for match in matches)


def _list_command(chain: Chain) -> str:
    if chain.program == "nft":
        return f"sudo nft -a list chain {chain.table} {chain.name}"
    return f"sudo {chain.program} -t {chain.table} -S {chain.name}"


# --- strongSwan ------------------------------------------------------------------------------------------------


@_check("strongSwan", "VICI")
def _vici(facts: Facts) -> Iterator[Told]:
    vici = known(facts.vici)
    path = vici.way.path
    answer = vici.answer if not isinstance(vici.answer, CannotLook) else None
    who = " ".join(answer) if answer else "strongSwan"
    said = str(facts.daemon.info.get("strongswan", "")) if isinstance(facts.daemon, Running) else ""
    if said == "connected":
        yield Told(OK, f"{who} answers fwd on {path}")
    else:
        yield from _no_vici(facts, vici, answer is not None, said)
    if answer and (version := _version(answer[1])) and version < _OLDEST_STRONGSWAN:
        oldest = ".".join(map(str, _OLDEST_STRONGSWAN))
        words = f"{who} is older than {oldest}, which fwd is made for"
        yield Told(WARNING, words, "sudo apt install strongswan-swanctl")


def _no_vici(facts: Facts, vici: Vici, has_answered: bool, said: str) -> Iterator[Told]:
    path, runs_as = vici.way.path, facts.runs_as
    has_sas = not isinstance(facts.xfrm, CannotLook) and facts.xfrm.states > 0
    start = "sudo systemctl start strongswan"
    obstacle = vici.way.obstacle(runs_as, READ | WRITE)
    if vici.way.end is None and vici.charons:
        words = f"{' and '.join(vici.charons)}, but there is no {path}: no vici plugin, or another path"
        yield Told(PROBLEM, words, "swanctl --stats; then [vici] socket in fwd's configuration")
    elif vici.way.end is None and has_sas:
        words = f"IPsec SAs are in the kernel, but there is no {path}: some other program set them up"
        yield Told(PROBLEM, words, "sudo ip xfrm state")
    elif vici.way.end is None:
        words = f"no {path}: strongSwan does not run, fwd knows no SPIs of its own; a firewall in transit needs none"
        yield Told(NOTE, words, start)
    elif not vici.way.end.is_socket:
        yield Told(PROBLEM, f"{path} is no socket", "[vici] socket in fwd's configuration")
    elif obstacle is not None and obstacle is not vici.way.end:
        words = f"{obstacle.path} keeps {runs_as.name}, whom fwd runs as, from {path}"
        yield Told(PROBLEM, words, f"sudo chmod a+x {obstacle.path}")
    elif obstacle is not None:
        mode, owner = f"{obstacle.mode & 0o7777:04o}", f"uid {obstacle.uid}, gid {obstacle.gid}"
        words = f"{runs_as.name}, whom fwd runs as, may not open {path} ({owner}, mode {mode})"
        yield Told(PROBLEM, words, f"sudo chgrp fwd-vici {path}; for good: group = fwd-vici in strongswan.conf, charon")
    elif has_answered:
        words = f"strongSwan answers on {path}" + (f", but fwd says: {said}" if said else "")
        yield Told(WARNING if said else OK, words, _JOURNAL if said else "")
    else:
        reason = vici.answer.why if isinstance(vici.answer, CannotLook) else said
        yield Told(PROBLEM, f"{path}: {reason}", "sudo systemctl restart strongswan")


def _version(text: str) -> tuple[int, ...]:
    numbers = text.split(".")
    return tuple(map(int, numbers)) if all(number.isdecimal() for number in numbers) else ()


@_check("strongSwan", "offloads")
def _offloads(facts: Facts) -> Iterator[Told]:
    offloads = known(facts.offloads)
    xfrm = facts.xfrm if not isinstance(facts.xfrm, CannotLook) else None
    modules = [name for name in ("esp4_offload", "esp6_offload") if facts.modules.get(name) in ("loaded", "builtin")]
    gro = sorted(name for name, on in offloads.items() if "rx-gro" in on and name != "lo")
    cards = sorted(name for name, on in offloads.items() if "esp-hw-offload" in on)
    for device, kind in xfrm.offloads if xfrm else ():
        if kind == "packet":
            words = f"SAs are offloaded to {device} whole: fwd, like any firewall here, never sees their packets"
            yield Told(PROBLEM, words, "hw_offload = no in swanctl.conf, then sudo swanctl --load-all")
        else:
            words = f"the ciphers of SAs are offloaded to {device}: what arrives is decrypted before fwd's rules"
            yield Told(WARNING, words, "hw_offload = no in swanctl.conf, then sudo swanctl --load-all")
    if modules and gro:
        words = f"{_list(modules)} and GRO on {_list(gro)}: ESP to SAs of this host may be decrypted before fwd's rules"
        yield Told(WARNING, words, "; ".join(f"sudo ethtool -K {name} gro off" for name in gro))
    elif cards and not (xfrm and xfrm.offloads):
        words = f"{_list(cards)} can offload ESP: SAs with hw_offload pass by fwd"
        yield Told(NOTE, words, "; ".join(f"sudo ethtool -K {name} esp-hw-offload off" for name in cards))
    elif not (xfrm and xfrm.offloads):
        yield Told(OK, "no offload lets ESP pass by fwd's rules")


# --- files -------------------------------------------------------------------------------------------------------


@_check("files", "state")
def _state(facts: Facts) -> Iterator[Told]:
    folder = known(facts.state)
    if folder is None:
        yield Told(NOTE, "no state file by configuration: sessions end with fwd", "[state] file in fwd's configuration")
        return
    yield from _folder(folder, facts.runs_as, "the state file")
    if folder.free < _LITTLE_ROOM * folder.total:
        words = f"{folder.way.path}: {_size(folder.free)} of {_size(folder.total)} free"
        yield Told(WARNING, words, f"df -h {folder.way.path}")


@_check("files", "traffic log")
def _traffic_log(facts: Facts) -> Iterator[Told]:
    folder = known(facts.traffic_log)
    if folder is None:
        yield Told(NOTE, "no traffic log by configuration", "[traffic-log] file in fwd's configuration")
        return
    yield from _folder(folder, facts.runs_as, "the traffic log")
    config = known(facts.config)
    wanted = max(0, (config.traffic_log.max_size << 20) - folder.used) if config else 0
    if folder.free < wanted:
        words = f"{folder.way.path}: the log may grow by {_size(wanted)}, and {_size(folder.free)} are free"
        yield Told(WARNING, words, "a smaller [traffic-log] max-size, or more room")


def _folder(folder: Folder, runs_as: Identity, what: str) -> Iterator[Told]:
    way = folder.way
    obstacle = way.obstacle(runs_as, WRITE | SEARCH)
    if way.end is None:
        last = way.steps[-1]
        if not last.lets(runs_as, WRITE | SEARCH):
            make = f"sudo install -d -m 750 -o {runs_as.name} {way.path}"
            yield Told(NOTE, f"{way.path}, for {what}, is yet to be made (the service does)", make)
        return
    if obstacle is not None:
        words = f"{obstacle.path} keeps {runs_as.name}, whom fwd runs as, from {what} {folder.file}"
        yield Told(PROBLEM, words, f"sudo chown {runs_as.name} {way.path}")
    elif folder.strangers:
        words = f"{folder.strangers}, who could put another file in the place of {folder.file}"
        yield Told(PROBLEM, words, f"ls -ld {way.path}")
    else:
        yield Told(OK, f"{what} {folder.file}: {_size(folder.used)}, {_size(folder.free)} free")


def _size(octets: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if octets < 1024:
            return f"{octets:.0f} {unit}"
        octets /= 1024
    return f"{octets:.0f} GiB" if octets < 1024 else f"{octets / 1024:.0f} TiB"
