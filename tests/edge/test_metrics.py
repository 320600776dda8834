"""The page with the metrics against clients that mean no good, over TCP and a unix socket."""

import asyncio
import itertools
import os
import socket
import threading
from pathlib import Path

import pytest

from fwd.edge import metrics
from fwd.edge.clients import Access, ListenError, Peer
from fwd.edge.metrics import MetricsServer
from tests.ports import free_port

STEPS = 3
GET = b"GET /metrics HTTP/1.1\r\nHost: fwd\r\nAccept: text/plain\r\n\r\n"


def take():
    for _ in range(STEPS):
        yield
    return 42


def expose(figures, accept):
    assert threading.current_thread() is not threading.main_thread()
    return f"{figures} {accept}\n".encode(), "text/plain; version=0.0.4"


def serve(work, address, *, take=take, expose=expose, groups=()):
    """Run `work(server, address)` against a server."""

    async def main():
        server = MetricsServer(take, expose, Access(groups, ()))
        server.listen(address)
        try:
            return await asyncio.wait_for(work(server, address), 60)
        finally:
            server.close()

    return asyncio.run(main())


def place(host="127.0.0.1"):
    return host, free_port(address=host)


@pytest.fixture(params=["tcp", "tcp6", "unix"])
def address(request, tmp_path):
    if request.param == "unix":
        return tmp_path / "run" / "metrics.sock"
    return place("::1") if request.param == "tcp6" else place()


async def connect(address):
    return await (
        asyncio.open_unix_connection(address) if isinstance(address, Path) else asyncio.open_connection(*address)
    )


async def ask(address, octets=GET):
    reader, writer = await connect(address)
    writer.write(octets)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head, body


def test_the_metrics_and_the_page_before_them(address):
    async def work(server, address):
        status, head, body = await ask(address)
        assert (status, body) == (200, b"42 text/plain\n") and b"Content-Type: text/plain; version=0.0.4" in head
        assert b"Connection: close" in head and server.requests == 1
        assert (await ask(address, GET.replace(b"GET", b"HEAD")))[::2] == (200, b"")
        status, head, body = await ask(address, GET.replace(b"/metrics", b"/"))
        assert status == 200 and b'href="/metrics"' in body
        assert (await ask(address, GET.replace(b"/metrics", b"/metrics?x=1")))[0] == 200
        assert server.refused == 0

    serve(work, address)


@pytest.mark.parametrize(
    ("octets", "status", "says"),
    [
        (b"GET /else HTTP/1.1\r\nHost: fwd\r\n\r\n", 404, b"/metrics"),
        (b"POST /metrics HTTP/1.1\r\nHost: fwd\r\nContent-Length: 3\r\n\r\nabc", 405, b"only GET and HEAD"),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400, b"Host"),
        (b"\xff\xfe\x00\x00\r\n\r\n", 400, b"no HTTP"),
        (b"GET /metrics HTTP/1.1\r\nHost: fwd\r\nX: " + b"x" * 9000, 431, b"too long"),
        (b"GET /" + b"x" * 100_000, 431, b"too long"),
    ],
    ids=["path", "method", "no host", "garbage", "long header", "long line"],
)
def test_whatever_else_is_refused_in_words(address, octets, status, says):
    async def work(server, address):
        got, _, body = await ask(address, octets)
        assert got == status and says in body and server.refused == 1
        assert (await ask(address))[0] == 200

    serve(work, address)


def test_a_client_that_sends_nothing_or_slowly_is_hung_up_on(address, monkeypatch):
    monkeypatch.setattr(metrics, "REQUEST_S", 2.0)

    async def work(server, address):
        silent, slow = await connect(address), await connect(address)

        async def drip():
            for octet in GET[:-1]:
                slow[1].write(bytes([octet]))
                await asyncio.sleep(0.1)

        dripping = asyncio.create_task(drip())
        assert (await ask(address))[0] == 200
        assert await silent[0].read() == b""
        try:
            assert await slow[0].read() == b""
        except ConnectionError:
            pass
        dripping.cancel()
        for _, writer in (silent, slow):
            writer.close()

    serve(work, address)


def test_one_client_too_many_hears_it_and_the_others_places_come_free():
    address = place()

    async def work(server, address):
        held = [await connect(address) for _ in range(metrics.MAX_CLIENTS_OF_USER)]
        while len(server._listener._clients) < len(held):
            await asyncio.sleep(0.01)
        status, _, body = await ask(address)
        assert status == 503 and b"TCP has 8 connections already" in body
        for _, writer in held:
            writer.close()
        while (await ask(address))[0] != 200:
            await asyncio.sleep(0.01)

    serve(work, address)


def test_a_crowd_of_refused_clients_holds_no_descriptors():
    address = place()

    async def work(server, address):
        held = [await connect(address) for _ in range(metrics.MAX_CLIENTS_OF_USER)]
        crowd = [await connect(address) for _ in range(100)]
        while server.refused < len(crowd):
            await asyncio.sleep(0.01)
        while len(server._listener._clients) > len(held) + metrics.MAX_CLIENTS:
            await asyncio.sleep(0.01)
        for _, writer in (*held, *crowd):
            writer.close()

    serve(work, address)


def test_who_may_not_read_hears_who_may(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "peer_of", lambda connection: Peer(4001, frozenset({4001})))

    async def work(server, address):
        status, _, body = await ask(address)
        assert status == 403 and b"uid 4001 may not read; root and members of group nobody-has-it may" in body

    serve(work, tmp_path / "m.sock", groups=["nobody-has-it"])


def test_clients_have_one_answer_at_a_time_and_the_loop_goes_on_between_the_steps(address):
    async def work(server, address):
        running, most, turns = 0, 0, []

        def take():
            nonlocal running, most
            running += 1
            most = max(most, running)
            for _ in range(50):
                turns.append("step")
                yield
            running -= 1
            return 1

        async def others():
            while True:
                turns.append("other")
                await asyncio.sleep(0)

        server._take = take
        other = asyncio.create_task(others())
        assert [status for status, *_ in await asyncio.gather(*(ask(address) for _ in range(5)))] == [200] * 5
        other.cancel()
        assert most == 1
        steps = [turn for turn, after in itertools.pairwise(turns) if turn == after == "step"]
        assert not steps  # never two without somebody else's turn between

    serve(work, address)


def test_a_defect_is_an_answer_and_a_line_in_the_log(address, caplog):
    def broken():
        yield
        raise ZeroDivisionError

    async def work(server, address):
        status, _, body = await ask(address)
        assert status == 500 and b"its log says more" in body
        server._take = take
        assert (await ask(address))[0] == 200

    serve(work, address, take=broken)
    assert "a request for metrics met a defect" in caplog.text


def test_it_moves_and_where_it_cannot_it_stays(tmp_path):
    first, second = place(), tmp_path / "m.sock"

    async def work(server, address):
        server.listen(second)
        assert (await ask(second))[0] == 200
        with pytest.raises(ConnectionRefusedError):
            await ask(first)
        with (
            socket.create_server(first) as taken,
            pytest.raises(ListenError, match=r"cannot listen on .* in use.*listen"),
        ):
            taken.listen()
            server.listen(first)
        assert (await ask(second))[0] == 200
        (tmp_path / "file").write_text("")
        with pytest.raises(ListenError, match="is no socket"):
            server.listen(tmp_path / "file")
        server.listen(None)
        assert not second.exists()
        server.listen(first)
        assert (await ask(first))[0] == 200

    serve(work, first)
    assert not os.listdir(tmp_path) or os.listdir(tmp_path) == ["file"]
