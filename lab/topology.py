"""A topology: hosts, the cables between them, and the tunnels, read from a TOML file that draws its picture."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

FOLDER = Path(__file__).parent / "topologies"


@dataclass(frozen=True, slots=True)
class HostPlan:
    """One host: does it forward, does it run strongSwan, its protected addresses, its default gateways.

    `masquerade` is the interface behind which it hides the others (IPv4 NAT, other ports included), if it does.
    """

    name: str
    forward: bool = False
    charon: bool = False
    inner: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    masquerade: str = ""


@dataclass(frozen=True, slots=True)
class Link:
    """A cable: (host, interface) at both ends, and the addresses of each end in prefix notation."""

    ends: tuple[tuple[str, str], tuple[str, str]]
    addresses: tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Tunnel:
    """A tunnel between two hosts, the initiator first: outer and inner addresses in that order.

    The CHILD_SA and its connection bear the tunnel's name. `nat` is the address that the responder sees, if the
    initiator is behind a NAT.
    """

    name: str
    ends: tuple[str, str]
    outer: tuple[str, str]
    inner: tuple[str, str]
    nat: str = ""

    @property
    def initiator(self) -> str:
        """The host that initiates."""
        return self.ends[0]

    def side(self, host: str) -> int:
        """0 for the initiator, 1 for the responder. Raises ValueError for another host."""
        return self.ends.index(host)


@dataclass(frozen=True, slots=True)
class Topology:
    """A whole testbed."""

    name: str
    hosts: tuple[HostPlan, ...]
    links: tuple[Link, ...]
    tunnels: tuple[Tunnel, ...]


def names() -> list[str]:
    """The topologies that come with the lab."""
    return sorted(path.stem for path in FOLDER.glob("*.toml") if path.stem != "fwd")


def drawing(name: str) -> str:
    """The picture at the top of a topology's file."""
    lines = (FOLDER / f"{name}.toml").read_text().splitlines()
    return "\n".join(line[2:] for line in takewhile(lambda line: line.startswith("#"), lines))


def summary(name: str) -> str:
    """What a topology is for, in one line."""
    return drawing(name).partition("\n")[0]


def load(name: str) -> Topology:
    """Read one of them. Raises FileNotFoundError, or KeyError, ValueError, TypeError for a file that is wrong."""
    plan = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    return Topology(
        name,
        tuple(
            HostPlan(
                host,
                wanted.get("forward", False),
                wanted.get("charon", False),
                tuple(wanted.get("inner", ())),
                tuple(wanted.get("gateways", ())),
                wanted.get("masquerade", ""),
            )
            for host, wanted in plan["hosts"].items()
        ),
        tuple(_link(link) for link in plan["links"]),
        tuple(
            Tunnel(
                tunnel["name"],
                _pair(tunnel["ends"]),
                _pair(tunnel["outer"]),
                _pair(tunnel["inner"]),
                tunnel.get("nat", ""),
            )
            for tunnel in plan.get("tunnels", [])
        ),
    )


def _link(link: dict[str, list[str]]) -> Link:
    first, second = (end.split(":") for end in link["ends"])
    left, right = link["addresses"]
    return Link((_pair(first), _pair(second)), (tuple(left), tuple(right)))


def _pair(items: list[str]) -> tuple[str, str]:
    first, second = items
    return first, second
