"""A tunnel that ends on fwd's host, against real strongSwan on both sides."""

import signal

import pytest

from lab.lab import wait_for
from lab.ping import outcome
from tests.namespaces.conftest import assert_balanced, has_rules


def tunnel_session(fwd, source="192.0.2.2"):
    found = fwd.sessions(application="ipsec-udp", source=source)
    return found[0] if len(found) == 1 else None


def tunnel_flow(fwd):
    """Its client's packets and ports; nothing while there are several sessions, until fwd has heard of a new SA."""
    return (tunnel_session(fwd) or {"c2s": {"packets": 0, "dport": None}})["c2s"]


def announced(fwd, source="192.0.2.2"):
    return wait_for(lambda: tunnel_session(fwd, source), "the tunnel has its session")


@pytest.mark.parametrize(
    ("tunnel", "client", "server", "is_initiator"),
    [("peer-v4", "192.0.2.2", "192.0.2.1", False), ("peer-v6", "2001:db8:c::1", "2001:db8:c::2", True)],
)
def test_the_session_shows_charons_spis_before_and_after_the_first_packet(
    terminated, tunnel, client, server, is_initiator
):
    fwd = terminated.start_fwd()
    wait_for(lambda: fwd.json("show", "tunnel")["source"]["connected"], "VICI is connected")
    terminated.initiate(tunnel)
    sa = terminated.charon("fwd").installed(tunnel)
    session = announced(fwd, client)
    assert (session["type"], session["state"]) == ("PRED", "OPENING")
    assert session["c2s"]["packets"] == session["s2c"]["packets"] == 0
    client_spi, server_spi = (sa.spi_in, sa.spi_out) if is_initiator else (sa.spi_out, sa.spi_in)

    with terminated.hosts["fwd"].capture("to-peer") as capture:
        assert terminated.ping(tunnel, count=5) == 5
    session = fwd.json("show", "session", "id", str(session["id"]))
    assert (session["type"], session["state"]) == ("FLOW", "ACTIVE")
    assert (session["c2s"]["source"], session["c2s"]["destination"]) == (client, server)
    assert (session["c2s"]["sport"], session["c2s"]["dport"]) == (client_spi, server_spi)
    assert (session["s2c"]["sport"], session["s2c"]["dport"]) == (server_spi, client_spi)
    assert session["ipsec"]["spis_seen"] == {"c2s": [server_spi], "s2c": [client_spi]}
    assert session["terminated_on_host"] and session["ingress_interface"] == "to-peer"
    for flow, ends in (("c2s", (client, server)), ("s2c", (server, client))):
        assert (session[flow]["packets"], session[flow]["bytes"]) == capture.total(*ends)
    assert capture.spis(client, server) == {server_spi} and capture.spis(server, client) == {client_spi}


def test_a_rekey_under_traffic_moves_to_the_new_spis_with_no_packet_unaccounted(terminated):
    fwd = terminated.start_fwd()
    terminated.initiate("peer-v4")
    session = announced(fwd)
    with terminated.hosts["fwd"].capture("to-peer") as capture:
        traffic = terminated.start_ping("peer-v4", count=150, interval_s=0.02)
        for side in ("fwd", "peer", "fwd"):
            terminated.charon(side).rekey("peer-v4")
        assert outcome(traffic).received == 150
        sa = terminated.charon("fwd").installed("peer-v4")
        wait_for(lambda: tunnel_flow(fwd)["dport"] == sa.spi_in, "the session shows the newest SPIs")
    after = tunnel_session(fwd)
    assert after["id"] == session["id"] and after["ipsec"]["rekeys"] == 3
    assert (after["c2s"]["sport"], after["c2s"]["dport"]) == (sa.spi_out, sa.spi_in)
    for flow, ends in (("c2s", ("192.0.2.2", "192.0.2.1")), ("s2c", ("192.0.2.1", "192.0.2.2"))):
        assert (after[flow]["packets"], after[flow]["bytes"]) == capture.total(*ends)
        assert after[flow]["packets"] == 150
    assert_balanced(terminated, fwd)
    # Charon does not tell when a rekeyed SA goes; fwd finds out by itself.
    wait_for(lambda: len(fwd.json("show", "tunnel")["tunnels"]) == 1, "the old SAs are gone")


def test_terminate_ends_the_session(terminated):
    fwd = terminated.start_fwd()
    terminated.initiate("peer-v4")
    session = announced(fwd)
    terminated.ping("peer-v4")
    terminated.charon("peer").terminate("peer-v4")

    def shown():
        return fwd.json("show", "session", "id", str(session["id"]))

    wait_for(lambda: shown()["end_reason"] == "tunnel-down", "the session knows why it ends")
    wait_for(lambda: shown()["state"] == "INIT", "the session has ended")
    assert not shown()["in_ager"] and shown()["time_to_live_s"] is None
    assert "time to live" not in fwd.fwctl("show", "session", "id", str(session["id"])).stdout
    assert not fwd.sessions(application="ipsec-udp")


