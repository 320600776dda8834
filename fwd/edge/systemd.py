"""sd_notify(3): what systemd wants to hear. The manual page itself advises to speak the protocol directly."""

from __future__ import annotations

import os
import socket
import time


def notify(*assignments: str) -> None:
    """Send assignments such as READY=1 to the service manager; without one, or on any error, do nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
            sender.connect("\0" + address[1:] if address[0] == "@" else address)
            sender.send("\n".join(assignments).encode())
    except OSError:
        pass  # the daemon's work does not depend on who watches it


def reloading() -> None:
    """Say that the configuration is being read again; `notify("READY=1")` ends it, whatever came of it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def watchdog_interval_s() -> float | None:
    """How often systemd wants to hear WATCHDOG=1: half of what it waits; None if it does not watch us."""
    pid, period = os.environ.get("WATCHDOG_PID"), os.environ.get("WATCHDOG_USEC", "")
    if not period.isdigit() or int(period) == 0 or (pid is not None and pid != str(os.getpid())):
        return None
    return int(period) / 2e6
