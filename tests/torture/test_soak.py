"""Nothing grows: an hour of churn by a clock that is moved, and ten minutes of it on real packets."""

from __future__ import annotations

import os
import random
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from subprocess import DEVNULL
from typing import Any

import pytest

from fwd import api as api_module
from fwd.api import Api
from fwd.cli.client import Client
from fwd.core import sa as sa_module
from fwd.core import session as session_module
from fwd.core.firewall import Hook
from fwd.core.health import Trouble
from fwd.core.interfaces import AddressPresent, LinkGone, LinkPresent
from fwd.core.sa import SaDeleted, SaEstablished, SaRekeyed, SaSnapshot, SaSourceAlive, SaSourceLost
from fwd.core.settings import PassThrough, TransitPorts, UnknownSpi
from fwd.rpc import RpcError
from lab.lab import default_config, wait_for
from tests.builders import HERE, LEFT, PEER, RIGHT, WAN, Bench, child_sa, esp, esp_in_udp, ike, packed
from tests.namespaces.conftest import assert_balanced
from tests.torture.conftest import in_full
from tests.torture.test_control_attacks import ATTACKER, PATH, READERS, as_user
from tests.torture.test_strongswan_faults import rss_mib

#: Values: what is in them is not looked into.
ATOMS = (str, bytes, int, float, type(None), type)


def census(*roots: object) -> Counter[str]:
    """How many items all containers have that can be reached, by the class and the attribute that they belong to."""
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    waiting: deque[tuple[str, object]] = deque((type(root).__name__, root) for root in roots)
    while waiting:
        name, found = waiting.popleft()
        if isinstance(found, ATOMS) or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, dict):
            sizes[name] += len(found)
            waiting.extend((name, item) for pair in found.items() for item in pair)
        elif isinstance(found, (list, tuple, set, frozenset, deque)):
            sizes[name] += len(found)
            waiting.extend((name, item) for item in found)
        elif type(found).__module__.startswith(("fwd.", "tests.")):
            sizes[type(found).__name__] += 1
            waiting.extend((f"{type(found).__name__}.{key}", value) for key, value in attributes(found))
    return sizes


def attributes(found: object) -> Iterator[tuple[str, Any]]:
    yield from getattr(found, "__dict__", {}).items()
    for kind in type(found).__mro__:
        for key in getattr(kind, "__slots__", ()):
            if hasattr(found, key):
                yield key, getattr(found, key)


