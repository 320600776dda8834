"""The service as a user has it: installed, under the machine's own systemd, beside the machine's own strongSwan."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.vm.site import (
    CONFIG,
    counters,
    flows_on,
    fwctl,
    has_queue,
    has_rules,
    kernel_packets,
    packets,
    received,
    sh,
    succeeds,
    unit,
    wait_for,
)

DROP_IN = Path("/run/systemd/system/fwd.service.d/test.conf")


@pytest.fixture
def drop_in():
    """Writes a drop-in for the unit, for one test."""

    def write(text):
        DROP_IN.parent.mkdir(parents=True, exist_ok=True)
        DROP_IN.write_text(text)
        sh("systemctl daemon-reload && systemctl restart fwd", check=True)

    yield write
    DROP_IN.unlink(missing_ok=True)
    sh("systemctl daemon-reload && systemctl restart fwd", check=True)


def is_active():
    return unit("fwd", "ActiveState") == "active"


def is_another(pid):
    """Whether the unit is active with another process than that one."""
    return unit("fwd", "MainPID") not in (pid, "0") and is_active()


def test_it_is_installed_as_a_user_would(site):
    """What the machine's disk had from the beginning is purged first."""
    sh("systemctl disable --now fwd && dpkg --purge fwd", check=True, timeout=240)
    assert not succeeds("systemctl cat fwd") and not Path("/usr/bin/fwctl").exists() and not has_rules()
    sh("dpkg --install /opt/fwd.deb", check=True, timeout=240)
    sh("systemctl enable --now fwd", check=True)
    assert is_active() and has_rules() and has_queue()


def test_it_is_enabled_and_runs_as_its_own_user(site):
    assert succeeds("systemctl is-enabled fwd")
    assert is_active()
    pid = unit("fwd", "MainPID")
    assert sh(f"stat -c %U /proc/{pid}").strip() == "fwd"
    assert "queue-rules: nft queue" in sh("/usr/bin/fwctl show system info", check=True)


def test_it_is_active_when_the_tunnel_flows_and_counts(service):
    service.up()
    assert received(service.ping(1)) == 1
    before = wait_for(service.session, "the tunnel has its session")
    sh("systemctl stop fwd", check=True)
    assert not has_rules() and not has_queue()
    sh("systemctl start fwd", check=True)
    assert has_queue() and has_rules()  # asked once: what comes later is too late
    assert received(service.ping(5)) == 5
    assert packets(wait_for(service.session, "the tunnel has its session again"), before) == [5, 5]


_AS_THE_UNIT_DOES = (
    *("setpriv", "--reuid=fwd", "--regid=fwd", "--init-groups", "--no-new-privs"),
    *("--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin", "--bounding-set=-all,+net_admin"),
)


