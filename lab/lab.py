"""A running testbed: hosts, their strongSwans, the tunnels between them, and fwd on one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fwd.rpc import DEFAULT_SOCKET

from . import ping
from .capture import Capture
from .sandbox import PATIENCE, LabError, Process, Sandbox, enter, outside_path
from .strongswan import Charon, ChildSa, strongswan_root
from .topology import FOLDER, Topology, Tunnel, load

#: Where fwd and fwctl are: FWD_LAB_PROGRAMS, or the same installation as the Python that runs the lab.
PROGRAMS = Path(os.environ.get("FWD_LAB_PROGRAMS") or Path(sys.executable).parent)

_START_S = 40.0 * PATIENCE


class Host:
    """One network namespace of the lab."""

    def __init__(self, first_pid: int, name: str) -> None:
        self._first_pid = first_pid
        self.name = name
        self.charon: Charon | None = None
        self._processes: list[Process] = []

    def run(self, command: Sequence[str], timeout: float = 30, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; its output is captured. Raises LabError with its words if it fails."""
        done = subprocess.run(
            [*enter(self._first_pid, self.name), *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout * PATIENCE,
            check=False,
        )
        if check and done.returncode:
            raise LabError(f"{self.name}: {' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def start(self, command: Sequence[str], **options: Any) -> Process:
        """Start a program; the lab ends it at the latest."""
        process = Process([*enter(self._first_pid, self.name), *command], stdin=subprocess.DEVNULL, **options)
        self._processes.append(process)
        return process

    def path(self, inside: str) -> Path:
        """A file of the lab as it is reached from outside."""
        return outside_path(self._first_pid, inside)

    def capture(self, interface: str, expression: str = "esp") -> Capture:
        """Let tcpdump listen; when this returns it does."""
        return Capture(self._first_pid, self.name, interface, expression)

    def close(self) -> None:
        """End what was started here."""
        if self.charon is not None:
            self.charon.close()
        for process in self._processes:
            process.end()


class Fwd:
    """One fwd daemon on a host of the lab."""

    def __init__(self, host: Host, config: str, environment: dict[str, str] | None = None) -> None:
        self._host = host
        self._config_path = "/run/fwd.toml"
        self._log_path = host.path("/run/fwd.log")
        host.path(self._config_path).write_text(config)
        with self._log_path.open("a") as log:
            self.process = host.start(
                [str(PROGRAMS / "fwd"), "--config", self._config_path], stdout=log, stderr=log, env=environment
            )
        deadline = time.monotonic() + _START_S
        # The socket comes last; asked before, fwctl would take the time that fwd needs to start.
        socket = host.path(DEFAULT_SOCKET)
        while not socket.exists() or self.fwctl("show", "system", "info", check=False).returncode:
            if not self.process.is_running() or time.monotonic() > deadline:
                self.process.end()
                raise LabError(f"fwd did not start:\n{self.log[-3000:]}")
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What this fwd and those before it in this lab logged."""
        return self._log_path.read_text(errors="replace")

    def fwctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run fwctl on the daemon's host."""
        # Without a width: readline, which pytest loads, exports that of a terminal to all children.
        return self._host.run(["env", "-u", "COLUMNS", str(PROGRAMS / "fwctl"), *words], check=check)

    def json(self, *words: str) -> Any:
        """What `fwctl --json` prints."""
        return json.loads(self.fwctl("--json", *words).stdout)

    def sessions(self, **words: str) -> list[dict[str, Any]]:
        """`show session all` with filter words, whose underscores stand for dashes (from_ for from)."""
        chosen = [word for key, value in words.items() for word in (key.rstrip("_").replace("_", "-"), value)]
        found: list[dict[str, Any]] = self.json("show", "session", "all", *(["filter", *chosen] if chosen else []))[
            "sessions"
        ]
        return found

    def counters(self) -> dict[str, int]:
        """The global counters."""
        return {counter["name"]: counter["value"] for counter in self.json("show", "counter", "global")["counters"]}

    def reload(self, config: str) -> None:
        """Write another configuration and send SIGHUP; returns when the daemon has logged what it made of it."""
        seen = len(self.log)
        self._host.path(self._config_path).write_text(config)
        self.process.send(signal.SIGHUP)

        def is_over() -> bool:
            if not self.process.is_running():
                raise LabError(f"fwd has ended instead of a reload:\n{self.log[-3000:]}")
            return "reloaded" in self.log[seen:]

        try:
            wait_for(is_over, "fwd read its configuration again")
        except LabError as error:
            raise LabError(f"{error}:\n{self.log[-3000:]}") from None

    def stop(self) -> int:
        """Stop it in order; gives its exit status."""
        self.process.send(signal.SIGTERM)
        return self.process.wait(60 * PATIENCE)

    def kill(self) -> None:
        """Kill it."""
        self.process.end()


_ESP_SOURCE = Path(__file__).parent / "esp_source.py"


class Lab:
    """A testbed built from a topology; as a context manager it is gone at the end.

    charon runs where the topology says, with its tunnels loaded; `initiate` sets them up.
    """

    def __init__(
        self, topology: str, *, is_detached: bool = False, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.topology: Topology = load(topology)
        root = strongswan_root(say) if any(host.charon for host in self.topology.hosts) else Path()
        self.sandbox = Sandbox(is_detached=is_detached)
        self.hosts: dict[str, Host] = {}
        try:
            self._build(root)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything."""
        for host in self.hosts.values():
            host.close()
        self.sandbox.close()

    def tunnel(self, name: str) -> Tunnel:
        """A tunnel of the topology by its name."""
        return next(tunnel for tunnel in self.topology.tunnels if tunnel.name == name)

    def charon(self, host: str) -> Charon:
        """The charon of a host. Raises LabError if the topology gave it none."""
        charon = self.hosts[host].charon
        if charon is None:
            raise LabError(f"{host} runs no strongSwan in this topology")
        return charon

    def initiate(self, *names: str) -> None:
        """Set up these tunnels, or all of them."""
        for tunnel in self.topology.tunnels:
            if not names or tunnel.name in names:
                self.charon(tunnel.initiator).initiate(tunnel.name)

    def rekey(self, name: str, host: str) -> ChildSa:
        """Rekey a tunnel's CHILD_SA from one end, until both send with the new one; gives it as that end has it.

        The other end goes on with the old one until it hears that it is deleted.
        """
        new = self.charon(host).rekey(name)

        def is_over() -> bool:
            used = [self.charon(end).in_use(name) for end in self.tunnel(name).ends]
            spis = [[{sa.spi_in, sa.spi_out} for sa in sas] for sas in used]
            return spis == [[{new.spi_in, new.spi_out}]] * 2

        wait_for(is_over, f"both ends of {name} send with the new SA")
        return new

    def ping(self, name: str, count: int = 3, interval_s: float = 0.02, size: int = 56) -> int:
        """Ping through a tunnel, from the initiator's inner address to the other; gives how many answers came."""
        tunnel = self.tunnel(name)
        command = ping.command(*tunnel.inner, count, interval_s, size)
        done = self.hosts[tunnel.initiator].run(command, timeout=count * interval_s + 30, check=False)
        return ping.tally(done.stderr).received

    def start_ping(self, name: str, count: int, interval_s: float = 0.02, size: int = 56) -> Process:
        """The same in the background; it ends by itself after `count`, and `lab.ping.outcome` tells of it."""
        tunnel = self.tunnel(name)
        command = ping.command(*tunnel.inner, count, interval_s, size)
        return self.hosts[tunnel.initiator].start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def start_source(self, host: str, source: str, destination: str, **options: float) -> Process:
        """Send raw ESP from a host, as the options of esp_source.py say; it ends by itself."""
        words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", f"{value}")]
        return self.hosts[host].start([sys.executable, str(_ESP_SOURCE), source, destination, *words])

    def start_fwd(self, config: str | None = None, host: str = "fwd", environment: dict[str, str] | None = None) -> Fwd:
        """Start fwd, with the lab's own configuration unless another is given. Raises LabError with its log."""
        return Fwd(self.hosts[host], default_config() if config is None else config, environment)

    def _build(self, root: Path) -> None:
        first_pid = self.sandbox.first_pid
        script = []
        for plan in self.topology.hosts:
            self.hosts[plan.name] = Host(first_pid, plan.name)
            on = f"ip netns exec {plan.name}"
            forward = int(plan.forward)
            script += [
                f"ip netns add {plan.name}",
                f"{on} sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.all.accept_dad=0",
                f"{on} sysctl -qw net.ipv4.ip_forward={forward} net.ipv6.conf.all.forwarding={forward}",
                f"{on} ip link set lo up",
                *(f"{on} ip address add {address} dev lo" for address in plan.inner),
            ]
        for link in self.topology.links:
            (left, left_name), (right, right_name) = link.ends
            script.append(f"ip link add {left_name} netns {left} type veth peer name {right_name} netns {right}")
            for (host, interface), addresses in zip(link.ends, link.addresses, strict=True):
                on = f"ip netns exec {host}"
                script += [f"{on} ip address add {address} dev {interface}" for address in addresses]
                script.append(f"{on} ip link set {interface} up")
        for plan in self.topology.hosts:
            on = f"ip netns exec {plan.name}"
            script += [f"{on} ip route add default via {gateway}" for gateway in plan.gateways]
            if plan.masquerade:
                script += [
                    f"{on} nft 'add table ip nat'",
                    f"{on} nft 'add chain ip nat post {{ type nat hook postrouting priority srcnat ; }}'",
                    f"{on} nft 'add rule ip nat post oifname {plan.masquerade} masquerade random'",
                ]
        command = [*enter(first_pid), "sh", "-ec", "\n".join(script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * PATIENCE, check=False)
        if done.returncode:
            raise LabError(f"cannot build topology {self.topology.name}: {done.stderr.strip()}")
        for plan in self.topology.hosts:
            if plan.charon:
                tunnels = tuple(tunnel for tunnel in self.topology.tunnels if plan.name in tunnel.ends)
                charon = Charon(first_pid, plan.name, tunnels, root)
                self.hosts[plan.name].charon = charon
                charon.start()


def default_config() -> str:
    """The configuration that fwd runs with in a lab."""
    return (FOLDER / "fwd.toml").read_text()


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 30) -> Any:
    """Ask again and again until the condition holds; gives its value. Raises LabError if it never does.

    The time is generous, for machines that do other work too.
    """
    deadline = time.monotonic() + timeout_s * PATIENCE
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout_s * PATIENCE:g} s in vain until {what}")
        time.sleep(0.05)
    return value
