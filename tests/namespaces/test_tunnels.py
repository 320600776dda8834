"""What fwd tells of tunnels beyond PAN-OS's fields, against real strongSwan and tcpdump on the same wire."""

import json
import re
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from lab.lab import PROGRAMS, default_config, wait_for
from lab.ping import outcome
from tests.namespaces.conftest import accounted, assert_balanced

HERE, PEER = "192.0.2.1", "192.0.2.2"
EVERY_PACKET = default_config().replace('action = "allow"', 'action = "allow"\ninspect = "every-packet"')


def tunnel(fwd, name="peer-v4"):
    """What `show tunnel detail` says of one tunnel."""
    (found,) = wait_for(lambda: fwd.json("show", "tunnel", "detail", name)["tunnels"], "fwd knows the tunnel")
    return found


def announced(fwd, name="peer-v4"):
    def there():
        return [t for t in fwd.json("show", "tunnel", "detail")["tunnels"] if t["child_sa"] == name]

    return wait_for(there, "fwd knows the tunnel")[0]["session"]


def shown(fwd, session_id):
    return fwd.json("show", "session", "id", str(session_id))


def counted(generations):
    """Packets and bytes of each SPI, in and out."""
    ways = {}
    for way in ("in", "out"):
        uses = [pair[way] for pair in generations if pair[way]]
        ways[way] = {use["spi"]: (use["packets"], use["bytes"]) for use in uses}
    return ways


@pytest.mark.alone
def test_each_generation_carries_what_tcpdump_saw_of_its_spis(terminated):
    fwd = terminated.start_fwd()
    terminated.initiate("peer-v4")
    session_id = announced(fwd)
    pairs = [terminated.charon("fwd").installed("peer-v4")]
    with terminated.hosts["fwd"].capture("to-peer") as capture:
        traffic = terminated.start_ping("peer-v4", count=200, interval_s=0.02)
        for side in ("fwd", "peer"):
            time.sleep(1)
            terminated.charon(side).rekey("peer-v4")
            pairs.append(terminated.charon("fwd").installed("peer-v4"))
        assert traffic.wait(30) == 0
    generations = wait_for(
        lambda: (found := tunnel(fwd)["generations"]) and all(p["end"] for p in found[:-1]) and found,
        "fwd knows that the old SAs are gone",
    )
    assert [(p["spi_in"], p["spi_out"]) for p in generations] == [(sa.spi_in, sa.spi_out) for sa in pairs]
    assert [p["end"] for p in generations] == ["rekeyed", "rekeyed", None]
    ways = counted(generations)
    assert ways == {"in": capture.by_spi(PEER, HERE), "out": capture.by_spi(HERE, PEER)}
    assert sum(packets for packets, _ in ways["in"].values()) == 200
    for old, new in pairwise(generations):
        assert old["installed"] < new["installed"] and old["in"]["first_seen"] < new["in"]["first_seen"]
        assert old["removed"] > new["installed"]  # make before break
    answered = [packet.at for packet in capture.packets if packet.source == HERE]
    stalled = max(later - earlier for earlier, later in pairwise(answered))  # 0.02 s, or the machine stood still
    for way, source in (("in", PEER), ("out", HERE)):
        times = {}  # of each SPI on the wire: first and last
        for packet in capture.packets:
            if packet.source == source:
                spi = int.from_bytes(packet.octets[20:24])
                times[spi] = (times.get(spi, (packet.at,))[0], packet.at)
        for old, new in pairwise(generations):
            overlap = times[old[way]["spi"]][1] - times[new[way]["spi"]][0]
            assert abs(new["overlap_s"][way] - max(0, overlap)) < 0.3 + stalled
            assert abs(new[way]["first_seen"] - times[new[way]["spi"]][0]) < 0.1 + stalled
            assert abs(old[way]["last_seen"] - times[old[way]["spi"]][1]) < 0.3 + stalled
    assert tunnel(fwd)["session"] == session_id and tunnel(fwd)["rekeys"] == 2
    text = fwd.fwctl("show", "session", "id", str(session_id)).stdout
    assert all(f"{sa.spi_in} (0x{sa.spi_in:08x})" in text for sa in pairs) and "rekeyed" in text


