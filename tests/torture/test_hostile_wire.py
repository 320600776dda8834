"""Hostile packets on real wires: what the kernel makes of them, what fwd has to, and what neither has."""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fwd.cli.client import Client
from lab.lab import default_config
from lab.ping import outcome
from tests.builders import esp, esp_in_udp, ip, ipv4, ipv6, udp
from tests.namespaces.conftest import assert_balanced, witnessed
from tests.torture.conftest import in_full
from tests.torture.seeds import HOP_BY_HOP, OPTIONS, PACKETS, chain, fragment6, read_corpus

A, B, A6, B6 = "198.51.100.2", "203.0.113.2", "2001:db8:a::2", "2001:db8:b::2"
#: Addresses of nobody, on site-a's network: what comes from them is the test's.
FOE, FOE6 = "198.51.100.77", "2001:db8:a::77"
FWD, FWD6 = "198.51.100.1", "2001:db8:a::1"
#: What arrives at site-b of what the test sent there; the kernel itself looks for neighbours under FWD6.
ARRIVALS = f"""
table inet arrivals {{
  chain prerouting {{
    type filter hook prerouting priority raw
    ip saddr {{ {FOE}, {A} }} counter
    ip6 saddr {{ {FOE6}, {A6}, {FWD6} }} ip6 nexthdr != ipv6-icmp counter
  }}
}}
"""
ESP = 50


def spi(number: int, size: int = 40) -> bytes:
    """The beginning of ESP, and as many bytes more."""
    return struct.pack("!II", number, 1) + bytes(size)


def with_hops(octets: bytes, hops: int) -> bytes:
    place = 8 if octets[0] >> 4 == 4 else 7
    return octets[:place] + bytes([hops]) + octets[place + 1 :]


def numbered(octets: bytes, number: int) -> bytes:
    """An IPv4 packet with this identification."""
    return octets[:4] + number.to_bytes(2) + octets[6:]


@dataclass(frozen=True)
class Case:
    """Packets from site-a's wire; how many fwd has to count, which drop counters rise, how many go on to site-b."""

    name: str
    packets: list[bytes]
    handled: int
    passed: int = 0
    drops: dict[str, int] = field(default_factory=dict)


def fragment(dst: str, octets: bytes, offset: int, *, more: bool, number: int = 7) -> bytes:
    return numbered(ipv4(FOE, dst, ESP, octets, fragment=offset | 0x2000 * more), number)


