"""fwd beside the rules of others: what they drop is dropped, what fwd counts stays whole."""

import pytest

from tests.vm.site import received, sh, succeeds, unit, wait_for, xfrm_packets

RULESET = """
table inet filter {
  chain input {
    type filter hook input priority filter; policy drop;
    iif lo accept
    meta l4proto esp counter
    CONNTRACK
    udp dport { 500, 4500 } accept
    meta l4proto esp accept
    meta ipsec exists accept
    meta l4proto { icmp, ipv6-icmp } accept
  }
  chain output {
    type filter hook output priority filter; policy accept;
    meta l4proto esp counter
  }
}
"""


@pytest.fixture(params=["with conntrack", "without conntrack"])
def ruleset(request, tmp_path):
    """A user's own ruleset that drops all it does not know."""
    path = tmp_path / "user.nft"
    line = "ct state established,related accept" if request.param == "with conntrack" else ""
    path.write_text(RULESET.replace("CONNTRACK", line))
    yield path
    sh("nft delete table inet filter")


def counts_agree(site, count):
    """What comes now; what a user's rule dropped behind fwd before, fwd has counted and the kernel's ESP has not."""
    before, kernel_before = wait_for(site.session, "the tunnel has its session"), xfrm_packets()
    assert received(site.ping(count)) == count
    after, kernel = site.session(), xfrm_packets()
    for flow, spi in (("c2s", after["c2s"]["dport"]), ("s2c", after["c2s"]["sport"])):
        assert after[flow]["packets"] - before[flow]["packets"] == kernel[spi] - kernel_before[spi] == count


def test_beside_a_users_own_rules(service, ruleset):
    service.up()
    sh(f"nft -f {ruleset}", check=True)
    assert received(service.ping(3)) == 3
    counts_agree(service, 50)
    listed = sh("nft list table inet filter")
    assert "counter packets 0 " not in listed, listed  # fwd's accept is not the last word: its chains come before


def test_what_a_user_drops_stays_dropped(service, ruleset):
    service.up()
    assert received(service.ping(3)) == 3
    sh(f"nft -f {ruleset}", check=True)
    sh("nft insert rule inet filter input meta l4proto esp drop", check=True)
    assert received(service.ping(3, 0.2)) == 0


def test_beside_firewalld(service):
    service.up()
    assert received(service.ping(3)) == 3
    sh("systemctl start firewalld", check=True)
    try:
        assert received(service.ping(3, 0.2)) == 3  # the zone `public` lets ICMP in; ESP is the tunnel's own
        said = sh("firewall-cmd --add-service=ipsec && firewall-cmd --reload")
        assert "success" in said, said
        wait_for(lambda: succeeds("nft list tables | grep -q fwd_dataplane"), "fwd's rules are there")
        counts_agree(service, 50)
        sh("systemctl restart firewalld", check=True)
        sh("firewall-cmd --add-service=ipsec", check=True)
        counts_agree(service, 50)
        assert unit("fwd", "NRestarts") == "0"
    finally:
        sh("systemctl stop firewalld")
