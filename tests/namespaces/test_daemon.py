"""The daemon as a user starts, stops, misuses and kills it."""

import json
import os
import queue
import re
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lab.lab import PROGRAMS, LabError, default_config, wait_for
from tests.namespaces.conftest import has_rules


def test_without_any_configuration_it_runs_with_a_sane_default(transit):
    host = transit.hosts["fwd"]
    process = host.start([str(PROGRAMS / "fwd")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(
        lambda: host.run([str(PROGRAMS / "fwctl"), "show", "system", "info"], check=False).returncode == 0, "it runs"
    )
    transit.initiate("sites-v4")
    transit.ping("sites-v4")
    shown = json.loads(host.run([str(PROGRAMS / "fwctl"), "show", "session", "all", "--json"]).stdout)["sessions"]
    assert {(s["rule"], s["c2s"]["source_zone"], s["c2s"]["destination_zone"]) for s in shown} == {
        ("any-any", "any", "any")
    }
    process.end()


def test_a_second_daemon_refuses_and_leaves_the_first_alone(transit):
    fwd = transit.start_fwd()
    with pytest.raises(LabError, match="cannot bind NFQUEUE 20"):
        # fwctl answers through the first one: so look at the second one's own exit.
        second = transit.hosts["fwd"].run([str(PROGRAMS / "fwd"), "--config", "/run/fwd.toml"], timeout=20)
        raise LabError(second.stderr)
    assert "Traceback" not in fwd.log
    transit.initiate("sites-v4")
    assert transit.ping("sites-v4") == 3
    assert fwd.sessions(application="ipsec-esp")


def test_a_second_daemon_with_another_queue_refuses_and_a_successor_with_it_goes_on(transit):
    host = transit.hosts["fwd"]
    fwd = transit.start_fwd()
    transit.initiate("sites-v4")
    assert transit.ping("sites-v4") == 3
    other = '[control]\nsocket = "/run/other.sock"\n[dataplane]\nqueue = 21\n'
    host.path("/run/other.toml").write_text(default_config() + other)
    refused = host.run([str(PROGRAMS / "fwd"), "--config", "/run/other.toml"], check=False, timeout=20)
    assert refused.returncode == 1 and "the rules of fwd are in place for NFQUEUE 20" in refused.stderr
    assert transit.ping("sites-v4") == 3
    (before,) = fwd.sessions(application="ipsec-esp")
    assert before["c2s"]["packets"] == 6
    fwd.kill()
    fwd = transit.start_fwd(default_config() + "[dataplane]\nqueue = 21\n")
    assert transit.ping("sites-v4") == 3
    (after,) = fwd.sessions(application="ipsec-esp")
    assert after["id"] == before["id"] and abs(after["start_time"] - before["start_time"]) < 2
    assert after["c2s"]["packets"] >= 8  # a kill loses what the daemon itself had counted


@pytest.mark.parametrize(
    ("backend", "command"),
    [
        ("auto", "nft flush table ip fwd_dataplane"),
        ("iptables-mark", "nft flush table ip fwd_dataplane"),
        ("iptables-mark", "iptables-nft -t mangle -F FWD-FORWARD"),
        ("iptables", "iptables-nft -t mangle -F FORWARD"),
    ],
)
def test_rules_that_somebody_flushed_are_put_back(transit, backend, command):
    host = transit.hosts["fwd"]
    fwd = transit.start_fwd(default_config() + f'[dataplane]\nbackend = "{backend}"\n')
    host.run(["sh", "-c", command])
    wait_for(lambda: fwd.counters()["rules_restored"] == 1, "the rules are back")
    transit.initiate("sites-v4")
    assert transit.ping("sites-v4") == 3
    assert [session["c2s"]["packets"] for session in fwd.sessions(application="ipsec-esp")] == [3]
    assert fwd.counters()["rules_restored"] == 1


def test_rules_of_a_killed_daemon_are_replaced_not_doubled(transit):
    host = transit.hosts["fwd"]
    for _ in range(3):
        transit.start_fwd().kill()
    fwd = transit.start_fwd()
    listed = host.run(["sh", "-c", "iptables-nft -t mangle -S; nft list table ip fwd_dataplane"]).stdout
    assert listed.count("-A INPUT -j FWD-INPUT") + listed.count('iif "lo" accept') == 1
    fwd.stop()
    assert not has_rules(transit)
    assert not host.path("/run/fwd/control.sock").exists()


@pytest.mark.parametrize(("number", "status", "has_them"), [(signal.SIGTERM, 0, False), (signal.SIGUSR1, 10, True)])
def test_a_signal_during_the_start_finds_a_killed_daemons_rules(transit, number, status, has_them):
    """So that its exit status tells whether rules are there, however early it was stopped."""
    host = transit.hosts["fwd"]
    transit.start_fwd().kill()
    host.path("/run/fwd/control.sock").unlink(missing_ok=True)
    process = host.start([str(PROGRAMS / "fwd"), "--config", "/run/fwd.toml"])
    wait_for(host.path("/run/fwd/control.sock").exists, "it has begun to start")
    process.send(number)
    assert process.wait(20) == status and has_rules(transit) == has_them


def test_a_users_own_filter_rules_still_see_what_fwd_accepted(transit):
    host = transit.hosts["fwd"]
    transit.start_fwd()
    transit.initiate("sites-v4")
    assert transit.ping("sites-v4") == 3
    host.run(["iptables-nft", "-A", "FORWARD", "-p", "esp", "-j", "DROP"])
    assert transit.ping("sites-v4", count=2) == 0


def test_a_reload_that_is_asked_for_during_the_start_comes_after_it(transit):
    host = transit.hosts["fwd"]
    host.path("/run/fwd.toml").write_text(default_config())
    with host.path("/run/early.log").open("w") as log:
        process = host.start([str(PROGRAMS / "fwd"), "--config", "/run/fwd.toml"], stdout=log, stderr=log)
    wait_for(host.path("/run/fwd/control.sock").exists, "it has begun to start")
    process.send(signal.SIGHUP)
    told = wait_for(
        lambda: (text := host.path("/run/early.log").read_text()) and "reloaded" in text and text, "it has reloaded"
    )
    assert process.is_running() and told.index("is ready") < told.index("INFO reloaded: ")


def test_it_notifies_systemd(transit):
    host = transit.hosts["fwd"]
    path = host.path("/run/notify")
    heard = queue.SimpleQueue()  # the socket's own is short, and fwd waits for no reader

    def listen():
        while (message := manager.recv(4096).decode()) != "over":
            heard.put(message)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        listener = threading.Thread(target=listen)
        listener.start()
        environment = {**os.environ, "NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "400000"}
        fwd = transit.start_fwd(environment=environment)

        def hear(word):
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                with suppress(queue.Empty):
                    message = heard.get(timeout=1)
                    if word in message.splitlines():
                        return message
            raise AssertionError(f"{word} was not said")

        try:
            assert "STATUS=" in hear("READY=1")
            hear("WATCHDOG=1")
            hear("WATCHDOG=1")
            fwd.reload(default_config())
            assert "MONOTONIC_USEC=" in hear("RELOADING=1")
            hear("READY=1")
            assert fwd.stop() == 0
            hear("STOPPING=1")
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
                end.sendto(b"over", str(path))
            listener.join()


def test_the_control_socket_asks_who_one_is(transit):
    host = transit.hosts["fwd"]
    transit.start_fwd()
    as_nobody = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "/usr/bin/python3", "-c"]
    ask = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/fwd/control.sock');"
        "print(s.makefile().readline())"
    )
    answer = json.loads(host.run([*as_nobody, ask]).stdout)
    assert answer["error"]["code"] == -32001 and "may not read" in answer["error"]["message"]
    as_nobody[-2:] = [str(PROGRAMS / "fwctl"), "show", "tunnel"]
    told = host.run(as_nobody, check=False)
    assert told.returncode == 1 and told.stderr.startswith("fwctl: permission denied: uid 65534 may not read")


def test_interfaces_that_come_later_are_known_by_name(transit):
    host = transit.hosts["fwd"]
    fwd = transit.start_fwd(default_config().replace('"to-b"', '"late*"'))
    host.run(["ip", "link", "set", "to-b", "down"])
    host.run(["ip", "link", "set", "to-b", "name", "late0"])
    host.run(["ip", "link", "set", "late0", "up"])
    host.run(["ip", "-6", "address", "replace", "2001:db8:b::1/64", "dev", "late0"])
    for _ in range(2):  # what is answered now was asked after the kernel had told of it
        fwd.fwctl("show", "system", "info")
    transit.initiate("sites-v4")
    transit.ping("sites-v4")
    (session,) = fwd.sessions(application="ipsec-esp")
    assert (session["egress_interface"], session["c2s"]["destination_zone"]) == ("late0", "untrust")


def test_the_log_has_what_lived_when_fwd_was_stopped_and_the_state_was_gone(transit):
    """As after a reboot; where the next fwd goes on with the sessions nothing is told of them."""

    def logged():
        told = fwd.fwctl("--json", "show", "log", "traffic", "filter", "application", "ipsec-esp").stdout
        return [json.loads(line) for line in told.splitlines()]

    fwd = transit.start_fwd()
    transit.initiate("sites-v4")
    assert transit.ping("sites-v4") == 3
    (before,) = fwd.sessions(application="ipsec-esp")
    for packets in (3, 6):
        assert fwd.stop() == 0
        fwd = transit.start_fwd()
        (session,) = fwd.sessions(application="ipsec-esp")
        assert (session["id"], session["c2s"]["packets"]) == (before["id"], packets) and logged() == []
        assert transit.ping("sites-v4") == 3
    assert fwd.stop() == 0
    for path in transit.hosts["fwd"].path("/run/fwd").glob("state*"):
        path.unlink()
    fwd = transit.start_fwd()
    (entry,) = wait_for(logged, "the log knows of it")
    assert (entry["session"], entry["subtype"], entry["end_reason"]) == (before["id"], "end", "unknown")
    assert entry["packets_c2s"] == 9 and abs(entry["start"] - before["start_time"]) < 1


def test_of_all_capabilities_it_needs_net_admin_only(terminated):
    """As the unit runs it with User=root: root's identity, one capability, no way to gain more."""
    host = terminated.hosts["fwd"]
    host.path("/run/fwd.toml").write_text(default_config())
    alone = ["setpriv", "--bounding-set", "-all,+net_admin", "--inh-caps", "-all", "--no-new-privs"]
    process = host.start(
        [*alone, str(PROGRAMS / "fwd"), "--config", "/run/fwd.toml"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    fwctl = [str(PROGRAMS / "fwctl"), "--json", "show", "tunnel"]

    def tunnels():
        asked = host.run(fwctl, check=False)
        return json.loads(asked.stdout)["tunnels"] if asked.returncode == 0 else []

    terminated.initiate("peer-v4")
    assert len(wait_for(tunnels, "the tunnel is known")) == 1
    assert terminated.ping("peer-v4") == 3
    effective = re.search(r"CapEff:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    assert effective is not None and int(effective[1], 16) == 1 << 12  # CAP_NET_ADMIN (linux/capability.h)
    shown = host.run(
        [str(PROGRAMS / "fwctl"), "--json", "show", "session", "all", "filter", "application", "ipsec-udp"]
    )
    (session,) = json.loads(shown.stdout)["sessions"]
    assert session["c2s"]["packets"] == 3
    process.end()


def test_rules_of_a_killed_daemon_can_be_taken_out_without_starting_one(transit):
    host = transit.hosts["fwd"]
    transit.initiate("sites-v4")
    transit.start_fwd(default_config() + '[dataplane]\nfail = "closed"\n').kill()
    assert transit.ping("sites-v4", count=2) == 0
    host.run([str(PROGRAMS / "fwd"), "--remove-rules"])
    assert transit.ping("sites-v4", count=2) == 2
