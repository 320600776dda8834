"""The kernel repeats fwd's decisions: counted by independent rules, under churn, and while no fwd runs."""

import os
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from statistics import median

import pytest

from fwd.cli.client import Client
from fwd.core.constants import LOOK_INTERVAL_S
from fwd.rpc import RpcError
from lab.lab import default_config, wait_for
from tests.namespaces.conftest import accounted, assert_balanced, has_rules, witnessed

A, B = ("198.51.100.2", "203.0.113.2")

#: What arrives at a site, for the other end of the wire to say.
ARRIVALS = """
table inet arrivals {
  chain prerouting {
    type filter hook prerouting priority raw
    meta l4proto esp counter
  }
}
"""


def watch_arrivals(lab):
    for site in ("site-a", "site-b"):
        lab.hosts[site].path("/run/arrivals.nft").write_text(ARRIVALS)
        lab.hosts[site].run(["nft", "-f", "/run/arrivals.nft"])


def arrived(lab, site):
    listed = lab.hosts[site].run(["nft", "list", "table", "inet", "arrivals"]).stdout
    return int(listed.split("packets")[1].split()[0])


def start_sources(lab, **options):
    return [lab.start_source("site-a", A, B, **options), lab.start_source("site-b", B, A, **options)]


def totals(lab, first_id=1):
    """Packets of all sessions that can be read, by the address that sent them: live and ended ones."""
    client = Client(str(lab.hosts["fwd"].path("/run/fwd/control.sock")))
    counters = {counter["name"]: counter["value"] for counter in client.call("counter.list")["counters"]}
    sums = {A: 0, B: 0}
    for session_id in range(first_id, first_id + counters["session_allocated"] + 1):
        with suppress(RpcError):
            session = client.call("session.get", id=session_id)
            for flow in ("c2s", "s2c"):
                if session["application"] == "ipsec-esp":
                    sums[session[flow]["source"]] += session[flow]["packets"]
    client.close()
    return sums


@pytest.mark.parametrize("backend", ["auto", "iptables-mark", "iptables"])
def test_established_tunnels_pass_the_kernel_alone(demo, backend):
    fwd = demo.start_fwd(default_config() + f'[dataplane]\nbackend = "{backend}"\n')
    demo.initiate()
    wait_for(lambda: len(fwd.sessions(application="ipsec-udp")) == 2, "fwd knows the tunnels that end here")
    for tunnel in demo.topology.tunnels:
        assert demo.ping(tunnel.name, count=1) == 1  # until this one is answered, others would come to the daemon, too
        assert demo.ping(tunnel.name, count=19) == 19
    for session in fwd.sessions(application="ipsec-esp") + fwd.sessions(application="ipsec-udp"):
        assert (session["c2s"]["packets"], session["s2c"]["packets"]) == (20, 20)
        assert session["ipsec"]["spis_in_kernel"] == (0 if backend == "iptables" else 2)
    counters = fwd.counters()
    assert counters["pkt_fast_path"] == (0 if backend == "iptables" else 4 * 2 * 19)
    assert_balanced(demo, fwd)
    assert "fast" in fwd.fwctl("show", "system", "info").stdout


def test_esp_in_udp_takes_the_fast_path_and_ike_beside_it_does_not(transit):
    fwd = transit.start_fwd()
    script = (
        "import socket, struct, sys, time\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('198.51.100.2', 4501))\n"
        "for n in range(*map(int, sys.argv[1:])):\n"
        "    s.sendto(struct.pack('!II', 0xbeef, n + 1) + bytes(40), ('203.0.113.2', 4500))\n"
        "    s.sendto(bytes(4) + bytes(range(1, 29)), ('203.0.113.2', 4500))\n"
        "    s.sendto(b'\\xff', ('203.0.113.2', 4500))\n"
        "    time.sleep(0.01)\n"
    )
    for first, end in ((0, 1), (1, 20)):
        transit.hosts["site-a"].run([sys.executable, "-c", script, f"{first}", f"{end}"])
        wait_for(partial(has_handled, fwd, 3 * end), "all is handled")
    (esp,) = fwd.sessions(application="ipsec-esp-udp")
    (ike,) = fwd.sessions(application="ike")
    assert (esp["c2s"]["packets"], ike["c2s"]["packets"]) == (20, 40)
    counters = fwd.counters()
    assert counters["pkt_fast_path"] == 19
    assert counters["pkt_recv"] == 60 == witnessed(transit)


def has_handled(fwd, packets):
    return accounted(fwd) >= packets


ROUNDS = int(os.environ.get("FWD_EXACT_ROUNDS", "20"))


