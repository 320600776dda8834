"""What holds for all tests."""

import signal

from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, and is no property of what is tested.
settings.register_profile("fwd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fwd")


def pytest_configure() -> None:
    """A worker of pytest-xdist is deaf to Ctrl-C, and so would be whatever it starts, fwd and pings included."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
