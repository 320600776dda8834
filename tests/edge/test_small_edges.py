"""The edges of a few lines: what systemd hears, what the kernel counts for a queue, what rtnetlink says."""

import os
import socket
import subprocess
import sys

import pytest

from fwd.core.interfaces import AddressGone, AddressPresent, InterfaceSnapshot, InterfaceTable, LinkGone, LinkPresent
from fwd.edge import systemd
from fwd.edge.queue_stats import QueueStats, parse_queue_stats


@pytest.mark.parametrize("is_abstract", [False, True])
def test_notifications_reach_the_manager(tmp_path, monkeypatch, is_abstract):
    name = f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name if is_abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if is_abstract else name)
        systemd.notify("READY=1", "STATUS=fine")
        assert manager.recv(100) == b"READY=1\nSTATUS=fine"
        systemd.reloading()
        assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")


@pytest.mark.parametrize("address", ["", "relative", "/nonexistent/socket"])
def test_without_a_manager_nothing_happens(monkeypatch, address):
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.notify("READY=1")


@pytest.mark.parametrize(
    ("period", "pid", "interval"),
    [("30000000", None, 15.0), ("0", None, None), ("x", None, None), ("", None, None), ("2", "1", None)],
)
def test_the_watchdogs_interval(monkeypatch, period, pid, interval):
    monkeypatch.setenv("WATCHDOG_USEC", period)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    assert systemd.watchdog_interval_s() == interval


def test_the_kernels_counts_of_a_queue():
    text = "   19   1234     0 2  4016     1     2      3  1\n   20  -4131     5 2  4016    70     8    999  1\n"
    assert parse_queue_stats(text, 20) == QueueStats(5, 70, 8, 999)
    assert parse_queue_stats(text, 21) is None
    assert parse_queue_stats("nonsense\n20 x y\n", 20) is None


def test_the_interface_table():
    table = InterfaceTable()
    table.apply(LinkPresent(2, "eth0"))
    table.apply(AddressPresent(2, b"addr"))
    table.apply(LinkPresent(2, "wan0"))
    assert (table.name_of(2), table.name_of(3), table.owner_of(b"addr"), table.owner_of(b"x")) == (
        "wan0",
        "if3",
        2,
        None,
    )
    table.apply(AddressPresent(3, b"addr"))  # it moved; the old interface's farewell comes late
    table.apply(AddressGone(2, b"addr"))
    assert table.owner_of(b"addr") == 3
    table.apply(LinkGone(3))
    assert table.owner_of(b"addr") is None
    table.apply(InterfaceSnapshot((LinkPresent(9, "x"),), (AddressPresent(9, b"y"),)))
    assert (table.name_of(2), table.name_of(9), table.owner_of(b"y")) == ("if2", "x", 9)


@pytest.mark.parametrize("farewell", [AddressGone(3, b"fe80"), LinkGone(3)])
def test_an_address_on_two_interfaces_is_known_until_the_last_of_them_loses_it(farewell):
    table = InterfaceTable()
    table.apply(InterfaceSnapshot((), (AddressPresent(2, b"fe80"), AddressPresent(3, b"fe80"))))
    table.apply(AddressPresent(2, b"fe80"))  # said twice, which changes nothing
    assert table.owner_of(b"fe80") == 3
    table.apply(farewell)
    assert table.owner_of(b"fe80") == 2
    table.apply(AddressGone(2, b"fe80"))
    assert table.owner_of(b"fe80") is None


WATCH = """
import asyncio, subprocess
from fwd.core.interfaces import InterfaceTable
from fwd.edge.interfaces import InterfaceWatcher

async def main():
    table = InterfaceTable()
    watcher = InterfaceWatcher(table.apply)
    task = asyncio.create_task(watcher.run())
    await asyncio.wait_for(watcher.ready.wait(), 10)
    async def settle(command, condition):
        await (await asyncio.create_subprocess_shell(command)).wait()
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.02)
        raise SystemExit(f"after '{command}': {vars(table)}")
    await settle("ip link add name va type veth peer name vb", lambda: "va" in table._names.values())
    index = next(i for i, name in table._names.items() if name == "va")
    await settle("ip address add 10.0.0.1/24 dev va", lambda: table.owner_of(bytes([10, 0, 0, 1])) == index)
    await settle("ip link set va name vc", lambda: table.name_of(index) == "vc")
    await settle("ip address del 10.0.0.1/24 dev vc", lambda: table.owner_of(bytes([10, 0, 0, 1])) is None)
    await settle("ip link del vc", lambda: table.name_of(index) == f"if{index}")
    task.cancel()
    print("all seen")

asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a network namespace")
def test_interface_changes_are_seen_live():
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", WATCH], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "all seen\n", done.stderr
