"""What holds for all tests."""

import signal


def pytest_configure() -> None:
    """A worker of pytest-xdist is deaf to Ctrl-C, and so would be whatever it starts, fwd and pings included."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
