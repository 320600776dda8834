"""`make bench`: measures, prints the tables, writes results.json and, of it, the table and the plot of the docs."""

from __future__ import annotations

import gc
import json
import os
import platform
import shlex
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from fwd.config import Config
from fwd.core.firewall import Firewall, Hook
from lab.esp_source import FIRST_SPI
from lab.lab import Fwd
from lab.root_folder import root_folder

from . import report
from .rig import QUEUE, SINK, Rig, cpu_seconds, resident_bytes

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"

REPETITIONS = 5
FORWARDED = 400_000
FLOOD = 1_500_000
SESSIONS = (1, 1_000, 10_000, 100_000)
#: An SPI starts: packets of it, and how many a second. 100,000 is more than one process sends.
STARTED = 10_000
STARTING_RATES = (10_000, 30_000, 100_000)
STARTS = 20

console = Console()


@dataclass
class Result:
    """One measurement: its values in the order in which they were taken."""

    group: str
    name: str
    unit: str
    values: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.values)


class Results:
    """All measurements of one run."""

    def __init__(self) -> None:
        self.all: dict[tuple[str, str], Result] = {}

    def add(self, group: str, name: str, unit: str, value: float, note: str = "") -> None:
        """Take one value."""
        result = self.all.setdefault((group, name), Result(group, name, unit))
        result.values.append(value)
        result.note = note or result.note

    def median(self, group: str, name: str) -> float:
        """The median of what was taken."""
        return self.all[group, name].median


# --- forwarding: what the fast path costs -------------------------------------------------------------------


def fill(rig: Rig, fwd: Fwd, sessions: int) -> None:
    """Let fwd decide on so many sessions, one SPI each, until the kernel has them all."""
    client = rig.client()
    for _ in range(20):
        rig.send(sessions, sources=sessions, rate=10_000)
        if client.call("session.info")["fast_path"]["spis_in_kernel"] >= sessions:
            client.close()
            return
    raise RuntimeError(f"the kernel never had {sessions} elements: {fwd.log[-1000:]}")


def forwarding(results: Results) -> None:
    """Plain forwarding and the fast path, by turns, with the same packets: CPU time a packet, all in all."""
    for sessions in SESSIONS:
        with Rig() as plain, Rig() as fast:
            fwd = fast.start()
            fill(fast, fwd, sessions)
            if sessions == 100_000:
                sweep(results, fast, fwd)
            sweeping = cpu_share(fwd.process.pid)
            used, began = cpu_seconds(fwd.process.pid), time.monotonic()
            packets = 0
            for turn in range(REPETITIONS + 1):
                for name, rig in (("plain forwarding", plain), ("fast path", fast)):
                    before = rig.arrived
                    seconds = rig.send(FORWARDED, sources=sessions)
                    arrived = rig.settled(0.1) - before
                    if arrived != FORWARDED:
                        console.print(f"  {name}: {FORWARDED - arrived} of {FORWARDED} packets were lost")
                    if turn:  # the first one warms up
                        results.add(
                            "forwarding", f"{name}, {sessions:,} sessions", "ns/packet", seconds / arrived * 1e9
                        )
                    packets += arrived if rig is fast else 0
            used, elapsed = cpu_seconds(fwd.process.pid) - used, time.monotonic() - began
            results.add("daemon", f"CPU of fwd without traffic, {sessions:,} sessions", "percent", sweeping * 100)
            results.add("daemon", f"CPU of fwd with traffic, {sessions:,} sessions", "percent", used / elapsed * 100)
            results.add(
                "daemon",
                f"CPU of fwd for packets on the fast path, {sessions:,} sessions",
                "ns/packet",
                max(0.0, used - sweeping * elapsed) / packets * 1e9,
                "what it uses more with traffic than without",
            )


def cpu_share(pid: int, seconds: float = 4.0) -> float:
    """What share of a core a process uses while nothing is sent: fwd sweeps the counters by time, not by packets."""
    before, began = cpu_seconds(pid), time.monotonic()
    time.sleep(seconds)
    return (cpu_seconds(pid) - before) / (time.monotonic() - began)


def sweep(results: Results, rig: Rig, fwd: Fwd) -> None:
    """Reading all counters: how long until all are in, and how long anybody waited for fwd meanwhile."""
    for _ in range(3):
        _sweep_once(results, rig, fwd)


