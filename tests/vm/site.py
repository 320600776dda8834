"""This machine as a gateway with a tunnel, and its peer in a network namespace."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from click.testing import CliRunner

from fwd.cli import main
from lab import ping
from lab.lab import wait_for
from lab.sandbox import Process
from lab.strongswan import Charon
from lab.topology import Tunnel

TUNNEL = Tunnel("peer-v4", ("peer", "fwd"), ("192.0.2.2", "192.0.2.1"), ("10.3.0.1", "10.9.0.1"))

CONFIG = """
[zones]
untrust = ["to-peer"]

[[rules]]
name = "any-any"
action = "allow"
"""

_SWANCTL = """
connections {
  peer-v4 {
    version = 2
    local_addrs = 192.0.2.1
    remote_addrs = 192.0.2.2
    proposals = aes128-sha256-x25519
    mobike = no
    rekey_time = 0
    local {
      auth = psk
      id = fwd.lab
    }
    remote {
      auth = psk
      id = peer.lab
    }
    children {
      peer-v4 {
        local_ts = 10.9.0.1/32
        remote_ts = 10.3.0.1/32
        esp_proposals = aes128-sha256
        rekey_time = 0
        start_action = trap
      }
    }
  }
}
secrets {
  ike-peer {
    id-1 = fwd.lab
    id-2 = peer.lab
    secret = "a secret of the lab's, worth nothing"
  }
}
"""

#: It is there before anybody needs it, as a machine's network is.
_LINK_UNIT = Path("/etc/systemd/system/lab-link.service")
_LINK_TEXT = """
[Unit]
DefaultDependencies=no
Wants=network-pre.target
Before=network-pre.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -e /etc/lab-link.sh
[Install]
WantedBy=multi-user.target
"""
_LINK = """
ip netns add peer
ip link add to-peer type veth peer name wan netns peer
ip address add 192.0.2.1/24 dev to-peer
ip address replace 10.9.0.1/32 dev lo
ip link set to-peer up
ip netns exec peer ip address add 192.0.2.2/24 dev wan
ip netns exec peer ip address add 10.3.0.1/32 dev lo
ip netns exec peer ip link set lo up
ip netns exec peer ip link set wan up
ip route replace 10.3.0.1/32 via 192.0.2.2 src 10.9.0.1
"""


def sh(command: str, *, check: bool = False, timeout: float = 120) -> str:
    """What a shell command prints, on both of its outputs."""
    done = subprocess.run(
        command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False
    )
    assert not check or done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout


def succeeds(command: str) -> bool:
    """Whether a shell command ends with status 0."""
    return subprocess.run(command, shell=True, capture_output=True, timeout=120, check=False).returncode == 0


class Site:
    """The peer runs in a namespace of its own with a charon of its own; here strongSwan is systemd's."""

    def __enter__(self) -> Self:
        if not _LINK_UNIT.exists():
            Path("/etc/lab-link.sh").write_text(_LINK)
            _LINK_UNIT.write_text(_LINK_TEXT)
            sh("systemctl daemon-reload && systemctl enable --now lab-link", check=True)
        Path("/run/hosts/peer").mkdir(parents=True, exist_ok=True)
        self.peer = Charon(1, "peer", (TUNNEL,), Path("/"))
        self.peer.start()
        Path("/etc/swanctl/conf.d/peer.conf").write_text(_SWANCTL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.peer.close()

    def up(self) -> None:
        """strongSwan runs, and the tunnel carries packets."""
        sh("systemctl start strongswan && swanctl --load-all", check=True)
        if not succeeds("swanctl --list-sas | grep -q INSTALLED"):
            sh("swanctl --initiate --child peer-v4 --timeout 20", check=True)

    def ping(self, count: int, interval_s: float = 0.02) -> Process:
        """Ping the peer through the tunnel, in the background."""
        command = ping.command("10.9.0.1", "10.3.0.1", count, interval_s)
        return Process(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def session(self) -> dict[str, Any] | None:
        """fwd's session of the tunnel; None if there is none yet."""
        found = fwctl("show", "session", "all", "filter", "application", "ipsec-udp")["sessions"]
        assert len(found) < 2, found
        return found[0] if found else None


def received(pings: Process) -> int:
    """How many answers a ping got, when it is over."""
    return ping.outcome(pings).received


def flows_on(pings: Process) -> None:
    """Whatever was done was done under traffic."""
    assert pings.is_running(), "the traffic was over too early to tell anything"


def packets(session: dict[str, Any], before: dict[str, Any] | None = None) -> list[int]:
    """The packets of a session's two directions; those since another look at it."""
    assert before is None or session["id"] == before["id"], (before, session)
    return [session[flow]["packets"] - (before[flow]["packets"] if before else 0) for flow in ("c2s", "s2c")]


def kernel_packets(session: dict[str, Any], before: Sequence[int] = (0, 0)) -> list[int]:
    """The packets of both directions as the kernel's own ESP counted them, less those that it had counted before."""
    kernel = xfrm_packets()
    return [kernel[session["c2s"][port]] - count for port, count in zip(("dport", "sport"), before, strict=True)]


def fwctl(*words: str) -> Any:
    """What `fwctl --json` prints, asked by this process: emulated, starting another takes seconds."""
    done = CliRunner().invoke(main.fwctl, ["--json", *words])
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.output)


def counters() -> dict[str, int]:
    """fwd's global counters."""
    return {counter["name"]: counter["value"] for counter in fwctl("show", "counter", "global")["counters"]}


def unit(name: str, key: str) -> str:
    """A property of a unit."""
    return sh(f"systemctl show --value -p {key} {name}").strip()


def has_rules() -> bool:
    """Whether fwd's tables are there."""
    return "fwd_dataplane" in sh("nft list tables")


def has_queue() -> bool:
    """Whether the kernel has somebody to hand packets to."""
    return any(line.split()[0] == "20" for line in Path("/proc/net/netfilter/nfnetlink_queue").read_text().splitlines())


def xfrm_packets() -> dict[int, int]:
    """Packets of each SPI, as the kernel's own ESP counted them."""
    return parse_xfrm(sh("ip -s xfrm state", check=True))


def xfrm_states(listed: str) -> dict[int, str]:
    """What `ip -s xfrm state` prints of each SPI."""
    found = {}
    for state in re.split(r"^src ", listed, flags=re.MULTILINE)[1:]:
        if spi := re.search(r"proto esp spi 0x([0-9a-f]+)", state):
            found[int(spi[1], 16)] = state
    return found


def parse_xfrm(listed: str) -> dict[int, int]:
    """The packets of each SPI in what `ip -s xfrm state` prints."""
    return {
        spi: int(current[1])
        for spi, state in xfrm_states(listed).items()
        if (current := re.search(r"lifetime current:\s+\d+\(bytes\), (\d+)\(packets\)", state))
    }


__all__ = ["CONFIG", "TUNNEL", "Site", "counters", "flows_on", "fwctl", "has_queue", "has_rules", "kernel_packets"]
__all__ += ["packets", "parse_xfrm", "received", "sh", "succeeds", "unit", "wait_for", "xfrm_states"]