@pytest.mark.timeout(900)
def test_packets_delivered_are_packets_counted_while_elements_come_and_go(transit):
    """Round after round both ways over many SPIs; all the while sessions are cleared, reloads go on, the table is full.

    In every other round each SPI has a session of its own, of which half find no place in the table.
    """
    watch_arrivals(transit)
    small = "[limits]\nhalf-open = 0\n[dataplane]\nmax-sessions = 100\nqueue-length = 65536\nkeep-ended = 1000000\n"
    modes = (
        small,
        small + 'transit-ports = "spi"\n',
        small + 'fast-path = "off"\n',
        small + 'transit-ports = "spi"\n',
    )
    fwd = transit.start_fwd(default_config() + small)
    client = Client(str(transit.hosts["fwd"].path("/run/fwd/control.sock")))
    count, sent, churn = 2500, 0, 0
    for number in range(ROUNDS):
        sources = start_sources(transit, count=count, spis=100, rate=12000, first_spi=4096 + 1000 * number)
        while any(source.popen.poll() is None for source in sources) or churn <= 5 * (number + 1):
            client.call("session.clear", filter={})
            churn += 1
            if churn % 8 == 0:
                fwd.reload(default_config() + modes[churn // 8 % len(modes)])
        assert [source.wait(10) for source in sources] == [0, 0]
        sent += 2 * count
        wait_for(partial(has_handled, fwd, sent), f"all is handled that was sent by round {number}")
        counters = fwd.counters()
        delivered = arrived(transit, "site-a") + arrived(transit, "site-b")
        assert counters["pkt_session"] == delivered, f"round {number}"
        assert accounted(fwd) == witnessed(transit) == sent, f"round {number}"
        assert delivered == sent - counters["flow_table_full"]
    client.close()
    print({name: value for name, value in counters.items() if value})
    assert totals(transit) == {A: arrived(transit, "site-b"), B: arrived(transit, "site-a")}
    assert churn > 5 * ROUNDS and counters["flow_table_full"] > 0
    assert counters["pkt_fast_path"] > 0 and counters["fast_path_lost"] == counters["fast_path_refused"] == 0


@pytest.mark.alone
def test_packets_of_a_new_spi_leave_in_the_order_in_which_they_came(transit, tmp_path):
    """Packets wait in the queue when the SPI is decided on, and more come while they do."""
    # This fwd waits for an empty queue as long as a slow machine takes.
    (tmp_path / "sitecustomize.py").write_text("from fwd.core import constants\nconstants.INSTALL_WAIT_S = 5.0\n")
    fwd = transit.start_fwd(environment={"PYTHONPATH": str(tmp_path)})
    late = []
    for attempt in range(1, 6):
        with transit.hosts["fwd"].capture("to-b", "esp") as capture:
            fwd.process.send(signal.SIGSTOP)
            source = transit.start_source("site-a", A, B, count=3000, spis=1, rate=5000, first_spi=5000 + attempt)
            time.sleep(0.25)
            fwd.process.send(signal.SIGCONT)
            assert source.wait(20) == 0
            wait_for(partial(has_handled, fwd, 3000 * attempt), "all is handled")
        assert max(int.from_bytes(packet.octets[24:28]) for packet in capture.packets) == 3000
        late.append(sum(numbers > 0 for numbers in capture.behind()))
    assert fwd.counters()["pkt_fast_path"] > 0
    # What came in the moment in which the kernel was told: one burst of the source.
    assert median(late) <= 64, late


@pytest.mark.parametrize("fail", ["open", "closed"])
def test_an_orderly_restart_is_not_noticed_by_tunnels_and_loses_no_count(transit, fail):
    watch_arrivals(transit)
    config = default_config() + f'[dataplane]\nfail = "{fail}"\nqueue-length = 65536\n'
    fwd = transit.start_fwd(config)
    count = 60000
    sources = start_sources(transit, count=count, spis=50, rate=12000)
    for _ in range(3):
        time.sleep(0.7)
        before = fwd.sessions()
        fwd.process.send(signal.SIGUSR1)
        assert fwd.process.wait(15) == 10
        time.sleep(0.3)
        fwd = transit.start_fwd(config)
        assert "took over 1 sessions" in fwd.log
        (session,) = fwd.sessions()
        assert session["id"] == before[0]["id"] == 1
        assert abs(session["start_time"] - before[0]["start_time"]) < 1.5
    assert [source.wait(20) for source in sources] == [0, 0]
    # Even with fail-closed all packets arrive: the kernel knows all the SPIs.
    assert (arrived(transit, "site-b"), arrived(transit, "site-a")) == (count, count)
    assert totals(transit) == {A: count, B: count}


def test_a_restart_puts_back_what_was_to_be_looked_at(transit):
    """Each 10 s a packet of an SPI comes to fwd, which is to see its number; not while there is no fwd."""
    config = default_config() + '[dataplane]\nfail = "closed"\n'
    fwd = transit.start_fwd(config)
    transit.initiate("sites-v4")

    def in_kernel():
        (session,) = fwd.sessions(application="ipsec-esp")
        return session["ipsec"]["spis_in_kernel"]

    assert transit.ping("sites-v4", count=1) == 1
    wait_for(lambda: in_kernel() == 2, "the kernel knows both SPIs")
    assert transit.ping("sites-v4", count=19) == 19
    time.sleep(LOOK_INTERVAL_S + 0.5)
    assert transit.ping("sites-v4", count=1) == 1  # fwd hears of it, and then nothing more comes
    wait_for(lambda: in_kernel() < 2, "the next packet of one would come to fwd")
    fwd.process.send(signal.SIGUSR1)
    assert fwd.process.wait(15) == 10
    assert transit.ping("sites-v4") == 3
    fwd = transit.start_fwd(config)
    (session,) = fwd.sessions(application="ipsec-esp")
    assert (session["c2s"]["packets"], session["s2c"]["packets"]) == (24, 24)


def test_after_a_kill_the_kernel_goes_on_and_the_next_fwd_takes_over(terminated):
    config = default_config() + '[dataplane]\nfail = "closed"\nunknown-spi = "discard"\n'
    fwd = terminated.start_fwd(config)
    terminated.initiate("peer-v4")
    assert terminated.ping("peer-v4", count=5) == 5
    (before,) = fwd.sessions(application="ipsec-udp")
    fwd.kill()
    assert terminated.ping("peer-v4", count=5) == 5
    fwd = terminated.start_fwd(config)
    wait_for(lambda: fwd.sessions(application="ipsec-udp"), "charon claims the tunnel")
    (after,) = fwd.sessions(application="ipsec-udp")
    assert after["id"] == before["id"] and after["c2s"]["packets"] == after["s2c"]["packets"] == 10
    assert (after["c2s"]["sport"], after["c2s"]["dport"]) == (before["c2s"]["sport"], before["c2s"]["dport"])
    assert after["state"] == "ACTIVE" and after["ipsec"]["child_sa"] == "peer-v4"


def test_a_stop_counts_what_the_kernel_counted_last_and_the_next_start_goes_on(transit):
    fwd = transit.start_fwd()
    transit.initiate("sites-v4")
    assert transit.ping("sites-v4", count=20) == 20
    assert fwd.stop() == 0
    assert not has_rules(transit)
    assert transit.ping("sites-v4", count=5) == 5  # nobody counts these: there are no rules
    fwd = transit.start_fwd()
    (session,) = fwd.sessions(application="ipsec-esp")
    assert session["c2s"]["packets"] == session["s2c"]["packets"] == 20
    assert transit.ping("sites-v4", count=5) == 5
    (after,) = fwd.sessions(application="ipsec-esp")
    assert after["id"] == session["id"] and after["c2s"]["packets"] == after["s2c"]["packets"] == 25
    assert after["ipsec"]["spis_in_kernel"] == 2 and fwd.counters()["pkt_unseen"] == 0


def test_a_damaged_state_file_is_set_aside_and_nothing_else_suffers(transit):
    fwd = transit.start_fwd()
    transit.initiate("sites-v4")
    assert transit.ping("sites-v4") == 3
    fwd.kill()
    for name in ("state", "state-wal"):  # of which either could heal the other
        transit.hosts["fwd"].path(f"/run/fwd/{name}").write_bytes(os.urandom(5000))
    fwd = transit.start_fwd()
    assert "/run/fwd/state is not used, sessions begin anew" in fwd.log and "Traceback" not in fwd.log
    assert transit.hosts["fwd"].path("/run/fwd/state.set-aside").exists()
    assert transit.ping("sites-v4") == 3
    (session,) = fwd.sessions(application="ipsec-esp")
    assert session["c2s"]["packets"] == 3 and session["ipsec"]["spis_in_kernel"] == 2


def test_flushed_rules_come_back(transit):
    fwd = transit.start_fwd()
    transit.initiate("sites-v4")
    assert transit.ping("sites-v4") == 3
    transit.hosts["fwd"].run(["nft", "flush", "ruleset"])
    wait_for(lambda: "somebody removed the rules of fwd" in fwd.log, "fwd notices")
    assert transit.ping("sites-v4") == 3
    (session,) = fwd.sessions(application="ipsec-esp")
    assert session["ipsec"]["spis_in_kernel"] == 2 and session["c2s"]["packets"] >= 4
    assert fwd.counters()["rules_restored"] == 1 and "Traceback" not in fwd.log


def test_a_watched_rule_sees_every_packet(transit):
    fwd = transit.start_fwd(default_config().replace("[[rules]]", '[[rules]]\ninspect = "every-packet"', 1))
    transit.initiate("sites-v4")
    assert transit.ping("sites-v4", count=10) == 10
    (session,) = fwd.sessions(application="ipsec-esp")
    assert session["c2s"]["packets"] == 10 and session["ipsec"]["spis_in_kernel"] == 0
    assert fwd.counters()["pkt_fast_path"] == 0
