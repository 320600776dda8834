"""A whole machine for the tests: they run in the guest of `make test-vm`, which is theirs to install and to reboot."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.namespaces.conftest import nat, terminated, transit
from tests.vm.site import CONFIG, Site, sh

__all__ = ["nat", "terminated", "transit"]  # fixtures

BOOT = int(os.environ.get("FWD_VM_BOOT", "-1"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Reboots are last, and what takes longest just before.

    Elsewhere nothing here may run: it installs fwd, and changes the machine's own rules and units.
    """
    last = [Path(__file__).parent / name for name in ("test_scale.py", "test_boot.py")]
    items.sort(key=lambda item: last.index(item.path) if item.path in last else -1)
    if BOOT < 0:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="wants a machine of its own: make test-vm"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say at once what failed: the guest may not live to the end of the run."""
    report = yield
    terminal = item.config.pluginmanager.get_plugin("terminalreporter")
    if report.failed and terminal is not None:
        terminal.write_line("")
        terminal.write_line(report.longreprtext)
        for name, text in report.sections:
            terminal.write_line(f"--- {name}\n{text}")
    return report


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    """A peer beside this machine, and this machine's own strongSwan with a tunnel to it."""
    with Site() as site:
        yield site


@pytest.fixture
def service(site: Site) -> Iterator[Site]:
    """fwd runs as the unit, with a configuration that allows all; what it logged is shown if the test fails."""
    Path("/etc/fwd/fwd.toml").write_text(CONFIG)
    sh("systemctl reset-failed fwd; systemctl restart fwd", check=True)
    since = sh("date +%s.%N").strip()
    yield site
    Path("/etc/fwd/fwd.toml").write_text(CONFIG)
    print(sh(f"journalctl -u fwd --no-pager --since=@{since} -n 60"))