def _sweep_once(results: Results, rig: Rig, fwd: Fwd) -> None:
    client = rig.client()
    recv = client.call("session.info")["sessions_allocated"]
    before = counter(client, "pkt_fast_path")
    rig.send(recv, sources=recv)
    started = time.monotonic()
    stalls = []
    while counter(client, "pkt_fast_path") < before + recv and time.monotonic() - started < 60:
        asked = time.monotonic()
        client.call("system.info")
        stalls.append(time.monotonic() - asked)
        time.sleep(0.01)
    results.add("daemon", f"all counters of {recv:,} sessions read", "s", time.monotonic() - started)
    results.add("daemon", "longest wait for an answer while they are read", "ms", max(stalls) * 1000)
    client.close()


def counter(client: Any, name: str) -> int:
    """One global counter."""
    return int(next(c["value"] for c in client.call("counter.list")["counters"] if c["name"] == name))


# --- the slow path: what a packet costs that the daemon sees -------------------------------------------------


@contextmanager
def fwd_alone(rig: Rig) -> Iterator[Fwd]:
    """fwd with the fast path off."""
    fwd = rig.start('fast-path = "off"\n')
    try:
        yield fwd
    finally:
        fwd.stop()


def suricata(rig: Rig, root: Path, mode: str, batch: int) -> Any:
    """Suricata 7 in NFQ mode without rules or outputs: it decodes, tracks and accepts."""
    options = f"-q {QUEUE} -S /dev/null -k none --runmode {mode} -l /run --pidfile /run/suricata.pid"
    settings = {
        "nfq.batchcount": batch,
        "outputs.0.fast.enabled": "no",
        "outputs.1.eve-log.enabled": "no",
        "stats.enabled": "no",
    }
    words = " ".join(f"--set {key}={value}" for key, value in settings.items())
    shell = (
        f"mount -t tmpfs tmpfs {root}/run && mount --rbind /dev {root}/dev && mount -t proc proc {root}/proc"
        f" && exec chroot {root} /usr/bin/suricata -c /etc/suricata/suricata.yaml {options} {words}"
    )
    return rig.reader(["unshare", "--mount", "sh", "-c", shell], "Engine started")


def slow_path(results: Results) -> None:
    """Who reads a flooded queue how fast, one CPU each, by turns."""
    program = Path("/tmp") / f"fwd-bench-queue-{os.getpid()}"
    subprocess.run(["gcc", "-O2", "-o", program, FOLDER / "queue.c", "-lnetfilter_queue", "-lnfnetlink"], check=True)
    root = root_folder("suricata-trixie", "suricata", console.print)
    readers: dict[str, Callable[[Rig], Any]] = {
        "empty netfilterqueue callback": lambda rig: rig.reader(
            [sys.executable, str(FOLDER / "empty_callback.py"), str(QUEUE)], "ready"
        ),
        "fwd, fast path off": fwd_alone,
        "C on libnetfilter_queue": lambda rig: rig.reader([str(program), str(QUEUE)], "ready"),
        "Suricata 7, autofp (its default)": lambda rig: suricata(rig, root, "autofp", 1),
        "Suricata 7, workers": lambda rig: suricata(rig, root, "workers", 1),
        "Suricata 7, workers, batches of 20": lambda rig: suricata(rig, root, "workers", 20),
    }
    try:
        for _ in range(REPETITIONS):
            for name, reader in readers.items():
                with Rig() as rig, reader(rig):
                    rig.send(1000, rate=5000)
                    before = rig.settled()
                    started = time.monotonic()
                    flood = rig.source.start(rig.command(FLOOD), stdout=subprocess.DEVNULL)
                    flood.wait(120)
                    seconds = time.monotonic() - started
                    results.add("slow path", name, "ns/packet", seconds / (rig.arrived - before) * 1e9)
    finally:
        program.unlink()


# --- setting sessions up -----------------------------------------------------------------------------------------


