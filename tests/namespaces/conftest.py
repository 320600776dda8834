"""Labs for the tests: real namespaces, real strongSwan, real ESP. They need root, as does all that they test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lab import Lab
from lab.lab import Fwd


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without root nothing here can run; the run says so instead of passing."""
    if os.geteuid() != 0:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs root: namespaces, NFQUEUE and strongSwan"))


@pytest.fixture
def transit() -> Iterator[Lab]:
    yield from lab_of("transit")


@pytest.fixture
def terminated() -> Iterator[Lab]:
    yield from lab_of("terminated")


@pytest.fixture
def demo() -> Iterator[Lab]:
    yield from lab_of("demo")


def lab_of(topology: str) -> Iterator[Lab]:
    """A lab for one test; what fwd logged is printed at its end, which pytest shows if the test failed."""
    with Lab(topology) as lab:
        yield lab
        log = lab.hosts["fwd"].path("/run/fwd.log")
        if log.exists():
            print(log.read_text(errors="replace")[-4000:])


def kernel_queued(fwd_host_rules: str) -> int:
    """Packets that the kernel queued by its own count: `iptables -t mangle -nvxL` of one family."""
    return sum(int(line.split()[0]) for line in fwd_host_rules.splitlines() if "NFQUEUE" in line)


def all_queued(lab: Lab) -> int:
    """Packets that fwd's rules queued, both families, as the kernel counted them."""
    host = lab.hosts["fwd"]
    nft = host.run(["nft", "list", "table", "inet", "fwd_dataplane"], check=False)
    if nft.returncode == 0:
        return sum(int(line.split("packets")[1].split()[0]) for line in nft.stdout.splitlines() if "queue" in line)
    return sum(
        kernel_queued(host.run([program, "-t", "mangle", "-nvxL"]).stdout)
        for program in ("iptables-nft", "ip6tables-nft")
    )


def accounted(fwd: Fwd) -> int:
    """Packets in sessions and in drop counters, by fwd's own count."""
    counters = fwd.counters()
    drops = sum(value for name, value in counters.items() if name.startswith("flow_parse_"))
    drops += sum(counters[name] for name in ("flow_table_full", "flow_internal_error"))
    drops += counters["queue_kernel_drop"] + counters["queue_socket_drop"]
    return counters["pkt_session"] + drops
