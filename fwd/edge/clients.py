"""Sockets for clients on this host: at a path or a loopback port, who connects, what they may, how many at a time.

Who may do what is decided by the peer's credentials (SO_PEERCRED, SO_PEERGROUPS, unix(7)), not by the file mode, so
that one who may not hears why. These are what the process had when it connected; no user database is asked, which may
be far away and slow. Whoever comes by TCP has no credentials: it may be anybody on this host.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import grp
import logging
import os
import socket
import stat
import struct
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..rpc import BUSY, FORBIDDEN, RpcError
from .folders import strangers_on_the_way

log = logging.getLogger(__name__)

#: asm-generic/socket.h, since Linux 4.13; Python has no name for it, and takes 1,024 bytes from any socket option.
_SO_PEERGROUPS = 59
_PYTHONS_LIMIT = 1024

#: Whose place is taken by who comes by TCP.
_NOBODY = -1

#: Clients that may wait to be taken in, and how long they wait if there is no file descriptor for them, in seconds.
BACKLOG = 64
ACCEPT_RETRY_S = 1.0


class ListenError(Exception):
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


class Places:
    """How many clients there may be at a time: in all, how many of these only root can have, how many any other user.

    Those who come by TCP are one user.
    """

    def __init__(self, in_all: int, kept_for_root: int, of_user: int) -> None:
        self._in_all = in_all
        self._kept_for_root = kept_for_root
        self._of_user = of_user
        self._taken: Counter[int] = Counter()

    @contextlib.contextmanager
    def place(self, peer: Peer | None) -> Iterator[None]:
        """One of the places that there are. Raises RpcError BUSY if this peer can have none."""
        uid = _NOBODY if peer is None else peer.uid
        is_owner = peer is not None and peer.is_owner
        if not is_owner and self._taken[uid] >= self._of_user:
            who = "TCP has" if peer is None else f"uid {uid} has"
            raise RpcError(BUSY, f"{who} {self._of_user} connections already: close one first")
        if self._taken.total() >= self._in_all - (0 if is_owner else self._kept_for_root):
            raise RpcError(BUSY, f"{self._taken.total()} clients are connected already: try again later")
        self._taken[uid] += 1
        try:
            yield
        finally:
            self._taken[uid] -= 1
            if not self._taken[uid]:
                del self._taken[uid]


class Listener:
    """A socket that takes clients in, one in each turn of the loop: packets have theirs, too.

    `attend` is the whole life of a connection, which is closed when it returns; what it raises of OSError, TimeoutError
    and cancellation concerns this client only. It works on bare sockets, because asyncio's transports leave garbage in
    circles, and to find that of 10,000 connections takes a tenth of a second, in which packets would wait.
    """

    def __init__(
        self, bound: socket.socket, attend: Callable[[socket.socket], Coroutine[Any, Any, None]], name: str
    ) -> None:
        self._socket = bound
        self._attend = attend
        self._name = name
        self._path = Path(bound.getsockname()) if bound.family == socket.AF_UNIX else None
        self._inode = os.lstat(self._path).st_ino if self._path else 0
        self._accepting: asyncio.Task[None] | None = None
        self._clients: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Take clients in. Until then they are told that nobody is there."""
        self._socket.listen(BACKLOG)
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    async def stop(self) -> None:
        """Hang up on everybody and take the socket away, if it is still ours."""
        self.close()
        await asyncio.gather(*self._clients, *filter(None, [self._accepting]), return_exceptions=True)

    def close(self) -> None:
        """The same; clients are hung up on in the loop's next turn."""
        for task in (*self._clients, *filter(None, [self._accepting])):
            task.cancel()
        # Now, not with the task's end in the next turn: by then the descriptor may be another socket's.
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.lstat(self._path).st_ino == self._inode:
                    self._path.unlink()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._socket)
            except OSError as error:  # a client that is gone already, or no file descriptor left
                log.warning("the %s cannot take a client in: %s", self._name, error.strerror or error)
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            client = loop.create_task(self._serve(connection))
            self._clients.add(client)
            client.add_done_callback(self._clients.discard)
            await asyncio.sleep(0)

    async def _serve(self, connection: socket.socket) -> None:
        # A peer that hangs up, is too slow or silent for too long ends its own connection, nothing else.
        with connection, contextlib.suppress(OSError, TimeoutError, asyncio.CancelledError):
            await self._attend(connection)


def bind_path(path: Path, key: str) -> socket.socket:
    """A unix socket at this path, not listening yet. Replaces what a dead daemon left.

    `key` is what chooses the path in the configuration. Raises ListenError.
    """
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with _umask(0o022):
            path.parent.mkdir(parents=True, exist_ok=True)
        if whose := strangers_on_the_way(path.parent):
            raise ListenError(
                f"{whose}, who could put another socket in the place of fwd's: take that right away, or choose"
                f" another {key}"
            )
        _clear_way(path, key)
        with _umask(0o111):  # it has its mode from the first instant; a chmod could be led elsewhere by a link
            bound.bind(str(path))
    except ListenError:
        bound.close()
        raise
    except OSError as error:
        bound.close()
        raise ListenError(f"cannot listen on {path} ({error.strerror or error}): {key} chooses another path") from None
    return bound


def bind_port(address: str, port: int, key: str) -> socket.socket:
    """A TCP socket at this address and port, not listening yet; `key` chooses them. Raises ListenError."""
    bound = None
    try:
        bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address, port))
    except OSError as error:
        if bound is not None:
            bound.close()
        raise ListenError(
            f"cannot listen on {address}, port {port} ({error.strerror or error}): {key} chooses another one, or a unix"
            " socket"
        ) from None
    return bound


def _clear_way(path: Path, key: str) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ListenError(f"{path} is no socket: remove it, or choose another {key}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
    raise ListenError(f"another fwd answers on {path}: stop it, or choose another {key}")


def _gid_of(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def peer_of(connection: socket.socket) -> Peer:
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