CASES = [
    # In transit, nobody puts fragments together: each is a packet, of the session of its addresses.
    Case(
        "overlapping fragments in transit",
        [
            fragment(B, spi(0x101, 40), 0, more=True),
            fragment(B, bytes(48), 2, more=True),
            fragment(B, bytes(48), 1, more=True),
            fragment(B, bytes(16), 7, more=False),
        ],
        handled=4,
        passed=4,
    ),
    Case(
        "tiny fragments in transit: without a whole ESP header they are malformed",
        [
            fragment(B, spi(0x102, 0), 0, more=True),
            fragment(B, bytes(8), 1, more=True),
            fragment(B, spi(0x102)[:4], 0, more=True),
            fragment(B, b"x", 2, more=False),
        ],
        handled=4,
        passed=3,
        drops={"flow_parse_truncated": 1},
    ),
    Case(
        "fragments in transit that are never completed",
        [fragment(B, spi(0x103), 0, more=True, number=number) for number in range(50)],
        handled=50,
        passed=50,
    ),
    Case(
        "ESP in UDP in tiny fragments in transit: the first has no SPI, the others not even ports",
        [
            ipv4(FOE, B, 17, struct.pack("!HHHH", 4500, 4500, 48, 0), fragment=0x2000),
            ipv4(FOE, B, 17, spi(0x104, 32), fragment=1),
        ],
        handled=1,
        passed=1,
        drops={"flow_parse_udp": 1},
    ),
    # To this host, the kernel puts IPv4 together before fwd sees it.
    Case(
        "overlapping fragments to this host: the kernel throws all of them away",
        [
            fragment(FWD, spi(0x201, 40), 0, more=True),
            fragment(FWD, bytes(48), 2, more=True),
            fragment(FWD, bytes(48), 4, more=False),
        ],
        handled=0,
    ),
    Case(
        "tiny fragments to this host: one packet",
        [fragment(FWD, spi(0x202, 0), 0, more=True, number=8), fragment(FWD, bytes(32), 1, more=False, number=8)],
        handled=1,
    ),
    Case(
        "fragments to this host that are never completed",
        [fragment(FWD, spi(0x203), 0, more=True, number=100 + number) for number in range(50)],
        handled=0,
    ),
    Case(
        "the largest packet that there is, to this host in fragments",
        [
            fragment(FWD, (spi(0x204) if not offset else bytes(48)) + bytes(1432), offset, more=True, number=9)
            for offset in range(0, 44 * 185, 185)
        ]
        + [fragment(FWD, bytes(65515 - 44 * 1480), 44 * 185, more=False, number=9)],
        handled=1,
    ),
    # IPv6 is put together behind fwd's rules, and chains of extension headers lead to ESP as the kernel walks them.
    Case(
        "IPv6 in transit: extension headers, whole and in fragments",
        [
            chain(HOP_BY_HOP, OPTIONS, payload=spi(0x301), src=FOE6, dst=B6),
            chain(HOP_BY_HOP, fragment6(0, more=True), OPTIONS, payload=spi(0x301), src=FOE6, dst=B6),
            chain(fragment6(6, more=True), payload=bytes(48), src=FOE6, dst=B6),
            chain(fragment6(3, more=False), payload=bytes(48), src=FOE6, dst=B6),
            chain(fragment6(0, more=False), payload=spi(0x302), src=FOE6, dst=B6),
        ],
        handled=5,
        passed=5,
    ),
    Case(
        "IPv6 in transit: later fragments that do not say that they are ESP",
        [chain(fragment6(7, more=False), last=60, payload=bytes(48), src=FOE6, dst=B6)] * 3,
        handled=0,
        passed=3,
    ),
    Case(
        "IPv6 to this host, in fragments: overlapping, never completed",
        [
            chain(fragment6(0, more=True, number=5), payload=spi(0x303), src=FOE6, dst=FWD6),
            chain(fragment6(2, more=False, number=5), payload=bytes(48), src=FOE6, dst=FWD6),
            *[chain(fragment6(0, more=True, number=9 + n), payload=spi(0x304), src=FOE6, dst=FWD6) for n in range(20)],
        ],
        handled=22,
    ),
    Case(
        "IPv6 with more extension headers than anybody needs",
        [chain(*[OPTIONS] * 12, payload=spi(0x305), src=FOE6, dst=B6)],
        handled=1,
        drops={"flow_parse_ipv6_extension": 1},
    ),
    Case(
        "the same with an SPI that was decided on before: the kernel finds its element",
        [*[esp(FOE6, B6, 0x307)] * 200, chain(*[OPTIONS] * 12, payload=spi(0x307), src=FOE6, dst=B6)],
        handled=201,
        passed=201,
    ),
    Case(
        "IPv6 that says it has no length, as a jumbogram does",
        [ipv6(FOE6, B6, ESP, b"") + spi(0x306)],
        handled=1,
        drops={"flow_parse_ip_header": 1},
    ),
    # Within other tunnels ESP is not fwd's: outer protocols 47, 4 and 41 are none of its rules.
    Case(
        "ESP in GRE, IPIP and 6in4 in transit",
        [
            ip(FOE, B, 47, b"\0\0\x08\0" + esp(A, B, 0x401)),
            ip(FOE, B, 4, esp(A, B, 0x402)),
            ip(FOE, B, 41, esp(A6, B6, 0x403)),
            ip(FOE6, B6, 47, b"\0\0\x86\xdd" + esp(A6, B6, 0x404)),
            ip(FOE6, B6, 41, esp(A6, B6, 0x405)),
        ],
        handled=0,
        passed=5,
    ),
    Case(
        "ESP in GRE and IPIP to this host",
        [ip(FOE, FWD, 47, b"\0\0\x08\0" + esp(A, B, 0x406)), ip(FOE, FWD, 4, esp(A, B, 0x407))],
        handled=0,
    ),
    # Larger than what the kernel copies to the queue: the length is the header's.
    Case(
        "jumbo frames in transit",
        [esp(FOE, B, 0x501, size=8900), esp(FOE6, B6, 0x502, size=8900), esp_in_udp(FOE, B, 0x503) + bytes(4000)],
        handled=3,
        passed=3,
    ),
    # The kernel looks at TTL and hop limit before the hook of fwd's rules.
    Case(
        "TTL 1 in transit: fwd sees none of them",
        [with_hops(esp(A, B, 0x601), 1), with_hops(esp(A6, B6, 0x602), 1), with_hops(esp_in_udp(A, B, 0x603), 1)],
        handled=0,
    ),
    Case(
        "TTL 1, and 0, to this host: it has arrived",
        [with_hops(esp(FOE, FWD, 0x604), 1), with_hops(esp(FOE6, FWD6, 0x605), 1), with_hops(esp(FOE, FWD, 0x604), 0)],
        handled=3,
    ),
    Case(
        "TTL 2 in transit",
        [with_hops(esp(FOE, B, 0x606), 2), with_hops(esp(FOE6, B6, 0x607), 2)],
        handled=2,
        passed=2,
    ),
    Case(
        "to all on this network, to all of another, to the groups of all hosts: they are for this host, too",
        [
            esp(FOE, "255.255.255.255", 0x701),
            esp(FOE, "198.51.100.255", 0x702),
            esp(FOE, "203.0.113.255", 0x703),
            esp(FOE, "224.0.0.1", 0x704),
            esp(FOE6, "ff02::1", 0x705),
            udp(FOE, "224.0.0.1", 500, 500, b"hello"),
        ],
        handled=6,
    ),
    Case(
        "to groups that this host is in none of",
        [esp(FOE, "239.1.1.1", 0x706), esp(FOE6, "ff0e::1:2", 0x707)],
        handled=0,
    ),
    Case(
        "from many, from loopback, and in IPv4 from this host itself: the kernel believes none of it",
        [
            esp("224.0.0.1", FWD, 0x801),
            esp(FWD, FWD, 0x802),
            esp("127.0.0.1", FWD, 0x803),
            esp(FOE, "127.0.0.1", 0x804),
            esp(FWD, B, 0x805),
            esp("ff02::1", FWD6, 0x806),
            esp("::1", FWD6, 0x807),
        ],
        handled=0,
    ),
    Case(
        "in IPv6 from this host itself: it is believed, and counted",
        [esp(FWD6, FWD6, 0x808), esp(FWD6, B6, 0x809)],
        handled=2,
        passed=1,
    ),
    Case(
        "from a site to itself, and back where it came from",
        [esp(FOE, FOE, 0x901), esp(FOE, A, 0x902), esp(FOE6, FOE6, 0x903)],
        handled=3,
    ),
]

