"""fwd beside the rules of others: what they drop is dropped, what fwd counts stays whole."""

from pathlib import Path

import pytest

from tests.vm.site import (
    counters,
    flows_on,
    has_rules,
    kernel_packets,
    packets,
    received,
    sh,
    succeeds,
    unit,
    wait_for,
)

RULESET = """
table inet filter {
  chain input {
    type filter hook input priority filter; policy drop;
    iif lo accept
    meta l4proto esp counter
    udp dport { 500, 4500 } accept
    ESP accept
    meta ipsec exists accept
    meta l4proto { icmp, ipv6-icmp } accept
  }
  chain output {
    type filter hook output priority filter; policy accept;
    meta l4proto esp counter
  }
}
"""

#: How a user lets ESP in: by itself, or as answers to what went out.
LETS_ESP_IN = {"without conntrack": "meta l4proto esp", "with conntrack": "ct state established,related"}


@pytest.fixture(params=LETS_ESP_IN)
def ruleset(request, tmp_path):
    """A user's own ruleset that drops all it does not know."""
    path = tmp_path / "user.nft"
    path.write_text(RULESET.replace("ESP", LETS_ESP_IN[request.param]))
    yield path
    sh("nft delete table inet filter")


def counts_agree(site, count):
    """What comes now; what a user's rule dropped behind fwd before, fwd has counted and the kernel's ESP has not."""
    before = wait_for(site.session, "the tunnel has its session")
    kernel_before = kernel_packets(before)
    assert received(site.ping(count)) == count
    after = site.session()
    assert packets(after, before) == kernel_packets(after, kernel_before) == [count, count]


def is_tracked():
    """Whether conntrack knows of the tunnel's ESP."""
    return "192.0.2.2" in sh("conntrack -L 2>/dev/null | awk '$2 == 50'")


def test_beside_a_users_own_rules(service, ruleset):
    service.up()
    sh(f"nft -f {ruleset}", check=True)
    assert received(service.ping(3)) == 3
    counts_agree(service, 50)
    assert is_tracked() is ("ct state" in ruleset.read_text())
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
        sh("firewall-cmd --permanent --add-service=ipsec && firewall-cmd --reload", check=True)
        assert "ipsec" in sh("firewall-cmd --list-services")
        counts_agree(service, 50)
        sh("systemctl restart firewalld", check=True)
        assert has_rules()
        counts_agree(service, 50)
        assert unit("fwd", "NRestarts") == "0"
    finally:
        sh("firewall-cmd --permanent --remove-service=ipsec; systemctl stop firewalld")


def test_a_reload_of_nftables_service_flushes_fwds_rules_and_they_come_back(service):
    """Debian's /etc/nftables.conf begins with `flush ruleset`."""
    service.up()
    assert received(service.ping(3)) == 3
    conf, restored = Path("/etc/nftables.conf"), counters()["rules_restored"]
    before = conf.read_text()
    assert "flush ruleset" in before
    conf.write_text("flush ruleset\n" + RULESET.replace("ESP", LETS_ESP_IN["without conntrack"]))
    try:
        traffic = service.ping(400, 0.05)
        sh("systemctl restart nftables", check=True)
        flows_on(traffic)
        wait_for(lambda: counters()["rules_restored"] > restored and has_rules(), "fwd's rules are there again", 30)
        flows_on(traffic)
        assert received(traffic) == 400
        assert succeeds("nft list table inet filter")
        counts_agree(service, 50)
    finally:
        conf.write_text(before)
        sh("nft delete table inet filter")  # a stop of the unit would flush all again
