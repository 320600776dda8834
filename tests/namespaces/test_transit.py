"""ESP that only passes: what nobody in the middle can know, and what must be exact all the same."""

import struct

import pytest

from lab.lab import default_config, wait_for
from tests.namespaces.conftest import accounted, assert_balanced

DENY_TRANSIT = (
    default_config()
    + """
[timeouts]
discard = 12
"""
).replace(
    "[[rules]]",
    '[[rules]]\nname = "no-esp-out"\nfrom = ["trust"]\nto = ["untrust"]\napplication = ["ipsec-esp"]\n'
    'action = "deny"\n\n[[rules]]',
)


@pytest.mark.parametrize(
    ("tunnel", "left", "right"),
    [("sites-v4", "198.51.100.2", "203.0.113.2"), ("sites-v6", "2001:db8:a::2", "2001:db8:b::2")],
)
def test_one_session_for_both_directions_equal_to_tcpdump_to_the_byte(transit, tunnel, left, right):
    fwd = transit.start_fwd()
    transit.initiate(tunnel)
    with transit.hosts["fwd"].capture("to-a") as near, transit.hosts["fwd"].capture("to-b") as far:
        assert transit.ping(tunnel, count=20) == 20
        assert transit.ping(tunnel, count=5, size=1200) == 5
    (session,) = fwd.sessions(application="ipsec-esp")
    assert (session["c2s"]["sport"], session["c2s"]["dport"]) == (20033, 20033)
    assert (session["c2s"]["source"], session["c2s"]["destination"]) == (left, right)
    assert (session["c2s"]["source_zone"], session["c2s"]["destination_zone"]) == ("trust", "untrust")
    assert (session["ingress_interface"], session["egress_interface"]) == ("to-a", "to-b")
    assert not session["terminated_on_host"] and session["state"] == "ACTIVE"
    for flow, ends in (("c2s", (left, right)), ("s2c", (right, left))):
        assert (session[flow]["packets"], session[flow]["bytes"]) == near.total(*ends) == far.total(*ends)
        assert session[flow]["packets"] == 25
    sa = transit.charon("site-a").installed(tunnel)
    assert session["ipsec"]["spis_seen"] == {"c2s": [sa.spi_out], "s2c": [sa.spi_in]}
    ike = fwd.sessions(application="ike", source=left)
    assert len(ike) == 1 and ike[0]["c2s"]["dport"] == 500
    assert_balanced(transit, fwd)


def test_a_rekey_stays_in_the_session(transit):
    fwd = transit.start_fwd()
    transit.initiate("sites-v4")
    transit.ping("sites-v4")
    transit.charon("site-a").rekey("sites-v4")
    transit.ping("sites-v4")
    (session,) = fwd.sessions(application="ipsec-esp")
    assert session["c2s"]["packets"] == 6 and len(session["ipsec"]["spis_seen"]["c2s"]) == 2


def test_a_fragmented_esp_packet_is_counted_whole(transit):
    """Later fragments have no SPI; they belong to the session of their addresses all the same."""
    fwd = transit.start_fwd()
    script = (
        "from scapy.all import IP, Raw, fragment, send\n"
        "import struct\n"
        "whole = IP(src='198.51.100.2', dst='203.0.113.2', proto=50) / Raw(struct.pack('!II', 77, 1) + bytes(2000))\n"
        "send(fragment(whole, 600), verbose=False)\n"
    )
    import sys

    with transit.hosts["fwd"].capture("to-b", "ip proto 50") as capture:
        transit.hosts["site-a"].run([sys.executable, "-c", script], timeout=60)
        wait_for(lambda: accounted(fwd) == 4, "the fragments are there")
    (session,) = fwd.sessions(application="ipsec-esp")
    assert capture.total("198.51.100.2", "203.0.113.2") == (session["c2s"]["packets"], session["c2s"]["bytes"])
    assert session["c2s"]["packets"] == 4 and session["ipsec"]["spis_seen"]["c2s"] == [77]


