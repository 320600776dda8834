"""What `fwctl top` shows, from the daemon's answers: rows with rates, health and a history each.

Nothing here knows of a screen, and only `Asker` talks to the daemon; so all of it is tested without either.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Final, NamedTuple, TypeAlias

from ..rpc import FILTER_KEYS, INVALID_PARAMS, NO_SUCH_SESSION, RpcError
from .client import Client, Ranking
from .render import spi_hex

#: Samples that a history keeps: what the widest sparkline shows.
HISTORY: Final = 240

#: Sessions whose history is kept although they are not shown at the moment, and for how many samples.
_KEPT, _KEPT_SAMPLES = 2048, 60

#: Rows that are asked for, and rows among which a free text is looked for.
ROWS: Final = 100
ROWS_SEARCHED: Final = 500

#: So many samples left out are a gap; less is a machine that was busy.
_GAP: Final = 2

#: How often what costs the daemon a look at its whole table is asked for, in seconds.
_SELDOM_S = 10.0

#: After a ranking it is left for so many times as long as it took.
_RANK_PAUSE: Final = 20

#: What became of sessions that are in the table no more.
_GONE: Final = ("session_ended", "session_absorbed", "session_not_restored")

#: Behind the last SA in a list of them: only what the list is like is wanted.
_BEHIND_ALL: Final = 2**62


class Kind(StrEnum):
    """What the rows are: tunnels that end here, or all sessions."""

    TUNNELS = "tunnels"
    SESSIONS = "sessions"


class Order(NamedTuple):
    """One way to sort: its name for people, the daemon's key, and whether the largest comes first by itself."""

    name: str
    key: str
    descending: bool


ORDERS: Final = (
    Order("rate", "bit-rate", True),
    Order("packets/s", "packet-rate", True),
    Order("bytes", "bytes", True),
    Order("packets", "packets", True),
    Order("trouble", "trouble", True),
    Order("newest", "age", False),
    Order("idle", "idle", True),
    Order("id", "id", False),
    Order("source", "source", False),
    Order("destination", "destination", False),
    Order("state", "state", False),
    Order("rule", "rule", False),
)


def order_by(key: str) -> Order:
    """The order by a key of the daemon; one that has no name of its own begins with the smallest."""
    return next((order for order in ORDERS if order.key == key), Order(key, key, False))


# --- the filter line ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filter:
    """What is written behind `/`: words for the daemon, or a free text that the rows are searched for.

    `pending` is the key whose value is yet to come. `hint` says what may follow, or what is wrong if `is_wrong`; what
    was complete before it holds all the same.
    """

    words: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    pending: str = ""
    hint: str = ""
    is_wrong: bool = False

    def __bool__(self) -> bool:
        return bool(self.words or self.text)

    def __str__(self) -> str:
        return " ".join(f"{key} {value}" for key, value in self.words.items()) or self.text


def parse_filter(line: str) -> Filter:
    """Read a filter line, complete or not: if its first word is a filter key it is a filter, else a free text."""
    words = line.split()
    if words[:1] == ["filter"]:
        del words[0]
    if not words:
        return Filter(hint=f"a text, or a filter: {', '.join(FILTER_KEYS)}")
    if words[0] not in FILTER_KEYS:
        near = [key for key in FILTER_KEYS if key.startswith(words[0])] if len(words) == 1 else []
        return Filter(text=" ".join(words), hint=f"text; or a filter: {', '.join(near)}" if near else "text")
    whole: dict[str, str] = {}
    while words:
        key = words.pop(0)
        if key not in FILTER_KEYS:
            near = [known for known in FILTER_KEYS if known.startswith(key)]
            if near and not words:
                return Filter(whole, hint=", ".join(near))
            return Filter(whole, hint=f"no filter key '{key}': {', '.join(FILTER_KEYS)}", is_wrong=True)
        if key in whole:
            return Filter(whole, hint=f"'{key}' stands there twice", is_wrong=True)
        negation = f"{words.pop(0)} " if FILTER_KEYS[key].has_not and words[:1] == ["not"] else ""
        if not words:
            return Filter(whole, pending=key, hint=f"{key}: {FILTER_KEYS[key].meaning}")
        whole[key] = negation + words.pop(0)
    return Filter(whole, hint="filter")


