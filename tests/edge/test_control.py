"""The control socket against clients that mean no good."""

import asyncio
import contextlib
import json
import os
import socket

import pytest

from fwd import rpc
from fwd.edge import clients, control
from fwd.edge.clients import Access, ListenError, Peer
from fwd.edge.control import ControlServer
from fwd.rpc import RpcError

GROUPS = {"readers": 71, "changers": 72}
RIGHTS = {"echo": "read", "change": "change"}


def dispatch(method, params):
    if method == "defect":
        raise ZeroDivisionError
    if method == "refuse":
        raise RpcError(rpc.NO_SUCH_SESSION, "no")
    if method == "long":
        return "x" * (rpc.MAX_ANSWER_BYTES + 1)
    if method == "big":
        return "x" * (rpc.MAX_ANSWER_BYTES // 2)
    return params


def serve(tmp_path, work, **access):
    """Run `work(path, server)` against a server."""

    async def main():
        server = ControlServer(tmp_path / "c.sock", dispatch, RIGHTS, Access(access.get("read", []), []))
        await server.start()
        try:
            return await asyncio.wait_for(work(tmp_path / "c.sock", server), 30)
        finally:
            await server.stop()

    return asyncio.run(main())


async def ask(path, *lines):
    reader, writer = await asyncio.open_unix_connection(path, limit=2 * rpc.MAX_ANSWER_BYTES)
    answers = []
    for line in lines:
        writer.write(line if isinstance(line, bytes) else json.dumps(line).encode())
        writer.write(b"\n")
        await writer.drain()
        answers.append(json.loads(await asyncio.wait_for(reader.readline(), 10)))
    writer.close()
    await writer.wait_closed()
    return answers


def _is_socket_of(fd, path):
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(fd))) as held:
        return held.family == socket.AF_UNIX and held.getsockname() == str(path)
    return False


def request(method, params=None, identity=1):
    return {"jsonrpc": "2.0", "id": identity, "method": method, "params": params or {}}


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"", rpc.PARSE_ERROR),
        (b"\xff\xfe\x00", rpc.PARSE_ERROR),
        (b"{", rpc.PARSE_ERROR),
        (b"[" * 60_000, rpc.PARSE_ERROR),
        (b'{"jsonrpc":"2.0","id":1,"method":"echo","params":{"x":NaN}}', rpc.PARSE_ERROR),
        (b"9" * 50_000, rpc.PARSE_ERROR),
        (b"1", rpc.INVALID_REQUEST),
        (b"[]", rpc.INVALID_REQUEST),
        ([request("echo")], rpc.INVALID_REQUEST),
        ({"id": 1, "method": "echo"}, rpc.INVALID_REQUEST),
        ({"method": "echo"}, rpc.INVALID_REQUEST),
        ({"jsonrpc": "2.0"}, rpc.INVALID_REQUEST),
        ({}, rpc.INVALID_REQUEST),
        ({**request("echo"), "method": 7}, rpc.INVALID_REQUEST),
        ({**request("echo"), "id": {}}, rpc.INVALID_REQUEST),
        ({**request("echo"), "params": [1]}, rpc.INVALID_PARAMS),
        (request("defect"), rpc.INTERNAL_ERROR),
        (request("refuse"), rpc.NO_SUCH_SESSION),
        (request("long"), rpc.INVALID_PARAMS),
    ],
)
def test_bad_requests_get_an_error_and_the_connection_goes_on(tmp_path, line, code):
    async def work(path, server):
        return await ask(path, line, request("echo", {"a": 1}, "next"))

    refused, fine = serve(tmp_path, work)
    assert refused["id"] is None or refused["id"] == 1
    assert refused["error"]["code"] == code and "\n" not in refused["error"]["message"]
    assert fine == {"jsonrpc": "2.0", "id": "next", "result": {"a": 1}}


