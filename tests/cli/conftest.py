import asyncio
import contextlib
import threading

import pytest

from fwd.api import Api
from fwd.core.sa import SaEstablished
from fwd.edge.clients import Access
from fwd.edge.control import ControlServer
from tests.builders import HERE, LEFT, PEER, RIGHT, Bench, child_sa, esp


def api_of(bench):
    return Api(
        bench.firewall, lambda: bench.now, "/nowhere", lambda: {"hostname": "test"}, lambda: None, lambda _: None, dict
    )


@contextlib.contextmanager
def serving(path, bench):
    """A real control socket in front of a real core, in a thread of its own."""
    api = api_of(bench)
    loop = asyncio.new_event_loop()
    server = ControlServer(path, api.dispatch, api.rights, Access([], []))
    loop.run_until_complete(server.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """1,100 sessions, so that six pages are needed."""
    path = tmp_path_factory.mktemp("run") / "control.sock"
    bench = Bench()
    bench.forward(esp(LEFT, RIGHT, 7))
    for host in range(1, 1100):
        bench.forward(esp(f"10.{host // 250}.0.{host % 250}", RIGHT, 7))
    with serving(path, bench):
        yield path


@pytest.fixture
def small_bench():
    """A tunnel, session 1, and nine sessions in transit."""
    bench = Bench()
    bench.sas(SaEstablished(child_sa()))
    bench.receive(esp(PEER, HERE, 0x1001))
    for host in range(1, 10):
        bench.forward(esp(f"10.0.0.{host}", RIGHT, 7))
    return bench


@pytest.fixture
def small_daemon(tmp_path, small_bench):
    with serving(tmp_path / "control.sock", small_bench):
        yield tmp_path / "control.sock"
