"""The machine boots anew, and all comes up by itself."""

import json
import os
from pathlib import Path

import pytest

from tests.vm.conftest import BOOT
from tests.vm.site import CONFIG, fwctl, packets, received, sh, unit, wait_for

#: In which order the two start at boot: what systemd is told, on top of what the units say.
ORDERS = {
    "fwd first": ("strongswan.service", "[Unit]\nAfter=fwd.service\n"),
    "strongSwan first": ("fwd.service", "[Unit]\nAfter=strongswan.service\n"),
}
_STAGE = Path("/lab/out/boot-order.json")


@pytest.mark.parametrize("order", ORDERS)
def test_after_a_reboot_tunnels_come_up_with_their_first_packet(site, order):
    """start_action = trap; strongSwan and fwd are enabled, and start in this order. The network is there before both.

    The session that lived when the machine went down is in the traffic log.
    """
    begun = json.loads(_STAGE.read_text()) if _STAGE.exists() else {}
    if order not in begun:
        if "FWD_VM_NEXT_BOOT" in os.environ:
            pytest.skip("the machine boots for another test already")
        os.environ["FWD_VM_NEXT_BOOT"] = "asked for"
        Path("/etc/fwd/fwd.toml").write_text(CONFIG)
        sh("systemctl restart fwd", check=True)
        site.up()
        assert received(site.ping(5)) == 5
        left = wait_for(site.session, "the tunnel has its session")
        sh("rm -f /etc/systemd/system/*.service.d/order.conf")
        name, text = ORDERS[order]
        folder = Path(f"/etc/systemd/system/{name}.d")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "order.conf").write_text(text)
        sh("systemctl daemon-reload && systemctl enable fwd strongswan", check=True)
        _STAGE.write_text(json.dumps({**begun, order: (BOOT + 1, left)}))
        pytest_words = f"--timeout=300 -p no:cacheprovider --junitxml=/lab/out/junit-{BOOT + 1}.xml {__file__}"
        Path("/lab/again").write_text(f"python -m pytest {pytest_words}\n")
        pytest.skip("goes on in the machine's next boot")
    boot, left = begun[order]
    if boot != BOOT:
        pytest.skip(f"was in boot {boot}")
    started = {name: int(unit(name, "ActiveEnterTimestampMonotonic")) for name in ("fwd", "strongswan")}
    assert all(started.values()), sh("systemctl status fwd strongswan")
    assert (started["fwd"] < started["strongswan"]) is (order == "fwd first")
    assert fwctl("show", "system", "info")["strongswan"] == "connected", sh("journalctl -u fwd -b --no-pager")
    assert sh("systemctl is-system-running").strip() == "running", sh("systemctl --failed")
    sh("ip xfrm policy | grep 10.3.0.1", check=True)
    assert received(site.ping(50, 0.2))  # the first ones wait for IKE, which takes seconds on an emulated machine
    before = wait_for(site.session, "the tunnel has its session")
    assert received(site.ping(20)) == 20
    assert packets(site.session(), before) == [20, 20]
    assert unit("fwd", "NRestarts") == "0"
    log = sh("/usr/bin/fwctl --json show log traffic filter application ipsec-udp", check=True)
    newest = json.loads(log.splitlines()[0])
    assert newest["end_reason"] in ("unknown", "tunnel-down")  # fwd went down before strongSwan, or after
    counted = [newest[key] for key in ("session", "packets_c2s", "packets_s2c")]
    assert counted == [left["id"], *packets(left)]
