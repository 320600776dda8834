"""The control socket: JSON-RPC 2.0 over a unix socket, one request a line, one answer a line.

Size, time and number of clients are bounded, and a client has one request at a time: one that sends garbage,
sends slowly or does not read costs a bounded piece of memory, and no packet its verdict. All clients together have one
answer at a time, after which packets have as long: a flood of requests takes half of the daemon at most.

Who may do what is decided by the peer's credentials (SO_PEERCRED, SO_PEERGROUPS, unix(7)), not by the file mode, so
that one who may not hears why. These are what the process had when it connected; no user database is asked, which may
be far away and slow. One who may not even read hears it at once, and takes nobody's place.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import grp
import json
import logging
import os
import socket
import stat
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..rpc import (
    BUSY,
    FORBIDDEN,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    MAX_ANSWER_BYTES,
    MAX_REQUEST_BYTES,
    PARSE_ERROR,
    RpcError,
)
from .folders import strangers_on_the_way

log = logging.getLogger(__name__)

#: asm-generic/socket.h, since Linux 4.13; Python has no name for it, and takes 1,024 bytes from any socket option.
_SO_PEERGROUPS = 59
_PYTHONS_LIMIT = 1024

#: Clients at a time: in all, how many of these places only root can have, and how many any other user.
MAX_CLIENTS = 32
KEPT_FOR_ROOT = 4
MAX_CLIENTS_OF_USER = 8
#: Clients that may wait to be taken in, and how long they wait if there is no file descriptor for them, in seconds.
BACKLOG = 64
ACCEPT_RETRY_S = 1.0
#: How long a client may be silent, and how long it may take to read an answer, in seconds.
IDLE_S = 60.0
READ_S = 10.0
#: How much of a request that is too long is read, in chunks of MAX_REQUEST_BYTES, and for how long.
DISCARD_CHUNKS = 16
DISCARD_S = 0.2


class ControlError(Exception):
    """The socket cannot be had; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end: user and all groups, by number."""

    uid: int
    gids: frozenset[int]

    @property
    def is_owner(self) -> bool:
        """Whether it is root or the user that fwd runs as."""
        return self.uid in (0, os.geteuid())


class Access:
    """Who has which right, by the names of groups. root and the daemon's own user have all.

    What numbers the groups have is asked once, here.
    """

    def __init__(self, read_groups: Sequence[str], change_groups: Sequence[str]) -> None:
        self._allowed = {"read": [*change_groups, *read_groups], "change": [*change_groups]}
        self._gids = {name: _gid_of(name) for name in self._allowed["read"]}

    def missing_groups(self) -> list[str]:
        """The groups named that this host does not have."""
        return [name for name, gid in self._gids.items() if gid is None]

    def check(self, peer: Peer, right: str) -> None:
        """Raises RpcError FORBIDDEN if the peer has not the right, `read` or `change`."""
        allowed = self._allowed[right]
        if not peer.is_owner and not any(self._gids[name] in peer.gids for name in allowed):
            groups = f" and members of group {' or '.join(allowed)}" if allowed else ""
            raise RpcError(
                FORBIDDEN,
                f"permission denied: uid {peer.uid} may not {right}; root{groups} may"
                f" ([control] {right}-groups in fwd's configuration)",
            )


class ControlServer:
    """The daemon's end. `dispatch(method, params)` answers or raises RpcError; it must be quick.

    `rights` maps each method to the right it needs. It works on bare sockets, because asyncio's transports leave
    garbage in circles, and to find that of 10,000 connections takes a tenth of a second, in which packets would wait.
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
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._places: Counter[int] = Counter()
        self._turn = asyncio.Lock()
        self._inode = 0

    async def open(self) -> None:
        """Take the path, without an answer to anybody yet. Replaces what a dead daemon left. Raises ControlError."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with _umask(0o022):
                self._path.parent.mkdir(parents=True, exist_ok=True)
            if whose := strangers_on_the_way(self._path.parent):
                raise ControlError(
                    f"{whose}, who could put another socket in the place of fwd's: take that right away, or choose"
                    " another [control] socket"
                )
            self._clear_way()
            with _umask(0o111):  # it has its mode from the first instant; a chmod could be led elsewhere by a link
                listener.bind(str(self._path))
            self._inode = os.lstat(self._path).st_ino
        except ControlError:
            listener.close()
            raise
        except OSError as error:
            listener.close()
            raise ControlError(
                f"cannot listen on {self._path} ({error.strerror or error}): [control] socket chooses another path"
            ) from None
        self._listener = listener

    async def start(self) -> None:
        """Answer. Until then a client is told that no daemon is there. Raises ControlError."""
        if self._listener is None:
            await self.open()
        assert self._listener is not None
        self._listener.listen(BACKLOG)
        self._accepting = asyncio.create_task(self._accept(self._listener))

    async def stop(self) -> None:
        """Hang up on everybody and take the socket away, if it is still ours."""
        if self._listener is None:
            return
        tasks = [*self._clients, *filter(None, [self._accepting])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(self._path).st_ino == self._inode:
                self._path.unlink()

    def _clear_way(self) -> None:
        try:
            found = os.lstat(self._path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise ControlError(f"{self._path} is no socket: remove it, or choose another [control] socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self._path))
            except (ConnectionRefusedError, FileNotFoundError):
                self._path.unlink(missing_ok=True)
                return
        raise ControlError(f"another fwd answers on {self._path}: stop it, or choose another [control] socket")

    async def _accept(self, listener: socket.socket) -> None:
        """Take clients in, one in each turn of the loop: packets have theirs, too."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # a client that is gone already, or no file descriptor left
                log.warning("the control socket cannot take a client in: %s", error.strerror or error)
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            client = loop.create_task(self._attend(connection))
            self._clients.add(client)
            client.add_done_callback(self._clients.discard)
            await asyncio.sleep(0)

    async def _attend(self, connection: socket.socket) -> None:
        # A peer that hangs up, is too slow or silent for too long ends its own connection, nothing else.
        with connection, contextlib.suppress(OSError, TimeoutError, asyncio.CancelledError):
            peer = _peer_of(connection)
            try:
                self.access.check(peer, "read")
                with self._place(peer):
                    await self._converse(connection, peer)
            except RpcError as error:
                self.refused += 1
                await _send(connection, _error(None, error.code, error.message))

    @contextlib.contextmanager
    def _place(self, peer: Peer) -> Iterator[None]:
        """One of the places that there are. Raises RpcError BUSY if this peer can have none."""
        if not peer.is_owner and self._places[peer.uid] >= MAX_CLIENTS_OF_USER:
            raise RpcError(BUSY, f"uid {peer.uid} has {MAX_CLIENTS_OF_USER} connections already: close one first")
        if self._places.total() >= MAX_CLIENTS - (0 if peer.is_owner else KEPT_FOR_ROOT):
            raise RpcError(BUSY, f"{self._places.total()} clients are connected already: try again later")
        self._places[peer.uid] += 1
        try:
            yield
        finally:
            self._places[peer.uid] -= 1
            if not self._places[peer.uid]:
                del self._places[peer.uid]

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
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def _error(identity: Any, code: int, message: str) -> bytes:
    return _encode({"jsonrpc": "2.0", "id": identity, "error": {"code": code, "message": message}})


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _gid_of(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def _peer_of(connection: socket.socket) -> Peer:
    """Who connected, as the kernel knows: struct ucred, and the supplementary groups. Raises OSError (unix(7))."""
    _, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        octets = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _PYTHONS_LIMIT)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        octets = _many_groups(connection)
    return Peer(uid, frozenset((gid, *struct.unpack(f"{len(octets) // 4}I", octets))))


def _many_groups(connection: socket.socket) -> bytes:
    """SO_PEERGROUPS of one who is in more groups than Python's own getsockopt has room for."""
    libc = ctypes.CDLL(None, use_errno=True)
    room = ctypes.create_string_buffer(4 * 65536)  # NGROUPS_MAX
    length = ctypes.c_uint(len(room))
    if libc.getsockopt(connection.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, room, ctypes.byref(length)):
        raise OSError(ctypes.get_errno(), "SO_PEERGROUPS")
    return room.raw[: length.value]


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    """For what is made meanwhile, whatever the daemon was started with."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