def test_half_a_surrogate_pair_is_answered_too(tmp_path):
    async def work(path, server):
        (answer,) = await ask(path, request("echo", {"name": "\udcff"}, identity="\ud800"))
        assert (answer["id"], answer["result"]) == ("\ud800", {"name": "\udcff"})

    serve(tmp_path, work)


def test_a_notification_is_done_and_not_answered(tmp_path):
    async def work(path, server):
        return await ask(path, b'{"jsonrpc":"2.0","method":"echo"}\n' + json.dumps(request("echo")).encode())

    assert serve(tmp_path, work)[0]["id"] == 1


def test_a_request_that_is_too_long_ends_the_connection(tmp_path):
    async def work(path, server):
        (answer,) = await ask(path, b"x" * (2 * rpc.MAX_REQUEST_BYTES))
        return answer, await ask(path, request("echo"))

    answer, after = serve(tmp_path, work)
    assert answer["error"]["code"] == rpc.INVALID_REQUEST and after[0]["result"] == {}


def test_one_client_too_many_is_told(tmp_path):
    async def work(path, server):
        others = [await asyncio.open_unix_connection(path) for _ in range(control.MAX_CLIENTS)]
        await asyncio.sleep(0.1)
        reader, writer = await asyncio.open_unix_connection(path)
        refused = json.loads(await reader.readline())
        writer.close()
        for _, other in others:
            other.close()
        while server._listener._clients:
            await asyncio.sleep(0.01)
        return refused, await ask(path, request("echo"))

    refused, after = serve(tmp_path, work)
    assert refused["error"]["code"] == rpc.BUSY and "result" in after[0]


def places_taken(server):
    return server._places._taken.total()


async def hellos(path, server, count):
    """Connect so often; gives what those hear whom fwd hangs up on, and what to close."""
    refused, dealt_with = server.refused, server.refused + places_taken(server)
    streams = [await asyncio.open_unix_connection(path) for _ in range(count)]
    while server.refused + places_taken(server) < dealt_with + count:
        await asyncio.sleep(0.01)
    reads = [asyncio.ensure_future(reader.read()) for reader, _ in streams]
    while sum(read.done() for read in reads) < server.refused - refused:
        await asyncio.sleep(0.01)
    said = [json.loads(read.result()) for read in reads if read.done()]
    for read in reads:
        read.cancel()
    return said, [writer for _, writer in streams]


def test_one_who_may_not_read_hears_it_at_once_and_takes_no_place(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "peer_of", lambda _: Peer(7777, frozenset()))

    async def work(path, server):
        refusals = [await asyncio.open_unix_connection(path) for _ in range(2 * control.MAX_CLIENTS)]
        said = [json.loads(await reader.readline()) for reader, _ in refusals]
        monkeypatch.setattr(control, "peer_of", lambda _: Peer(0, frozenset()))
        served = await ask(path, request("echo"))
        for _, writer in refusals:
            writer.close()
        return said, served, server.refused

    said, served, refused = serve(tmp_path, work)
    assert {(answer["error"]["code"], answer["id"]) for answer in said} == {(rpc.FORBIDDEN, None)}
    assert "uid 7777 may not read" in said[0]["error"]["message"]
    assert "result" in served[0] and refused == 2 * control.MAX_CLIENTS


def test_no_user_takes_all_places_and_some_are_roots(tmp_path, monkeypatch):
    monkeypatch.setattr(clients, "_gid_of", GROUPS.get)

    async def work(path, server):
        writers, served = [], {}
        for uid in (7001, 7002, 7003, 7004, 0):
            monkeypatch.setattr(control, "peer_of", lambda _, uid=uid: Peer(uid, frozenset({GROUPS["readers"]})))
            said, opened = await hellos(path, server, 12)
            writers += opened
            served[uid] = 12 - len(said)
            assert all(word["error"]["code"] == rpc.BUSY for word in said)
        for writer in writers:
            writer.close()
        return served

    assert serve(tmp_path, work, read=["readers"]) == {7001: 8, 7002: 8, 7003: 8, 7004: 4, 0: 4}


