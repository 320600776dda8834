"""The service as a user has it: installed, under the machine's own systemd, beside the machine's own strongSwan."""

import json
import re
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.vm.site import (
    CONFIG,
    counters,
    fwctl,
    has_queue,
    has_rules,
    received,
    sh,
    succeeds,
    unit,
    wait_for,
    xfrm_packets,
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
    sh("systemctl daemon-reload")


def test_it_is_enabled_and_runs_as_its_own_user(site):
    assert succeeds("systemctl is-enabled fwd")  # by the package
    sh("systemctl start fwd", check=True)
    assert unit("fwd", "ActiveState") == "active"
    pid = unit("fwd", "MainPID")
    assert sh(f"stat -c %U /proc/{pid}").strip() == "fwd"
    assert "queue-rules: nft queue" in sh("/usr/bin/fwctl show system info", check=True)


def test_it_is_active_only_when_packets_are_handled(service):
    service.up()
    assert received(service.ping(1)) == 1
    before = wait_for(service.session, "the tunnel has its session")
    sh("systemctl stop fwd", check=True)
    assert not has_rules() and not has_queue()
    sh("systemctl start --no-block fwd", check=True)
    wait_for(lambda: unit("fwd", "ActiveState") == "active", "the unit is active", 60)
    assert has_rules() and has_queue()  # asked once: what comes later is too late
    assert received(service.ping(5)) == 5
    after = wait_for(service.session, "the tunnel has its session again")
    assert [after[flow]["packets"] - before[flow]["packets"] for flow in ("c2s", "s2c")] == [5, 5]


def test_without_its_queue_it_does_not_become_active(service):
    """Another fwd has it: a start that succeeded would be a lie."""
    other = "fwd-other"
    sh(f"systemd-run --unit {other} -p Type=notify -p Restart=no /usr/sbin/fwd --config /etc/fwd/fwd.toml")
    assert unit(other, "ActiveState") in ("failed", "inactive") or not succeeds(f"systemctl is-active {other}")
    assert unit("fwd", "ActiveState") == "active" and has_rules()
    sh(f"systemctl reset-failed {other}")


def test_a_hung_daemon_is_restarted_by_the_watchdog_and_nothing_is_lost(service, drop_in):
    drop_in("[Service]\nWatchdogSec=6s\nTimeoutAbortSec=3s\n")
    service.up()
    assert received(service.ping(5)) == 5
    before, pid = wait_for(service.session, "the tunnel has its session"), unit("fwd", "MainPID")
    sh(f"kill -s STOP {pid}", check=True)
    traffic = service.ping(300, 0.05)
    wait_for(
        lambda: unit("fwd", "MainPID") not in (pid, "0") and unit("fwd", "ActiveState") == "active", "it is back", 60
    )
    assert received(traffic) == 300
    assert "Watchdog timeout" in sh("journalctl -u fwd --no-pager")
    after = wait_for(service.session, "the tunnel has its session again")
    assert after["id"] == before["id"] and after["c2s"]["packets"] - before["c2s"]["packets"] == 300


def test_a_reload_under_traffic_is_whole_or_fails(service):
    service.up()
    traffic = service.ping(150)
    before = wait_for(service.session, "the tunnel has its session")
    sh("systemctl reload fwd", check=True)
    Path("/etc/fwd/fwd.toml").write_text(CONFIG.replace('"allow"', '"perhaps"'))
    said = sh("systemctl reload fwd; systemctl is-active fwd; journalctl -u fwd -n 20 --no-pager")
    assert "Job for fwd.service failed" in said and "\nactive\n" in said and "perhaps" in said
    Path("/etc/fwd/fwd.toml").write_text(CONFIG)
    sh("systemctl reload fwd", check=True)
    assert received(traffic) == 150
    after = service.session()
    assert after["id"] == before["id"] and after["c2s"]["packets"] >= 150


@pytest.mark.parametrize("how", ["systemctl restart fwd", "systemctl kill -s KILL fwd"])
def test_its_end_and_start_under_traffic_lose_no_packet_and_no_count(service, how):
    service.up()
    assert received(service.ping(3)) == 3
    before, pid = wait_for(service.session, "the tunnel has its session"), unit("fwd", "MainPID")
    kernel_before = xfrm_packets()
    traffic = service.ping(250)
    sh(how, check=True)
    wait_for(
        lambda: unit("fwd", "MainPID") not in (pid, "0") and unit("fwd", "ActiveState") == "active", "it is back", 60
    )
    assert received(traffic) == 250
    after = wait_for(service.session, "the tunnel has its session again")
    assert after["id"] == before["id"]
    kernel = xfrm_packets()
    for flow, spi in (("c2s", after["c2s"]["dport"]), ("s2c", after["c2s"]["sport"])):
        assert after[flow]["packets"] - before[flow]["packets"] == kernel[spi] - kernel_before[spi] == 250


def test_a_stop_takes_the_rules_out_and_tunnels_flow_on(service):
    service.up()
    traffic = service.ping(100)
    sh("systemctl stop fwd", check=True)
    assert not has_rules()
    assert (unit("fwd", "ActiveState"), unit("fwd", "Result")) == ("inactive", "success")
    assert received(traffic) == 100


def test_the_journal_has_levels_and_no_trace_of_a_defect(service):
    lines = [json.loads(line) for line in sh("journalctl -u fwd -b -o json --no-pager _COMM=fwd").splitlines()]
    assert lines and {line["PRIORITY"] for line in lines} <= {"4", "5", "6"}
    assert not [line for line in lines if "Traceback" in str(line["MESSAGE"])]


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
    log = sh("journalctl -u fwd --no-pager --since=-2min -p warning")
    assert "not permitted" not in log and "Traceback" not in log, log
    assert counters()["flow_internal_error"] == 0
