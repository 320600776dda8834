"""Times as operators write them."""

from __future__ import annotations

import re
import time

_SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_FORMS = ("%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M", "%Y-%m-%d", "%Y/%m/%dT%H:%M:%S", "%Y/%m/%dT%H:%M", "%Y/%m/%d")
_TIMES = ("%H:%M:%S", "%H:%M")

#: For error messages and help.
WANTED = (
    "a time such as 20:00, 2026-11-25, 2026-11-25T20:00:30 or 2026/11/25@20:00:30, or how long ago: 90s, 15m, 2h, 3d"
)


def when(text: str, now: float) -> float:
    """A local time, or a time ago, in seconds since the epoch; a time without its day is today's. Raises ValueError."""
    if span := re.fullmatch(r"([0-9]{1,6})([smhdw])", text):
        return now - int(span[1]) * _SPANS[span[2]]
    spelled = re.sub("[@ ]", "T", text)
    for form in _FORMS:
        try:
            return time.mktime((*time.strptime(spelled, form)[:8], -1))
        except (ValueError, OverflowError):
            continue
    today = time.strftime("%Y-%m-%d", time.localtime(now))
    for form in _TIMES:
        try:
            return time.mktime((*time.strptime(f"{today}T{text}", f"%Y-%m-%dT{form}")[:8], -1))
        except (ValueError, OverflowError):
            continue
    raise ValueError(f"found '{text}', want {WANTED}")