def complete_filter(line: str, rows: Iterable[Row] = ()) -> str | None:
    """How a filter line may go on, as a whole line; None if nothing is known. Zones and such come from the rows."""
    before, _, last = line.rpartition(" ")
    written = parse_filter(before)
    last = last.rpartition(",")[2]
    if not last or written.text:
        return None
    if written.pending:
        choices = FILTER_KEYS[written.pending].words or sorted({row.value_of(written.pending) for row in rows})
    else:
        choices = [key for key in FILTER_KEYS if key not in written.words]
    found = next((choice for choice in choices if choice.startswith(last) and choice != last), None)
    return found and f"{line[: len(line) - len(last)]}{found}"


# --- health ---------------------------------------------------------------------------------------------


class Level(IntEnum):
    """How bad something is; each has a colour and a sign."""

    REST = 0
    GOOD = 1
    DOUBT = 2
    BAD = 3


#: Troubles of which the operator has to do something; any other is a doubt.
_BAD = frozenset({"one-way", "after-delete", "unknown-spi", "reset", "wrap", "discard"})


class Health(NamedTuple):
    """A session's health as a word, and what is wrong as sentences, the worst first."""

    level: Level
    word: str
    troubles: tuple[str, ...] = ()

    @property
    def more(self) -> int:
        """How many troubles there are beside the one that is named."""
        return max(0, len(self.troubles) - 1)


def health_of(session: Mapping[str, Any]) -> Health:
    """The health of a session as `session.list` gives it, with `findings`."""
    if session["state"] == "DISCARD":
        return Health(Level.BAD, "discard", (f"its packets are dropped: rule {session['rule']}",))
    if session["end_reason"] != "unknown" and session["state"] in ("INIT", "CLOSED", "FREE"):
        return Health(Level.REST, "ended", (session["end_reason"],))
    found = session.get("findings") or (session.get("ipsec") or {}).get("findings") or ()
    if found:
        worst = sorted(found, key=lambda finding: finding["trouble"] not in _BAD)
        level = Level.BAD if worst[0]["trouble"] in _BAD else Level.DOUBT
        return Health(level, worst[0]["trouble"], tuple(finding["text"] for finding in worst))
    if session["state"] == "CLOSING":
        return Health(Level.REST, "closing", (session["end_reason"],))
    if session["type"] == "PRED":
        return Health(Level.REST, "waiting", ("announced by strongSwan, no packet yet",))
    return Health(Level.GOOD, "ok")


# --- rows -----------------------------------------------------------------------------------------------


#: One sample: a pair of rates, or None where nobody looked or they were not known.
Sample: TypeAlias = tuple[float, float] | None


class Rate(NamedTuple):
    """Packets and bits a second."""

    packets: float
    bits: float


