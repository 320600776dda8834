"""The client's end of the control socket."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..rpc import INTERNAL_ERROR, MAX_ANSWER_BYTES, RATE_KEYS, RATES_KNOWN_S, LiveKind, RpcError

TIMEOUT_S = 10.0
#: Sessions in a page, in full, in brief, and with rates and findings: some 5 ms of the daemon's time, in which packets
#: wait. The counts of those in full are read from the kernel.
_PAGE = 100
_BRIEF_PAGE = 500
_LIVE_PAGE = 100

#: How often `events` asks for more, in seconds.
_POLL_S = 0.2


class Ranking(NamedTuple):
    """Ids of sessions in the order asked for, how many match, and for how long rates are being measured, in seconds."""

    ids: list[int]
    matched: int
    measured_s: float


class NoDaemon(Exception):
    """Nobody answers on the socket; the message says what to do."""


def printable(text: str) -> str:
    """Text as a terminal may have it: what it would obey, and what nobody sees, as Python writes it (`\\x1b`)."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _printable_answer(answer: Any) -> Any:
    """An answer whose texts are printable: names of tunnels and identities of peers are chosen by anybody."""
    if isinstance(answer, str):
        return printable(answer)
    if isinstance(answer, list):
        return [_printable_answer(value) for value in answer]
    if isinstance(answer, dict):
        return {printable(key): _printable_answer(value) for key, value in answer.items()}
    return answer