def set_up(results: Results) -> None:
    """Every packet a new session: how many a second, and what each weighs."""
    for _ in range(REPETITIONS):
        with Rig() as rig:
            fwd = rig.start()
            client = rig.client()
            empty = resident_bytes(fwd.process.pid)
            flood = rig.source.start(rig.command(100_000, sources=100_000, rate=60_000), stdout=subprocess.DEVNULL)
            samples: list[tuple[float, int]] = []
            while flood.is_running():
                samples.append((time.monotonic(), int(client.call("system.info")["sessions"].split()[0])))
                time.sleep(0.1)
            busy = [sample for sample in samples if sample[1] > 0]
            (first_at, first), (last_at, last) = busy[0], busy[-1]
            results.add(
                "set-up",
                "sessions set up under a flood of new ones",
                "sessions/s",
                (last - first) / (last_at - first_at),
            )
            fill(rig, fwd, 100_000)
            allocated = client.call("session.info")["sessions_allocated"]
            memory = (resident_bytes(fwd.process.pid) - empty) / allocated
            results.add("set-up", "memory of fwd a session", "bytes", memory, f"resident, {allocated:,} sessions")
            client.close()


# --- order: what a new SPI that starts at full speed suffers --------------------------------------------------------


def order(results: Results) -> None:
    """An SPI starts at a rate: how many numbers behind the newest a packet arrives, and what a replay window drops."""
    with Rig() as rig:
        rig.start()
        spi = FIRST_SPI
        for rate in STARTING_RATES:
            for _ in range(STARTS):
                spi += 1
                with rig.sink.capture("wan", "esp") as capture:
                    options = {"count": STARTED, "spis": 1, "rate": rate, "first_spi": spi}
                    before = rig.arrived
                    rig.start_source("source", "10.0.0.1", SINK, **options).wait(60)
                    if (arrived := rig.settled() - before) != STARTED:
                        raise RuntimeError(f"{arrived} of {STARTED} packets arrived")
                behind = capture.behind()
                name = f"{rate:,} packets/s"
                results.add("order", f"latest packet of a new SPI, {name}", "numbers", max(behind))
                # RFC 4303 section 3.4.3: what lies left of the window. strongSwan's is 32 unless told otherwise.
                dropped = sum(late >= 32 for late in behind)
                results.add("order", f"of {STARTED:,}, out of a window of 32, {name}", "packets", dropped)


# --- where the time goes -------------------------------------------------------------------------------------------


def profiles() -> dict[str, list[tuple[str, float]]]:
    """Where fwd spends its time, on the slow path and on setting up: functions and their own share, largest first."""
    with Rig() as rig, fwd_alone(rig) as fwd:
        slow = _profile(rig, fwd, rig.command(FLOOD))
    with Rig() as rig:
        fwd = rig.start()
        setting_up = _profile(rig, fwd, rig.command(100_000, sources=100_000, rate=20_000))
    return {"slow path, a flood of one flow": slow, "set-up, 20,000 new sessions a second": setting_up}


def _profile(rig: Rig, fwd: Fwd, command: Sequence[str]) -> list[tuple[str, float]]:
    flood = rig.source.start(command, stdout=subprocess.DEVNULL)
    samples = rig.middle.path("/run/profile.txt")
    spy = [str(Path(sys.executable).parent / "py-spy"), "record", "--format", "raw", "--duration", "4", "--gil"]
    subprocess.run(
        [*spy, "--output", str(samples), "--pid", str(fwd.process.pid)], check=True, capture_output=True, timeout=60
    )
    flood.wait(120)
    own: dict[str, int] = {}
    for line in samples.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        function = stack.rpartition(";")[2]
        own[function] = own.get(function, 0) + int(count)
    total = sum(own.values())
    largest = sorted(own.items(), key=lambda item: -item[1])[:10]
    return [(function, count / total) for function, count in largest]


def weights() -> dict[str, int]:
    """What one session with one SPI is made of, in bytes, its places in dicts and lists left out."""
    firewall = Firewall(Config().settings(), 0.0)
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 68, 0, 0, 64, 50, 0, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]))
    firewall.receive_packet(header + struct.pack("!II", 4096, 1) + bytes(40), Hook.FORWARD, 2, 3, 0.5)
    (session,) = firewall.table
    (element,), (use,), (key,) = session.elements, session.c2s.uses, session.keys
    parts: dict[str, list[object]] = {
        "session": [session],
        "its two flows": [session.c2s, session.s2c],
        "the SPI's record": [use],
        "the element of the fast path": [element],
        "the element's key": [element.key, element.key[2]],
        "the session's key": [key],
        "two addresses": [session.c2s.address, session.s2c.address],
        "the tuples that hold these": [session.elements, session.keys, session.c2s.uses],
        "numbers": [session.id + 2**20, session.expires_at, use.first_seen_at, session.byte_count + 2**20, use.spi],
    }
    gc_head = 16
    return {
        name: sum(sys.getsizeof(thing) + gc_head * gc.is_tracked(thing) for thing in things)
        for name, things in parts.items()
    }


