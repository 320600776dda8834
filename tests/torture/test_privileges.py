"""fwd as its unit runs it: a user of its own, one capability, no way to gain another.

Not here: the unit's seccomp filter and file system, which only systemd can put around it.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from lab import Lab
from lab.lab import PROGRAMS, Host, default_config, wait_for
from lab.sandbox import Process
from tests.torture.conftest import in_full

#: A user that no machine has. The group is one that strongSwan's root folder knows, too.
USER, GROUP = 64321, 65534
NET_ADMIN = 1 << 12  # linux/capability.h

#: As the unit does it: User=, AmbientCapabilities=, CapabilityBoundingSet=, NoNewPrivileges=.
AS_USER = [
    *("setpriv", "--reuid", f"{USER}", "--regid", f"{USER}", "--groups", f"{GROUP}", "--no-new-privs"),
    *("--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin", "--bounding-set=-all,+net_admin"),
]
COUNTS = "/proc/net/netfilter/nfnetlink_queue"


class AsUser:
    """A fwd without root's powers, and what to ask it; fwctl is root's."""

    def __init__(self, lab: Lab, more: str = "") -> None:
        self.host: Host = lab.hosts["fwd"]
        self.host.run(["install", "-d", "-m", "755", "-o", f"{USER}", "-g", f"{USER}", "/run/fwd"])
        self.host.path("/run/fwd.toml").write_text(default_config() + more)
        self._log = self.host.path("/run/fwd.log")
        with self._log.open("a") as log:
            command = [*AS_USER, str(PROGRAMS / "fwd"), "--config", "/run/fwd.toml"]
            self.process: Process = self.host.start(command, stdout=log, stderr=log)
        wait_for(lambda: "is ready" in self.log, "it is ready")

    @property
    def log(self) -> str:
        return self._log.read_text()

    def ask(self, *words: str) -> dict:
        return json.loads(self.host.run([str(PROGRAMS / "fwctl"), "--json", *words]).stdout)

    def open_vici(self, path: str = "/run/hosts/fwd/charon.vici") -> None:
        """What the unit and the drop-in of strongSwan's do."""
        self.host.run(["chgrp", f"{GROUP}", path])

    def hears_charon(self) -> bool:
        return bool(self.ask("show", "tunnel")["source"]["connected"])