class Client:
    """One connection to the daemon, opened with the first request, and again if the daemon has hung up since.

    `timeout_s` is how long an answer may take. Texts in answers are printable.
    """

    def __init__(self, path: str, timeout_s: float = TIMEOUT_S) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._connection: socket.socket | None = None
        self._buffer = b""
        self._id = 0

    @property
    def path(self) -> str:
        """The daemon's control socket."""
        return self._path

    def call(self, method: str, **params: Any) -> Any:
        """Ask and wait for the answer. Raises RpcError if the daemon says no, NoDaemon if it does not answer."""
        try:
            return self._call(method, params)
        except RpcError:
            raise
        except BaseException:  # Ctrl-C, say: an answer that is still to come must not be taken for the next one
            self.close()
            raise

    def _call(self, method: str, params: Mapping[str, Any]) -> Any:
        self._id += 1
        request = {"jsonrpc": "2.0", "id": self._id, "method": method, "params": params}
        try:
            if self._connection is not None and self._has_hung_up(self._connection):
                self.close()
            if self._connection is None:
                self._connection = self._connect()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a fwd that hangs up says why first
                self._connection.sendall(json.dumps(request).encode() + b"\n")
            line = self._line()
            answer = json.loads(line)
            if b"\\" in line or not line.isascii():  # else there is nothing that a terminal would obey
                answer = _printable_answer(answer)
        except FileNotFoundError:
            raise NoDaemon(f"no fwd on {self._path}: start it (systemctl start fwd), or name its --socket") from None
        except BlockingIOError:
            raise NoDaemon(f"fwd on {self._path} takes no more connections: try again later") from None
        except ConnectionRefusedError:
            if not stat.S_ISSOCK(os.stat(self._path).st_mode):
                raise NoDaemon(f"{self._path} is no socket: name fwd's --socket") from None
            raise NoDaemon(f"fwd has left {self._path} behind: start it again (systemctl start fwd)") from None
        except TimeoutError:
            raise NoDaemon(f"fwd on {self._path} does not answer within {self._timeout_s:g} s: see its log") from None
        except OSError as error:
            raise NoDaemon(f"{self._path}: {error.strerror or error}") from None
        except ValueError:
            raise NoDaemon(f"{self._path}: this is not fwd's answer: name fwd's --socket") from None
        if not isinstance(answer, dict) or ("result" not in answer and not isinstance(answer.get("error"), dict)):
            raise NoDaemon(f"{self._path}: this is not fwd's answer: name fwd's --socket")
        if "error" in answer:
            refusal = answer["error"]
            raise RpcError(refusal.get("code", INTERNAL_ERROR), str(refusal.get("message", "no reason given")))
        return answer["result"]

    def sessions(
        self,
        words: Mapping[str, str],
        sort: str | None = None,
        *,
        descending: bool = False,
        limit: int | None = None,
        brief: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """The sessions that match the filter, page by page, in the order of their ids or of `sort`; the first `limit`.

        What is read and not yet asked for is one page, and with `sort` the ids. In the order of a rate it takes a few
        seconds, if nobody has asked for rates yet, and they are as in `top`. `brief`: what `show session all` prints.
        """
        page = _BRIEF_PAGE if brief else _LIVE_PAGE if sort in RATE_KEYS else _PAGE
        shown = {"brief": brief, "live": sort in RATE_KEYS}
        if sort is not None:
            if sort in RATE_KEYS and (missing := RATES_KNOWN_S - self.rank(words, sort, limit=1).measured_s) > 0:
                time.sleep(missing)
            ids = self.rank(words, sort, descending=descending, limit=limit).ids
            for begin in range(0, len(ids), page):
                yield from self.call("session.list", ids=ids[begin : begin + page], limit=page, **shown)["sessions"]
            return
        after: int | None = 0
        left = limit
        while after is not None and left != 0:
            answer = self.call("session.list", filter=dict(words), after=after, limit=min(page, left or page), **shown)
            yield from answer["sessions"]
            after = answer["next"]
            left = None if left is None else left - len(answer["sessions"])

    def rank(
        self, words: Mapping[str, str], sort: str, *, descending: bool = False, limit: int | None = None
    ) -> Ranking:
        """Which sessions match the filter, in the order of `sort`; of equal ones the lower id comes first.

        The daemon looks at a bounded number of sessions for each request, and packets have their turn in between.
        """
        best: list[tuple[Any, int]] = []
        matched, after = 0, 0
        while True:
            is_enough = limit is not None and len(best) >= limit
            page = self.call(
                "session.rank",
                filter=dict(words),
                sort=sort,
                descending=descending,
                limit=limit,
                after=after,
                beyond=best[-1][0] if is_enough else None,
            )
            best += page["ranked"]
            matched += page["matched"]
            if limit is not None or page["next"] is None:  # without a limit once is enough
                best = sorted(best, key=lambda pair: pair[0], reverse=descending)[:limit]
            if page["next"] is None:
                return Ranking([number for _, number in best], matched, page["measured_s"])
            after = page["next"]

    def live(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Sessions by their ids, as far as they are still there, for a display that asks again every second or so.

        Each is as in `session.list`, and has `idle_s`, `rates` and `findings`:

            "rates": {"c2s": {"packets": 812.0, "bits": 9.1e6}, "s2c": ...}   a second; a direction is null until known
            "findings": [{"trouble": "loss", "text": ...}]                    what is wrong: see health.py

        Of a tunnel that ends here, which has one session, `ipsec` tells the rest: `ike_sa`, `child_sa`, `sa_stale_s`,
        and by `outbound` which direction this host sends, `c2s` or `s2c`. The filter `application ipsec-udp` chooses
        tunnels. Rates are measured from the first time that somebody asks for them until 30 s after the last; they
        are known some 2 s later. They are those of the last second; with more than 10,000 SPIs in the kernel of
        the last few.
        """
        sessions: list[dict[str, Any]] = []
        for begin in range(0, len(ids), _LIVE_PAGE):
            chosen = ids[begin : begin + _LIVE_PAGE]
            sessions += self.call("session.list", ids=chosen, limit=_LIVE_PAGE, live=True)["sessions"]
        return sessions

    def logged(self, words: Mapping[str, str], **more: Any) -> Iterator[dict[str, Any]]:
        """Entries of the traffic log that match, page by page; `more` is what `log.list` takes besides."""
        after = None
        while True:
            page = self.call("log.list", filter=dict(words), after=after, **more)
            yield from page["entries"]
            if (after := page["next"]) is None:
                return

    def session_count(self, words: Mapping[str, str]) -> dict[str, Any]:
        """How many sessions match the filter."""
        return self._whole("session.count", filter=dict(words))

    def clear(self, words: Mapping[str, str]) -> int:
        """End the sessions that match the filter and are there now; gives how many. Those before an error are ended."""
        answer = self.call("session.clear", filter=dict(words))
        count = int(answer["cleared"])
        while (after := answer["next"]) is not None:
            answer = self.call("session.clear", filter=dict(words), after=after, until=answer["until"])
            count += answer["cleared"]
        return count

    def sas(self) -> dict[str, Any]:
        """What `tunnel.list` says of all SAs."""
        return self._whole("tunnel.list")

    def tunnels(self, name: str | None) -> dict[str, Any]:
        """What `tunnel.detail` says of all tunnels, or of those of that name."""
        return self._whole("tunnel.detail", name=name)

    def values(self, kind: LiveKind, prefix: str) -> tuple[list[tuple[str, str]], bool]:
        """Some of the values of a kind that begin so, each with what it is, and whether there are more."""
        answer = self.call("complete.values", kind=kind, prefix=prefix)
        return [(value, meaning) for value, meaning in answer["values"]], answer["more"]

    def _whole(self, method: str, **params: Any) -> dict[str, Any]:
        """An answer whose pages are put together: what they list, and how many they count."""
        answer: dict[str, Any] = self.call(method, **params)
        after = answer.pop("next")
        while after is not None:
            page = self.call(method, **params, after=after)
            after = page.pop("next")
            for key, value in page.items():
                if isinstance(value, list) or key == "count":
                    answer[key] += value
        return answer

    def events(self, words: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Events from now on, for ever; those that were forgotten before they were read come as one `missed` event."""
        after = self.call("event.list", filter=dict(words))["next"]
        while True:
            page = self.call("event.list", filter=dict(words), after=after)
            if page["lost"]:
                yield {"number": after + page["lost"], "time": time.time(), "event": "missed", "count": page["lost"]}
            yield from page["events"]
            if page["next"] == after:
                time.sleep(_POLL_S)
            after = page["next"]

    def _connect(self) -> socket.socket:
        """Connect; while others stand in line before fwd, wait for a place in it."""
        deadline = time.monotonic() + self._timeout_s
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self._timeout_s)
        while True:
            try:
                connection.connect(self._path)
                return connection
            except BlockingIOError:
                if time.monotonic() > deadline:
                    connection.close()
                    raise
                time.sleep(0.01)
            except BaseException:
                connection.close()
                raise

    @staticmethod
    def _has_hung_up(connection: socket.socket) -> bool:
        """Whether there is something to read although nothing was asked: the end, if the daemon is another one now."""
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Hang up; the next request connects again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._buffer = b""

    def _line(self) -> bytes:
        assert self._connection is not None
        while b"\n" not in self._buffer:
            chunk = self._connection.recv(1 << 20)
            if not chunk:
                raise ConnectionError("fwd hung up")
            self._buffer += chunk
            if len(self._buffer) > MAX_ANSWER_BYTES:
                raise ConnectionError("the answer is too long")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
