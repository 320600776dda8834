"""The daemon's wiring when something in it fails; the whole daemon is tested in namespaces."""

import asyncio
import logging
import socket

import pytest

from fwd import daemon
from fwd.config import Config
from fwd.daemon import Daemon
from fwd.edge.interfaces import InterfaceError
from fwd.edge.state_file import StateError


def wired(work, path=None):
    """Run `await work(daemon)` with a daemon that has not begun to work."""

    async def main():
        return await asyncio.wait_for(work(Daemon(Config(), path)), 10)

    return asyncio.run(main())


def test_a_timer_that_raises_is_logged_and_counted_and_comes_again(monkeypatch, caplog):
    monkeypatch.setattr(daemon, "TIMER_RETRY_S", 0.05)
    calls = []

    async def work(fwd):
        began = asyncio.get_running_loop().time()

        def handle_timer(now):
            calls.append(now - began)
            if len(calls) < 3:
                raise ZeroDivisionError("a defect")

        monkeypatch.setattr(fwd._firewall, "handle_timer", handle_timer)
        monkeypatch.setattr(fwd._firewall, "next_deadline", lambda: began)
        fwd._run_timer()
        while len(calls) < 3:
            await asyncio.sleep(0.01)
        return fwd._firewall.counters.values["timer_internal_error"]

    assert wired(work) == 2
    assert calls[2] >= 0.1 and caplog.text.count("a timer met a defect of fwd") == 2


def test_the_guard_of_the_rules_survives_what_netlink_says(monkeypatch, caplog):
    monkeypatch.setattr(daemon, "GUARD_INTERVAL_S", 0.001)
    answers = [OSError(105, "No buffer space available"), TimeoutError("timed out"), True]

    async def work(fwd):
        def is_in_place():
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(fwd._ruleset, "is_in_place", is_in_place)
        guard = asyncio.create_task(fwd._guard_rules())
        while answers:
            await asyncio.sleep(0.001)
        guard.cancel()

    wired(work)
    assert "No buffer space available" in caplog.text and "timed out" in caplog.text


def test_a_kernel_that_tells_of_no_interfaces_is_waited_for_so_long_and_no_longer(monkeypatch):
    monkeypatch.setattr(daemon, "INTERFACES_S", 0.05)
    with pytest.raises(InterfaceError, match=r"did not tell of its interfaces within 0.05 s"):
        wired(Daemon._wait_for_interfaces)


def test_a_stop_does_not_wait_for_interfaces():
    async def work(fwd):
        asyncio.get_running_loop().call_later(0.05, fwd._stop.set)
        await fwd._wait_for_interfaces()

    wired(work)


@pytest.mark.parametrize(
    "text", ["x = " + "[" * 10_000, "x = " + "9" * 5000, "default-zone = 7", "[dataplane]\nqueue = 7"]
)
def test_systemd_hears_of_the_end_of_a_reload_that_failed(tmp_path, monkeypatch, caplog, text):
    path = tmp_path / "fwd.toml"
    path.write_text(text)

    async def work(fwd):
        fwd._is_ready = True
        fwd._reload()

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{tmp_path}/notify")
        monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
        wired(work, path)
        assert manager.recv(4096).startswith(b"RELOADING=1")
        assert manager.recv(4096).startswith(b"READY=1")
    assert "not reloaded: " in caplog.text


def test_a_defect_at_the_takeover_does_not_come_again_and_again(tmp_path, monkeypatch, caplog):
    tmp_path.chmod(0o755)
    state = tmp_path / "state"
    config = Config.model_validate({"state": {"file": str(state)}})

    async def work():
        fwd = Daemon(config, None)
        monkeypatch.setattr(fwd._succession, "restore", lambda *_: 1 / 0)
        with pytest.raises(StateError, match="start it again, and sessions begin anew"):
            fwd._take_over()
        assert fwd._state is None and not fwd._firewall.changes.is_on

    asyncio.run(work())
    assert state.exists() and "met a defect of this one" in caplog.text


def test_groups_that_do_not_exist_are_named_in_the_log(caplog):
    caplog.set_level(logging.WARNING)
    daemon._access(Config.model_validate({"control": {"read-groups": ["root", "no-such-group"]}}))
    assert "groups that do not exist here: no-such-group" in caplog.text
