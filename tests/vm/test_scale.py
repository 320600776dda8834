"""Five thousand CHILD_SAs in the kernel, set up over VICI, each with its session."""

import re
import time
from contextlib import closing
from pathlib import Path

import pytest

from lab import ping
from lab.lab import default_config, wait_for
from tests.namespaces.conftest import assert_balanced
from tests.namespaces.test_metrics import UNIX, ask_by_path, read
from tests.vm.site import parse_xfrm

#: What charon does for a CHILD_SA takes the longer, the more its IKE_SA has already.
IKE_SAS, CHILDREN = 20, 250
SECRET = "worth nothing"
#: Those that carry packets.
USED = [(ike, child) for ike in range(0, IKE_SAS, 2) for child in (0, CHILDREN - 1)]
PINGS = 3


def inner(side, ike, child):
    return f"10.{(3, 9)[side]}.{ike + 1}.{child + 1}"


def load(vici, here, outer, ike):
    """One connection; where `here` is 0 its CHILD_SAs are set up at once."""
    there = 1 - here
    ids = [f"{ike}.peer.lab", f"{ike}.fwd.lab"]
    children = {
        f"c{ike}-{child}": {
            "local_ts": [f"{inner(here, ike, child)}/32"],
            "remote_ts": [f"{inner(there, ike, child)}/32"],
            "esp_proposals": ["aes128-sha256"],
            "rekey_time": "0",
            "start_action": ("start", "none")[here],
        }
        for child in range(CHILDREN)
    }
    connection = {
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
    vici.load_shared({"id": f"s{ike}", "type": "IKE", "data": SECRET, "owners": ids})
    vici.load_conn({f"many{ike}": connection})


def set_up(charon, outer, say):
    """Load the connections of the side that initiates, and wait until all is up."""
    begun = said_at = moved = time.monotonic()
    up, loaded = dict.fromkeys(range(IKE_SAS), 0), 0
    with (
        charon.session() as asking,
        charon.session() as hearing,
        closing(hearing.listen(["child-updown"], 1.0)) as events,
    ):
        next(events)  # from now on they come
        while (number := sum(up.values())) < IKE_SAS * CHILDREN:
            if loaded < IKE_SAS and (not loaded or up[loaded - 1]):  # charon takes few half-open IKE_SAs of a peer
                load(asking, 0, outer, loaded)
                loaded += 1
            _, message = next(events)
            if message:
                assert message.get("up") == b"yes", charon.log[-2000:]
                (ike,) = (int(name.removeprefix("many")) for name in message if name.startswith("many"))
                up[ike] += 1
                moved = time.monotonic()
            now = time.monotonic()
            assert now < moved + 120, charon.log[-2000:]
            if now > said_at + 20:  # that the guest does not look as if it hung
                say(f"{number} CHILD_SAs after {now - begun:.0f} s")
                said_at = now


def timed(say, what, call):
    """The value of a call, of which is said how many seconds it took."""
    begun = time.monotonic()
    value = call()
    say(f"{what}: {time.monotonic() - begun:.1f} s")
    return value


@pytest.mark.timeout(2400)
def test_five_thousand_child_sas(terminated, capsys):
    def say(text):
        with capsys.disabled():
            print(text, flush=True)

    outer, hosts = terminated.tunnel("peer-v4").outer, terminated.hosts
    with terminated.charon("fwd").session() as vici:
        for ike in range(IKE_SAS):
            load(vici, 1, outer, ike)
    say("loaded")
    for here, host in enumerate(("peer", "fwd")):
        hosts[host].run(["sh", "-ec", "\n".join(f"ip address add {inner(here, *one)}/32 dev lo" for one in USED)])
    fwd = terminated.start_fwd(default_config() + UNIX)

    def known():
        return fwd.json("show", "session", "all", "filter", "application", "ipsec-udp", "count", "yes")["count"]

    timed(say, "set up", lambda: set_up(terminated.charon("peer"), outer, say))
    timed(say, "fwd knows them", lambda: wait_for(lambda: known() == IKE_SAS * CHILDREN, "each has its session"))
    for words in ("show session all", "show session info", "show tunnel"):
        timed(say, f"fwctl {words}", lambda words=words: fwd.fwctl(*words.split()))

    for ike, child in USED:
        command = ping.command(*(inner(here, ike, child) for here in (0, 1)), PINGS)
        assert ping.tally(hosts["peer"].run(command, check=False).stderr) == (PINGS, PINGS)
    kernel = parse_xfrm(hosts["fwd"].run(["ip", "-s", "xfrm", "state"], timeout=60).stdout)
    assert len(kernel) == 2 * IKE_SAS * CHILDREN
    used = {spi: packets for spi, packets in kernel.items() if packets}
    assert len(used) == 2 * len(USED) and set(used.values()) == {PINGS}
    sessions = fwd.sessions(application="ipsec-udp", type="flow")
    assert {session[flow]["dport"]: session[flow]["packets"] for session in sessions for flow in ("c2s", "s2c")} == used
    assert known() == IKE_SAS * CHILDREN
    assert_balanced(terminated, fwd)
    counters = fwd.counters()
    assert counters["flow_internal_error"] == counters["queue_kernel_drop"] == counters["queue_socket_drop"] == 0

    say(re.findall(r"Vm(?:RSS|HWM):.*", Path(f"/proc/{fwd.pid}/status").read_text()))
    figures = read(ask_by_path(hosts["fwd"].path("/run/fwd/metrics.sock")))
    say({labels: value for (name, labels), value in figures.items() if name.startswith("fwd_event_loop_lag")})