def test_it_says_ready_only_when_packets_are_handled(service):
    """It is frozen the moment it says so, for one to look at leisure."""
    sh("systemctl stop fwd", check=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0fwd-test-manager")
        manager.settimeout(60)
        environment = {**os.environ, "NOTIFY_SOCKET": "@fwd-test-manager"}
        fwd = subprocess.Popen([*_AS_THE_UNIT_DOES, "/usr/sbin/fwd"], env=environment)
        try:
            while b"READY=1" not in manager.recv(4096):
                pass
            fwd.send_signal(signal.SIGSTOP)
            assert has_queue() and has_rules()
        finally:
            fwd.send_signal(signal.SIGCONT)
            fwd.terminate()
            assert fwd.wait(60) == 0
    sh("systemctl start fwd", check=True)


#: Has the queue that fwd wants, until its input ends.
_HOLD_THE_QUEUE = """
import sys
from netfilterqueue import NetfilterQueue
queue = NetfilterQueue()
queue.bind(20, lambda packet: packet.accept())
print("ready", flush=True)
sys.stdin.read()
"""


def test_without_its_queue_it_does_not_become_active(service):
    """A start that succeeded would be a lie. When the queue is free, it starts by itself."""
    sh("systemctl stop fwd", check=True)
    since = sh("date +%s.%N").strip()
    command = [sys.executable, "-c", _HOLD_THE_QUEUE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "ready\n"
        assert not succeeds("systemctl start fwd")
        assert not is_active() and not has_rules()
        assert "cannot bind NFQUEUE 20" in sh(f"journalctl -u fwd --no-pager --since=@{since}")
    wait_for(is_active, "the unit is active", 60)
    assert has_queue() and has_rules()


def test_a_hung_daemon_is_restarted_by_the_watchdog_and_nothing_is_lost(service, drop_in):
    assert unit("fwd", "WatchdogUSec") == "30s"  # here it shall not take as long
    drop_in("[Service]\nWatchdogSec=10s\nTimeoutAbortSec=3s\n")
    service.up()
    assert received(service.ping(5)) == 5
    before, pid = wait_for(service.session, "the tunnel has its session"), unit("fwd", "MainPID")
    kernel_before = kernel_packets(before)
    since = sh("date +%s.%N").strip()
    sh(f"kill -s STOP {pid}", check=True)
    traffic = service.ping(500, 0.05)
    wait_for(lambda: is_another(pid), "it is back", 60)
    assert received(traffic) == 500
    assert "Watchdog timeout" in sh(f"journalctl -u fwd --no-pager --since=@{since}")
    assert unit("fwd", "NRestarts") == "1"
    after = wait_for(service.session, "the tunnel has its session again")
    assert packets(after, before) == kernel_packets(after, kernel_before) == [500, 500]


def test_a_reload_under_traffic_is_whole_or_fails(service):
    service.up()
    assert received(service.ping(3)) == 3
    before = wait_for(service.session, "the tunnel has its session")
    assert before["rule"] == "any-any"
    traffic = service.ping(500, 0.05)
    Path("/etc/fwd/fwd.toml").write_text(CONFIG.replace("any-any", "another-name"))
    sh("systemctl reload fwd", check=True)
    wait_for(lambda: service.session()["rule"] == "another-name", "the session meets the new rules")
    flows_on(traffic)
    Path("/etc/fwd/fwd.toml").write_text(CONFIG.replace('"allow"', '"perhaps"'))
    said = sh("systemctl reload fwd; systemctl is-active fwd; journalctl -u fwd -n 20 --no-pager")
    assert "Job for fwd.service failed" in said and "\nactive\n" in said and "perhaps" in said
    assert service.session()["rule"] == "another-name"
    assert received(traffic) == 500
    assert packets(service.session(), before) == [500, 500]


@pytest.mark.parametrize("how", ["systemctl restart fwd", "systemctl kill -s KILL fwd"])
def test_its_end_and_start_under_traffic_lose_no_packet_and_no_count(service, how):
    service.up()
    assert received(service.ping(3)) == 3
    before, pid = wait_for(service.session, "the tunnel has its session"), unit("fwd", "MainPID")
    kernel_before = kernel_packets(before)
    traffic = service.ping(600, 0.1)
    sh(how, check=True)
    wait_for(lambda: is_another(pid), "it is back", 60)
    flows_on(traffic)
    assert received(traffic) == 600
    after = wait_for(service.session, "the tunnel has its session again")
    assert packets(after, before) == kernel_packets(after, kernel_before) == [600, 600]


def test_a_stop_takes_the_rules_out_and_tunnels_flow_on(service):
    service.up()
    traffic = service.ping(300, 0.05)
    sh("systemctl stop fwd", check=True)
    flows_on(traffic)
    assert not has_rules()
    assert (unit("fwd", "ActiveState"), unit("fwd", "Result")) == ("inactive", "success")
    assert received(traffic) == 300


def journal(*words):
    """The entries of fwd's own in the journal."""
    lines = sh(f"journalctl -u fwd -b -o json --no-pager _COMM=fwd {' '.join(words)}").splitlines()
    return [json.loads(line) for line in lines]


def test_the_journal_has_levels_and_no_trace_of_a_defect(service):
    service.up()
    since = sh("date +%s.%N").strip()
    sh("systemctl stop strongswan", check=True)

    def warnings():
        return [e for e in journal(f"--since=@{since}") if e["PRIORITY"] == "4" and "SAs known so far" in e["MESSAGE"]]

    wait_for(warnings, "fwd warns that strongSwan is away", 60)
    service.up()
    entries = journal()
    assert {"4", "6"} <= {entry["PRIORITY"] for entry in entries} <= {"3", "4", "5", "6"}
    for entry in entries:
        assert entry["PRIORITY"] != "3" or re.search("removed the rules|cannot bind NFQUEUE", entry["MESSAGE"]), entry
    assert not [e for e in entries if "Traceback" in str(e["MESSAGE"]) or str(e["MESSAGE"]).startswith("<")]


def test_its_exposure_is_low_as_it_runs(service):
    said = sh("systemd-analyze security --no-pager fwd")
    level = re.search(r"Overall exposure level for fwd.service: ([0-9.]+)", said)
    assert level and float(level[1]) <= 1.5, said


@pytest.fixture
def sinks():
    """Two that listen to UDP."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2)]
        for sink in found:
            sink.bind(("127.0.0.1", 0))
            sink.settimeout(30)
        yield found


def test_nothing_that_can_be_switched_on_runs_into_the_sandbox(service, sinks):
    """Traffic log, journal, syslog, flow export, metrics: the system calls of each are allowed."""
    since = sh("date +%s.%N").strip()
    service.up()
    syslog, collector = (sink.getsockname()[1] for sink in sinks)
    Path("/etc/fwd/fwd.toml").write_text(
        CONFIG
        + f"""
log-at-start = true
[traffic-log]
journal = true
[syslog]
server = "udp:127.0.0.1:{syslog}"
[ipfix]
collector = "udp:127.0.0.1:{collector}"
[metrics]
listen = "127.0.0.1:9400"
"""
    )
    sh("systemctl restart fwd", check=True)
    assert received(service.ping(5)) == 5
    wait_for(service.session, "the tunnel has its session")
    fwctl("clear", "session", "all")
    assert b"TRAFFIC" in sinks[0].recv(65536)
    assert sinks[1].recv(65536)[:2] == b"\0\x0a"  # IPFIX's version, 10
    page = sh(
        "/usr/bin/python3 -c 'import urllib.request as u; print(u.urlopen(\"http://127.0.0.1:9400/metrics\").read())'"
    )
    assert "fwd_" in page
    wait_for(lambda: "ipsec-udp" in sh("/usr/bin/fwctl show log traffic"), "the traffic log has it", 15)
    assert unit("fwd", "NRestarts") == "0" and unit("fwd", "ActiveState") == "active"
    log = sh(f"journalctl -u fwd --no-pager --since=@{since} -p warning")
    assert "not permitted" not in log and "Traceback" not in log, log
    assert counters()["flow_internal_error"] == 0
