"""Rates: right whenever counts are brought up to date, and nothing while nobody asks."""

import pytest

from fwd.core import fast_path
from fwd.core.rates import WATCH_S
from fwd.core.sa import SaEstablished
from tests.builders import HERE, LEFT, PEER, RIGHT, Bench, child_sa, esp, ike


def stream(bench, seconds, packets, *, size=72, first=2):
    """So many packets a second, one at a time, while the daemon does what is due."""
    for number in range(int(seconds * packets)):
        bench.wait(1 / packets)
        bench.forward(esp(LEFT, RIGHT, 5, seq=first + number, size=size))


@pytest.mark.parametrize("in_kernel", [False, True])
def test_a_steady_stream_has_its_rate(in_kernel):
    bench = Bench(fast_path=in_kernel)
    bench.forward(esp(LEFT, RIGHT, 5))
    session = bench.session
    assert bench.firewall.rate(session.c2s, bench.now) is None
    bench.firewall.rates.watch(bench.now)
    assert bench.firewall.rate(session.c2s, bench.now) is None
    stream(bench, 6, 20)
    rate = bench.firewall.rate(session.c2s, bench.now)
    assert rate.packets == pytest.approx(20, rel=0.1) and rate.octets == pytest.approx(2000, rel=0.1)
    assert bench.firewall.rate(session.s2c, bench.now) == (0, 0)
    stream(bench, 4, 100, first=200)
    assert bench.firewall.rate(session.c2s, bench.now).packets == pytest.approx(100, rel=0.1)
    bench.wait(4)
    assert bench.firewall.rate(session.c2s, bench.now).packets < 1


def test_nothing_is_measured_when_nobody_has_asked_for_a_while():
    bench = Bench()
    bench.firewall.rates.watch(bench.now)
    bench.forward(esp(LEFT, RIGHT, 5))
    stream(bench, 2, 10)
    assert bench.session.c2s.pace is not None and bench.firewall.rates.measured_s(bench.now) == pytest.approx(2)
    bench.wait(WATCH_S + 1)
    stream(bench, 2, 10, first=100)
    assert bench.session.c2s.pace is None and bench.firewall.rates.measured_s(bench.now) == 0
    assert bench.firewall.rate(bench.session.c2s, bench.now) is None


def test_what_was_measured_before_a_pause_is_no_rate_after_it():
    bench = Bench()
    bench.firewall.rates.watch(bench.now)
    bench.forward(esp(LEFT, RIGHT, 5))
    stream(bench, 3, 10)
    bench.wait(WATCH_S + 1)
    bench.firewall.rates.watch(bench.now)
    assert bench.firewall.rate(bench.session.c2s, bench.now) is None
    bench.wait(3)
    assert bench.firewall.rate(bench.session.c2s, bench.now) == (0, 0)


def test_ike_has_rates_although_no_element_counts_it():
    bench = Bench()
    bench.firewall.rates.watch(bench.now)
    bench.forward(ike(LEFT, RIGHT))
    bench.firewall.rate(bench.session.c2s, bench.now)
    for _ in range(40):
        bench.wait(0.1)
        bench.forward(ike(LEFT, RIGHT))
        bench.firewall.rate(bench.session.c2s, bench.now)
    assert bench.firewall.rate(bench.session.c2s, bench.now).packets == pytest.approx(10, rel=0.15)


def test_a_rate_is_right_when_counts_are_read_seldom(monkeypatch):
    """More SPIs than are read in a second: an element's turn comes every few seconds."""
    monkeypatch.setattr(fast_path, "SWEEP_SLICE", 1)
    bench = Bench(fast_path=True)
    bench.forward(esp(LEFT, RIGHT, 5))
    session = bench.session
    for host in range(199):
        bench.forward(esp(f"10.0.0.{host}", RIGHT, 5))
    bench.firewall.rates.watch(bench.now)
    stream(bench, 13, 20)
    assert bench.firewall.fast_path.round_s > 3.9
    assert bench.firewall.rate(session.c2s, bench.now).packets == pytest.approx(20, rel=0.05)


def test_a_rekey_is_no_leap():
    """What a provisional session counted comes to the tunnel's session at once: that is no traffic of that second."""
    bench = Bench()
    bench.firewall.rates.watch(bench.now)
    for seq in range(1, 2001):
        bench.receive(esp(PEER, HERE, 0x1001, seq=seq))
    bench.wait(0.5)
    bench.sas(SaEstablished(child_sa()))
    for seq in range(2001, 2031):
        bench.wait(0.1)
        bench.receive(esp(PEER, HERE, 0x1001, seq=seq))
    session = bench.session
    assert session.c2s.packet_count == 2030
    assert bench.firewall.rate(session.c2s, bench.now).packets == pytest.approx(10, rel=0.1)
