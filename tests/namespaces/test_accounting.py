"""One minute of everything at once; at its end the books have to balance to the packet."""

import sys
import time
from contextlib import suppress

import pytest

from fwd.cli.client import Client
from fwd.rpc import RpcError
from lab.lab import default_config, wait_for
from tests.namespaces.conftest import assert_balanced, has_rules, witnessed

DENY_V6 = """\
[[rules]]
name = "no-v6-transit"
source = ["2001:db8:a::/64"]
application = ["ipsec-esp"]
action = "deny"
"""
REST = """
[dataplane]
unknown-spi = "discard"
unknown-spi-grace = 2
[timeouts]
ike = 5
discard = 7
"""
CONFIG = default_config().replace("[[rules]]", DENY_V6 + "\n[[rules]]", 1) + REST

#: ESP of unknown SPIs to this host and through it, of absurd form, and IKE-like UDP: 600 packets in 45 s.
NOISE = """
import struct, time
from scapy.all import IP, UDP, Raw, conf
socket = conf.L3socket()
here = IP(src='198.51.100.2', dst='198.51.100.1', proto=50)
beyond = IP(src='198.51.100.2', dst='203.0.113.2', proto=50)
nat_t = IP(src='198.51.100.2', dst='203.0.113.2') / UDP(sport=4500, dport=4500)
for n in range(200):
    socket.send(here / Raw(struct.pack('!II', 4000 + n % 40, n) + bytes(n)))
    socket.send(beyond / Raw(struct.pack('!II', 0 if n % 5 == 0 else n, n)))
    socket.send(nat_t / Raw(bytes([n % 256]) * (n % 20)))
    time.sleep(0.22)
"""


@pytest.mark.timeout(600)
def test_after_a_minute_of_mixed_traffic_every_packet_is_accounted_for(demo):
    host = demo.hosts["fwd"]
    fwd = demo.start_fwd(CONFIG)
    started = time.monotonic()
    demo.initiate()
    pings = [demo.start_ping(tunnel.name, count=900, interval_s=0.05) for tunnel in demo.topology.tunnels]
    noise = demo.hosts["site-a"].start([sys.executable, "-c", NOISE])
    wait_for(lambda: len(fwd.sessions(application="ipsec-udp")) == 2, "both tunnels are up")
    for round_ in range(5):
        time.sleep(5)
        demo.charon(("fwd", "peer")[round_ % 2]).rekey("peer-v4")
        demo.charon("site-a").rekey("sites-v4")
        fwd.fwctl("clear", "session", "all", "filter", "application", ("ipsec-esp", "ipsec-udp")[round_ % 2])
    demo.charon("peer").terminate("peer-v4")
    time.sleep(3)
    demo.initiate("peer-v4")
    assert noise.wait(90) == 0
    for ping in pings:
        ping.wait(90)
    time.sleep(max(0.0, 60 - (time.monotonic() - started)))

    wait_for(
        lambda: assert_balanced(demo, fwd) == fwd.counters()["pkt_recv"] == witnessed(demo),
        "all that came is what fwd received",
    )
    counters = fwd.counters()
    print({name: value for name, value in counters.items() if value})
    assert counters["pkt_recv"] > 4000
    assert counters["flow_parse_esp"] == 40 and counters["flow_parse_udp"] > 0
    assert counters["flow_policy_deny"] > 0 and counters["sa_rekeyed"] >= 5
    assert counters["queue_kernel_drop"] == counters["queue_socket_drop"] == counters["flow_internal_error"] == 0

    # And once more, from the sessions themselves: live ones, and those that ended and are still readable.
    client = Client(str(host.path("/run/fwd/control.sock")))

    def in_sessions():
        return sum(packets_of(session_id) for session_id in range(1, fwd.counters()["session_allocated"] + 1))

    def packets_of(session_id):
        with suppress(RpcError):  # absorbed by another one
            session = client.call("session.get", id=session_id)
            return session["c2s"]["packets"] + session["s2c"]["packets"]
        return 0

    wait_for(lambda: in_sessions() == fwd.counters()["pkt_session"], "the sessions have all packets")
    client.close()
    assert fwd.stop() == 0
    assert not has_rules(demo)
