"""More than fwd can bear: a full table, sprayed SPIs, forged sources, an overrun queue, ten times the rate.

What was there before has to go on, what is refused has to be counted, and fwd has to answer all the while.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from vici.exception import CommandException

from lab.lab import default_config, wait_for
from tests.namespaces.conftest import accounted, witnessed
from tests.torture.conftest import in_full
from tests.torture.flood import Flood, ask, counters, pin, streamed, timed

A, B = "198.51.100.2", "203.0.113.2"
HERE = "192.0.2.1"


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def is_all_told(lab, fwd) -> bool:
    """Whether each packet that came by is in a session or in a drop counter; those of the kernel's come with a look."""
    return accounted(fwd) == witnessed(lab)


def test_a_full_table_refuses_counts_and_keeps_what_it_has(demo):
    flood = Flood(demo)
    fwd = demo.start_fwd(default_config() + "[dataplane]\nmax-sessions = 500\n[limits]\nhalf-open = 0\n")
    client = ask(demo)
    demo.initiate("sites-v4")
    assert demo.ping("sites-v4") == 3
    (before,) = fwd.sessions(application="ipsec-esp")
    flood.send(5000, sources=1000)
    info = client.call("session.info")
    assert info["sessions_allocated"] == 500 and info["accelerated_ageing"]["active"]
    assert counters(client)["flow_table_full"] > 0
    demo.initiate("peer-v4")  # an announced tunnel is worth more than a stranger who got no answer
    assert demo.ping("peer-v4") == 3
    (tunnel,) = fwd.sessions(application="ipsec-udp")
    assert tunnel["c2s"]["packets"] == 3
    assert demo.ping("sites-v4") == 3
    after = client.call("session.get", id=before["id"])
    assert (after["c2s"]["packets"], after["state"]) == (6, "ACTIVE")
    wait_for(partial(is_all_told, demo, fwd), "all is counted")
    print(fwd.fwctl("explain", "packet", "--src", "10.1.250.1", "--dst", B, "--spi", "1").stdout)


def test_a_spray_of_spis_at_this_host_takes_its_share_and_no_more(demo):
    flood = Flood(demo, "peer")
    grace = "[dataplane]\nunknown-spi-grace = 3\n"
    fwd = demo.start_fwd(default_config() + grace + "[limits]\npeers = 1000\n")
    client = ask(demo)
    demo.initiate("peer-v4")
    assert demo.ping("peer-v4") == 3
    count = in_full(500_000, 50_000)
    flood.send(count, spis=count, destination=HERE)
    assert demo.ping("peer-v4") == 3
    info = client.call("session.info")
    assert info["sessions_allocated"] <= 1010 and info["limits"]["peers"]["most"] <= 1000
    told = counters(client)
    assert told["flow_limit_peers"] > told["session_provisional"] >= 1000
    wait_for(lambda: client.call("session.info")["sessions_allocated"] <= 4, "the strangers are one session", 20)
    (tunnel,) = fwd.sessions(application="ipsec-udp")
    assert tunnel["state"] == "ACTIVE" and tunnel["c2s"]["packets"] == 6
    wait_for(partial(is_all_told, demo, fwd), "all is counted")


def test_forged_sources_fill_half_the_table_and_are_gone_as_soon_as_it_is_needed(demo):
    flood = Flood(demo)
    size = in_full(65536, 8192)
    fwd = demo.start_fwd(default_config() + f"[dataplane]\nmax-sessions = {size}\nqueue-length = 65536\n")
    client = ask(demo)
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
    time.sleep(10)  # HALF_OPEN_IDLE_S: from now on the forged ones give way
    demo.initiate("sites-v6")
    assert demo.ping("sites-v6") == 3
    assert counters(client)["session_gave_way"] > 0
    assert client.call("session.count", filter={"source": A})["count"] >= 1
    wait_for(partial(is_all_told, demo, fwd), "all is counted")


