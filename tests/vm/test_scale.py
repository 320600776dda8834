"""Five thousand CHILD_SAs in the kernel, set up over VICI, each with its session."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lab.lab import wait_for
from tests.vm.site import parse_xfrm

IKE_SAS, CHILDREN = 10, 500
SECRET = "worth nothing"


def inner(side, ike, child):
    return f"10.{(3, 9)[side]}.{ike * 2 + child // 250}.{child % 250 + 1}"


def load(charon, here, outer):
    there = 1 - here
    with charon.session() as vici:
        for ike in range(IKE_SAS):
            ids = [f"{ike}.peer.lab", f"{ike}.fwd.lab"]
            children = {
                f"c{ike}-{child}": {
                    "local_ts": [f"{inner(here, ike, child)}/32"],
                    "remote_ts": [f"{inner(there, ike, child)}/32"],
                    "esp_proposals": ["aes128-sha256"],
                    "rekey_time": "0",
                }
                for child in range(CHILDREN)
            }
            vici.load_shared({"id": f"s{ike}", "type": "IKE", "data": SECRET, "owners": ids})
            vici.load_conn(
                {
                    f"many{ike}": {
                        "version": "2",
                        "local_addrs": [outer[here]],
                        "remote_addrs": [outer[there]],
                        "proposals": ["aes128-sha256-x25519"],
                        "mobike": "no",
                        "rekey_time": "0",
                        "local": {"auth": "psk", "id": ids[here]},
                        "remote": {"auth": "psk", "id": ids[there]},
                        "children": children,
                    }
                }
            )


@pytest.mark.timeout(1200)
def test_five_thousand_child_sas(terminated):
    outer = terminated.tunnel("peer-v4").outer
    for here, host in enumerate(("peer", "fwd")):
        load(terminated.charon(host), here, outer)
    fwd = terminated.start_fwd()
    begun = time.monotonic()

    def set_up(ike):
        with terminated.charon("peer").session() as vici:
            for child in range(CHILDREN):
                for _ in vici.initiate({"ike": f"many{ike}", "child": f"c{ike}-{child}", "timeout": "9000"}):
                    pass

    with ThreadPoolExecutor(IKE_SAS) as pool:
        list(pool.map(set_up, range(IKE_SAS)))
    took = time.monotonic() - begun

    def number():
        return fwd.json("show", "session", "all", "filter", "application", "ipsec-udp", "count", "yes")["count"]

    wait_for(lambda: number() == IKE_SAS * CHILDREN, "each has its session", 120)
    print(
        f"{IKE_SAS * CHILDREN} CHILD_SAs in {took:.0f} s; fwd knew them {time.monotonic() - begun - took:.1f} s later"
    )
    some = [(ike, child) for ike in range(IKE_SAS) for child in (0, 249, 250, 499)]
    for ike, child in some:
        for here, host in enumerate(("peer", "fwd")):
            terminated.hosts[host].run(["ip", "address", "add", f"{inner(here, ike, child)}/32", "dev", "lo"])
        source, destination = (inner(here, ike, child) for here in (0, 1))
        command = ["ping", "-n", "-c", "3", "-i", "0.02", "-W", "5", "-I", source, destination]
        assert "3 received" in terminated.hosts["peer"].run(command).stdout
    kernel = parse_xfrm(terminated.hosts["fwd"].run(["ip", "-s", "xfrm", "state"], timeout=120).stdout)
    assert len(kernel) == 2 * IKE_SAS * CHILDREN
    used = {spi: packets for spi, packets in kernel.items() if packets}
    assert len(used) == 2 * len(some) and set(used.values()) == {3}
    sessions = fwd.sessions(application="ipsec-udp", type="flow")
    seen = {session[flow]["dport"]: session[flow]["packets"] for session in sessions for flow in ("c2s", "s2c")}
    assert seen == used
    counters = fwd.counters()
    assert counters["flow_internal_error"] == counters["queue_kernel_drop"] == counters["queue_socket_drop"] == 0