def test_restarting_charon_under_traffic_recovers_by_itself(terminated):
    fwd = terminated.start_fwd()
    terminated.initiate("peer-v4")
    first = announced(fwd)
    terminated.ping("peer-v4")
    traffic = terminated.start_ping("peer-v4", count=100, interval_s=0.05)
    terminated.charon("fwd").kill()
    source = wait_for(lambda: not (found := fwd.json("show", "tunnel"))["source"]["connected"] and found, "fwd notices")
    assert source["tunnels"] and all(tunnel["stale_s"] is not None for tunnel in source["tunnels"])
    assert tunnel_session(fwd)["id"] == first["id"]  # the last known SPIs stay in use
    terminated.charon("fwd").start()
    terminated.charon("fwd").initiate("peer-v4")
    sa = terminated.charon("fwd").installed("peer-v4")
    wait_for(
        lambda: any(session["c2s"]["dport"] == sa.spi_in for session in fwd.sessions(application="ipsec-udp")),
        "the new tunnel has its session",
    )
    traffic.wait(30)
    assert terminated.ping("peer-v4") == 3
    session = next(s for s in fwd.sessions(application="ipsec-udp") if s["c2s"]["dport"] == sa.spi_in)
    assert session["state"] == "ACTIVE" and session["ipsec"]["sa_stale_s"] is None
    assert_balanced(terminated, fwd)


def test_a_frozen_charon_is_noticed_and_one_that_thaws_is_found_again(terminated):
    fwd = terminated.start_fwd()
    terminated.initiate("peer-v4")
    session = announced(fwd)
    terminated.charon("fwd").freeze()
    lost = wait_for(lambda: not (found := fwd.json("show", "tunnel"))["source"]["connected"] and found, "fwd notices")
    assert "did not answer" in lost["source"]["reason"]
    assert tunnel_session(fwd)["id"] == session["id"]
    terminated.charon("fwd").thaw()
    wait_for(lambda: fwd.json("show", "tunnel")["source"]["connected"], "fwd is connected again")
    assert tunnel_session(fwd)["id"] == session["id"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_restarting_fwd_under_traffic_recovers_by_itself(terminated, number):
    fwd = terminated.start_fwd()
    terminated.initiate("peer-v4")
    announced(fwd)
    traffic = terminated.start_ping("peer-v4", count=150, interval_s=0.02)
    wait_for(lambda: tunnel_flow(fwd)["packets"] > 10, "traffic flows")
    fwd.process.send(number)
    fwd.process.wait(15)
    assert has_rules(terminated) == (number == signal.SIGKILL)
    fwd = terminated.start_fwd()
    session = announced(fwd)
    sa = terminated.charon("fwd").installed("peer-v4")
    assert (session["c2s"]["sport"], session["c2s"]["dport"]) == (sa.spi_out, sa.spi_in)
    wait_for(lambda: tunnel_flow(fwd)["packets"] > 10, "traffic is counted again")
    received = outcome(traffic).received
    # Fail-open. A clean stop hands back what waits in the queue; of a killed reader's queue the kernel drops it.
    assert received == 150 if number == signal.SIGTERM else received >= 140


def test_it_works_without_strongswan_and_says_so(transit):
    fwd = transit.start_fwd()
    answer = fwd.json("show", "tunnel")
    assert not answer["source"]["connected"] and "no such socket" in answer["source"]["reason"]
    transit.initiate("sites-v4")
    assert transit.ping("sites-v4") == 3


OURS_ONLY = """
[zones]
untrust = ["to-peer"]

[vici]
socket = "/run/hosts/fwd/charon.vici"

[[rules]]
name = "our-tunnels"
application = ["ipsec-udp", "ike"]
action = "allow"
"""


@pytest.mark.parametrize(
    ("tunnel", "ends"),
    [("peer-v4", ("192.0.2.2", "192.0.2.1")), ("peer-v6", ("2001:db8:c::1", "2001:db8:c::2"))],
)
def test_packets_in_fragments_are_the_tunnels_and_counted_as_they_came(terminated, tunnel, ends):
    """IPv4 is put together before fwd's rules, IPv6 after: where it is not, its later fragments name no SPI."""
    for host, interface in (("fwd", "to-peer"), ("peer", "wan")):
        terminated.hosts[host].run(["ip", "link", "set", interface, "mtu", "1280"])
    fwd = terminated.start_fwd(OURS_ONLY)
    terminated.initiate(tunnel)
    announced(fwd, ends[0])
    assert terminated.ping(tunnel, count=40, size=1300) == 40
    (session,) = (s for s in fwd.sessions() if s["application"] != "ike")
    assert (session["application"], session["rule"], session["state"]) == ("ipsec-udp", "our-tunnels", "ACTIVE")
    if tunnel == "peer-v6":  # the witness sees IPv4 in fragments
        assert_balanced(terminated, fwd)
    wait_for(
        lambda: (
            "fragments"
            in [f["trouble"] for t in fwd.json("show", "tunnel", "detail")["tunnels"] for f in t["findings"]]
        ),
        "the MTU is found too small",
    )