@dataclass(frozen=True, slots=True)
class Row:
    """One session, which may be a tunnel's, at one time.

    `into` and `out` are the rates of what comes in and goes out of a tunnel that ends here, else those of c2s and s2c;
    None as long as they are not known. `history` has bits a second of both, oldest first.
    """

    session: Mapping[str, Any]
    health: Health
    into: Rate | None
    out: Rate | None
    history: Sequence[Sample]

    @property
    def id(self) -> int:
        """The session's id."""
        return int(self.session["id"])

    @property
    def name(self) -> str:
        """A tunnel's name, else the application."""
        if not self.is_tunnel:
            return str(self.session["application"])
        ipsec = self.session["ipsec"]
        child, ike = str(ipsec["child_sa"]), str(ipsec["ike_sa"])
        return child if child == ike else f"{ike}/{child}"

    @property
    def is_tunnel(self) -> bool:
        """Whether it is the session of a tunnel that ends here."""
        return bool(self.session["ipsec"]) and self.session["ipsec"]["child_sa"] is not None

    @property
    def peer(self) -> str:
        """The address of the other end of a tunnel that ends here."""
        return str(self.session["c2s"]["destination" if self.is_client_here else "source"])

    @property
    def is_client_here(self) -> bool:
        """Whether this host sends the c2s flow of a tunnel."""
        return bool(self.session["ipsec"] and self.session["ipsec"].get("outbound") == "c2s")

    @property
    def packet_rate(self) -> float | None:
        """Packets a second of both directions."""
        return None if self.into is None or self.out is None else self.into.packets + self.out.packets

    @property
    def bit_rate(self) -> float | None:
        """Bits a second of both directions."""
        return None if self.into is None or self.out is None else self.into.bits + self.out.bits

    def value_of(self, key: str) -> str:
        """The value under a filter key, as far as there are few different ones; else nothing."""
        flow = self.session["c2s"]
        values = {
            "from": flow["source_zone"],
            "to": flow["destination_zone"],
            "rule": self.session["rule"],
            "tunnel": self.name if self.is_tunnel else "",
            "source": flow["source"],
            "destination": flow["destination"],
            "ingress-interface": self.session["ingress_interface"],
            "egress-interface": self.session["egress_interface"],
        }
        return str(values.get(key, ""))

    def has(self, text: str) -> bool:
        """Whether all words of a text stand somewhere in the row, in upper or lower case."""
        flow, ipsec = self.session["c2s"], self.session["ipsec"] or {}
        ports = (flow["sport"], flow["dport"])
        hay = [
            self.name,
            self.health.word,
            *(f"{self.session[key]}" for key in ("id", "application", "state", "type", "rule")),
            *(f"{self.session[key]}" for key in ("ingress_interface", "egress_interface")),
            *(f"{flow[key]}" for key in ("source", "destination", "source_zone", "destination_zone")),
            *map(str, ports),
            *(f"0x{port:x} {spi_hex(port)}" for port in ports),
            *(f"{ipsec.get(key) or ''}" for key in ("local_id", "remote_id")),
        ]
        line = "\n".join(hay).lower()
        return all(word in line for word in text.lower().split())


def _rates(session: Mapping[str, Any]) -> tuple[Rate | None, Rate | None]:
    """In and out of a tunnel that ends here, else c2s and s2c."""
    told = session.get("rates") or {}
    c2s, s2c = (rate and Rate(rate["packets"], rate["bits"]) for rate in (told.get("c2s"), told.get("s2c")))
    return (s2c, c2s) if session["ipsec"] and session["ipsec"].get("outbound") == "c2s" else (c2s, s2c)


# --- questions and answers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What somebody wants to see. `detail` is the session that is looked at in full, `why` whether it is explained."""

    kind: Kind = Kind.TUNNELS
    order: Order = ORDERS[0]
    is_reversed: bool = False
    filter: Filter = field(default_factory=Filter)
    limit: int = ROWS
    detail: int | None = None
    why: bool = False

    @property
    def is_descending(self) -> bool:
        """Whether the largest comes first."""
        return self.order.descending is not self.is_reversed

    @property
    def words(self) -> dict[str, str]:
        """The filter words for the daemon."""
        return {**self.filter.words, **({"application": "ipsec-udp"} if self.kind is Kind.TUNNELS else {})}


@dataclass(frozen=True)
class Answers:
    """What the daemon said to one question: of itself, and of the sessions in their order.

    `matched` is how many sessions match; `sessions` is None if the daemon did not like the filter, whose `refusal` says
    why.
    """

    question: Question
    system: Mapping[str, Any]
    info: Mapping[str, Any]
    counters: Mapping[str, Mapping[str, Any]]
    source: Mapping[str, Any]
    sessions: Sequence[Mapping[str, Any]] | None
    matched: int = 0
    refusal: str = ""
    detail: Mapping[str, Any] | None = None
    explanation: Mapping[str, Any] | None = None


