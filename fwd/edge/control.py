"""The control socket: JSON-RPC 2.0 over a unix socket, one request a line, one answer a line.

Size, time and number of clients are bounded, and a client has one request at a time: one that sends garbage,
sends slowly or does not read costs a bounded piece of memory, and no packet its verdict. All clients together have one
answer at a time, after which packets have as long: a flood of requests takes half of the daemon at most.

Who may do what: clients.py. One who may not even read hears it at once, and takes nobody's place.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..rpc import (
    FORBIDDEN,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    MAX_ANSWER_BYTES,
    MAX_REQUEST_BYTES,
    PARSE_ERROR,
    RpcError,
)
from .clients import Access, Listener, Peer, Places, bind_path, peer_of

log = logging.getLogger(__name__)

#: Clients at a time: in all, how many of these places only root can have, and how many any other user.
MAX_CLIENTS = 32
KEPT_FOR_ROOT = 4
MAX_CLIENTS_OF_USER = 8
#: How long a client may be silent, and how long it may take to read an answer, in seconds.
IDLE_S = 60.0
READ_S = 10.0
#: How much of a request that is too long is read, in chunks of MAX_REQUEST_BYTES, and for how long.
DISCARD_CHUNKS = 16
DISCARD_S = 0.2


class ControlServer:
    """The daemon's end. `dispatch(method, params)` answers or raises RpcError; it must be quick.

    `rights` maps each method to the right it needs.
    """

    def __init__(
        self,
        path: Path,
        dispatch: Callable[[str, Mapping[str, object]], Any],
        rights: Mapping[str, str],
        access: Access,
    ) -> None:
        self._path = path
        self._dispatch = dispatch
        self._rights = rights
        self.access = access
        self.requests = 0
        self.refused = 0
        self._listener: Listener | None = None
        self._places = Places(MAX_CLIENTS, KEPT_FOR_ROOT, MAX_CLIENTS_OF_USER)
        self._turn = asyncio.Lock()

    async def open(self) -> None:
        """Take the path, without an answer to anybody yet. Replaces what a dead daemon left. Raises ListenError."""
        self._listener = Listener(bind_path(self._path, "[control] socket"), self._attend, "control socket")

    async def start(self) -> None:
        """Answer. Until then a client is told that no daemon is there. Raises ListenError."""
        if self._listener is None:
            await self.open()
        assert self._listener is not None
        self._listener.start()

    async def stop(self) -> None:
        """Hang up on everybody and take the socket away, if it is still ours."""
        if self._listener is not None:
            await self._listener.stop()

    async def _attend(self, connection: socket.socket) -> None:
        peer = peer_of(connection)
        try:
            self.access.check(peer, "read")
            with self._places.place(peer):
                await self._converse(connection, peer)
        except RpcError as error:
            self.refused += 1
            await _send(connection, _error(None, error.code, error.message))

    async def _converse(self, connection: socket.socket, peer: Peer) -> None:
        """Answer requests until the client hangs up, or has to be hung up on."""
        received = bytearray()
        while line := await _line(connection, received):
            async with self._turn:
                begun = time.monotonic()
                answer = self._answer(line, peer)
                await asyncio.sleep(time.monotonic() - begun)
            if answer is not None:
                await _send(connection, answer)

    def _answer(self, line: bytes, peer: Peer) -> bytes | None:
        """The answer to one line; None to a notification, which has no id and wants none."""
        self.requests += 1
        identity = None
        is_notification = False
        try:
            request = _parse(line)
            identity, is_notification = request.get("id"), "id" not in request
            answer = _encode({"jsonrpc": "2.0", "id": identity, "result": self._call(request, peer)})
            if len(answer) > MAX_ANSWER_BYTES:
                raise RpcError(INVALID_PARAMS, "the answer would be too long: ask for a smaller page")
        except RpcError as error:
            self.refused += error.code in _REFUSED
            answer = _error(identity, error.code, error.message)
        except Exception:
            log.exception("a request met a defect of fwd")
            answer = _error(identity, INTERNAL_ERROR, "error inside fwd: its log says more")
        return None if is_notification else answer

    def _call(self, request: Mapping[str, Any], peer: Peer) -> Any:
        method, params = request["method"], request.get("params", {})
        if not isinstance(params, dict):
            raise RpcError(INVALID_PARAMS, "params are given by name, as an object")
        self.access.check(peer, self._rights.get(method, "read"))
        return self._dispatch(method, params)


#: What counts as refused: not a question whose answer is no.
_REFUSED = frozenset({PARSE_ERROR, INVALID_REQUEST, FORBIDDEN})


def _parse(line: bytes) -> dict[str, Any]:
    """A request of JSON-RPC 2.0, params apart. Raises RpcError PARSE_ERROR or INVALID_REQUEST."""
    try:
        request = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise RpcError(PARSE_ERROR, "this is no JSON: one request a line, as JSON-RPC 2.0 has it") from None
    if not isinstance(request, dict):
        raise RpcError(INVALID_REQUEST, "a request is one JSON object; batches are not taken")
    if request.get("jsonrpc") != "2.0" or not isinstance(request.get("method"), str):
        raise RpcError(INVALID_REQUEST, 'a request has "jsonrpc": "2.0" and a "method"')
    if isinstance(request.get("id"), dict | list | bool):
        raise RpcError(INVALID_REQUEST, "an id is a number or a string")
    return request


async def _line(connection: socket.socket, received: bytearray) -> bytes:
    """The next line, from what was received or is; what a peer that hung up left is one, too, maybe an empty one.

    Raises RpcError INVALID_REQUEST if it is too long, TimeoutError if it does not come.
    """
    loop = asyncio.get_running_loop()
    looked_at = 0
    async with asyncio.timeout(IDLE_S):
        while (end := received.find(b"\n", looked_at)) < 0 and len(received) < MAX_REQUEST_BYTES:
            looked_at = len(received)
            chunk = await loop.sock_recv(connection, MAX_REQUEST_BYTES)
            if not chunk:
                end = len(received) - 1
                break
            received += chunk
    if (end < 0 and received) or end >= MAX_REQUEST_BYTES:
        await _discard(connection)
        raise RpcError(INVALID_REQUEST, f"a request has {MAX_REQUEST_BYTES} bytes at most")
    line = bytes(received[: end + 1])
    del received[: end + 1]
    return line


async def _discard(connection: socket.socket) -> None:
    """Read the rest of a line that is too long, some of it: a peer that still writes would miss what it is told."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            for _ in range(DISCARD_CHUNKS):
                chunk = await loop.sock_recv(connection, MAX_REQUEST_BYTES)
                if not chunk or chunk.endswith(b"\n"):
                    break
                await asyncio.sleep(0)


async def _send(connection: socket.socket, line: bytes) -> None:
    """Returns when the peer has read it, but for what the kernel holds. Raises TimeoutError or OSError."""
    async with asyncio.timeout(READ_S):
        await asyncio.get_running_loop().sock_sendall(connection, line)


def _encode(message: Mapping[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(message) + b"\n"  # in a tenth of the time, which packets wait
    except UnicodeEncodeError:  # half a surrogate pair, in somebody's id or name: JSON can escape it
        return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def _error(identity: Any, code: int, message: str) -> bytes:
    return _encode({"jsonrpc": "2.0", "id": identity, "error": {"code": code, "message": message}})


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
