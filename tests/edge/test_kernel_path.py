"""Elements in the kernel's own maps, as the nft program lists them."""

import json

from tests.edge.namespace import in_namespace, needs_root

pytestmark = needs_root

SCRIPT = """
import json, time
from types import SimpleNamespace
from fwd.core.fast_path import Outcome, Work
from fwd.core.policy import Verdict
from fwd.core.session import Element, Flow, SpiUse
from fwd.edge.kernel_path import KernelPath

Ruleset(20, True, 1024).install()
path = KernelPath(Backend.XT)
elements = []
for size in (12, 16, 36, 40):
    for number in range(3):
        flow = Flow(b"", "", 0)
        flow.session = SimpleNamespace(id=10 * size + number, c2s=flow if number < 2 else None)
        key = (1, 0 if number == 2 else 1, bytes([number + 1]) * (size - 4) + (4096 + number).to_bytes(4))
        use = SpiUse(4096 + number, flow, 0.0, 0.0)
        elements.append(Element(key, use, Verdict.DROP if number == 1 else Verdict.ACCEPT, 5 + number, 500 + number))

def show(readings):
    return [readings.get(element.key) for element in elements]
"""


def run(script):
    return [json.loads(line) for line in in_namespace(SCRIPT + script).splitlines()]


def test_what_is_written_is_what_nft_lists():
    refused, listing, found = run(
        "print(json.dumps(len(path.carry_out(Work(installs=elements)).refused)))\n"
        "print(json.dumps(listed('nft list table ip fwd_dataplane; nft list table ip6 fwd_dataplane')))\n"
        "print(json.dumps([(len(f.key[2]), f.verdict.value, f.reading, f.key[:2]) for f in path.find_all()]))\n"
    )
    assert not refused
    assert '"lo" . "lo" . 1.1.1.1 . 1.1.1.1 . 0.0.16.0 counter packets 5 bytes 500' in listing
    assert '"lo" . 0 . 3.3.3.3 . 3.3.3.3 . 0.0.16.2 counter packets 7 bytes 502' in listing
    assert "303:303:303:303:303:303:303:303" in listing
    for size in (12, 16, 36, 40):
        assert f'comment "session {10 * size} c2s, SPI 4096"' in listing
        assert f'comment "session {10 * size + 2} s2c, SPI 4098"' in listing
    assert listing.count(": drop") == 4 and listing.count(": accept") == 8
    assert sorted(found) == sorted(
        [size, "drop" if n == 1 else "accept", [5 + n, 500 + n], [1, 0 if n == 2 else 1]]
        for size in (12, 16, 36, 40)
        for n in range(3)
    )


def test_reading_and_removing_bring_the_counts():
    counts = [[5, 500], [6, 501], [7, 502]] * 4
    read, removed, left = run(
        "path.carry_out(Work(installs=elements))\n"
        "print(json.dumps(show(path.carry_out(Work(reads=elements)).read)))\n"
        "print(json.dumps(show(path.carry_out(Work(removals=elements)).removed)))\n"
        "print(json.dumps([len(path.find_all())]))\n"
    )
    assert read == removed == counts and left == [0]


def test_what_is_not_there_is_left_out_and_the_rest_done():
    removed, read, installed = run(
        "path.carry_out(Work(installs=elements[2:]))\n"
        "work = Work(removals=elements[:4], installs=elements[:1], reads=elements[4:6] + elements[1:2])\n"
        "outcome = path.carry_out(work)\n"
        "print(json.dumps(show(outcome.removed)[:5]))\n"
        "print(json.dumps(show(outcome.read)[:6]))\n"
        "print(json.dumps([len(outcome.refused), len(outcome.unknown), len(path.find_all())]))\n"
    )
    assert removed == [None, None, [7, 502], [5, 500], None]
    assert read == [None, None, None, None, [6, 501], [7, 502]]
    assert installed == [0, 0, 9]


