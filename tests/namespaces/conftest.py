"""Labs for the tests: real namespaces, real strongSwan, real ESP. They need root, as does all that they test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Protocol

import pytest

from lab import Lab
from lab.lab import LabError, wait_for
from lab.strongswan import strongswan_root


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without root nothing here can run; the run says so instead of passing."""
    if os.geteuid() != 0:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs root: namespaces, NFQUEUE and strongSwan"))
    elif items:
        with suppress(LabError):  # each test says so itself
            strongswan_root()  # the first time it takes long, and is to be no test's time


@pytest.fixture
def transit() -> Iterator[Lab]:
    yield from lab_of("transit")


@pytest.fixture
def terminated() -> Iterator[Lab]:
    yield from lab_of("terminated")


@pytest.fixture
def nat() -> Iterator[Lab]:
    yield from lab_of("nat")


@pytest.fixture
def demo() -> Iterator[Lab]:
    yield from lab_of("demo")


#: Counts what fwd has to account for, before fwd sees it and by rules that are not its own.
WITNESS = """
table inet witness {
  chain input { type filter hook input priority raw; iif != lo jump count; }
  chain forward { type filter hook forward priority raw; jump count; }
  chain output { type filter hook output priority raw; oif != lo jump count; }
  chain count {
    meta l4proto esp counter
    udp dport { 500, 4500 } counter return
    udp sport { 500, 4500 } counter
  }
}
"""


def lab_of(topology: str) -> Iterator[Lab]:
    """A lab for one test; what fwd logged is printed at its end, which pytest shows if the test failed."""
    with Lab(topology) as lab:
        path = lab.hosts["fwd"].path("/run/witness.nft")
        path.write_text(WITNESS)
        lab.hosts["fwd"].run(["nft", "-f", "/run/witness.nft"])
        yield lab
        log = lab.hosts["fwd"].path("/run/fwd.log")
        if log.exists():
            print(log.read_text(errors="replace")[-4000:])


def witnessed(lab: Lab) -> int:
    """Packets that came by for fwd to handle since the lab was built, by the kernel's count."""
    listed = lab.hosts["fwd"].run(["nft", "list", "chain", "inet", "witness", "count"]).stdout
    return sum(int(line.split("packets")[1].split()[0]) for line in listed.splitlines() if "packets" in line)


def has_rules(lab: Lab) -> bool:
    """Whether fwd's rules, of whatever kind, are in place on its host."""
    command = "nft list tables; for p in iptables-nft ip6tables-nft; do $p -t mangle -S; done"
    listed = lab.hosts["fwd"].run(["sh", "-c", command]).stdout
    return "fwd_dataplane" in listed or "FWD-" in listed


class Counts(Protocol):
    """fwd, by whatever way it is asked."""

    def counters(self) -> dict[str, int]: ...


def accounted(fwd: Counts) -> int:
    """Packets in sessions and in drop counters, by fwd's own count."""
    counters = fwd.counters()
    drops = sum(value for name, value in counters.items() if name.startswith("flow_parse_"))
    drops += sum(value for name, value in counters.items() if name.startswith("flow_limit_"))
    drops += sum(counters[name] for name in ("flow_table_full", "flow_internal_error"))
    drops += counters["queue_kernel_drop"] + counters["queue_socket_drop"]
    return counters["pkt_session"] + drops


def assert_balanced(lab: Lab, fwd: Counts) -> int:
    """fwd's count and the kernel's are equal: soon, and at one moment, for IKE goes on in the background. Gives it."""
    seen: list[int] = []

    def is_balanced() -> bool:
        seen[:] = [witnessed(lab), accounted(fwd), witnessed(lab)]
        return len(set(seen)) == 1

    try:
        wait_for(is_balanced, "fwd's count equals the kernel's")
    except LabError:
        raise AssertionError(f"the kernel's count, fwd's, the kernel's again: {seen}; {fwd.counters()}") from None
    return seen[0]
