"""More than fwd can bear: a full table, sprayed SPIs, forged sources, an overrun queue, ten times the rate.

What was there before has to go on, what is refused has to be counted, and fwd has to answer all the while.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from vici.exception import CommandException

from bench.rig import cpu_seconds
from fwd.cli.client import Client
from lab import Lab
from lab.lab import PROGRAMS, default_config, wait_for
from lab.ping import outcome
from tests.namespaces.conftest import assert_balanced, witnessed
from tests.torture.conftest import in_full
from tests.torture.flood import Flood, counters, pin, timed
from tests.torture.prober import Prober, prefer

pytestmark = pytest.mark.alone

A, B = "198.51.100.2", "203.0.113.2"
HERE = "192.0.2.1"


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def ask(demo: Lab) -> Iterator[Callable[[], Client]]:
    """Gives clients of fwd that need no process of their own."""
    clients: list[Client] = []

    def connect() -> Client:
        clients.append(Client(str(demo.hosts["fwd"].path("/run/fwd/control.sock"))))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def fill(flood: Flood, client: Client, size: int) -> None:
    """Flood until the table is full, and some more: what finds no place costs no memory."""
    deadline = time.monotonic() + 60
    while client.call("session.info")["sessions_allocated"] < size:
        assert time.monotonic() < deadline
        flood.send(size, sources=2 * size)


@pytest.mark.timeout(600)
def test_a_full_table_refuses_counts_and_keeps_what_it_has(demo, ask):
    flood = Flood(demo)
    size = in_full(65536, 500)
    more = f"[dataplane]\nmax-sessions = {size}\n[limits]\nhalf-open = 0\n[timeouts]\nike = 1\n"
    fwd = demo.start_fwd(default_config() + more)
    client = ask()
    demo.initiate("sites-v4", "peer-v4")
    assert demo.ping("sites-v4") == demo.ping("peer-v4") == 3
    (before,) = fwd.sessions(application="ipsec-esp")
    empty = resident_bytes(fwd.pid)
    fill(flood, client, size)
    full = resident_bytes(fwd.pid)
    flood.send(10 * size, sources=200_000)
    after = resident_bytes(fwd.pid)
    print(f"{(full - empty) / size:.0f} bytes a session; fwd has {full} bytes, {after} after ten times as many packets")
    assert client.call("session.info")["sessions_allocated"] == size
    assert after < 1.15 * full and full - empty < max(4096 * size, 2**25)
    wait_for(lambda: client.call("session.info")["accelerated_ageing"]["active"], "time runs faster")
    assert counters(client)["flow_table_full"] > 0
    time.sleep(1.5)  # no IKE session is left: a new one of the same peers takes a stranger's place
    demo.charon("peer").rekey("peer-v4")
    assert demo.ping("peer-v4") == 3
    wait_for(lambda: fwd.sessions(application="ipsec-udp")[0]["ipsec"]["rekeys"], "fwd has heard of the rekey")
    (tunnel,) = fwd.sessions(application="ipsec-udp")
    assert (tunnel["c2s"]["packets"], tunnel["ipsec"]["rekeys"]) == (6, 1)
    assert demo.ping("sites-v4") == 3
    session = client.call("session.get", id=before["id"])
    assert (session["c2s"]["packets"], session["state"]) == (6, "ACTIVE")
    assert_balanced(demo, fwd)
    print(fwd.fwctl("explain", "packet", "--src", "10.9.9.9", "--dst", B, "--spi", "1").stdout)


#: What an operator asks of a full table, and how many lines it prints of so many sessions.
LISTINGS: dict[str, Callable[[int], int]] = {
    "": lambda _: 0,
    "show session all": lambda count: 4 + 2 * count,
    "show session all filter source 10.0.0.0/8 spi not 1,0x2 min-kb not 1000": lambda count: 4 + 2 * count,
    "show session all filter min-kb 1000000": lambda _: 1,
    "show session all sort bytes descending": lambda count: 4 + 2 * count,
    "show session all --json": lambda count: count + 2,
    "clear session all filter tunnel nobody": lambda _: 1,
}


@pytest.mark.timeout(600)
def test_long_listings_keep_no_packet_waiting(demo, ask):
    """Probes that fwd looks at one by one, while fwctl prints a table whose counts are in the kernel."""
    flood = Flood(demo)
    probed = '[[rules]]\nname = "probes"\nsource = ["198.51.100.2"]\naction = "allow"\ninspect = "every-packet"\n\n'
    more = "[dataplane]\nmax-sessions = 131072\nqueue-length = 16384\n[limits]\nhalf-open = 0\npeers = 0\nsource = 0\n"
    fwd = demo.start_fwd(default_config().replace("[[rules]]", probed + "[[rules]]", 1) + more)
    prefer(fwd.pid, is_strict=True)
    client = ask()
    size = in_full(100_000, 3000)
    while client.call("session.info")["sessions_allocated"] < size:
        flood.send(size, sources=size, rate=6000)
    out = demo.hosts["fwd"].path("/run/listing")
    for words, lines in LISTINGS.items():
        prober, began, used = Prober(demo, "site-a", "site-b"), time.monotonic(), cpu_seconds(fwd.pid)
        if words:
            with out.open("w") as page:
                listing = demo.hosts["fwd"].start([str(PROGRAMS / "fwctl"), *words.split()], stdout=page, stderr=page)
                assert listing.wait(120) == 0
            elapsed = time.monotonic() - began
            sessions = client.call("session.info")["sessions_allocated"]
            assert abs(out.read_text().count("\n") - lines(sessions)) <= 4, "the probes' own may come meanwhile"
        else:
            time.sleep(elapsed := in_full(5.0, 0.5))
        used = cpu_seconds(fwd.pid) - used
        seen = prober.stop()
        print(f"{words or 'nothing asked'}: {elapsed:.1f} s, {used:.1f} s of fwd's CPU; {seen}")
        assert seen["received"] == seen["sent"]
        assert seen["worst_ms"] - seen["stalled_ms"] < 500  # generous, for machines that do other work too


@pytest.mark.timeout(600)
def test_a_spray_of_spis_at_this_host_takes_its_share_and_no_more(demo, ask):
    flood = Flood(demo, "peer")
    grace = "[dataplane]\nunknown-spi-grace = 3\n"
    fwd = demo.start_fwd(default_config() + grace + "[limits]\npeers = 1000\n")
    client = ask()
    demo.initiate("peer-v4")
    assert demo.ping("peer-v4") == 3
    count = in_full(500_000, 20_000)
    flood.send(count, spis=count, destination=HERE)
    assert demo.ping("peer-v4") == 3
    info = client.call("session.info")
    assert info["sessions_allocated"] <= 1010 and info["limits"]["peers"]["most"] <= 1000
    told = counters(client)
    assert told["flow_limit_peers"] > told["session_provisional"] >= 1000
    wait_for(lambda: client.call("session.info")["sessions_allocated"] <= 4, "the strangers are one session", 20)
    (tunnel,) = fwd.sessions(application="ipsec-udp")
    assert tunnel["state"] == "ACTIVE" and tunnel["c2s"]["packets"] == 6
    assert_balanced(demo, fwd)


@pytest.mark.timeout(600)
def test_forged_sources_fill_half_the_table_and_are_gone_as_soon_as_it_is_needed(demo, ask):
    flood = Flood(demo)
    size = in_full(65536, 8192)
    fwd = demo.start_fwd(default_config() + f"[dataplane]\nmax-sessions = {size}\nqueue-length = 65536\n")
    client = ask()
    demo.initiate("sites-v4")
    assert demo.ping("sites-v4") == 3
    empty = resident_bytes(fwd.pid)
    deadline = time.monotonic() + 30
    while not counters(client)["flow_limit_half_open"] and time.monotonic() < deadline:
        flood.send(size, sources=2 * size)
    info = client.call("session.info")
    assert info["limits"]["half_open"] == {"limit": size // 2, "now": size // 2}
    assert info["utilization_percent"] <= 51
    print("bytes a session:", (resident_bytes(fwd.pid) - empty) / info["sessions_allocated"])
    assert demo.ping("sites-v4") == 3
    demo.initiate("sites-v6")  # of IKE there may be more, and who has spoken IKE is no stranger
    assert demo.ping("sites-v6") == 3
    demo.charon("site-a").rekey("sites-v4")
    assert demo.ping("sites-v4") == 3
    assert fwd.sessions(application="ipsec-esp", source=A)[0]["c2s"]["packets"] == 9
    assert_balanced(demo, fwd)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", ["queue_kernel_drop", "queue_socket_drop"])
def test_what_the_queue_loses_is_counted_and_fwd_goes_on_by_itself(demo, ask, which):
    """Stopped, it reads nothing: a short queue is full first, a long one overruns the socket."""
    flood = Flood(demo)
    length = 64 if which == "queue_kernel_drop" else 65536
    fwd = demo.start_fwd(default_config() + f"[dataplane]\nqueue-length = {length}\n")
    client = ask()
    demo.initiate("sites-v4", "peer-v4")
    assert demo.ping("sites-v4") == 3
    fwd.process.send(signal.SIGSTOP)
    try:
        flood.send(in_full(200_000, 40_000), sources=1000)
        assert demo.ping("sites-v4") == 3  # by the kernel alone
    finally:
        fwd.process.send(signal.SIGCONT)
    wait_for(lambda: counters(client)[which] > 0, "the loss is told")
    assert_balanced(demo, fwd)
    demo.initiate("sites-v6")
    assert demo.ping("sites-v6") == 3 and demo.ping("peer-v4") == 3
    told = counters(client)
    print({name: value for name, value in told.items() if value})
    assert told["rules_restored"] == told["flow_internal_error"] == 0


@pytest.mark.timeout(900)
def test_ten_times_the_rate_that_it_can_bear(demo, ask):
    """New sessions from forged sources, ten times as many a second as fwd can set up; all else goes on."""
    seconds = in_full(60, 4)
    flood = Flood(demo)
    # IKE sessions end soon after the last packet, if timers are served. Small, the table has its fill soon.
    size = in_full("", "[dataplane]\nmax-sessions = 20000\n")
    fwd = demo.start_fwd(default_config() + f"[timeouts]\nike = 2\n{size}")
    pin(fwd)
    client = ask()
    demo.initiate("sites-v4", "peer-v6")
    assert demo.ping("sites-v4") == 3 and demo.ping("peer-v6") == 3
    began = time.monotonic()
    flood.send(30_000, sources=30_000)
    wait_for(lambda: client.call("system.info")["queue-waiting"] == 0, "the queue is empty")
    bearable = counters(client)["session_allocated"] / (time.monotonic() - began)

    options = {"rate": STREAM_RATE, "size": STREAM_SIZE, "count": STREAM_RATE * (seconds + 20)}
    stream = demo.start_source("site-a", A, B, **options)
    quiet, _ = flood.stream(2)
    ping = demo.start_ping("peer-v6", count=50 * seconds, interval_s=0.02)

    rate = int(10 * bearable)
    demo.initiate("sites-v6")  # its IKE ends meanwhile
    before, began = counters(client), time.monotonic()
    seen = witnessed(demo)
    source = flood.start(rate * seconds, sources=200_000, rate=rate)
    answers, programs, tunnel_after = [], [], None
    sent_at_start, arrived_at_start = flood.streamed()
    while time.monotonic() < began + seconds and source.is_running():
        answers += [timed(client, method) for method in ("session.info", "session.list", "counter.list")]
        asked = time.monotonic()
        fwd.fwctl("show", "system", "info")
        programs.append(time.monotonic() - asked)
        if tunnel_after is None and time.monotonic() > began + seconds / 3:
            tunnel_after = new_tunnel(demo, client, "peer-v4")
    sent, arrived = flood.streamed()
    elapsed = time.monotonic() - began
    offered = (witnessed(demo) - seen) / elapsed
    after = counters(client)
    told = {name: after[name] - before[name] for name in after}
    assert source.wait(90) == 0
    pinged, received = outcome(ping)
    stream.end()
    sent, arrived = sent - sent_at_start, arrived - arrived_at_start
    answers.sort()
    print(
        f"bearable {bearable:.0f}/s, offered {offered:.0f}/s for {elapsed:.0f} s; stream {quiet:.0f}/s quiet,"
        f" {arrived / elapsed:.0f}/s flooded, {arrived} of {sent} arrived; pings {received} of {pinged};"
        f" answers median {statistics.median(answers):.3f} s, most {answers[-1]:.3f} s;"
        f" fwctl median {statistics.median(programs):.2f} s, most {max(programs):.2f} s;"
        f" new tunnel: tries, and seconds from charon to fwd: {tunnel_after}"
    )
    print({name: round(value / elapsed) for name, value in told.items() if value})
    assert arrived >= 0.95 * sent
    assert received >= 0.9 * pinged  # charon's own ESP and ping need a CPU, too
    assert answers[len(answers) * 95 // 100] < 1 and statistics.median(programs) < 2
    assert told["session_aged_out"] > 0 and told["flow_limit_half_open"] > 0
    assert_balanced(demo, fwd)


STREAM_RATE, STREAM_SIZE = 4000, 1000


def new_tunnel(lab: Lab, client: Client, name: str) -> tuple[int, float]:
    """Set a tunnel up in the flood: how many tries, and how long after charon had it fwd showed its session."""
    tries, is_up = 0, False
    while not is_up and tries < 20:
        tries += 1
        with suppress(CommandException):
            lab.initiate(name)
            is_up = True
    began = time.monotonic()

    def has_session() -> bool:
        return any(tunnel["child_sa"] == name and tunnel["session"] for tunnel in client.call("tunnel.list")["tunnels"])

    wait_for(has_session, "fwd has heard of the new tunnel", 10)
    return tries, time.monotonic() - began