class Asker:
    """Asks a daemon over one connection, and waits for the answers.

    To put 100,000 sessions in order costs the daemon some tenths of a second, in small pages between packets. So that
    is repeated the less often the longer it takes; the rates of those that came first are asked for every time.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._seldom: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None
        self._seldom_at = 0.0
        self._ranking: Ranking | None = None
        self._ranked: tuple[Any, ...] = ()
        self._rank_again_at = 0.0

    def ask(self, question: Question) -> Answers:
        """Ask all of it, in requests that cost the daemon little each. Raises RpcError and NoDaemon."""
        client, now = self._client, time.monotonic()
        if self._seldom is None or now - self._seldom_at >= _SELDOM_S:
            self._seldom, self._seldom_at = (client.call("system.info"), client.call("session.info")), now
        system, info = self._seldom
        counters = {counter["name"]: counter for counter in client.call("counter.list")["counters"]}
        source = client.call("tunnel.list", after=_BEHIND_ALL)["source"]
        detail = explanation = None
        if question.detail is not None:
            detail, explanation = self._detail(question.detail, question.why)
        try:
            ranking = self._rank(question)
        except RpcError as error:
            if error.code != INVALID_PARAMS:
                raise
            return Answers(question, system, info, counters, source, None, 0, error.message, detail, explanation)
        sessions = client.live(ranking.ids)
        return Answers(question, system, info, counters, source, sessions, ranking.matched, "", detail, explanation)

    def _rank(self, question: Question) -> Ranking:
        limit = max(question.limit, ROWS_SEARCHED) if question.filter.text else question.limit
        wanted = (question.words, question.order.key, question.is_descending, limit)
        started = time.monotonic()
        if self._ranking is None or wanted != self._ranked or started >= self._rank_again_at:
            words, key, descending, _ = wanted
            self._ranking = self._client.rank(words, key, descending=descending, limit=limit)
            now = time.monotonic()
            self._ranked, self._rank_again_at = wanted, now + (now - started) * _RANK_PAUSE
        return self._ranking

    def _detail(self, session_id: int, why: bool) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
        """One session in full, live, and what explains it; nothing if it is not there any more."""
        try:
            detail = self._client.call("session.get", id=session_id)
            live = self._client.live([session_id])
            detail |= {key: live[0][key] for key in ("rates", "idle_s")} if live else {}
            return detail, self._client.call("explain.session", id=session_id) if why else None
        except RpcError as error:
            if error.code != NO_SUCH_SESSION:
                raise
            return None, None

    def close(self) -> None:
        """Hang up."""
        self._client.close()


# --- what is shown --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Overview:
    """The daemon as a whole. Rates are a second; `fast_share` is None if no packet came or the fast path is off."""

    host: str
    version: str
    pid: int
    packet_rate: float
    bit_rate: float
    fast_share: float | None
    fast_on: bool
    drop_rate: float
    drops: int
    session_count: int
    capacity: int
    new_rate: float
    vici_connected: bool
    vici_age_s: float | None
    vici_reason: str
    history: Sequence[Sample]

    @property
    def table_share(self) -> float:
        """How full the session table is, from 0 to 1."""
        return self.session_count / self.capacity if self.capacity else 0.0


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture: the overview, the rows in their order, and what is looked at in full.

    `matched` is how many sessions the daemon has for the filter, `searched` in how many of them a free text was
    looked for.
    """

    question: Question
    overview: Overview
    rows: Sequence[Row]
    matched: int
    searched: int
    refusal: str
    detail: Row | None
    explanation: Mapping[str, Any] | None


class History:
    """Pairs of rates, a sample for each tick, oldest first."""

    def __init__(self) -> None:
        self.seen_at = 0
        self._samples: deque[Sample] = deque(maxlen=HISTORY)

    def note(self, tick: int, sample: Sample) -> None:
        """The rates at a tick; a second time for the same tick replaces the first, and what was left out is a gap."""
        if self._samples:
            if tick == self.seen_at:
                self._samples.pop()
            self._samples.extend([None] * min(tick - self.seen_at - 1, HISTORY))
        self._samples.append(sample)
        self.seen_at = tick

    def last(self, tick: int) -> tuple[Sample, ...]:
        """The samples up to a tick, with the gap behind the newest if there is one."""
        return (*self._samples, *[None] * min(tick - self.seen_at, HISTORY))[-HISTORY:]