#: ESP and IKE that fwd's host sends to itself.
TO_ITSELF = """
import socket, struct
for family, address in ((socket.AF_INET, '127.0.0.1'), (socket.AF_INET, '192.0.2.1'), (socket.AF_INET6, '::1'),
                        (socket.AF_INET6, '2001:db8:c::1')):
    esp = socket.socket(family, socket.SOCK_RAW, 50)
    esp.bind((address, 0))
    udp = socket.socket(family, socket.SOCK_DGRAM)
    udp.bind((address, 0))
    for n in range(5):
        esp.sendto(struct.pack('!II', 0xa01, n + 1) + bytes(40), (address, 0))
        udp.sendto(bytes(range(1, 29)), (address, 4500))
"""


def mac_of(lab, interface):
    (link,) = json.loads(lab.hosts["fwd"].run(["ip", "-j", "link", "show", interface]).stdout)
    return link["address"].replace(":", "")


def put_on_the_wire(lab, host, towards, packets):
    """Send packets to fwd's interface `towards`, from the host at its other end."""
    lab.hosts[host].path("/run/packets").write_text("\n".join(octets.hex() for octets in packets))
    command = [sys.executable, str(Path(__file__).with_name("wire.py")), "wan", mac_of(lab, towards), "/run/packets"]
    lab.hosts[host].run(command, timeout=60)


def with_jumbo_frames(lab):
    for host, interface in (("fwd", "to-a"), ("fwd", "to-b"), ("site-a", "wan"), ("site-b", "wan")):
        lab.hosts[host].run(["ip", "link", "set", interface, "mtu", "9216"])


class Books:
    """fwd's counters, asked for on its socket."""

    def __init__(self, lab):
        self.client = Client(str(lab.hosts["fwd"].path("/run/fwd/control.sock")))

    def counters(self):
        return {counter["name"]: counter["value"] for counter in self.client.call("counter.list")["counters"]}


def arrived(lab):
    listed = lab.hosts["site-b"].run(["nft", "list", "table", "inet", "arrivals"]).stdout
    return sum(int(line.split("packets")[1].split()[0]) for line in listed.splitlines() if "packets" in line)