def as_user(host: Host, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return host.run([*AS_USER, *command], check=False)


def test_it_works_on_real_esp_as_its_own_user_with_one_capability(terminated):
    fwd = AsUser(terminated)
    fwd.open_vici()
    wait_for(fwd.hears_charon, "charon is heard")
    terminated.initiate("peer-v4", "peer-v6")
    for count in (1, 2):  # the first of each comes to the daemon
        assert terminated.ping("peer-v4", count) == terminated.ping("peer-v6", count) == count

    def counted():
        sessions = fwd.ask("show", "session", "all", "filter", "application", "ipsec-udp")["sessions"]
        return [(s["c2s"]["packets"], s["s2c"]["packets"]) for s in sessions]

    # What came before charon's news has joined its tunnel then.
    wait_for(lambda: counted() == [(3, 3)] * 2, f"both tunnels have all packets, not {counted()}")
    counters = {counter["name"]: counter["value"] for counter in fwd.ask("show", "counter", "global")["counters"]}
    assert counters["flow_internal_error"] == 0 and counters["pkt_fast_path"] > 0

    status = Path(f"/proc/{fwd.process.pid}/status").read_text()
    fields = dict(re.findall(r"^(\w+):\s*(.*)$", status, re.MULTILINE))
    assert set(fields["Uid"].split()) == set(fields["Gid"].split()) == {f"{USER}"} and fields["NoNewPrivs"] == "1"
    assert {int(fields[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {NET_ADMIN}

    fwd.process.popen.terminate()
    assert fwd.process.wait(15) is not None


CANNOT: dict[str, str] = {
    "read what is root's": "open('/etc/shadow')",
    "write where programs lie": "open('/usr/local/sbin/fwd', 'w')",
    "write its own configuration": "open('/run/fwd.toml', 'a')",
    "make a file in /run": "open('/run/mine', 'w')",
    "become root": "os.setuid(0)",
    "become another group": "os.setgid(0)",
    "give files away": "os.chown('/run/fwd', 0, 0)",
    "send forged packets": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 50)",
    "listen to an interface": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)",
    "take a low port": "socket.create_server(('127.0.0.1', 80))",
    "see root's memory": "open('/proc/1/mem', 'rb')",
    "end root's processes": "os.kill(1, 9)",
    "leave its root folder": "os.chroot('/run')",
    "mount": "libc('mount', b'none', b'/mnt', b'tmpfs', 0, None)",
    "set the clock": "time.clock_settime(time.CLOCK_REALTIME, time.time())",
    "enter another namespace": "libc('setns', os.open('/proc/1/ns/net', os.O_RDONLY), 0)",
}


_TRIES = """
import ctypes, json, os, socket, sys, time
def libc(name, *words):
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*words):
        raise OSError(ctypes.get_errno(), name)
outcomes = {}
for what, statement in json.loads(sys.argv[1]).items():
    try:
        exec(statement)
        outcomes[what] = "done"
    except OSError as error:
        outcomes[what] = os.strerror(error.errno)
print(json.dumps(outcomes))
"""


def test_what_runs_with_its_rights_cannot(transit):
    fwd = AsUser(transit)
    done = as_user(fwd.host, ["/usr/bin/python3", "-c", _TRIES, json.dumps(CANNOT)])
    outcomes = json.loads(done.stdout)
    assert outcomes.keys() == CANNOT.keys()
    assert {
        what: outcome
        for what, outcome in outcomes.items()
        if outcome not in ("Operation not permitted", "Permission denied")
    } == {}


def test_of_all_folders_only_its_own_is_writable(transit):
    fwd = AsUser(transit)
    found = as_user(fwd.host, ["find", "/run", "/etc", "/usr/local", "/var/lib", "-type", "d", "-writable"])
    assert found.stdout.split() == ["/run/fwd"]


@pytest.mark.parametrize("backend", in_full(["nft-xt", "iptables-mark", "iptables"], ["iptables"]))
def test_every_backend_works_without_root_and_leaves_nothing(transit, backend):
    fwd = AsUser(transit, f'[dataplane]\nbackend = "{backend}"\n')
    transit.initiate("sites-v4")
    assert transit.ping("sites-v4") == 3
    (session,) = fwd.ask("show", "session", "all", "filter", "application", "ipsec-esp")["sessions"]
    assert session["c2s"]["packets"] == session["s2c"]["packets"] == 3
    fwd.process.end()
    assert as_user(fwd.host, [str(PROGRAMS / "fwd"), "--remove-rules"]).returncode == 0
    listed = fwd.host.run(["sh", "-c", "nft list ruleset; iptables-nft -t mangle -S; ip6tables-nft -t mangle -S"])
    assert "fwd_dataplane" not in listed.stdout and "FWD-" not in listed.stdout


def test_a_vici_socket_that_is_roots_is_told_of_and_heard_as_soon_as_it_may_be(terminated):
    fwd = AsUser(terminated)
    told = wait_for(lambda: fwd.ask("show", "tunnel")["source"]["reason"], "it says why charon is not heard")
    assert told.startswith("permission denied: ") and "chgrp fwd-vici /run/hosts/fwd/charon.vici" in told
    fwd.open_vici()
    wait_for(fwd.hears_charon, "charon is heard")


def test_charon_gives_its_socket_to_the_group_that_its_configuration_names(terminated):
    host, charon = terminated.hosts["fwd"], terminated.charon("fwd")
    conf = host.path("/run/hosts/fwd/strongswan.conf")
    conf.write_text(conf.read_text() + "charon {\n  group = nogroup\n}\n")
    fwd = AsUser(terminated)
    charon.restart()
    assert host.path(charon.vici_path).stat().st_gid == GROUP
    wait_for(fwd.hears_charon, "charon is heard")
    terminated.initiate("peer-v4")
    assert terminated.ping("peer-v4") == 3
    wait_for(lambda: len(fwd.ask("show", "tunnel")["tunnels"]) == 1, "fwd knows the tunnel")


def test_counts_of_the_queue_that_are_roots_are_missed_aloud(transit):
    fwd = AsUser(transit)
    assert "unknown" in str(fwd.ask("show", "system", "info")["queue-waiting"])
    wait_for(lambda: f"chgrp fwd {COUNTS}" in fwd.log, "it says what is missing")
    fwd.host.run(["chgrp", f"{USER}", COUNTS])
    assert fwd.ask("show", "system", "info")["queue-waiting"] == 0


def test_root_may_still_run_it_by_hand(transit):
    fwd = transit.start_fwd()
    transit.initiate("sites-v4")
    assert transit.ping("sites-v4") == 3
    assert "Uid:\t0" in Path(f"/proc/{fwd.pid}/status").read_text()
    assert fwd.stop() == 0
