"""Makes fwd's rules and binds a queue where that hurts nobody: in a network namespace of its own.

Run as a program there (`unshare --net`), it prints what came of it as JSON.
"""

from __future__ import annotations

import json
import sys

from ..core.policy import Verdict
from ..edge.nfqueue import PacketQueue, QueueError
from ..edge.ruleset import Backend, Ruleset, RulesetError

_QUEUE, _QUEUE_LENGTH, _ELEMENTS = 20, 16, 16


def try_out(wanted: str) -> dict[str, str]:
    """How packets get to the queue here, in words, and why they do not; `wanted` is a backend, or `auto`."""
    outcome = {"backend": "", "words": "", "queue_refusal": ""}
    ruleset = Ruleset(_QUEUE, True, _ELEMENTS, None if wanted == "auto" else Backend(wanted))
    try:
        outcome["words"] = ruleset.install()
        outcome["backend"] = str(ruleset.backend)
    except RulesetError as error:
        outcome["words"] = str(error)
    packets = PacketQueue(_QUEUE, _QUEUE_LENGTH, lambda *_: Verdict.ACCEPT, lambda: Verdict.ACCEPT)
    try:
        packets.open()
        packets.close()
    except QueueError as error:
        outcome["queue_refusal"] = str(error)
    return outcome


if __name__ == "__main__":
    print(json.dumps(try_out(sys.argv[1])))