@pytest.mark.parametrize("which", ["queue_kernel_drop", "queue_socket_drop"])
def test_what_the_queue_loses_is_counted_and_fwd_goes_on_by_itself(demo, which):
    """Stopped, it reads nothing: a short queue is full first, a long one overruns the socket."""
    flood = Flood(demo)
    length = 64 if which == "queue_kernel_drop" else 65536
    fwd = demo.start_fwd(default_config() + f"[dataplane]\nqueue-length = {length}\n")
    client = ask(demo)
    demo.initiate("sites-v4", "peer-v4")
    assert demo.ping("sites-v4") == 3
    fwd.process.send(signal.SIGSTOP)
    try:
        flood.send(in_full(200_000, 60_000), sources=60_000)
        assert demo.ping("sites-v4") == 3  # by the kernel alone
    finally:
        fwd.process.send(signal.SIGCONT)
    wait_for(lambda: counters(client)[which] > 0, "the loss is told")
    wait_for(partial(is_all_told, demo, fwd), "all is counted")
    demo.initiate("sites-v6")
    assert demo.ping("sites-v6") == 3 and demo.ping("peer-v4") == 3
    told = counters(client)
    print({name: value for name, value in told.items() if value})
    assert told["rules_restored"] == told["flow_internal_error"] == 0


@pytest.mark.timeout(300)
def test_ten_times_the_rate_that_it_can_bear(demo):
    """New sessions from forged sources, ten times as many a second as fwd can set up; all else goes on."""
    seconds = in_full(60, 6)
    flood = Flood(demo)
    # Those of IKE end soon after the last packet, if timers are served.
    fwd = demo.start_fwd(default_config() + "[timeouts]\nike = 2\n")
    pin(fwd)
    client = ask(demo)
    demo.initiate("sites-v4", "peer-v6")
    assert demo.ping("sites-v4") == 3 and demo.ping("peer-v6") == 3
    began = time.monotonic()
    source = flood.start(40_000, sources=40_000)
    source.wait(30)
    wait_for(lambda: client.call("system.info")["queue-waiting"] == 0, "the queue is empty")
    bearable = counters(client)["session_allocated"] / (time.monotonic() - began)

    stream_rate = 4000
    stream = demo.start_source("site-a", A, B, count=stream_rate * (seconds + 12), rate=stream_rate, size=1000)
    wait_for(lambda: streamed(demo) > 0, "the stream flows")
    quiet = rate_of_stream(demo, 2)
    ping = demo.start_ping("peer-v6", count=50 * seconds, interval_s=0.02)

    rate = int(10 * bearable)
    before, at = counters(client), time.monotonic()
    source = flood.start(rate * seconds, sources=200_000, rate=rate)
    initiated = initiate_somehow(demo, "peer-v4", at + seconds)
    answers, programs, streams = [], [], []
    while time.monotonic() < at + seconds - 1 and source.is_running():
        streams.append(rate_of_stream(demo, 1))
        answers += [timed(client, method) for method in ("session.info", "session.list", "counter.list")]
        asked = time.monotonic()
        fwd.fwctl("show", "system", "info")
        programs.append(time.monotonic() - asked)
    elapsed = time.monotonic() - at
    after = counters(client)
    told = {name: after[name] - before[name] for name in after}
    source.wait(90)
    offered = (witnessed(demo) and rate * seconds) / (time.monotonic() - at)
    output, _ = ping.popen.communicate(timeout=60)
    received = int(output.split(" received")[0].split()[-1])
    stream.end()
    print(
        f"bearable {bearable:.0f}/s, offered {offered:.0f}/s; stream {quiet:.0f}/s quiet,"
        f" {statistics.mean(streams):.0f}/s under the flood; pings {received} of {50 * seconds};"
        f" answers {max(answers):.3f} s at most, fwctl {statistics.median(programs):.2f} s, {max(programs):.2f} s at most;"
        f" new tunnel after {initiated:.1f} s"
    )
    print({name: round(value / elapsed) for name, value in told.items() if value})
    assert statistics.mean(streams) >= 0.95 * quiet
    assert received >= 0.95 * 50 * seconds
    assert max(answers) < 1 and statistics.median(programs) < 1.5
    assert told["session_aged_out"] > 0
    (tunnel,) = [tunnel for tunnel in client.call("tunnel.list")["tunnels"] if tunnel["child_sa"] == "peer-v4"]
    assert tunnel["session"] is not None
    assert told["flow_limit_half_open"] > 0
    wait_for(partial(is_all_told, demo, fwd), "all is counted", 60)


def rate_of_stream(lab, seconds: float) -> float:
    began, before = time.monotonic(), streamed(lab)
    time.sleep(seconds)
    arrived = streamed(lab) - before
    return arrived / (time.monotonic() - began)


def initiate_somehow(lab, tunnel: str, deadline: float) -> float:
    """Set a tunnel up although packets of IKE are lost in the flood; gives the seconds that it took."""
    began = time.monotonic()
    while time.monotonic() < deadline:
        with suppress(CommandException):
            lab.initiate(tunnel)
            return time.monotonic() - began
    raise AssertionError(f"{tunnel} could not be set up")
