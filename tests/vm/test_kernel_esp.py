"""ESP of the kernel's own: what fwd counts is what `ip -s xfrm state` and tcpdump count, to the packet and the byte."""

import re

import pytest

from lab.lab import wait_for
from lab.strongswan import kernel_has_esp
from tests.namespaces.conftest import accounted, witnessed
from tests.vm.site import parse_xfrm

SUITE = "aes128-sha256"
#: What of a connection and of its CHILD_SA is other than in the lab, by the name of the case.
CASES = {
    "tunnel": ({}, {}),
    "transport": ({}, {"mode": "transport"}),
    "ESN": ({}, {"esp_proposals": ["aes128gcm16-esn"]}),
    "in UDP": ({"encap": "yes"}, {}),
    "xfrm interface": ({}, {"if_id_in": "42", "if_id_out": "42"}),
}


def configure(lab, tunnel, case):
    connection, child = CASES[case]
    plan = lab.tunnel(tunnel)
    for host in plan.ends:
        here = plan.side(host)
        inner = plan.outer if case == "transport" else plan.inner
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


def send(lab, tunnel, case, count):
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
    command = ["ping", "-n", "-I", ends[0], "-c", f"{count}", "-i", "0.02", "-W", "2", ends[1]]
    done = lab.hosts[plan.initiator].run(command, timeout=60, check=False)
    return int(re.search(r"(\d+) received", done.stdout)[1])


def states(lab, host):
    return parse_xfrm(lab.hosts[host].run(["ip", "-s", "xfrm", "state"]).stdout)


def test_the_kernel_has_esp():
    assert kernel_has_esp()


@pytest.mark.parametrize("tunnel", ["peer-v4", "peer-v6"])
@pytest.mark.parametrize("case", CASES)
def test_a_tunnel_that_ends_here(terminated, tunnel, case):
    configure(terminated, tunnel, case)
    fwd = terminated.start_fwd()
    assert fwd.json("show", "system", "info")["queue-rules"] == "nft queue"
    expression = "esp or (udp port 4500 and udp[8:4] != 0)" if tunnel == "peer-v4" else "esp or udp port 4500"
    with terminated.hosts["fwd"].capture("to-peer", expression) as capture:
        terminated.initiate(tunnel)
        sa = terminated.charon("fwd").installed(tunnel)
        assert send(terminated, tunnel, case, 40) == 40
        session = wait_for(
            lambda: next(iter(fwd.sessions(application="ipsec-udp", spi=f"{sa.spi_in:#x}")), None), "it has its session"
        )
    kernel = states(terminated, "fwd")
    inbound, outbound = ("c2s", "s2c") if session["c2s"]["dport"] == sa.spi_in else ("s2c", "c2s")
    assert session[inbound]["packets"] == kernel[sa.spi_in] == 40
    assert session[outbound]["packets"] == kernel[sa.spi_out] == 40
    for flow in ("c2s", "s2c"):
        ends = session[flow]["source"], session[flow]["destination"]
        seen = [packet for packet in capture.packets if (packet.source, packet.destination) == ends]
        if case == "in UDP":  # IKE beside it has a session of its own: the non-ESP marker is zeros (RFC 3948)
            header = 48 if ":" in ends[0] else 28
            seen = [packet for packet in seen if any(packet.octets[header : header + 4])]
        assert (session[flow]["packets"], session[flow]["bytes"]) == (len(seen), sum(one.length for one in seen))
    assert accounted(fwd) == witnessed(terminated)
    assert fwd.counters()["flow_internal_error"] == 0


@pytest.mark.parametrize("tunnel", ["sites-v4", "sites-v6"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "xfrm interface"])
def test_a_tunnel_in_transit(transit, tunnel, case):
    configure(transit, tunnel, case)
    fwd = transit.start_fwd()
    transit.initiate(tunnel)
    assert send(transit, tunnel, case, 40) == 40
    sa = transit.charon("site-a").installed(tunnel)
    application = "ipsec-esp-udp" if case == "in UDP" else "ipsec-esp"
    (session,) = fwd.sessions(application=application)
    kernel = states(transit, "site-b")
    assert session["c2s"]["packets"] + session["s2c"]["packets"] == kernel[sa.spi_in] + kernel[sa.spi_out] == 80
    assert accounted(fwd) == witnessed(transit)