def test_when_both_sides_rekey_at_once_there_is_one_session_still(terminated):
    fwd = terminated.start_fwd()
    terminated.initiate("peer-v4")
    session_id = announced(fwd)
    traffic = terminated.start_ping("peer-v4", count=150, interval_s=0.02)
    for _ in range(3):
        rekeys = []
        for side in ("fwd", "peer"):
            with terminated.charon(side).session() as vici:
                rekeys.append(vici.rekey({"child": "peer-v4"}))
        time.sleep(0.7)
    assert traffic.wait(30) == 0

    def settled():
        mine = {(sa.spi_in, sa.spi_out) for sa in terminated.charon("fwd").list_sas() if sa.state == "INSTALLED"}
        known = {(p["spi_in"], p["spi_out"]) for p in tunnel(fwd)["generations"] if p["end"] is None}
        return known == mine

    wait_for(settled, "fwd and charon know the same SAs", 40)
    found = tunnel(fwd)
    assert found["session"] == session_id and len(fwd.sessions(application="ipsec-udp")) == 1
    assert shown(fwd, session_id)["c2s"]["packets"] == 150
    assert_balanced(terminated, fwd)


@pytest.mark.parametrize("initiator", ["fwd", "peer"])
def test_a_new_ike_sa_changes_nothing_but_reauthentication_makes_a_generation(terminated, initiator):
    fwd = terminated.start_fwd()
    terminated.initiate("peer-v4")
    session_id = announced(fwd)
    terminated.ping("peer-v4")
    before = tunnel(fwd)["generations"]
    terminated.charon(initiator).rekey_ike("peer-v4")
    time.sleep(1)
    terminated.ping("peer-v4")
    after = tunnel(fwd)
    assert [p["spi_in"] for p in after["generations"]] == [p["spi_in"] for p in before]
    assert after["session"] == session_id

    terminated.charon("peer").reauthenticate("peer-v4")  # what charon does is break before make
    sa = terminated.charon("fwd").installed("peer-v4")
    wait_for(lambda: tunnel(fwd)["generations"][-1]["spi_in"] == sa.spi_in, "fwd knows the new SA")
    assert terminated.ping("peer-v4") == 3
    assert tunnel(fwd)["session"] == session_id and shown(fwd, session_id)["state"] == "ACTIVE"
    time.sleep(6)  # the old SPIs linger no more
    assert terminated.ping("peer-v4") == 3
    session = shown(fwd, session_id)
    assert (session["state"], session["c2s"]["packets"]) == ("ACTIVE", 12)
    assert fwd.counters()["session_ended"] == 0 or not fwd.sessions(application="ipsec-esp")


def test_a_peer_that_moves_keeps_its_session(terminated):
    fwd = terminated.start_fwd()
    peer, here = terminated.charon("peer"), terminated.charon("fwd")
    peer.configure("peer-v4", mobike="yes", local_addrs=["192.0.2.2", "192.0.2.3"])
    here.configure("peer-v4", mobike="yes", remote_addrs=["192.0.2.2", "192.0.2.3"])
    terminated.initiate("peer-v4")
    session_id = announced(fwd)
    assert terminated.ping("peer-v4") == 3
    spi = here.installed("peer-v4").spi_in
    terminated.hosts["peer"].run(["ip", "address", "add", "192.0.2.3/24", "dev", "wan"])
    terminated.hosts["peer"].run(["ip", "address", "del", "192.0.2.2/24", "dev", "wan"])
    # Where the kernel does ESP, its SA moves; kernel-libipsec cannot do that, and charon rekeys it.
    wait_for(lambda: tunnel(fwd)["remote"] in ("192.0.2.3", "2001:db8:c::2"), "fwd follows the peer", 20)
    wait_for(lambda: terminated.ping("peer-v4", count=1) == 1, "traffic flows again")
    found = wait_for(  # both sides may rekey at once: the one that is left need not be the last that came up
        lambda: (t := tunnel(fwd)) and [p["end"] for p in t["generations"]].count(None) == 1 and t,
        "the old SA is gone",
        40,
    )
    first = found["generations"][0]
    assert found["session"] == session_id and first["spi_in"] == spi
    assert first["moves"] == 1 or first["end"] == "rekeyed"
    assert first["in"]["packets"] == 3 or first["moves"]
    session = shown(fwd, session_id)
    newest = here.installed("peer-v4")
    assert session["c2s"]["source"] == found["remote"] and session["c2s"]["dport"] == newest.spi_in
    assert sum(p["in"]["packets"] for p in found["generations"] if p["in"]) == session["c2s"]["packets"]
    assert_balanced(terminated, fwd)


