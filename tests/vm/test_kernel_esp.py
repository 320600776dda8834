"""ESP of the kernel's own: what fwd counts is what `ip -s xfrm state` and tcpdump count, to the packet and the byte."""

import re

import pytest

from lab import ping
from lab.lab import wait_for
from lab.strongswan import kernel_has_esp
from tests.namespaces.conftest import assert_balanced
from tests.vm.site import parse_xfrm, xfrm_states

SUITE = "aes128-sha256"
PINGS = 40
CAPTURED = "esp or udp port 4500"
#: What of a connection and of its CHILD_SA is other than in the lab, by the name of the case.
CASES = {
    "tunnel": ({}, {}),
    "transport": ({}, {"mode": "transport"}),
    "ESN": ({}, {"esp_proposals": ["aes128gcm16-esn"]}),
    "in UDP": ({"encap": "yes"}, {}),
    "xfrm interface": ({}, {"if_id_in": "42", "if_id_out": "42"}),
}
#: What the kernel then says of its SAs. strongSwan would fall back to tunnel mode without a word.
PROOF = {
    "tunnel": r"mode tunnel",
    "transport": r"mode transport",
    "ESN": r"flag .*\besn\b",
    "in UDP": r"encap type espinudp",
    "xfrm interface": r"if_id 0x2a",
}


def configure(lab, tunnel, case):
    connection, child = CASES[case]
    plan = lab.tunnel(tunnel)
    for host in plan.ends:
        here = plan.side(host)
        inner = list(plan.outer if case == "transport" else plan.inner)
        if case == "transport" and plan.nat and here == 1:
            inner[0] = plan.nat  # what it sees of the other
        prefix = 128 if ":" in inner[0] else 32
        children = {
            tunnel: {
                "local_ts": [f"{inner[here]}/{prefix}"],
                "remote_ts": [f"{inner[1 - here]}/{prefix}"],
                "esp_proposals": [SUITE],
                "rekey_time": "0",
                **child,
            }
        }
        lab.charon(host).configure(tunnel, children=children, **connection)


def send(lab, tunnel, case):
    """Ping through the tunnel; with transport mode that is between the outer addresses."""
    plan = lab.tunnel(tunnel)
    if case == "xfrm interface":
        for host in plan.ends:
            here = plan.side(host)
            device = next(end[1] for link in lab.topology.links for end in link.ends if end[0] == host)
            lab.hosts[host].run(["ip", "link", "add", "ipsec0", "type", "xfrm", "dev", device, "if_id", "42"])
            lab.hosts[host].run(["ip", "link", "set", "ipsec0", "up"])
            route = ["route", "replace", plan.inner[1 - here], "dev", "ipsec0", "src", plan.inner[here]]
            lab.hosts[host].run(["ip", *(["-6"] if ":" in route[2] else []), *route])
    ends = plan.outer if case == "transport" else plan.inner
    done = lab.hosts[plan.initiator].run(ping.command(*ends, PINGS), timeout=60, check=False)
    return ping.tally(done.stderr).received


def states(lab, host):
    return lab.hosts[host].run(["ip", "-s", "xfrm", "state"]).stdout


def is_udp(packet):
    return packet.octets[6 if ":" in packet.source else 9] == 17


def is_esp(packet):
    """IKE beside it in UDP has the non-ESP marker, zeros, and a keepalive is one octet (RFC 3948)."""
    payload = packet.octets[(40 if ":" in packet.source else 20) + 8 :]
    return not is_udp(packet) or (len(payload) >= 8 and any(payload[:4]))


def check(lab, fwd, session, spis, capture, listed, case):
    """Both directions are what tcpdump and the kernel's ESP counted; `spis` are those of c2s and s2c."""
    seen = [packet for packet in capture.packets if is_esp(packet)]
    kernel, states = parse_xfrm(listed), xfrm_states(listed)
    for spi in spis:
        assert re.search(PROOF[case], states[spi]), states[spi]
    is_in_udp = all("encap type espinudp" in states[spi] for spi in spis)
    assert {is_udp(packet) for packet in seen} == {is_in_udp}
    for flow, spi in zip(("c2s", "s2c"), spis, strict=True):
        ends = session[flow]["source"], session[flow]["destination"]
        lengths = [packet.length for packet in seen if (packet.source, packet.destination) == ends]
        assert (session[flow]["packets"], session[flow]["bytes"]) == (len(lengths), sum(lengths))
        assert session[flow]["packets"] == kernel[spi] == PINGS
    assert_balanced(lab, fwd)
    assert fwd.counters()["flow_internal_error"] == 0


def check_terminated(lab, tunnel, case, interface):
    configure(lab, tunnel, case)
    fwd = lab.start_fwd()
    assert fwd.json("show", "system", "info")["queue-rules"] == "nft queue"
    with lab.hosts["fwd"].capture(interface, CAPTURED) as capture:
        lab.initiate(tunnel)
        sa = lab.charon("fwd").installed(tunnel)
        assert send(lab, tunnel, case) == PINGS
        session = wait_for(
            lambda: next(iter(fwd.sessions(application="ipsec-udp", spi=f"{sa.spi_in:#x}")), None), "it has its session"
        )
    # The port of a direction's destination is the SPI that it carries.
    spis = [session[flow]["dport"] for flow in ("c2s", "s2c")]
    assert set(spis) == {sa.spi_in, sa.spi_out}
    check(lab, fwd, session, spis, capture, states(lab, "fwd"), case)


def check_transit(lab, tunnel, case, is_in_udp):
    configure(lab, tunnel, case)
    fwd = lab.start_fwd()
    with lab.hosts["fwd"].capture("to-a", CAPTURED) as capture:
        lab.initiate(tunnel)
        assert send(lab, tunnel, case) == PINGS
        (session,) = fwd.sessions(application="ipsec-esp-udp" if is_in_udp else "ipsec-esp")
    sa = lab.charon("site-a").installed(tunnel)  # whose hosts send the first packet: it is the client
    check(lab, fwd, session, (sa.spi_out, sa.spi_in), capture, states(lab, "site-b"), case)


def test_the_kernel_has_esp():
    assert kernel_has_esp()


@pytest.mark.parametrize("tunnel", ["peer-v4", "peer-v6"])
@pytest.mark.parametrize("case", CASES)
def test_a_tunnel_that_ends_here(terminated, tunnel, case):
    check_terminated(terminated, tunnel, case, "to-peer")


@pytest.mark.parametrize("tunnel", ["sites-v4", "sites-v6"])
@pytest.mark.parametrize("case", CASES)
def test_a_tunnel_in_transit(transit, tunnel, case):
    check_transit(transit, tunnel, case, case == "in UDP")


@pytest.mark.parametrize("case", ["tunnel", "transport", "ESN", "xfrm interface"])
def test_a_tunnel_from_behind_a_nat_that_ends_here(nat, case):
    check_terminated(nat, "here", case, "to-a")


@pytest.mark.parametrize("case", ["tunnel", "transport", "ESN", "xfrm interface"])
def test_a_tunnel_from_behind_a_nat_in_transit(nat, case):
    check_transit(nat, "across", case, is_in_udp=True)