def assert_books_balance(lab, fwd):
    """Ours and the kernel's count are equal, no packet waits for a verdict, and nothing went wrong inside."""

    books = Books(lab)
    came = assert_balanced(lab, books)
    queue = lab.hosts["fwd"].run(["cat", "/proc/net/netfilter/nfnetlink_queue"]).stdout.split()
    counters = books.counters()
    books.client.close()
    assert queue[2] == "0", queue
    assert not any(counters[f"{kind}_internal_error"] for kind in ("flow", "timer")) and "Traceback" not in fwd.log
    assert counters["fast_path_lost"] == counters["queue_kernel_drop"] == counters["queue_socket_drop"] == 0
    return came, counters


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ports", in_full(["generic", "spi"], ["generic"]))
def test_each_hostile_packet_is_where_it_belongs(demo, ports):
    """Case by case, by two witnesses: rules that are not fwd's count what came, others at site-b what went on."""
    with_jumbo_frames(demo)
    demo.hosts["site-b"].path("/run/arrivals.nft").write_text(ARRIVALS)
    demo.hosts["site-b"].run(["nft", "-f", "/run/arrivals.nft"])
    fwd = demo.start_fwd(default_config() + f'[dataplane]\ntransit-ports = "{ports}"\n')
    demo.initiate()
    for tunnel in demo.topology.tunnels:
        assert demo.ping(tunnel.name) == 3
    came, before = assert_books_balance(demo, fwd)
    wrong = []
    for case in CASES:
        went_on = arrived(demo)
        put_on_the_wire(demo, "site-a", "to-a", case.packets)
        came_before, (came, after) = came, assert_books_balance(demo, fwd)
        drops = {name: after[name] - before[name] for name in after if name.startswith("flow_")}
        outcome = (came - came_before, arrived(demo) - went_on, {name: rise for name, rise in drops.items() if rise})
        if outcome != (case.handled, case.passed, case.drops):
            wrong.append((case.name, outcome, (case.handled, case.passed, case.drops)))
        before = after
    assert not wrong
    for tunnel in demo.topology.tunnels:
        assert demo.ping(tunnel.name) == 3
    sessions = fwd.sessions(application="ipsec-esp")
    large = [flow["bytes"] for session in sessions for flow in (session["c2s"], session["s2c"]) if flow["bytes"] > 8900]
    assert sum(large) >= 8928 + 8948 + 65535
    assert_books_balance(demo, fwd)
    assert fwd.stop() == 0


@pytest.mark.timeout(600)
def test_tunnels_flow_on_under_all_of_it_at_once(demo):
    """All that was thought of and found, from a site and from a peer of this host, while tunnels carry pings."""
    with_jumbo_frames(demo)
    fwd = demo.start_fwd()
    demo.initiate()
    for tunnel in demo.topology.tunnels:
        assert demo.ping(tunnel.name) == 3
    pings = [
        demo.start_ping(tunnel.name, count=in_full(600, 150), interval_s=in_full(0.05, 0.02))
        for tunnel in demo.topology.tunnels
    ]
    whole = [octets for octets in (*PACKETS, *read_corpus("decoder")) if len(octets) >= 20]
    for _ in range(in_full(10, 1)):
        put_on_the_wire(demo, "site-a", "to-a", [octets for case in CASES for octets in case.packets])
        put_on_the_wire(demo, "site-a", "to-a", whole)
        put_on_the_wire(demo, "peer", "to-peer", whole)
    lost = {}
    for tunnel, ping in zip(demo.topology.tunnels, pings, strict=True):
        told = outcome(ping)
        if told.received != in_full(600, 150):
            lost[tunnel.name] = told
    assert not lost
    came, counters = assert_books_balance(demo, fwd)
    print(f"{came} packets by the kernel's count, {counters['pkt_recv']} by fwd's")
    assert counters["pkt_recv"] == came > in_full(5_000, 1000)
    assert fwd.stop() == 0


def test_what_a_host_sends_to_itself_is_not_the_firewalls(terminated):
    """It would be seen twice, going out and coming in, and never crosses a wire."""
    fwd = terminated.start_fwd()
    terminated.initiate()
    for tunnel in terminated.topology.tunnels:
        assert terminated.ping(tunnel.name) == 3
    assert_books_balance(terminated, fwd)
    before = witnessed(terminated)
    with terminated.hosts["fwd"].capture("lo", "ip proto 50 or ip6 proto 50 or udp") as capture:
        terminated.hosts["fwd"].run([sys.executable, "-c", TO_ITSELF])
    assert len(capture.packets) >= 40
    assert_books_balance(terminated, fwd)
    assert witnessed(terminated) == before
    assert {s["c2s"]["source"] for s in fwd.sessions()} <= {"192.0.2.1", "192.0.2.2", "2001:db8:c::1", "2001:db8:c::2"}