# --- sequence numbers ------------------------------------------------------------------------------------------

#: Drops one ESP packet of ten on the way out of the sender, and counts them: an independent figure.
LOSSY = """
table ip lossy {
  chain out {
    type filter hook output priority 300
    ip protocol esp numgen inc mod 10 == 3 counter drop
  }
}
"""


def dropped(host):
    listed = host.run(["nft", "list", "table", "ip", "lossy"]).stdout
    return int(re.search(r"counter packets (\d+)", listed)[1])


@pytest.mark.parametrize("config", [None, EVERY_PACKET])
def test_packets_that_are_lost_before_here_are_counted(terminated, config):
    fwd = terminated.start_fwd(config)
    peer = terminated.hosts["peer"]
    peer.path("/run/lossy.nft").write_text(LOSSY)
    terminated.initiate("peer-v4")
    announced(fwd)
    peer.run(["nft", "-f", "/run/lossy.nft"])
    with terminated.hosts["fwd"].capture("to-peer") as capture:
        terminated.ping("peer-v4", count=1200, interval_s=0.02)  # 24 s: at least two looks
        time.sleep(2)
        terminated.ping("peer-v4", count=20, interval_s=0.02)
    lost = dropped(peer)
    (pair,) = tunnel(fwd)["generations"]
    numbers = pair["in"]["sequence"]
    seen = [int.from_bytes(p.octets[24:28]) for p in capture.packets if p.source == PEER]
    missing = set(range(1, numbers["highest"] + 1)) - set(seen)
    assert lost > 60 and numbers["lost"] == len(missing)  # by tcpdump, as of the last packet that was looked at
    assert numbers["highest"] == max(seen) or config is None
    assert (numbers["late"], numbers["duplicates"], numbers["resets"]) == (0, 0, 0)
    assert (numbers["looked_at"] < numbers["of"]) == (config is None)
    assert any(f["trouble"] == "loss" for f in tunnel(fwd)["findings"])
    assert fwd.counters()["tunnel_loss"] == 1 and "packets were lost before they came here" in fwd.log


def send_esp(lab, fwd, host, source, destination, numbers, spi=0x77, pause_s=0.0):
    """Send raw ESP with these sequence numbers; returns when fwd has counted it."""
    before = accounted(fwd)
    script = (
        "import socket, struct, time\n"
        "raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, 50)\n"
        f"raw.bind(('{source}', 0)); raw.connect(('{destination}', 0))\n"
        f"for n in {[*numbers]!r}:\n"
        f"    raw.send(struct.pack('!II', {spi}, n) + bytes(40)); time.sleep({pause_s})\n"
    )
    lab.hosts[host].run([sys.executable, "-c", script])
    wait_for(lambda: accounted(fwd) >= before + len(numbers), "fwd has counted what was sent")


def test_late_doubled_and_restarted_numbers_have_their_names(transit):
    fwd = transit.start_fwd(EVERY_PACKET)
    ends = ("198.51.100.2", "203.0.113.2")
    send_esp(transit, fwd, "site-a", *ends, [1, 2, 3, 6, 4, 7, 7, 8, 9, *range(500, 700), 1, 2, 3])
    (session,) = fwd.sessions(application="ipsec-esp")
    (use,) = shown(fwd, session["id"])["ipsec"]["spis"]["c2s"]
    numbers = use["sequence"]
    assert (numbers["lost"], numbers["late"], numbers["depth"], numbers["duplicates"]) == (491, 1, 2, 1)
    assert (numbers["resets"], numbers["outliers"]) == (1, 1)


# --- in transit ----------------------------------------------------------------------------------------------------


