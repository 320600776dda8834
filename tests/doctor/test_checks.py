"""Each finding from the facts that lead to it; nothing is looked at."""

import dataclasses
import stat

import pytest

from fwd.config import Config
from fwd.core.counters import COUNTERS
from fwd.doctor import checks
from fwd.doctor.checks import examine
from fwd.doctor.facts import (
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
from fwd.doctor.finding import CannotLook, Level
from fwd.doctor.firewalls import iptables_chains
from fwd.edge.queue_stats import QueueStats
from fwd.edge.ruleset import Backend, PresentTable

FWD = Identity("fwd", 990, frozenset({990, 989}))
NET_ADMIN = 1 << 12
CONFIG = "/etc/fwd/fwd.toml"
VICI = "/run/charon.vici"
UNIT = {
    "LoadState": "loaded", "ActiveState": "active", "SubState": "running", "Result": "success", "ExecMainStatus": "0",
    "UnitFileState": "enabled", "NRestarts": "0", "NeedDaemonReload": "no", "MainPID": "7", "User": "fwd",
    "AmbientCapabilities": "cap_net_admin", "CapabilityBoundingSet": "cap_net_admin",
}  # fmt: skip
INFO = {
    "pid": 7, "fwd-version": "1.0", "uptime": "0 days, 0:01:00", "configuration": CONFIG, "queue-rules": "nft queue",
    "fast-path": "3 SPIs in the kernel, room for 131072", "state-file": "/run/fwd/state", "strongswan": "connected",
    "traffic-log": "/var/log/fwd/traffic, 0 records wait",
}  # fmt: skip
TABLE = PresentTable("fwd: layout 3, nft, 131072 elements", Backend.NFT, 20, 20, frozenset({20}))


def way(path, *, uid=0, gid=0, mode=stat.S_IFDIR | 0o755, exists=True):
    """A path of root's folders, with this at its end."""
    parts = path.strip("/").split("/")
    folders = ["/", *("/" + "/".join(parts[:count]) for count in range(1, len(parts)))]
    steps = [FileState(step, 0, 0, stat.S_IFDIR | 0o755) for step in folders]
    return Way(path, (*steps, FileState(path, uid, gid, mode)) if exists else tuple(steps))


def vici(*, answer=("charon", "5.9.14"), charons=("charon (pid 9)",), **end):
    return Vici(way(VICI, **{"gid": 989, "mode": stat.S_IFSOCK | 0o770, **end}), answer, charons)


def folder(path, *, free=50 << 30, strangers=None, used=1 << 20, **end):
    return Folder(f"{path}/file", way(path, **{"uid": 990, **end}), strangers, free, 100 << 30, used)


def counters(**values):
    return [
        {"name": counter.name, "value": values.get(counter.name, 0), "rate": 0.0, "severity": counter.severity,
         "description": counter.description}
        for counter in COUNTERS
    ]  # fmt: skip


def running(**info):
    return Running({**INFO, **{key.replace("_", "-"): value for key, value in info.items()}}, counters())


HEALTHY = Facts(
    hostname="gw",
    release="6.1.0",
    version="1.0",
    me=Me(Identity("root", 0, frozenset({0}), True), True),
    socket="/run/fwd/control.sock",
    daemon=running(),
    process=Process(7, FWD, NET_ADMIN, True),
    unit=UNIT,
    accounts=Accounts(990, 990, 989, frozenset({"fwd"})),
    runs_as=FWD,
    config_way=way(CONFIG, mode=stat.S_IFREG | 0o644),
    config=Config.model_validate({"zones": {"trust": ["eth1", "veth*"]}}),
    config_faults=(),
    missing_groups=(),
    interfaces=("lo", "eth1", "veth7"),
    modules=dict.fromkeys(("nf_tables", "nfnetlink_queue", "nft_queue", "nft_compat", "xt_NFQUEUE"), "loaded")
    | {"esp4_offload": "available", "esp6_offload": "available"},
    trial=None,
    tables={"IPv4": TABLE, "IPv6": TABLE},
    chains=[],
    firewall_services=(),
    reader=Reader(QueueStats(0, 0, 0, 9), 7, "fwd (pid 7)"),
    vici=vici(),
    xfrm=Xfrm(2, 6, ()),
    offloads={"eth1": frozenset({"rx-gro"})},
    sysctls={"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1, "net/ipv4/conf/all/rp_filter": 2},
    clock=Clock(2e9, 1.9e9, True, 0.0),
    state=folder("/run/fwd"),
    traffic_log=folder("/var/log/fwd", mode=stat.S_IFDIR | 0o750),
)


def findings(**changes):
    return examine(dataclasses.replace(HEALTHY, **changes))


def test_a_healthy_machine_has_nothing_but_ok():
    assert {finding.level for finding in findings()} == {Level.OK}
    assert [finding.area for finding in findings()] == sorted(
        (finding.area for finding in findings()), key=["daemon", "kernel", "rules", "strongSwan", "files"].index
    )
    assert all(not finding.action and "\n" not in finding.text for finding in findings())


def unit(**changes):
    return {**UNIT, **changes}


def table(**changes):
    return {"IPv4": dataclasses.replace(TABLE, **changes), "IPv6": TABLE}


def saved(*rules, table="filter", chain="INPUT", policy="ACCEPT", more=""):
    lines = [f"*{table}", f":{chain} {policy} [0:0]", *more.split("\n"), *(f"-A {chain} {rule}" for rule in rules)]
    return iptables_chains("iptables", "\n".join([*lines, "COMMIT"]))


NO_DAEMON = Silence("no fwd on /run/fwd/control.sock: start it (systemctl start fwd), or name its --socket", False)
GONE = {"daemon": NO_DAEMON, "process": None}
STATES = [
    # service
    ({"unit": unit(ActiveState="failed", SubState="failed", Result="exit-code", ExecMainStatus="1"), **GONE},
     "problem", "it failed: exit-code, exit status 1", "journalctl -u fwd"),
    ({"unit": unit(ActiveState="inactive", SubState="dead"), **GONE}, "problem", "inactive (dead)", "enable --now fwd"),
    ({"unit": unit(ActiveState="inactive", SubState="dead")}, "note", "not as a service", "enable --now fwd"),
    ({"unit": unit(ActiveState="activating", SubState="start")}, "warning", "look again", "journalctl"),
    ({"unit": unit(UnitFileState="disabled")}, "warning", "not be there after a reboot", "systemctl enable fwd"),
    ({"unit": unit(NRestarts="3")}, "warning", "start fwd again 3 times", "journalctl"),
    ({"unit": unit(NeedDaemonReload="yes")}, "warning", "newer than what systemd knows", "daemon-reload"),
    ({"unit": unit(LoadState="not-found")}, "note", "fwd.service is not installed", ""),
    ({"unit": None}, "note", "no systemd here", ""),
    # socket
    ({**GONE}, "problem", "no fwd on /run/fwd/control.sock", "systemctl start fwd"),
    ({**GONE, "unit": None}, "problem", "no fwd on /run/fwd/control.sock", "sudo fwd"),
    ({"daemon": Silence("permission denied: uid 1000 may not read", True)}, "problem", "uid 1000 may not read",
     "usermod -aG fwd root"),
    ({"daemon": running(fwd_version="0.9")}, "warning", "fwd is version 0.9, fwctl 1.0", "restart fwd"),
    # capabilities
    ({"process": Process(7, FWD, 0, True)}, "problem", "fwd (pid 7) is without CAP_NET_ADMIN", "README"),
    ({"process": Process(7, FWD, NET_ADMIN, False)}, "problem", "another network namespace", "nsenter --net -t 7"),
    ({"unit": unit(AmbientCapabilities="")}, "problem", "AmbientCapabilities of fwd.service", "systemctl edit fwd"),
    # accounts
    ({"accounts": Accounts(None, None, None, frozenset()), "missing_groups": ("fwd",)}, "note",
     "no user fwd, nor a group fwd", "systemd-sysusers"),
    ({"accounts": Accounts(990, 990, None, frozenset())}, "warning", "does not exist", "systemd-sysusers"),
    ({"accounts": Accounts(990, 990, 989, frozenset())}, "warning", "is without user fwd", "usermod -aG fwd-vici fwd"),
    ({"accounts": Accounts(990, 990, 989, frozenset({"fwd", "eve"}))}, "warning", "eve in group fwd-vici",
     "gpasswd -d eve fwd-vici"),
    ({"missing_groups": ("ops",)}, "note", "no group ops that [control] names", "systemd-sysusers"),
    # configuration
    ({"config": None, "config_faults": (f"{CONFIG}:3: queue: found 'x'",)}, "problem", "found 'x'", "--check"),
    ({"config_way": way(CONFIG, mode=stat.S_IFREG | 0o600)}, "problem", "not to be read by fwd", f"chmod a+r {CONFIG}"),
    ({"interfaces": ("lo", "eth1")}, "note", "veth* (zone trust)", "ip link"),
    # what the daemon says
    ({"daemon": running(traffic_log="/x, 9 records wait, cannot be written: No space left")}, "warning",
     "cannot be written: No space left", "journalctl"),
    ({"daemon": running(state_file="none: /run is full")}, "warning", "none: /run is full", "journalctl"),
    ({"daemon": running(metrics="none: the port is taken")}, "warning", "port is taken", "journalctl"),
    ({"daemon": running(queue_waiting="unknown: x is root's; 'chgrp fwd x' lets fwd's group read it")}, "note",
     "queue-waiting: unknown", "chgrp fwd"),
    ({"daemon": Running(INFO, counters(queue_kernel_drop=5))}, "warning", "queue_kernel_drop 5: packets", "counter"),
    ({"daemon": Running(INFO, counters(flow_internal_error=1))}, "problem", "by a defect of fwd", "journalctl"),
    ({"daemon": Running(INFO, counters(tunnel_loss=2))}, "note", "loss 2", "fwctl show tunnel detail"),
    # kernel
    ({"daemon": running(fast_path="none: all packets", queue_rules="iptables NFQUEUE")}, "warning", "fast path none",
     "modprobe nf_tables"),
    ({**GONE, "trial": Trial("", "cannot install", "")}, "problem", "cannot install", "modprobe"),
    ({**GONE, "trial": Trial("iptables", "iptables NFQUEUE", "")}, "warning", "no fast path", "modprobe nf_tables"),
    ({**GONE, "trial": Trial("nft", "nft queue", "cannot bind")}, "problem", "NFQUEUE: cannot bind", "nfnetlink_queue"),
    ({"trial": CannotLook("x"), "modules": HEALTHY.modules | {"nft_queue": "absent", "xt_NFQUEUE": "absent"}},
     "problem", "lacks nft_queue or xt_NFQUEUE", "linux-modules"),
    ({"clock": Clock(1e9, 1.9e9, True, 0.0)}, "problem", "clock stands before the day", "set-ntp true"),
    ({"clock": Clock(2e9, 1.9e9, False, 0.0)}, "warning", "NTP does not keep the clock", "set-ntp true"),
    ({"clock": Clock(2e9, 1.9e9, True, 900.0)}, "note", "slept for 900 s", "sleep.target"),
    ({"sysctls": {"net/ipv4/ip_forward": 0}}, "note", "no IPv4 is forwarded", "net.ipv4.ip_forward=1"),
    ({"sysctls": {"net/ipv4/conf/all/rp_filter": 0, "net/ipv4/conf/eth1/rp_filter": 1}}, "note", "strict on eth1",
     "rp_filter=2"),
    ({"sysctls": {"net/netfilter/nf_conntrack_count": 99, "net/netfilter/nf_conntrack_max": 100}}, "warning",
     "99 entries of 100", "nf_conntrack_max=200"),
    # rules
    ({"tables": {}}, "problem", "its rules are not there: somebody flushed them", "journalctl"),
    ({"tables": {}, **GONE}, "note", "no rules of fwd are in place", ""),
    ({**GONE}, "warning", "rules of fwd are in place, and none answers", "fwd --remove-rules"),
    ({"tables": table(rules=12)}, "problem", "12 rules of fwd instead of 20: some were removed", "journalctl"),
    ({"tables": table(rules=40)}, "problem", "40 rules of fwd instead of 20: some are there twice", "journalctl"),
    ({"tables": table(wanted_rules=None, label="fwd: layout 2")}, "warning", "another version of fwd", "restart fwd"),
    ({"tables": table(queues=frozenset({3}))}, "warning", "send to NFQUEUE 3, the configuration says 20", "restart"),
    ({"tables": {}, "chains": saved("-j FWD-INPUT", "-j FWD-INPUT", table="mangle", more=":FWD-INPUT - [0:0]")},
     "problem", "leads to fwd's chain 2 times", "restart fwd"),
    ({"chains": saved("-j FWD-INPUT", table="mangle", more=":FWD-INPUT - [0:0]")}, "problem",
     "chains of iptables are in place beside its nft rules", "restart fwd"),
    # queue
    ({"reader": None}, "problem", "nobody reads NFQUEUE 20", "restart fwd"),
    ({"reader": Reader(QueueStats(0, 0, 0, 0), 8, "suricata (pid 8)")}, "problem", "another process than this fwd",
     "another [dataplane] queue"),
    ({"reader": Reader(QueueStats(4000, 0, 0, 0), 7, "")}, "warning", "4000 of 4096 packets wait", "counter global"),
    ({"chains": saved("-p tcp -j NFQUEUE --queue-num 20")}, "problem", "packets of its own to NFQUEUE 20", "-S INPUT"),
    # other firewalls
    ({"chains": saved("-p esp -j DROP")}, "warning", "chain INPUT (input) drops ESP, although fwd let it pass",
     "sudo iptables -t filter -I INPUT -p esp -j ACCEPT"),
    ({"chains": saved(policy="DROP")}, "warning", "drops ESP, UDP 500, UDP 4500", "--dports 500,4500 -j ACCEPT"),
    ({"chains": saved("-s 192.0.2.1 -j ACCEPT", policy="DROP")}, "note", "but for what passes by address", "iptables"),
    ({"chains": saved("-p esp -j DROP", table="raw", chain="PREROUTING")}, "warning", "before fwd sees it", "-t raw"),
    ({"chains": saved(policy="DROP"), "firewall_services": ("ufw",)}, "warning", "drops ESP", "sudo ufw allow"),
    ({"chains": saved("-p esp -j NOTRACK", table="raw", chain="PREROUTING")}, "note", "not tracked", "-S PREROUTING"),
    ({"chains": saved("-m conntrack --ctstate INVALID -j DROP")}, "note", "conntrack finds invalid", "conntrack -S"),
    ({"chains": saved("-p udp -j FLOWOFFLOAD", chain="FORWARD")}, "warning", "offloaded flows pass by", "-S FORWARD"),
    ({"chains": CannotLook("x"), "firewall_services": ("firewalld",)}, "warning", "firewalld is active",
     "--add-service=ipsec"),
    # strongSwan
    ({"daemon": running(strongswan="away: x"), "vici": vici(exists=False, answer=CannotLook("x"), charons=())},
     "problem", "IPsec SAs are in the kernel, but there is no /run/charon.vici", "ip xfrm state"),
    ({"daemon": running(strongswan="away: x"), "xfrm": Xfrm(0, 0, ()),
      "vici": vici(exists=False, answer=CannotLook("x"), charons=())}, "note", "strongSwan does not run", "strongswan"),
    ({"daemon": running(strongswan="away: x"), "vici": vici(exists=False, answer=CannotLook("x"))}, "problem",
     "charon (pid 9), but there is no /run/charon.vici", "[vici] socket"),
    ({"daemon": running(strongswan="away: x"), "vici": vici(mode=stat.S_IFREG | 0o644)}, "problem", "is no socket",
     "[vici] socket"),
    ({"daemon": running(strongswan="away: x"), "vici": vici(gid=0)}, "problem",
     "fwd, whom fwd runs as, may not open /run/charon.vici (uid 0, gid 0, mode 0770)", f"chgrp fwd-vici {VICI}"),
    ({"daemon": running(strongswan="away: x"), "vici": vici(answer=CannotLook("nobody listens"))}, "problem",
     "nobody listens", "restart strongswan"),
    ({"daemon": running(strongswan="away: it hangs")}, "warning", "but fwd says: away: it hangs", "journalctl"),
    ({"vici": vici(answer=("charon", "5.9.1"))}, "warning", "charon 5.9.1 is older than 5.9.8", "apt install"),
    ({"xfrm": Xfrm(2, 6, (("eth1", "packet"),))}, "problem", "offloaded to eth1 whole", "hw_offload = no"),
    ({"xfrm": Xfrm(2, 6, (("eth1", "crypto"),))}, "warning", "ciphers of SAs are offloaded to eth1", "hw_offload = no"),
    ({"modules": HEALTHY.modules | {"esp4_offload": "loaded"}}, "warning", "esp4_offload and GRO on eth1",
     "ethtool -K eth1 gro off"),
    ({"offloads": {"eth1": frozenset({"esp-hw-offload"})}}, "note", "eth1 can offload ESP", "esp-hw-offload off"),
    # files
    ({"state": None}, "note", "no state file", "[state] file"),
    ({"state": folder("/run/fwd", uid=0)}, "problem", "/run/fwd keeps fwd, whom fwd runs as, from", "chown fwd"),
    ({"state": folder("/run/fwd", free=1 << 30)}, "warning", "/run/fwd: 1 GiB of 100 GiB free", "df -h /run/fwd"),
    ({"state": folder("/run/fwd", strangers="/run/fwd can be changed by others")}, "problem", "another file", "ls -ld"),
    ({"traffic_log": None}, "note", "no traffic log", "[traffic-log] file"),
    ({"traffic_log": folder("/var/log/fwd", free=1 << 20)}, "warning", "may grow by 1023 MiB, and 1 MiB are free",
     "max-size"),
    ({"traffic_log": folder("/var/log/fwd", exists=False)}, "note", "is yet to be made", "install -d -m 750 -o fwd"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "level", "text", "action"), STATES)
def test_a_state_is_found_and_says_what_to_do(changes, level, text, action):
    found = [finding for finding in findings(**changes) if text in finding.text]
    assert len(found) == 1, [finding.text for finding in findings(**changes)]
    assert found[0].level == level and action in found[0].action and "\n" not in found[0].text + found[0].action
    assert bool(found[0].action) == bool(action)


def test_whatever_cannot_be_had_is_said_and_hides_nothing_else():
    may_fail = [f.name for f in dataclasses.fields(Facts) if "Fact[" in str(f.type)]
    assert len(may_fail) > 12
    for daemon in (HEALTHY.daemon, NO_DAEMON):
        for names in ([name] for name in may_fail), [may_fail]:
            for chosen in names:
                found = findings(daemon=daemon, **{name: CannotLook("it is dark", "a lamp") for name in chosen})
                assert not [finding for finding in found if "defect" in finding.text]
                unknown = [f for f in found if f.level is Level.UNKNOWN and f.text == "could not look: it is dark"]
                assert all(finding.action == "a lamp" for finding in unknown)
                assert unknown or chosen in (["accounts"], ["missing_groups"], ["xfrm"], ["trial"])
    everything = findings(**{name: CannotLook("it is dark") for name in may_fail})
    assert {finding.area for finding in everything} == {finding.area for finding in findings()}


def test_a_defect_of_a_check_is_a_finding(monkeypatch):
    def broken(facts):
        yield 1 / 0

    monkeypatch.setattr(checks, "CHECKS", [("daemon", "broken", broken), *checks.CHECKS])
    found = findings()
    assert found[0].level is Level.UNKNOWN and "a defect of fwctl (ZeroDivisionError" in found[0].text
    assert len(found) > 10


def test_every_counter_that_is_judged_exists():
    assert set(checks._COUNTERS) <= {counter.name for counter in COUNTERS}


def test_modes_bind_whom_they_bind():
    state = FileState("/x", 1, 2, stat.S_IFREG | 0o640)
    owner, member, other = (
        Identity("a", 1, frozenset()),
        Identity("b", 3, frozenset({2})),
        Identity("c", 3, frozenset()),
    )
    assert [state.lets(who, 4) for who in (owner, member, other)] == [True, True, False]
    assert [state.lets(who, 2) for who in (owner, member, other)] == [True, False, False]
    assert state.lets(Identity("root", 0, frozenset(), True), 6) and not state.lets(Identity("r", 0, frozenset()), 4)
    closed = Way("/a/b", (FileState("/", 0, 0, 0o755), FileState("/a", 0, 0, 0o700), FileState("/a/b", 1, 1, 0o777)))
    assert closed.obstacle(owner, 4).path == "/a"