class Churn:
    """A host on which everything happens again and again, a second at a time."""

    def __init__(self, **changes: Any) -> None:
        self.changes = {
            "keep_ended": 200,
            "keep_ended_s": 60,
            "timeouts_s": dict.fromkeys(("ipsec-esp", "ipsec-udp", "ipsec-esp-udp"), 120) | {"ike": 30},
            "max_sessions": 2000,
            **changes,
        }
        self.bench = Bench(fast_path=True, **self.changes)
        self.check, self.bench.check = self.bench.check, lambda: None  # type: ignore[method-assign]
        self.bench.firewall.use_fast_path(True)
        bench = self.bench
        self.api = Api(bench.firewall, lambda: bench.now, "/nowhere", dict, lambda: None, lambda _: None, dict)
        self.random = random.Random(1)
        self.number = 0
        self.up: dict[int, Any] = {}

    def second(self, second: int) -> None:
        bench, pick = self.bench, self.random.choice
        self.number += 1
        number = self.number
        for tunnel in range(20):
            self.tunnel(tunnel, second)
        for spi in range(3):  # nobody's SPIs, some of which are claimed later
            bench.receive(esp(PEER, HERE, 0x5000_0000 + 3 * number + spi))
        bench.forward(esp(f"10.{number >> 8 & 7}.{number & 255}.1", RIGHT, number))
        bench.forward(esp(LEFT, RIGHT, 0x6000_0000 + number // 7, number))
        bench.forward(esp(RIGHT, LEFT, 0x7000_0000 + number // 7, number), to_left=True)
        bench.forward(esp_in_udp(f"10.99.{number & 63}.1", RIGHT, number))
        for packet in (ike(f"10.98.{number & 63}.1", RIGHT), ike(f"10.98.{number & 63}.1", RIGHT, 4500)):
            bench.forward(packet)
        bench.receive(os.urandom(40))
        if second % 30 == 0:
            bench.sas(SaSnapshot(tuple(self.up.values())))
        elif second % 5 == 0:
            bench.sas(pick([SaSourceAlive(), SaSourceLost("away")]))
        index = 100 + number  # an interface that comes, is used, and goes
        bench.firewall.apply_interface(LinkPresent(index, f"veth{number}", 1500))
        bench.firewall.apply_interface(AddressPresent(index, packed(f"10.97.{number >> 8 & 255}.{number & 255}")))
        bench._packet(esp(LEFT, RIGHT, number), Hook.FORWARD, index, WAN)
        bench.firewall.apply_interface(LinkGone(index))
        if second % 60 == 0:
            mode = list(PassThrough)[second // 60 % 2]  # the same one at both marks: what is held depends on it
            bench.firewall.reconfigure(replace(bench.firewall.settings, pass_through=mode))
            bench.clear(*bench.sessions[::17])
        self.ask(pick)
        bench.wait(1)
        while (event := bench.firewall.next_event()) is not None:
            self.api.note_event(event)

    def tunnel(self, tunnel: int, second: int) -> None:
        """A rekey each ten seconds, with or without news of it; now and then the tunnel goes, and comes back."""
        bench = self.bench
        serial = self.number * 32 + tunnel
        old = self.up.get(tunnel)
        new = child_sa(0x1000_0000 + serial, 0x2000_0000 + serial, uniqueid=serial, reqid=tunnel + 1)
        if old is None:
            bench.receive(esp(PEER, HERE, new.spi_in))  # faster than the news
            bench.sas(SaEstablished(new))
            self.up[tunnel] = new
        elif (second + tunnel) % 97 == 0:
            bench.sas(SaDeleted(old))
            del self.up[tunnel]
        elif (second + tunnel) % 10 == 0:
            bench.sas(SaRekeyed(old, new) if second % 3 else SaEstablished(new))
            self.up[tunnel] = new
        else:
            bench.receive(esp(PEER, HERE, old.spi_in, second))
            bench.send(esp(HERE, PEER, old.spi_out, second))

    def ask(self, pick: Any) -> None:
        """Questions leave no trace, whatever they are about."""
        table = list(self.bench.firewall.table)
        chosen = [pick(table), *[session for session in table if session.is_provisional][-3:]]
        for session_id in [session.id for session in (*chosen, *self.bench.firewall.strangers)][:8]:
            for method in ("session.get", "explain.session"):
                try:
                    self.api.dispatch(method, {"id": session_id})
                except RpcError:
                    pass
        self.api.dispatch("tunnel.detail", {})
        self.api.dispatch("explain.packet", {"src": LEFT, "dst": RIGHT, "spi": self.number})


@pytest.mark.timeout(600)
@pytest.mark.parametrize("transit_ports", in_full(list(TransitPorts), [TransitPorts.SPI]))
def test_after_an_hour_of_churn_nothing_has_grown(transit_ports, monkeypatch):
    """An hour by the clock that the core is given. `make test` has a tenth of it, with memories that fill as soon."""
    monkeypatch.setattr(sa_module, "FORMER_SPIS_KEPT", in_full(4096, 256))
    monkeypatch.setattr(session_module, "GENERATIONS_KEPT", in_full(32, 8))
    monkeypatch.setattr(api_module, "EVENTS_KEPT", in_full(4096, 512))
    churn = Churn(transit_ports=transit_ports, unknown_spi=UnknownSpi.GENERIC)
    minutes = in_full(60, 8)
    marks = {60 * minutes // 2, 60 * minutes}
    counted = {}
    for second in range(1, 60 * minutes + 1):
        churn.second(second)
        if second in marks:
            churn.check()
            counted[second] = census(churn.bench.firewall, churn.api)
    half, whole = (counted[second] for second in sorted(counted))
    grown = {name: (half[name], size) for name, size in whole.items() if size > 1.25 * half[name] + 100}
    print(dict(whole.most_common(25)))
    assert not grown
    assert whole["Watch._records"] <= len(churn.bench.firewall.table)
    assert churn.bench.firewall.counters.values[Trouble.UNKNOWN_SPI.counter]  # there was trouble enough


def handles(pid):
    """File descriptors, threads, and memory in MiB."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")), rss_mib(pid)


@pytest.mark.timeout(900)
def test_ten_minutes_of_everything_on_real_packets(demo):
    """Tunnels that are used, rekeyed, cut and set up again; charon killed; unknown SPIs; questions; attacks."""
    host = demo.hosts["fwd"]
    fwd = demo.start_fwd(default_config() + '[control]\nread-groups = ["games"]\n[timeouts]\nike = 10\n')
    client = Client(str(host.path("/run/fwd/control.sock")))
    seconds = in_full(600, 6)
    demo.initiate("sites-v4", "sites-v6", "peer-v6")
    pings = [demo.start_ping(name, count=20 * seconds, interval_s=0.05) for name in ("sites-v4", "sites-v6", "peer-v6")]
    wait_for(lambda: client.call("tunnel.list")["source"]["connected"], "charon is heard")
    before, marks = handles(fwd.pid), []
    turn = 0
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        turn += 1
        spi = 100_000 + 1000 * turn
        for destination in ("198.51.100.1", "203.0.113.2"):
            demo.start_source("site-a", "198.51.100.2", destination, count=200, spis=20, first_spi=spi, rate=2000)
        demo.charon(("fwd", "peer")[turn % 2]).rekey("peer-v6")
        demo.charon("site-a").rekey("sites-v4")
        demo.initiate("peer-v4")
        wait_for(lambda: demo.ping("peer-v4") == 3, "packets flow")
        sessions = list(client.sessions({}))
        for session in sessions[-20:]:
            with suppress(RpcError):  # it has just ended
                client.call("explain.session", id=session["id"])
        client.tunnels(None)
        attack = ("crowd", "pipeline", "garbage", "unread")[turn % 4]
        host.start([*as_user(4001, READERS), ATTACKER, PATH, attack, "1"], stdout=DEVNULL).wait(60)
        demo.charon("peer").terminate("peer-v4")
        if turn % 10 == 9:
            demo.charon("fwd").kill()
            demo.charon("fwd").start()
            demo.initiate("peer-v6")
        wait_for(lambda: client.call("tunnel.list")["source"]["connected"], "charon is heard")
        marks.append((round(time.monotonic() - begun), *handles(fwd.pid)))
    for ping in pings:
        ping.end()
    # A client that does not read is hung up on after ten seconds.
    wait_for(lambda: handles(fwd.pid)[:2] == before[:2], f"descriptors and threads are {before[:2]} again")
    client.close()
    print("seconds, descriptors, threads, MiB:", *marks[:: max(1, len(marks) // 20)], marks[-1])
    warm = marks[len(marks) // 3]
    assert marks[-1][3] - warm[3] < 16
    assert_balanced(demo, fwd)
    assert "Traceback" not in fwd.log and "defect" not in fwd.log