def test_one_change_replaces_an_element():
    removed, read = run(
        "path.carry_out(Work(installs=elements))\n"
        "outcome = path.carry_out(Work(removals=elements, installs=elements, reads=[]))\n"
        "print(json.dumps(show(outcome.removed)))\n"
        "print(json.dumps(show(path.carry_out(Work(reads=elements)).read)))\n"
    )
    assert removed == read == [[5, 500], [6, 501], [7, 502]] * 4


def test_many_elements_take_several_messages():
    (result,) = run(
        "many = [Element((1, 1, n.to_bytes(12)), elements[0].use, Verdict.ACCEPT, n, n) for n in range(1000)]\n"
        "outcomes = [path.carry_out(work) for work in (Work(installs=many), Work(reads=many), Work(removals=many))]\n"
        "wanted = {element.key: (element.kernel_packets, element.kernel_bytes) for element in many}\n"
        "print(json.dumps([outcomes[1].read == wanted, outcomes[2].removed == wanted]))\n"
    )
    assert result == [True, True]


def test_full_maps_and_missing_tables_are_told():
    full, gone, removed = run(
        "many = [Element((1, 1, n.to_bytes(12)), elements[0].use, Verdict.ACCEPT, n, n) for n in range(1025)]\n"
        "print(json.dumps(len(path.carry_out(Work(installs=many)).refused)))\n"
        "Ruleset.remove()\n"
        "print(json.dumps(len(path.carry_out(Work(installs=many[:5])).refused)))\n"
        "outcome = path.carry_out(Work(removals=many[:5], reads=many[5:10]))\n"
        "print(json.dumps([len(outcome.removed), len(outcome.read), path.find_all()]))\n"
    )
    assert (full, gone, removed) == (1, 5, [0, 0, []])


def test_however_many_there_are_they_fit_a_small_socket_buffer():
    """The kernel's default limit, net.core.wmem_max, is 212,992 bytes: as many elements at once do not fit."""
    (result,) = run(
        "from fwd.edge import nftables\n"
        "Ruleset(20, True, 32768).install()\n"
        "nftables._SEND_BYTES = 106496\n"
        "path = KernelPath(Backend.XT)\n"
        "many = [Element((1, 1, n.to_bytes(12)), elements[0].use, Verdict.ACCEPT, n, n) for n in range(20000)]\n"
        "installed = path.carry_out(Work(installs=many))\n"
        "removed = path.carry_out(Work(removals=many))\n"
        "counts = [len(installed.refused), len(installed.unknown), len(removed.removed), len(removed.unknown)]\n"
        "print(json.dumps([*counts, len(path.find_all())]))\n"
    )
    assert result == [0, 0, 20000, 0, 0]


def test_no_answer_is_told_from_nothing_there():
    unknown, refused, reads = run(
        "path.carry_out(Work(installs=elements[:6]))\n"
        "def silence(*_): raise TimeoutError\n"
        "transact, path._socket.transact = path._socket.transact, silence\n"
        "outcome = path.carry_out(Work(removals=elements[:2], installs=elements[6:8], reads=elements[2:4]))\n"
        "print(json.dumps([e.key in outcome.unknown for e in elements[:8]]))\n"
        "print(json.dumps([len(outcome.refused), len(outcome.removed), len(outcome.read)]))\n"
        "path._socket.ask = silence\n"
        "outcome = path.carry_out(Work(reads=elements[:6]))\n"
        "print(json.dumps([len(outcome.unknown), len(outcome.read)]))\n"
    )
    assert unknown == [True, True, False, False, False, False, True, True]
    assert refused == [0, 0, 2] and reads == [6, 0]


def test_a_map_that_cannot_be_read_is_emptied_for_nobody_would_count():
    found, left = run(
        "path.carry_out(Work(installs=elements))\n"
        "asked = path._socket.ask\n"
        "def ask(message):\n"
        "    path._socket.ask = asked\n"
        "    raise OSError('no buffer space')\n"
        "path._socket.ask = ask\n"
        "print(json.dumps(len(path.find_all())))\n"
        "print(json.dumps(len(path.find_all())))\n"
    )
    assert found == left == 9  # of four maps with three each, the first is gone, in the kernel, too
