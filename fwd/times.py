"""Times as people read them."""

from __future__ import annotations

import time


def time_of_day(epoch: float) -> str:
    """A time in seconds since the epoch as text, with its date if that is not today's."""
    then = time.localtime(epoch)
    is_today = time.strftime("%F", then) == time.strftime("%F")
    return time.strftime("%H:%M:%S" if is_today else "%b %d %H:%M:%S", then)
