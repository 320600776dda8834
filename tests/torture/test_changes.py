"""What changes under traffic: the configuration, and interfaces. No session is lost by it, and no packet uncounted."""

import pytest

from lab.lab import default_config, wait_for
from tests.namespaces.conftest import assert_balanced
from tests.torture.conftest import in_full

ROUNDS = in_full(20, 2)

DENY = """
[[rules]]
name = "no-v6"
source = ["2001:db8:a::/64"]
action = "deny"
"""


def by_family(fwd):
    """The session of each tunnel in transit, by its IP version."""
    sessions = fwd.sessions(application="ipsec-esp")
    return {6 if ":" in session["c2s"]["source"] else 4: session for session in sessions}


@pytest.mark.timeout(in_full(900, 300))
def test_rules_zones_and_timeouts_change_under_traffic_and_no_session_is_lost(transit):
    plain = default_config()
    fwd = transit.start_fwd(plain)
    transit.initiate()
    for tunnel in transit.topology.tunnels:
        assert transit.ping(tunnel.name) == 3
    first = by_family(fwd)
    pings = [transit.start_ping(t.name, count=6000 * ROUNDS, interval_s=0.01) for t in transit.topology.tunnels]
    path = transit.hosts["fwd"].path("/run/fwd.toml")
    for _ in range(ROUNDS):
        path.write_text(plain + "[timeouts]\nipsec-esp = 1800\n")
        assert "meet them anew" in fwd.fwctl("reload").stdout
        wait_for(lambda: {s["timeout_s"] for s in by_family(fwd).values()} == {1800}, "the timeouts are followed")

        path.write_text(plain.replace('action = "allow"', 'action = "perhaps"'))
        refused = fwd.fwctl("reload", check=False)
        assert refused.returncode == 1 and "nothing was changed" in refused.stderr
        assert ", action: found 'perhaps'" in refused.stderr
        assert {s["timeout_s"] for s in by_family(fwd).values()} == {1800}

        path.write_text(plain.replace("\ntrust =", "\ninside ="))
        fwd.fwctl("reload")
        wait_for(lambda: {s["c2s"]["source_zone"] for s in by_family(fwd).values()} == {"inside"}, "zones follow")

        path.write_text(DENY + plain)
        fwd.fwctl("reload")
        wait_for(lambda: by_family(fwd)[6]["state"] == "DISCARD", "what is denied now is discarded")
        assert by_family(fwd)[6]["rule"] == "no-v6" and by_family(fwd)[4]["state"] == "ACTIVE"

        path.write_text(plain)
        fwd.fwctl("reload")
        wait_for(lambda: 6 in (now := by_family(fwd)) and now[6]["state"] == "ACTIVE", "it may pass again")
        assert by_family(fwd)[4]["id"] == first[4]["id"]
        assert by_family(fwd)[4]["start_time"] == pytest.approx(first[4]["start_time"], abs=0.01)
    for ping in pings:
        ping.end()
    assert_balanced(transit, fwd)
    assert "Traceback" not in fwd.log


REBUILD = """
ip link del to-b
ip link add to-b type veth peer name wan
ip link set wan netns site-b
ip address add 203.0.113.1/24 dev to-b
ip address add 2001:db8:b::1/64 dev to-b
ip link set to-b up
"""


@pytest.mark.timeout(300)
def test_an_interface_that_vanishes_and_comes_back_is_followed(transit):
    fwd = transit.start_fwd()
    transit.initiate("sites-v4")
    assert transit.ping("sites-v4", count=10) == 10
    (before,) = fwd.sessions(application="ipsec-esp")
    site, host = transit.hosts["site-b"], transit.hosts["fwd"]
    host.run(["sh", "-ec", REBUILD])
    for words in ("address add 203.0.113.2/24 dev wan", "link set wan up", "route add default via 203.0.113.1"):
        site.run(["ip", *words.split()])
    wait_for(lambda: transit.ping("sites-v4", count=3) == 3, "the tunnel flows again")
    (after,) = fwd.sessions(application="ipsec-esp")
    assert after["id"] == before["id"] and after["c2s"]["packets"] >= before["c2s"]["packets"] + 3
    assert (after["ingress_interface"], after["egress_interface"]) == ("to-a", "to-b")
    assert after["c2s"]["destination_zone"] == before["c2s"]["destination_zone"]
    assert after["ipsec"]["spis_in_kernel"] >= 2
    assert_balanced(transit, fwd)


@pytest.mark.timeout(300)
def test_an_address_that_moves_to_another_interface_is_followed(terminated):
    """The announced session of a tunnel shows the interface that has its local address."""
    fwd = terminated.start_fwd(default_config().replace("[zones]", '[zones]\ndmz = ["spare*"]'))
    terminated.initiate("peer-v4")
    (before,) = wait_for(lambda: fwd.sessions(application="ipsec-udp"), "the tunnel has its session")
    assert before["state"] == "OPENING"
    host = terminated.hosts["fwd"]
    script = "ip link add spare0 type veth peer name spare1; ip link set spare0 up; ip link set spare1 up;"
    host.run(["sh", "-ec", script + "ip address add 192.0.2.1/32 dev spare0"])
    wait_for(lambda: fwd.sessions(application="ipsec-udp")[0]["ingress_interface"] == "spare0", "it follows")
    (after,) = fwd.sessions(application="ipsec-udp")
    assert after["id"] == before["id"] and after["c2s"]["source_zone"] == "dmz"