def test_spis_in_transit_are_paired_with_their_proof_and_a_rekey_is_told_from_a_second_tunnel(transit):
    fwd = transit.start_fwd()
    ends = ("198.51.100.2", "203.0.113.2")
    transit.initiate("sites-v4")
    first = transit.charon("site-a").installed("sites-v4")
    with transit.hosts["fwd"].capture("to-a") as capture:
        # Each pair of SPIs is to have the wire to itself for ten seconds and some more.
        traffic = transit.start_ping("sites-v4", count=1000, interval_s=0.02)
        time.sleep(3)
        second = transit.rekey("sites-v4", "site-a")
        assert outcome(traffic) == (1000, 1000)
    (session,) = fwd.sessions(application="ipsec-esp")
    assert {session["c2s"]["sport"], session["c2s"]["dport"]} == {20033}
    spis = shown(fwd, session["id"])["ipsec"]["spis"]
    for way, pair, side in (("c2s", ends, "spi_out"), ("s2c", ends[::-1], "spi_in")):
        seen = {use["spi"]: (use["packets"], use["bytes"]) for use in spis[way]}
        assert seen == capture.by_spi(*pair)
        other = "spi_in" if side == "spi_out" else "spi_out"
        stories = [(u["spi"], u["relation"], u["before"], u["evidence"], u["partner"]) for u in spis[way]]
        assert stories == [
            (getattr(first, side), "first", None, "observed-unique", getattr(first, other)),
            (getattr(second, side), "takes-over", getattr(first, side), "observed-unique", getattr(second, other)),
        ]
    assert "takes over from" in fwd.fwctl("show", "session", "id", str(session["id"])).stdout

    # A second tunnel, while the first goes on: told as such when both have been seen side by side.
    traffic = transit.start_ping("sites-v4", count=3000, interval_s=0.02)
    send_esp(transit, fwd, "site-a", *ends, range(1, 601), spi=0x1234, pause_s=0.02)
    spis = shown(fwd, session["id"])["ipsec"]["spis"]
    (use,) = [use for use in spis["c2s"] if use["spi"] == 0x1234]
    assert use["relation"] == "beside" and use["evidence"] != "observed-unique"
    traffic.end()


def test_with_spi_ports_each_spi_has_a_session_until_a_pair_is_proven(transit):
    fwd = transit.start_fwd(default_config() + '[dataplane]\ntransit-ports = "spi"\n')
    transit.initiate("sites-v4")
    sa = transit.charon("site-a").installed("sites-v4")
    assert transit.ping("sites-v4") == 3
    found = fwd.sessions(application="ipsec-esp")
    ports = {(s["c2s"]["source"], s["c2s"]["sport"], s["c2s"]["dport"], s["s2c"]["packets"]) for s in found}
    assert ports == {("198.51.100.2", sa.spi_out, sa.spi_out, 0), ("203.0.113.2", sa.spi_in, sa.spi_in, 0)}
    transit.ping("sites-v4", count=600, interval_s=0.02)
    (session,) = wait_for(
        lambda: len(found := fwd.sessions(application="ipsec-esp")) == 1 and found, "the pair is proven"
    )
    assert session["id"] == min(s["id"] for s in found)
    assert (session["c2s"]["sport"], session["c2s"]["dport"]) == (sa.spi_in, sa.spi_out)
    assert session["c2s"]["packets"] == session["s2c"]["packets"] == 603
    assert transit.ping("sites-v4") == 3
    assert_balanced(transit, fwd)


# --- IKE beside ESP --------------------------------------------------------------------------------------------------


def test_ike_is_read_and_linked_with_its_esp(transit):
    fwd = transit.start_fwd()
    with transit.hosts["fwd"].capture("to-a", "udp port 500") as capture:
        transit.initiate("sites-v4")
        transit.ping("sites-v4")
    (ike,) = fwd.sessions(application="ike")
    (esp,) = fwd.sessions(application="ipsec-esp")
    for one, other in ((ike, esp), (esp, ike)):
        linked = [(beside["id"], beside["application"]) for beside in shown(fwd, one["id"])["linked"]]
        assert (other["id"], other["application"]) in linked
    (sa,) = shown(fwd, esp["id"])["ike"]
    first = capture.packets[0].octets[28:]
    answer = next(p for p in capture.packets if p.source == capture.packets[0].destination)  # a request may come twice
    assert sa["initiator_spi"] == first[:8].hex() and sa["version"] == "2.0" and sa["floated"] is None
    assert sa["responder_spi"] == answer.octets[36:44].hex()
    assert sa["messages"] == len(capture.packets) and sa["last_exchange"] == "IKE_AUTH" and sa["completed"]


