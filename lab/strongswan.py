"""strongSwan for the lab's hosts: a root folder with Debian 13's packages, made once, and a charon on each host.

Where the kernel has no ESP, charon's kernel-libipsec plugin does it in userland; `raw_esp` (since 5.9.11, hence
Debian 13) then still sends and receives protocol 50, so that fwd meets the same packets either way.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_network
from pathlib import Path

from vici import Session

from .root_folder import root_folder
from .sandbox import PATIENCE, LabError, Process, enter, outside_path
from .topology import Tunnel

#: For root_folder.
ROOT = "strongswan-trixie"
PACKAGES = "charon-systemd,strongswan-swanctl,libcharon-extra-plugins,libstrongswan-extra-plugins,iproute2,iputils-ping"
_PLUGINS = (
    "random nonce openssl aes sha1 sha2 hmac kdf pem pkcs1 x509 pubkey curve25519 drbg"
    " {ipsec} kernel-netlink socket-default vici updown"
)
_CONF = """
charon-systemd {{
  load = {plugins}
  retransmit_timeout = 1
  retransmit_tries = {tries}
  plugins {{
    kernel-libipsec {{
      raw_esp = yes
    }}
    vici {{
      socket = unix:///run/charon.vici
    }}
  }}
  journal {{
    default = -1
  }}
  filelog {{
    lab {{
      path = /run/charon.log
      default = 1
      flush_line = yes
    }}
  }}
}}
"""
_SECRET = "a secret of the lab's, worth nothing"
_START_S = 40.0 * PATIENCE
_ANSWER_S = 30.0 * PATIENCE


def strongswan_root(say: Callable[[str], None] = lambda _: None) -> Path:
    """The root folder whose strongSwan the hosts run: Debian 13's, or FWD_LAB_ROOT of the environment.

    That is / in a machine which has a strongSwan of its own. Raises LabError.
    """
    given = os.environ.get("FWD_LAB_ROOT")
    return Path(given) if given else root_folder(ROOT, PACKAGES, say)


@cache
def kernel_has_esp() -> bool:
    """Whether this kernel does ESP itself: it is asked for an SA, in a namespace of its own."""
    add = "ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x100 mode tunnel enc cipher_null ''"
    return subprocess.run(["unshare", "--net", "sh", "-c", add], capture_output=True, check=False).returncode == 0


@dataclass(frozen=True, slots=True)
class ChildSa:
    """A CHILD_SA as charon lists it (`swanctl --list-sas`); SPIs as numbers."""

    name: str
    uniqueid: int
    reqid: int
    state: str
    spi_in: int
    spi_out: int
    packets_in: int
    packets_out: int


class Charon:
    """The IKE daemon of one host; restarted it loads the same tunnels again."""

    def __init__(self, first_pid: int, host: str, tunnels: tuple[Tunnel, ...], root: Path) -> None:
        self._first_pid = first_pid
        self._host = host
        self._tunnels = tunnels
        self._root = root
        self._folder = f"/run/hosts/{host}"
        self._process: Process | None = None
        self._write("strongswan.conf", self._conf())

    @property
    def vici_path(self) -> str:
        """VICI's socket, inside the lab."""
        return f"{self._folder}/charon.vici"

    @property
    def log(self) -> str:
        """What charon logged so far."""
        path = outside_path(self._first_pid, f"{self._folder}/charon.log")
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start it, wait until it answers, load its tunnels. Raises LabError."""
        shell = (
            f"mount --bind {self._folder} {self._root}/run && mount --rbind /dev {self._root}/dev"
            f" && mount -t proc proc {self._root}/proc && exec chroot {self._root} /usr/sbin/charon-systemd"
        )
        self._process = Process(
            [*enter(self._first_pid, self._host), "unshare", "--mount", "sh", "-c", shell],
            env={"PATH": os.environ["PATH"], "STRONGSWAN_CONF": "/run/strongswan.conf"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _START_S
        while True:
            try:
                with self.session() as vici:
                    vici.version()
                break
            except OSError:
                if not self._process.is_running() or time.monotonic() > deadline:
                    raise LabError(f"charon on {self._host} did not start:\n{self.log[-2000:]}") from None
                time.sleep(0.05)
        for tunnel in self._tunnels:
            self._load(tunnel)

    def close(self) -> None:
        """End it however it is, if it runs at all."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def stop(self) -> None:
        """Stop it in order: it tells its peers."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it: nobody is told."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop and start; its tunnels are loaded but not initiated."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Let it hang: it accepts connections and never answers."""
        self._running().send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._running().send(signal.SIGCONT)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A VICI session, with a timeout of 30 s. Raises OSError while charon is not there."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_ANSWER_S)
            connection.connect(str(outside_path(self._first_pid, self.vici_path)))
            yield Session(connection)

    def list_sas(self) -> list[ChildSa]:
        """All CHILD_SAs, in charon's order."""
        return list(self._sas())

    def installed(self, tunnel: str) -> ChildSa:
        """The newest CHILD_SA of a tunnel that is installed. Raises LabError if there is none."""
        found = [sa for sa in self._sas() if sa.name == tunnel and sa.state == "INSTALLED"]
        if not found:
            raise LabError(f"{self._host} has no CHILD_SA {tunnel}:\n{self.log[-2000:]}")
        return max(found, key=lambda sa: sa.uniqueid)

    def in_use(self, tunnel: str) -> list[ChildSa]:
        """Its CHILD_SAs, without those that were replaced, deleted, and stay only for late packets."""
        return [sa for sa in self._sas() if sa.name == tunnel and sa.state not in ("DELETING", "DELETED")]

    def initiate(self, tunnel: str) -> None:
        """Set a tunnel up and wait for it. Raises vici's CommandException with charon's reason."""
        with self.session() as vici:
            for _ in vici.initiate({"child": tunnel, "ike": tunnel, "timeout": "9000"}):
                pass

    def terminate(self, tunnel: str) -> None:
        """Take a tunnel down, with its IKE_SA."""
        with self.session() as vici:
            for _ in vici.terminate({"ike": tunnel, "timeout": "9000"}):
                pass

    def rekey(self, tunnel: str) -> ChildSa:
        """Rekey a CHILD_SA; gives the new one once it is there. Raises LabError if none comes."""
        before = self.installed(tunnel)
        with self.session() as vici:
            vici.rekey({"child": tunnel})
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline:
            for sa in self._sas():
                if sa.name == tunnel and sa.state == "INSTALLED" and sa.uniqueid > before.uniqueid:
                    return sa
            time.sleep(0.02)
        raise LabError(f"{self._host} did not rekey {tunnel}:\n{self.log[-2000:]}")

    def rekey_ike(self, tunnel: str) -> None:
        """Rekey the IKE_SA of a tunnel; its CHILD_SAs go along."""
        self._replace_ike(tunnel, {"ike": tunnel})

    def reauthenticate(self, tunnel: str) -> None:
        """Set the IKE_SA of a tunnel up anew, with its CHILD_SAs: the old ones are deleted first."""
        self._replace_ike(tunnel, {"ike": tunnel, "reauth": "yes"})

    def configure(self, tunnel: str, **changes: object) -> None:
        """Load a tunnel's connection again, with other values for some keys (swanctl.conf(5))."""
        self._load(next(plan for plan in self._tunnels if plan.name == tunnel), changes)

    def _replace_ike(self, tunnel: str, what: dict[str, str]) -> None:
        before = self._ike_ids(tunnel)
        with self.session() as vici:
            vici.rekey(what)
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline:
            after = self._ike_ids(tunnel)
            if after and not after & before:
                return
            time.sleep(0.05)
        raise LabError(f"{self._host} did not replace the IKE_SA of {tunnel}:\n{self.log[-2000:]}")

    def _ike_ids(self, tunnel: str) -> set[int]:
        with self.session() as vici:
            answers = list(vici.list_sas({"ike": tunnel}))
        return {
            int(ike["uniqueid"])
            for answer in answers
            for ike in answer.values()
            if ike["state"] == b"ESTABLISHED"
            and any(child["state"] == b"INSTALLED" for child in ike["child-sas"].values())
        }

    def _sas(self) -> Iterator[ChildSa]:
        with self.session() as vici:
            answers = list(vici.list_sas())
        for answer in answers:
            for ike in answer.values():
                for child in ike["child-sas"].values():
                    if "spi-out" in child:
                        yield ChildSa(
                            child["name"].decode(),
                            int(child["uniqueid"]),
                            int(child["reqid"]),
                            child["state"].decode(),
                            int(child["spi-in"], 16),
                            int(child["spi-out"], 16),
                            int(child["packets-in"]),
                            int(child["packets-out"]),
                        )

    def _load(self, tunnel: Tunnel, changes: Mapping[str, object] | None = None) -> None:
        here = tunnel.side(self._host)
        there = 1 - here
        remote = tunnel.nat if tunnel.nat and there == 0 else tunnel.outer[there]
        ids = [f"{end}.lab" for end in tunnel.ends]
        connection = {
            "version": "2",
            "local_addrs": [tunnel.outer[here]],
            "remote_addrs": [remote],
            "proposals": ["aes128-sha256-x25519"],
            "mobike": "no",
            "rekey_time": "0",  # only when a test asks for it
            "local": {"auth": "psk", "id": ids[here]},
            "remote": {"auth": "psk", "id": ids[there]},
            "children": {
                tunnel.name: {
                    "local_ts": [str(ip_network(tunnel.inner[here]))],
                    "remote_ts": [str(ip_network(tunnel.inner[there]))],
                    "esp_proposals": ["aes128-sha256"],
                    "rekey_time": "0",
                }
            },
        }
        with self.session() as vici:
            vici.load_shared({"id": tunnel.name, "type": "IKE", "data": _SECRET, "owners": ids})
            vici.load_conn({tunnel.name: {**connection, **(changes or {})}})

    def _end(self, number: signal.Signals) -> None:
        process = self._running()
        process.send(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ANSWER_S)
        self.close()

    def _running(self) -> Process:
        if self._process is None:
            raise LabError(f"charon on {self._host} is not running")
        return self._process

    def _conf(self) -> str:
        tries = 3 if PATIENCE == 1 else 6  # a peer is given up after 12 s, or after 75 s
        return _CONF.format(tries=tries, plugins=_PLUGINS.format(ipsec="" if kernel_has_esp() else "kernel-libipsec"))

    def _write(self, name: str, text: str) -> None:
        folder = outside_path(self._first_pid, self._folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