class Pictures:
    """Makes frames of answers, and remembers the rates that were: a sample each `interval_s` seconds."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self._tick = 0
        self._tick_at: float | None = None
        self._histories: dict[int, History] = {}
        self._pid: object = None
        self._overall = History()

    def take(self, answers: Answers, now: float, before: Frame | None = None) -> Frame:
        """A frame of what was answered at a time (monotonic seconds); what was refused stays as it was before."""
        self._advance(now)
        if answers.system["pid"] != self._pid:  # its ids may be other sessions'
            self._histories.clear()
            self._pid = answers.system["pid"]
        overview = self._overview(answers)
        rows: Sequence[Row] = before.rows if before else ()
        searched, matched = (before.searched, before.matched) if before else (0, 0)
        if answers.sessions is not None:
            rows = [self._row(session) for session in answers.sessions]
            searched, matched = len(rows), answers.matched
            if text := answers.question.filter.text:
                rows = [row for row in rows if row.has(text)]
        self._forget()
        return Frame(
            question=answers.question,
            overview=overview,
            rows=rows,
            matched=matched,
            searched=searched,
            refusal=answers.refusal,
            detail=None if answers.detail is None else self._row(answers.detail),
            explanation=answers.explanation,
        )

    def _advance(self, now: float) -> None:
        """Count ticks: several at once if nobody asked meanwhile, none if somebody asks in between."""
        elapsed = self.interval_s if self._tick_at is None else now - self._tick_at
        if elapsed >= 0.6 * self.interval_s:
            missed = round(elapsed / self.interval_s) - 1
            self._tick += 1 + (missed if missed >= _GAP else 0)
            self._tick_at = now

    def _row(self, session: Mapping[str, Any]) -> Row:
        into, out = _rates(session)
        history = self._histories.setdefault(session["id"], History())
        if "rates" in session:
            history.note(self._tick, None if into is None or out is None else (into.bits, out.bits))
        return Row(session, health_of(session), into, out, history.last(self._tick))

    def _forget(self) -> None:
        """Keep the histories of what was shown of late."""
        if len(self._histories) > _KEPT:
            oldest = self._tick - _KEPT_SAMPLES
            self._histories = {key: it for key, it in self._histories.items() if it.seen_at >= oldest}

    def _overview(self, answers: Answers) -> Overview:
        counters, info, source = answers.counters, answers.info, answers.source

        def value(name: str) -> int:
            return int(counters[name]["value"])

        def rate(name: str) -> float:
            return float(counters[name]["rate"])

        drops = [counter for counter in counters.values() if counter["severity"] == "drop"]
        packet_rate, bit_rate = rate("pkt_recv"), rate("byte_session") * 8
        self._overall.note(self._tick, (packet_rate, bit_rate))
        is_on = bool(info["fast_path"]["on"])
        return Overview(
            host=str(answers.system.get("hostname", "")),
            version=str(answers.system.get("fwd-version", "")),
            pid=int(answers.system.get("pid", 0)),
            packet_rate=packet_rate,
            bit_rate=bit_rate,
            fast_share=min(1.0, rate("pkt_fast_path") / packet_rate) if is_on and packet_rate else None,
            fast_on=is_on,
            drop_rate=float(sum(counter["rate"] for counter in drops)),
            drops=sum(counter["value"] for counter in drops),
            # What there is, from counters: to count the table costs more.
            session_count=value("session_allocated") - sum(map(value, _GONE)),
            capacity=int(info["sessions_supported"]),
            new_rate=rate("session_allocated"),
            vici_connected=bool(source["connected"]),
            vici_age_s=source["last_answer_age_s"],
            vici_reason=str(source["reason"] or ""),
            history=self._overall.last(self._tick),
        )