def test_refusals_are_counted_and_answers_that_are_no_are_not(tmp_path):
    async def work(path, server):
        await ask(path, request("refuse"), request("long"), {**request("echo"), "params": [1]}, request("defect"))
        assert server.refused == 0
        await ask(path, b"{", {"method": "echo"})
        return server.refused

    assert serve(tmp_path, work) == 2


def test_a_client_that_does_not_read_is_hung_up_on_and_stalls_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "READ_S", 2.0)

    async def work(path, server):
        _, lazy = await asyncio.open_unix_connection(path, limit=1)
        lazy.write(json.dumps(request("big")).encode() + b"\n")
        while not server.requests:
            await asyncio.sleep(0.01)
        await ask(path, request("echo"))
        while places_taken(server) > 1:
            await asyncio.sleep(0.01)
        is_waited_for = places_taken(server) == 1  # others had their answers while fwd waits for this one
        while server._listener._clients:
            await asyncio.sleep(0.01)
        left = [task for task in os.listdir("/proc/self/fd") if _is_socket_of(task, path)]
        lazy.close()
        return is_waited_for, len(left)

    is_waited_for, left = serve(tmp_path, work)
    assert is_waited_for and left == 1  # only the listening socket: nothing waits for a reader that never comes


def test_a_silent_client_is_hung_up_on(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "IDLE_S", 0.2)

    async def work(path, server):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b'{"half')
        answer = await reader.read()
        writer.close()
        return answer

    assert serve(tmp_path, work) == b""


def test_who_may_do_what(monkeypatch):
    monkeypatch.setattr(clients, "_gid_of", GROUPS.get)
    access = Access(["readers"], ["changers", "nobodys"])
    assert access.missing_groups() == ["nobodys"]
    own = os.geteuid()
    for uid, groups, right, may in (
        (0, (), "change", True),
        (own, (), "change", True),
        (7777, (), "read", False),
        (7777, ("readers",), "read", True),
        (7777, ("readers",), "change", False),
        (7777, ("changers",), "read", True),
        (7777, ("changers",), "change", True),
    ):
        if may:
            access.check(Peer(uid, frozenset(map(GROUPS.get, groups))), right)
        else:
            with pytest.raises(RpcError, match=f"uid 7777 may not {right}; root and members of group"):
                access.check(Peer(uid, frozenset(map(GROUPS.get, groups))), right)


def test_a_dead_daemons_socket_is_replaced_and_a_live_ones_is_not(tmp_path):
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def work(path, server):
        with pytest.raises(ListenError, match="another fwd answers"):
            await ControlServer(path, dispatch, RIGHTS, Access([], [])).start()
        return await ask(path, request("echo"))

    assert serve(tmp_path, work)[0]["result"] == {}
    assert not path.exists()


def test_a_file_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "c.sock").write_text("precious")
    with pytest.raises(ListenError, match="is no socket"):
        serve(tmp_path, None)
    assert (tmp_path / "c.sock").read_text() == "precious"


def test_a_link_in_the_way_is_not_followed(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "c.sock").symlink_to(tmp_path / "target")
    with pytest.raises(ListenError, match="is no socket"):
        serve(tmp_path, None)
    assert (tmp_path / "target").read_text() == "precious"


def test_a_socket_that_is_no_longer_ours_stays(tmp_path):
    async def work(path, server):
        path.unlink()
        path.write_text("another's")

    serve(tmp_path, work)
    assert (tmp_path / "c.sock").read_text() == "another's"


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ListenError, match=r"cannot listen on .* \(.*\): \[control\] socket"):
        serve(tmp_path / "file" / "below", None)


def test_a_path_that_no_socket_can_have_is_a_clear_error(tmp_path):
    with pytest.raises(ListenError, match=r"cannot listen on .* \(AF_UNIX path too long\)"):
        serve(tmp_path / ("x" * 120), None)