def test_esp_passes_the_gate_only_after_ike_and_only_for_a_while(transit):
    config = default_config() + '[dataplane]\nipsec-pass-through = "ike-gated"\nike-gate-time = 6\n'
    ends = ("198.51.100.2", "203.0.113.2")
    fwd = transit.start_fwd(config)
    send_esp(transit, fwd, "site-a", *ends, range(1, 4))
    (gated,) = fwd.sessions(application="ipsec-esp")
    assert (gated["state"], gated["rule"], gated["c2s"]["packets"]) == ("DISCARD", "ike-gate", 3)
    assert "no IKE exchange" in fwd.fwctl("explain", "session", str(gated["id"])).stdout
    transit.initiate("sites-v4")
    assert transit.ping("sites-v4") == 3
    (allowed,) = fwd.sessions(application="ipsec-esp")
    assert (allowed["state"], allowed["rule"]) == ("ACTIVE", "any-any")
    wait_for(lambda: fwd.sessions(state="discard"), "the gate is closed again")
    assert transit.ping("sites-v4", count=2) == 0
    transit.charon("site-a").rekey("sites-v4")  # a CREATE_CHILD_SA exchange opens it again
    assert transit.ping("sites-v4") == 3
    assert_balanced(transit, fwd)


def test_behind_a_nat_ike_floats_and_the_whole_is_one_tunnel(nat):
    fwd = nat.start_fwd()
    with nat.hosts["fwd"].capture("to-a", "udp") as capture:
        nat.initiate()
        assert nat.ping("across") == nat.ping("here") == 3
    ike = {s["c2s"]["dport"]: s for s in fwd.sessions(application="ike", destination="203.0.113.2")}
    assert set(ike) == {500, 4500}
    (esp,) = fwd.sessions(application="ipsec-esp-udp")
    ports = (esp["c2s"]["sport"], esp["c2s"]["dport"])
    assert ports[1] == 4500 != ports[0] == ike[4500]["c2s"]["sport"]
    detail = shown(fwd, esp["id"])
    assert {other["id"] for other in detail["linked"]} == {ike[500]["id"], ike[4500]["id"]}
    (sa,) = detail["ike"]
    assert sa["floated"] and tuple(sa["ports"]) == ports and sa["completed"]
    esp_packets = [
        p
        for p in capture.packets
        if {p.source, p.destination} == {"198.51.100.2", "203.0.113.2"}
        and 4500 in (int.from_bytes(p.octets[20:22]), int.from_bytes(p.octets[22:24]))
        and p.octets[28:32] != bytes(4)
    ]
    assert esp["c2s"]["packets"] + esp["s2c"]["packets"] == len(esp_packets) == 6

    here = tunnel(fwd, "here")
    charon = nat.charon("fwd").installed("here")
    session = shown(fwd, here["session"])
    assert here["nat_t_ports"] and (session["c2s"]["sport"], session["c2s"]["dport"]) == (charon.spi_out, charon.spi_in)
    assert session["c2s"]["packets"] == 3 and session["c2s"]["protocol"] == 50
    assert_balanced(nat, fwd)


# --- control against data, explanations, events ----------------------------------------------------------------------