# --- what comes of it ----------------------------------------------------------------------------------------------


def ratios(results: Results) -> list[tuple[str, float, str, bool]]:
    """What the targets say: name, value, target, met or not."""
    found = []

    def ratio(name: str, value: float, target: str, is_met: bool) -> None:
        found.append((name, value, target, is_met))

    for sessions, least in ((1_000, 0.85), (100_000, 0.70)):
        value = results.median("forwarding", f"plain forwarding, {sessions:,} sessions") / results.median(
            "forwarding", f"fast path, {sessions:,} sessions"
        )
        ratio(f"fast path, of plain forwarding, {sessions:,} sessions", value, f"at least {least}", value >= least)
    own = results.median("slow path", "fwd, fast path off")
    value = own / results.median("slow path", "empty netfilterqueue callback")
    ratio("fwd's slow path, of an empty callback", value, "at most 1.25", value <= 1.25)
    for name in ("autofp (its default)", "workers", "workers, batches of 20"):
        value = results.median("slow path", f"Suricata 7, {name}") / own
        ratio(f"Suricata 7, {name}, of fwd's slow path", value, "more than 1", value > 1)
    value = results.median("set-up", "sessions set up under a flood of new ones")
    ratio("sessions set up a second", value, "at least 20,000", value >= 20_000)
    value = results.median("set-up", "memory of fwd a session")
    ratio("memory a session, bytes", value, "at most 1,024", value <= 1024)
    value = results.median("daemon", "CPU of fwd for packets on the fast path, 1,000 sessions")
    ratio("fwd's CPU for a packet on the fast path, ns", value, "0 (less than 20, of which it can be told)", value < 20)
    value = results.median("daemon", "longest wait for an answer while they are read")
    ratio("longest wait while counters are read, ms", value, "at most 20", value <= 20)
    return found


def machine() -> dict[str, str]:
    """What it ran on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "kernel": platform.release(),
        "cpu": model,
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
    }


def show(results: Results) -> None:
    """The tables."""
    table = Table("measurement", "median", "lowest", "highest", "unit")
    group = ""
    for result in results.all.values():
        if result.group != group:
            table.add_section()
            group = result.group
        numbers = [
            f"{number:,.0f}" if number >= 10 else f"{number:.2f}"
            for number in (result.median, min(result.values), max(result.values))
        ]
        table.add_row(result.name, *numbers, result.unit)
    console.print(table)
    targets = Table("ratio in this run", "value", "target", "")
    for name, value, target, is_met in ratios(results):
        targets.add_row(
            name, f"{value:,.0f}" if value >= 100 else f"{value:.2f}", target, "met" if is_met else "MISSED"
        )
    console.print(targets)


def main(words: Sequence[str]) -> None:
    """Measure everything, or only the groups named."""
    groups = {"forwarding": forwarding, "slow-path": slow_path, "set-up": set_up, "order": order}
    unknown = [word for word in words if word not in groups]
    if unknown:
        raise SystemExit(f"no group {shlex.join(unknown)}: there are {', '.join(groups)}")
    results = Results()
    started = time.monotonic()
    for name, measure in groups.items():
        if not words or name in words:
            console.print(f"measuring {name} ...")
            measure(results)
    if words:
        for result in results.all.values():
            console.print(f"{result.name}: {result.median:,.1f} {result.unit}  {[round(v, 1) for v in result.values]}")
        return
    show(results)
    everything = {
        "profiles": profiles(),
        "weights": weights(),
        "machine": machine(),
        "seconds": round(time.monotonic() - started),
        "results": [{**asdict(result), "median": result.median} for result in results.all.values()],
        "ratios": [dict(zip(("name", "value", "target", "met"), row, strict=True)) for row in ratios(results)],
    }
    RESULTS.write_text(json.dumps(everything, indent=1) + "\n")
    report.write(everything)
    console.print(f"written: {RESULTS}, {report.PAGE}, {report.PLOT}")


if __name__ == "__main__":
    main(sys.argv[1:])
