"""What happens to one packet out of the queue; the queue itself is tested with real packets, in namespaces."""

import contextlib

import pytest

from fwd.core.policy import Verdict
from fwd.edge.nfqueue import TIMED_EVERY, PacketQueue, _TurnIsOver


class Packet:
    hook, indev, outdev = 2, 3, 4

    def __init__(self, number, verdicts):
        self.number, self.verdicts = number, verdicts

    def get_payload(self):
        return bytes([self.number])

    def accept(self):
        self.verdicts.append((self.number, Verdict.ACCEPT))

    def drop(self):
        self.verdicts.append((self.number, Verdict.DROP))


def decide(octets, hook, indev, outdev, now):
    if octets[0] == 13:
        raise ValueError("a defect")
    return Verdict.ACCEPT if octets[0] % 2 else Verdict.DROP


def test_a_defect_costs_one_packet(caplog):
    verdicts = []
    queue = PacketQueue(20, 16, decide, lambda: Verdict.DROP)
    for number in (13, 1):
        queue._handle(Packet(number, verdicts))
    assert verdicts == [(13, Verdict.DROP), (1, Verdict.ACCEPT)] and "a defect of fwd" in caplog.text


@pytest.mark.parametrize(("packets", "timed"), [(1, 1), (TIMED_EVERY, 1), (TIMED_EVERY + 1, 2), (4 * TIMED_EVERY, 4)])
def test_the_first_decision_of_a_turn_is_timed_and_one_in_so_many_after_it(packets, timed):
    queue = PacketQueue(20, 16, decide, lambda: Verdict.DROP)
    queue._left = 4 * TIMED_EVERY
    for number in range(packets):
        with contextlib.suppress(_TurnIsOver):
            queue._handle(Packet(number % 2, []))
    assert sum(queue.decisions.counts) == timed and 0 < queue.decisions.total_s < 1
