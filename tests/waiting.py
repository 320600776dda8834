"""Waiting for what another thread, another process or the kernel is to do."""

import time

#: No turn counts for more.
_TURN_S = 0.25


def until(condition, timeout_s=30.0, pause_s=0.01):
    """Ask again and again until a condition holds; gives how many seconds that took.

    When the machine stands still for a second, so does whoever is waited for: a turn counts as 0.25 s at most. So the
    condition has to be one that is soon looked at.
    """
    waited, before = 0.0, time.monotonic()
    while not condition():
        assert waited < timeout_s, "waited in vain"
        time.sleep(pause_s)
        now = time.monotonic()
        waited += min(now - before, _TURN_S)
        before = now
    return waited
