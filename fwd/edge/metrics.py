"""The metrics over HTTP, for a Prometheus on this host or behind a proxy on it: GET /metrics.

Size, time and number of clients are bounded, one request a connection. All clients together have one answer at a time,
after which packets have as long. The figures are taken down between packets; what they look like as text is worked out
in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Generator, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import h11

from ..rpc import BUSY, RpcError
from .clients import Access, Listener, Peer, Places, bind_path, bind_port, peer_of

log = logging.getLogger(__name__)

#: A unix socket's path, or a loopback address and a port.
Address: TypeAlias = Path | tuple[str, int]

#: Clients at a time: in all, how many of these places only root can have, and how many any other user.
MAX_CLIENTS = 16
KEPT_FOR_ROOT = 4
MAX_CLIENTS_OF_USER = 8
#: The longest head of a request, in bytes, and how long it may take to come, in seconds.
MAX_HEAD_BYTES = 8192
REQUEST_S = 5.0
#: How long a client may take to read an answer, in seconds.
READ_S = 10.0
#: How long a client that was refused has to hang up: to do so first would take the refusal away from it.
LINGER_S = 0.5

_KEY = "[metrics] listen"
_TEXT = "text/plain; charset=utf-8"
_PAGE = b"""<!DOCTYPE html>
<html lang="en"><title>fwd</title><h1>fwd</h1><p><a href="/metrics">Metrics</a>, for Prometheus.</p></html>
"""

_Figures = TypeVar("_Figures")


class _Refused(Exception):
    """A request that is not answered with what it asks for."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class MetricsServer(Generic[_Figures]):
    """`take` gives the figures, in steps; `expose` turns them and the `Accept` header into text and its type."""

    def __init__(
        self,
        take: Callable[[], Generator[None, None, _Figures]],
        expose: Callable[[_Figures, str], tuple[bytes, str]],
        access: Access,
    ) -> None:
        self._take = take
        self._expose = expose
        self.access = access
        self.requests = 0
        self.refused = 0
        self._address: Address | None = None
        self._listener: Listener | None = None
        self._places = Places(MAX_CLIENTS, KEPT_FOR_ROOT, MAX_CLIENTS_OF_USER)
        self._lingering = 0
        self._turn = asyncio.Lock()

    def listen(self, address: Address | None) -> None:
        """Answer there from now on, and nowhere else. Raises ListenError, and then nothing has changed."""
        if address == self._address:
            return
        listener = None
        if address is not None:
            bound = bind_path(address, _KEY) if isinstance(address, Path) else bind_port(*address, _KEY)
            listener = Listener(bound, self._attend, "metrics socket")
            listener.start()
        self.close()
        self._address, self._listener = address, listener

    def close(self) -> None:
        """Answer no more."""
        if self._listener is not None:
            self._listener.close()
        self._address = self._listener = None

    async def _attend(self, connection: socket.socket) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        peer = peer_of(connection) if connection.family == socket.AF_UNIX else None
        request = None
        try:
            with self._place(peer):
                request = await _request(connection, http)
                body, content_type = await self._answer(request)
                await _send(connection, http, request, 200, body, content_type)
                return
        except h11.RemoteProtocolError as error:
            refusal = _Refused(error.error_status_hint, f"this is no HTTP request that fwd understands: {error}")
        except _Refused as error:
            refusal = error
        self.refused += 1
        await _send(connection, http, request, refusal.status, f"{refusal}\n".encode(), _TEXT)
        if self._lingering < MAX_CLIENTS:
            self._lingering += 1
            try:
                await _linger(connection)
            finally:
                self._lingering -= 1

    @contextlib.contextmanager
    def _place(self, peer: Peer | None) -> Iterator[None]:
        try:
            if peer is not None:
                self.access.check(peer, "read")
            with self._places.place(peer):
                yield
        except RpcError as error:
            raise _Refused(503 if error.code == BUSY else 403, error.message) from None

    async def _answer(self, request: h11.Request) -> tuple[bytes, str]:
        if request.method not in (b"GET", b"HEAD"):
            raise _Refused(405, "only GET and HEAD are answered here")
        path = request.target.partition(b"?")[0]
        if path == b"/":
            return _PAGE, "text/html; charset=utf-8"
        if path != b"/metrics":
            raise _Refused(404, "there is nothing here: the metrics are at /metrics")
        accept = b", ".join(value for name, value in request.headers if name == b"accept").decode("latin-1")
        self.requests += 1
        async with self._turn:
            begun = time.monotonic()
            try:
                figures = await _in_steps(self._take())
                answer = await asyncio.to_thread(self._expose, figures, accept)
            except Exception:
                log.exception("a request for metrics met a defect of fwd")
                raise _Refused(500, "error inside fwd: its log says more") from None
            await asyncio.sleep(time.monotonic() - begun)
        return answer


async def _in_steps(steps: Generator[None, None, _Figures]) -> _Figures:
    """What a generator returns, with a turn for packets after each of its steps."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            figures: _Figures = stop.value
            return figures
        await asyncio.sleep(0)


async def _request(connection: socket.socket, http: h11.Connection) -> h11.Request:
    """The head of a request. Raises RemoteProtocolError, _Refused, or TimeoutError if it does not come."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(REQUEST_S):
        while (event := http.next_event()) is h11.NEED_DATA:
            http.receive_data(await loop.sock_recv(connection, MAX_HEAD_BYTES))
    if isinstance(event, h11.Request):
        return event
    raise ConnectionResetError("hung up")  # before any request


async def _send(
    connection: socket.socket, http: h11.Connection, request: h11.Request | None, status: int, body: bytes, kind: str
) -> None:
    """Returns when the peer has read it, but for what the kernel holds. Raises TimeoutError or OSError."""
    headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("Connection", "close")]
    if status == 405:
        headers.append(("Allow", "GET, HEAD"))
    reason = HTTPStatus(status).phrase
    octets = http.send(h11.Response(status_code=status, reason=reason, headers=headers)) or b""
    if request is None or request.method != b"HEAD":
        octets += http.send(h11.Data(data=body)) or b""
    async with asyncio.timeout(READ_S):
        await asyncio.get_running_loop().sock_sendall(connection, octets)


async def _linger(connection: socket.socket) -> None:
    """Let a client hang up first, for a moment, and read what it still has to say."""
    connection.shutdown(socket.SHUT_WR)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while await asyncio.get_running_loop().sock_recv(connection, MAX_HEAD_BYTES):
                await asyncio.sleep(0)