def test_what_strongswan_says_and_what_the_wire_says_are_held_against_each_other(terminated):
    fwd = terminated.start_fwd(default_config() + "[dataplane]\ntunnel-silent-after = 3\n")
    terminated.initiate("peer-v4")
    announced(fwd)
    wait_for(lambda: "silent" in [f["trouble"] for f in tunnel(fwd)["findings"]], "the tunnel is found silent")
    wait_for(lambda: fwd.counters()["tunnel_silent"] == 1, "it is counted")
    terminated.ping("peer-v4", count=30)
    sa = terminated.rekey("peer-v4", "fwd")  # fwd reads all SAs some seconds later
    assert terminated.ping("peer-v4", count=20) == 20

    def compared():
        pair = tunnel(fwd)["generations"][-1]
        seen = pair["strongswan"]
        return pair["spi_in"] == sa.spi_in and seen and seen["packets_in"] == 20 and seen

    seen = wait_for(compared, "strongSwan's counts were read")
    now = next(s for s in terminated.charon("fwd").list_sas() if s.spi_in == sa.spi_in)
    assert (seen["packets_in"], seen["packets_out"]) == (now.packets_in, now.packets_out) == (20, 20)
    assert (seen["fwd_more_in"], seen["fwd_more_out"]) == (0, 0)

    # The peer goes on with an SA that charon deletes here: its packets are told from a stranger's.
    send_esp(terminated, fwd, "peer", PEER, HERE, range(1, 4), spi=0x4321)
    wait_for(lambda: fwd.counters()["pkt_unknown_spi"] == 3, "nobody claimed them in time")
    assert fwd.counters()["pkt_deleted_sa"] == 0
    assert "unknown-spi" in [f["trouble"] for f in tunnel(fwd)["findings"]]
    terminated.charon("peer").kill()
    spi = sa.spi_in
    with terminated.charon("fwd").session() as vici:
        for _ in vici.terminate({"ike": "peer-v4", "force": "yes", "timeout": "-1"}):
            pass
    wait_for(lambda: not terminated.charon("fwd").list_sas(), "charon has deleted the SA")
    time.sleep(7)  # what comes within five seconds is merely late
    send_esp(terminated, fwd, "peer", PEER, HERE, range(100, 104), spi=spi)
    wait_for(lambda: fwd.counters()["pkt_deleted_sa"] == 4, "they are told from a stranger's")
    told = fwd.fwctl("explain", "packet", "--src", PEER, "--dst", HERE, "--spi", f"{spi:#x}").stdout
    assert "deleted" in told


def test_a_tunnel_that_carries_packets_one_way_only_is_found(terminated):
    fwd = terminated.start_fwd()
    terminated.initiate("peer-v4")
    announced(fwd)
    terminated.ping("peer-v4", count=5)
    terminated.hosts["fwd"].run(["ip", "address", "del", "10.9.0.1/32", "dev", "lo"])  # nobody answers any more
    traffic = terminated.start_ping("peer-v4", count=350, interval_s=0.1)
    found = wait_for(
        lambda: [f for f in tunnel(fwd)["findings"] if f["trouble"] == "one-way"], "the tunnel is one-way", 45
    )
    assert "this host sends none" in found[0]["text"]
    wait_for(lambda: fwd.counters()["tunnel_one_way"] == 1, "it is counted")
    traffic.end()


def test_monitor_tells_what_happens_as_it_happens(terminated):
    fwd = terminated.start_fwd()
    host = terminated.hosts["fwd"]
    command = [str(PROGRAMS / "fwctl"), "monitor", "--json", "filter", "application", "ipsec-udp"]
    watcher = host.start(command, stdout=subprocess.PIPE)

    def is_watched():
        """Somebody else asks, too, between one question of ours and the next."""
        before = fwd.counters()["control_request"]
        return fwd.counters()["control_request"] > before + 1

    wait_for(is_watched, "the watcher asks for events")
    terminated.initiate("peer-v4")
    announced(fwd)
    terminated.ping("peer-v4")
    terminated.charon("fwd").rekey("peer-v4")
    time.sleep(0.5)
    terminated.charon("peer").terminate("peer-v4")
    lines = []
    for line in watcher.popen.stdout:
        lines.append(json.loads(line))
        if lines[-1]["event"] == "ended":
            break
    watcher.end()
    assert [line["event"] for line in lines] == ["created", "promoted", "rekeyed", "ended"]
    assert [line["number"] for line in lines] == sorted(line["number"] for line in lines)
    assert (lines[-1]["end_reason"], lines[-1]["packets"]) == ("tunnel-down", 6)