def test_a_deny_rule_drops_discards_and_frees(transit):
    fwd = transit.start_fwd(DENY_TRANSIT)
    transit.initiate("sites-v4")
    with transit.hosts["site-b"].capture("wan") as arrived:
        assert transit.ping("sites-v4", count=3) == 0
    assert arrived.packets == []
    (session,) = fwd.sessions(state="discard")
    assert (session["rule"], session["end_reason"], session["timeout_s"]) == ("no-esp-out", "policy-deny", 12)
    assert session["c2s"]["packets"] == 3
    wait_for(lambda: not fwd.sessions(state="discard"), "the session is freed")
    assert fwd.json("show", "session", "id", str(session["id"]))["state"] == "INIT"
    assert_balanced(transit, fwd)


def test_clear_session_says_what_it_did(transit):
    fwd = transit.start_fwd()
    transit.initiate()
    transit.ping("sites-v4")
    transit.ping("sites-v6")
    first, _ = fwd.sessions(application="ipsec-esp")
    assert fwd.fwctl("clear", "session", "id", str(first["id"])).stdout == f"session {first['id']} cleared\n"
    assert fwd.json("show", "session", "id", str(first["id"]))["end_reason"] == "cleared"
    again = fwd.fwctl("clear", "session", "id", str(first["id"]), check=False)
    assert again.returncode == 1 and "no session" in again.stderr
    assert fwd.fwctl("clear", "session", "all", "filter", "application", "ipsec-esp").stdout == "1 session cleared\n"
    assert fwd.fwctl("show", "session", "all", "filter", "application", "ipsec-esp").stdout == "No Active Sessions\n"
    assert transit.ping("sites-v4") == 3


def test_a_reload_is_whole_or_not_at_all(transit):
    fwd = transit.start_fwd()
    transit.initiate("sites-v4")
    fwd.reload(default_config().replace('action = "allow"', 'action = "perhaps"'))
    assert "rules #1 'any-any', action: found 'perhaps'; want 'allow' or 'deny'" in fwd.log
    fwd.reload(default_config() + "[dataplane]\nqueue = 21\n")
    assert "dataplane.queue: only a restart changes this" in fwd.log
    assert transit.ping("sites-v4") == 3
    fwd.fwctl("clear", "session", "all")
    fwd.reload(DENY_TRANSIT)
    assert transit.ping("sites-v4", count=2) == 0


@pytest.mark.parametrize("fail", ["open", "closed"])
def test_without_a_reader_packets_pass_or_not_as_configured(transit, fail):
    fwd = transit.start_fwd(default_config() + f'[dataplane]\nfail = "{fail}"\n')
    transit.initiate()
    assert transit.ping("sites-v4", count=2) == 2
    fwd.kill()
    assert transit.ping("sites-v4", count=2) == 2  # what was decided stays decided
    assert transit.ping("sites-v6", count=2) == (2 if fail == "open" else 0)


def test_fail_mode_changes_with_a_reload(transit):
    fwd = transit.start_fwd()
    transit.initiate("sites-v4")
    assert transit.ping("sites-v4", count=2) == 2
    fwd.reload(default_config() + '[dataplane]\nfail = "closed"\n')
    assert transit.ping("sites-v4", count=2) == 2
    assert fwd.sessions(application="ipsec-esp")[0]["c2s"]["packets"] == 4
    transit.charon("site-a").rekey("sites-v4")
    fwd.kill()
    assert transit.ping("sites-v4", count=2) == 0


def test_garbage_that_claims_to_be_esp_or_ike_is_dropped_and_counted(transit):
    import sys

    fwd = transit.start_fwd()
    cases = [struct.pack("!II", 0, 1) + bytes(8), b"short"]
    script = (
        "from scapy.all import IP, UDP, Raw, send\n"
        f"for body in {cases!r}:\n"
        "    send(IP(src='198.51.100.2', dst='203.0.113.2', proto=50) / Raw(body), verbose=False)\n"
        "send(IP(src='198.51.100.2', dst='203.0.113.2') / UDP(sport=4500, dport=4500) / Raw(b'xy'), verbose=False)\n"
    )
    transit.hosts["site-a"].run([sys.executable, "-c", script], timeout=60)
    wait_for(lambda: fwd.counters()["pkt_recv"] == 3, "they are handled")
    counters = fwd.counters()
    assert (counters["flow_parse_esp"], counters["flow_parse_truncated"], counters["flow_parse_udp"]) == (1, 1, 1)
    assert not fwd.sessions()
    assert_balanced(transit, fwd)
