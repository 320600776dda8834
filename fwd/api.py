"""What can be asked of the daemon: the methods of the control socket, from parameters to JSON-able answers.

No I/O: the methods work on the core alone, so they are tested without a socket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from heapq import nlargest, nsmallest
from ipaddress import ip_address
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .core.constants import HALF_OPEN_IDLE_S, SA_LINGER_S
from .core.counters import COUNTERS
from .core.events import ABOUT_NO_SESSION, Event, Moment, as_it_was, moment_of
from .core.explain import Group, explain_packet, explain_session
from .core.filter_value import FilterError
from .core.firewall import Firewall
from .core.limits import BY_PEERS, BY_SOURCE, HALF_OPEN
from .core.session import Application, Session, SessionType
from .core.session_filter import build_filter
from .core.session_order import RATES, OrderError, value_of
from .core.state import State
from .core.table import MAX_ID
from .log_filter import LogQuestion, build_log_filter
from .rpc import INVALID_PARAMS, METHOD_NOT_FOUND, NO_SUCH_SESSION, NO_TRAFFIC_LOG, LiveKind, RpcError
from .schema import explain
from .views import JSON, Views, brief

#: Events remembered for those who ask a little later.
EVENTS_KEPT = 4096

#: SPI pairs in one answer of `tunnel.detail`, about: each takes some 0.1 ms and 1 kB, a tunnel has 32 at most.
PAIRS_PER_PAGE = 128

#: Sessions, and events, that one page looks at, at most: some 2 to 5 ms with a filter, in which packets wait.
LOOKED_AT_ONCE = 4096
RANKED_AT_ONCE = 2048
EVENTS_LOOKED_AT = 1024

#: Sessions, in brief or not, and events, in one answer, whatever limit is asked for: some 5 to 15 ms' worth.
BRIEF_PER_PAGE = 500
SESSIONS_PER_PAGE = 250
EVENTS_PER_PAGE = 500

#: SAs in one answer of `tunnel.list`: some 5 ms' worth.
SAS_PER_PAGE = 500

#: Values offered for completion at once. With 100,000 sessions that takes 0.5 ms; if none of LOOKED_AT_ONCE SAs has a
#: name that begins so, 3 ms.
VALUES_OFFERED = 50

#: Entries in one answer of `log.list`, whatever limit is asked for: some 5 ms' worth.
LOGGED_PER_PAGE = 250

#: Sessions of this host without a tunnel in an answer of `tunnel.detail`.
STRANGERS_SHOWN = 32

#: A page ends earlier when the look at sessions has taken so long, in seconds, for filters can be long. Between two
#: glances at the clock there are so many.
LOOK_S = 0.005
LOOKS_A_GLANCE = 128

SessionId = Annotated[int, Field(ge=1)]


class _Params(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Nothing(_Params):
    pass


class _Filtered(_Params):
    filter: dict[str, str] = {}


class _After(_Params):
    after: int = Field(default=0, ge=0)


class _Counted(_After, _Filtered):
    pass


class _Page(_Counted):
    limit: int = Field(default=500, ge=1, le=1000)


class _ListParams(_Page):
    ids: Annotated[list[SessionId], Field(max_length=1000)] | None = None
    live: bool = False
    brief: bool = False

    @property
    def most(self) -> int:
        """How many sessions there may be in the answer."""
        return min(self.limit, BRIEF_PER_PAGE if self.brief else SESSIONS_PER_PAGE)


class _Rank(_Counted):
    sort: str = "id"
    descending: bool = False
    limit: Annotated[int, Field(ge=1)] | None = None
    beyond: str | float | int | None = None


class _One(_Params):
    id: SessionId


class _Clear(_After):
    id: SessionId | None = None
    filter: dict[str, str] | None = None
    until: Annotated[int, Field(ge=0)] | None = None


class _Tunnels(_After):
    name: str | None = None


class _PacketParams(_Params):
    src: str
    dst: str
    spi: Annotated[int, Field(ge=1, le=2**32 - 1)]
    ports: Annotated[list[Annotated[int, Field(ge=0, le=65535)]], Field(min_length=2, max_length=2)] | None = None


class _Values(_Params):
    kind: LiveKind
    prefix: str = ""


class _Logged(_Filtered):
    since: float | None = None
    until: float | None = None
    direction: Literal["backward", "forward"] = "backward"
    after: int | None = Field(default=None, ge=0)
    limit: int = Field(default=LOGGED_PER_PAGE, ge=1, le=1000)


class _Events(_Filtered):
    after: int = Field(default=-1, ge=-1)
    limit: int = Field(default=500, ge=1, le=1000)


def no_log(_: LogQuestion) -> tuple[list[JSON], int | None]:
    """A page of the traffic log where there is none. Raises RpcError."""
    raise RpcError(NO_TRAFFIC_LOG, "there is no traffic log: [traffic-log] file in fwd's configuration names one")


@dataclass(frozen=True, slots=True)
class Method:
    """A method: which right it needs (`read` or `change`), its parameters, what answers it."""

    right: str
    params: type[_Params]
    answer: Callable[[Any], JSON]


class Api:
    """The methods by name. `now` gives monotonic seconds; `host` what only the daemon knows of itself.

    `sync` brings the global counters up to date, `refresh` the counts of sessions that are about to be shown. `reload`
    reads the configuration again, and raises RpcError; so does `logged`, which gives a page of the traffic log.
    """

    def __init__(
        self,
        firewall: Firewall,
        now: Callable[[], float],
        vici_socket: str,
        host: Callable[[], Mapping[str, object]],
        sync: Callable[[], None],
        refresh: Callable[[Iterable[Session]], None],
        reload: Callable[[], JSON],
        logged: Callable[[LogQuestion], tuple[list[JSON], int | None]] = no_log,
    ) -> None:
        self._firewall = firewall
        self._now = now
        self._views = Views(firewall, now)
        self._events: deque[tuple[float, Event, Moment | None]] = deque(maxlen=EVENTS_KEPT)
        self._event_count = 0
        self._vici_socket = vici_socket
        self._host = host
        self._sync = sync
        self._refresh = refresh
        self._logged = logged
        self.methods: Mapping[str, Method] = {
            "session.list": Method("read", _ListParams, self._session_list),
            "session.rank": Method("read", _Rank, self._session_rank),
            "session.count": Method("read", _Counted, self._session_count),
            "session.get": Method("read", _One, self._session_get),
            "session.clear": Method("change", _Clear, self._session_clear),
            "session.info": Method("read", _Nothing, self._session_info),
            "explain.session": Method("read", _One, self._explain_session),
            "explain.packet": Method("read", _PacketParams, self._explain_packet),
            "event.list": Method("read", _Events, self._event_list),
            "complete.values": Method("read", _Values, self._complete_values),
            "counter.list": Method("read", _Nothing, self._counter_list),
            "log.list": Method("read", _Logged, self._log_list),
            "tunnel.list": Method("read", _After, self._tunnel_list),
            "tunnel.detail": Method("read", _Tunnels, self._tunnel_detail),
            "system.info": Method("read", _Nothing, self._system_info),
            "system.reload": Method("change", _Nothing, lambda _: reload()),
        }

    @property
    def rights(self) -> Mapping[str, str]:
        """Which right each method needs."""
        return {name: method.right for name, method in self.methods.items()}

    def dispatch(self, name: str, params: Mapping[str, object]) -> JSON:
        """Answer one request. Raises RpcError."""
        method = self.methods.get(name)
        if method is None:
            raise RpcError(METHOD_NOT_FOUND, f"no method '{name}': there are {', '.join(self.methods)}")
        try:
            return method.answer(method.params.model_validate(params))
        except ValidationError as error:
            raise RpcError(INVALID_PARAMS, f"{name}: {'; '.join(explain(error, method.params))}") from None
        except (FilterError, OrderError) as error:
            raise RpcError(INVALID_PARAMS, str(error)) from None

    # --- sessions -----------------------------------------------------------------------------------

    def _look(
        self, words: Mapping[str, str], after: int, looks: int, *, most: int = 0, until: int = MAX_ID
    ) -> tuple[list[Session], int | None]:
        """What matches among the next sessions after an id, up to `until`, and what to go on after; None at the end.

        Of those that match, `most` at most, if given. It looks at no more than `looks` sessions, nor for longer than
        LOOK_S: packets wait meanwhile.
        """
        matches, began = build_filter(words), self._now()
        found: list[Session] = []
        last = after
        for count, session in enumerate(self._firewall.table.after(after)):
            if session.id > until:
                break
            is_late = count % LOOKS_A_GLANCE == LOOKS_A_GLANCE - 1 and self._now() - began > LOOK_S
            if count == looks or is_late or (most and len(found) == most):
                return found, last
            last = session.id
            if matches(session, began):
                found.append(session)
        return found, None

    def _session_list(self, params: _ListParams) -> JSON:
        """Sessions after an id, in the order of their ids. `next` is what to go on after, None at the end.

        A page may have fewer than `limit`, with a filter even none, and still not be the last. With `ids` those
        sessions, in that order, as far as they are still there and the filter matches; SESSIONS_PER_PAGE at most, and
        `next` is how many of the ids are done. `live`: for a display that asks again and again, each with `rates` and
        `findings`. `brief`: what `show session all` prints and no more, which is a fraction of the work.
        """
        if params.ids is not None:
            return self._sessions_named(params, params.ids)
        page, following = self._look(
            params.filter, params.after, LOOKED_AT_ONCE, most=min(params.limit, SESSIONS_PER_PAGE)
        )
        return self._shown(page, following, params)

    def _sessions_named(self, params: _ListParams, ids: list[int]) -> JSON:
        matches, now = build_filter(params.filter), self._now()
        limit = params.most
        chosen = ids[params.after : params.after + limit]
        found = filter(None, map(self._firewall.table.live, chosen))
        following = params.after + limit if params.after + limit < len(ids) else None
        return self._shown([session for session in found if matches(session, now)], following, params)

    def _shown(self, page: list[Session], following: int | None, params: _ListParams) -> JSON:
        if params.brief:
            return {"sessions": [brief(session) for session in page], "next": following}
        if params.live:
            self._firewall.rates.watch(self._now())
        self._refresh(page)
        return {
            "sessions": [self._views.session(session, is_live=params.live) for session in page],
            "next": following,
        }

    def _session_rank(self, params: _Rank) -> JSON:
        """The next sessions after an id in the order of `sort`: pairs of value and id, of equals the lower id first.

        RANKED_AT_ONCE are looked at, at most, and `next` is what to go on after, None at the end; who asks puts the
        pages together. With `limit` no more than so many, and with `beyond` only those that come before that value: the
        last of those that one has already. `matched` is how many match the filter. Rates are measured from the first
        time that somebody sorts by them, `measured_s` seconds ago; until they are known they are taken for 0.
        """
        firewall, now = self._firewall, self._now()
        if params.sort in RATES:
            firewall.rates.watch(now)
        value = value_of(params.sort)
        page, following = self._look(params.filter, params.after, RANKED_AT_ONCE)
        ranked = [(value(firewall, session, now), session.id) for session in page]
        matched = len(ranked)
        if (beyond := params.beyond) is not None:
            if ranked and isinstance(beyond, str) is not isinstance(ranked[0][0], str):
                raise RpcError(INVALID_PARAMS, f"session.rank: beyond: {beyond!r} is no value of '{params.sort}'")
            ranked = [pair for pair in ranked if (pair[0] > beyond if params.descending else pair[0] < beyond)]
        if params.limit is not None:
            first = nlargest if params.descending else nsmallest
            ranked = first(params.limit, ranked, key=lambda pair: pair[0])
        else:
            ranked.sort(key=lambda pair: pair[0], reverse=params.descending)
        return {
            "ranked": ranked,
            "matched": matched,
            "measured_s": firewall.rates.measured_s(now),
            "next": following,
        }

    def _session_count(self, params: _Counted) -> JSON:
        """How many of the next sessions after an id match; `next` is what to go on after, None at the end."""
        found, following = self._look(params.filter, params.after, LOOKED_AT_ONCE)
        return {"count": len(found), "next": following}

    def _session_get(self, params: _One) -> JSON:
        session = self._found(params.id, self._firewall.table.find(params.id))
        self._refresh([session])
        return self._views.session(session, is_detailed=True)

    def _session_clear(self, params: _Clear) -> JSON:
        """End one session, or the next ones after an id that match a filter.

        `next` is what to go on after, None at the end. No session beyond `until` is ended; the first answer gives the
        newest's id for the questions that follow: what comes after an ended one, a tunnel's next session say, stays.
        """
        if (params.id is None) == (params.filter is None):
            raise RpcError(INVALID_PARAMS, "session.clear: give either an id or a filter (an empty one for all)")
        until = self._firewall.table.last_id if params.until is None else params.until
        following = None
        if params.id is not None:
            chosen = [self._found(params.id, self._firewall.table.live(params.id))]
        else:
            chosen, following = self._look(params.filter or {}, params.after, LOOKED_AT_ONCE, until=until)
        self._firewall.clear(chosen, self._now())
        return {"cleared": len(chosen), "next": following, "until": until}

    def _found(self, session_id: int, session: Session | None) -> Session:
        if session is None:
            raise RpcError(NO_SUCH_SESSION, f"no session {session_id}: 'show session all' lists those there are")
        return session

    def _session_info(self, _: _Nothing) -> JSON:
        firewall, now = self._firewall, self._now()
        active = dict.fromkeys(map(str, Application), 0)
        discarded = predicted = 0
        for (application, state, kind), count in firewall.table.tally.items():
            if kind is SessionType.PRED:
                predicted += count
            elif state is State.DISCARD:
                discarded += count
            else:
                active[application] += count
        settings = firewall.settings
        rate = firewall.counters.rate
        bounds = firewall.limits.bounds
        most_of_source, most_of_peers = firewall.limits.most()
        next_look = firewall.ager.next_deadline()
        return {
            "sessions_supported": firewall.table.capacity,
            "sessions_allocated": len(firewall.table),
            "active": active,
            "predicted": predicted,
            "discard": discarded,
            "ended_readable": firewall.table.ended_count,
            "utilization_percent": int(firewall.table.utilisation * 100),
            "created_since_start": firewall.counters.values["session_allocated"],
            "packet_rate": rate("pkt_recv", now),
            "throughput_kbps": rate("byte_session", now) * 8 / 1000,
            "new_session_rate": rate("session_allocated", now),
            "fast_path": {
                "on": firewall.fast_path.is_on,
                "spis_in_kernel": firewall.fast_path.in_kernel,
                "capacity": firewall.fast_path.capacity,
                "packet_rate": rate("pkt_fast_path", now),
            },
            "timeouts_s": {**settings.timeouts_s, "discard": settings.discard_timeout_s},
            "tunnel_down_timeout_s": SA_LINGER_S,
            "half_open_idle_s": HALF_OPEN_IDLE_S,
            "readable_s": settings.keep_ended_s,
            "limits": {
                "source": {"limit": bounds.source, "most": most_of_source},
                "peers": {"limit": bounds.peers, "most": most_of_peers},
                "half_open": {"limit": bounds.half_open, "now": firewall.limits.half_open_count},
                "dropped": sum(firewall.counters.values[name] for name in (BY_SOURCE, BY_PEERS, HALF_OPEN)),
            },
            "accelerated_ageing": {
                "enabled": settings.ageing_factor > 1,
                "active": firewall.ager.factor > 1,
                "threshold_percent": round(settings.ageing_threshold * 100),
                "factor": settings.ageing_factor,
            },
            "ager": {
                "aged_out": firewall.counters.values["session_aged_out"],
                "gave_way": firewall.counters.values["session_gave_way"],
                "next_look_s": None if next_look is None else max(0.0, next_look - now),
            },
            "setup": {
                "transit_ports": settings.transit_ports,
                "pass_through": settings.pass_through,
                "unknown_spi": settings.unknown_spi,
                "unknown_spi_grace_s": settings.unknown_spi_grace_s,
                "dropped_table_full": firewall.counters.values["flow_table_full"],
            },
        }

    # --- what, why, and what happens --------------------------------------------------------------------

    def note_event(self, event: Event) -> None:
        """Remember an event, as things are, for those who ask for it; of more than EVENTS_KEPT the oldest goes."""
        self._events.append((self._now(), event, moment_of(event)))
        self._event_count += 1

    def _event_list(self, params: _Events) -> JSON:
        """Events after a number, as far as they are still there; after -1 only says where one is."""
        first = self._event_count - len(self._events) + 1
        if params.after == -1 or params.after > self._event_count:
            return {"events": [], "next": self._event_count, "lost": 0}
        matches, now = build_filter(params.filter), self._now()
        begin = max(params.after + 1, first)
        events = []
        number = params.after
        looked_at = islice(self._events, begin - first, begin - first + EVENTS_LOOKED_AT)
        for number, (at, happened, moment) in enumerate(looked_at, begin):
            event = as_it_was(happened, moment)
            about = event.session if not isinstance(event, ABOUT_NO_SESSION) else None
            if not params.filter or (about is not None and matches(about, now)):
                events.append(self._views.event(number, at, event))
                if len(events) == min(params.limit, EVENTS_PER_PAGE):
                    break
        return {"events": events, "next": max(number, begin - 1), "lost": begin - params.after - 1}

    def _explain_session(self, params: _One) -> JSON:
        session = self._found(params.id, self._firewall.table.find(params.id))
        self._refresh([session])
        return {"session": session.id, "groups": self._groups(explain_session, session)}

    def _explain_packet(self, params: _PacketParams) -> JSON:
        src, dst = (_address(key, text) for key, text in (("src", params.src), ("dst", params.dst)))
        if len(src) != len(dst):
            raise RpcError(INVALID_PARAMS, "explain packet: src and dst are of different IP versions")
        ports = (params.ports[0], params.ports[1]) if params.ports else None
        now = self._now()
        session, groups = explain_packet(self._firewall, src, dst, params.spi, ports, now, self._views.clock)
        return {"session": session and session.id, "groups": [asdict(group) for group in groups]}

    def _groups(self, explain_it: Callable[..., list[Group]], session: Session) -> list[JSON]:
        return [asdict(group) for group in explain_it(self._firewall, session, self._now(), self._views.clock)]

    def _tunnel_detail(self, params: _Tunnels) -> JSON:
        """Tunnels in the order of their sessions' ids, those that ended and are still readable included."""
        page: list[Session] = []
        following = None
        pairs = 0
        for session in self._firewall.table.tunnels_after(params.after, params.name):
            pairs += len(session.generations)
            if page and pairs > PAIRS_PER_PAGE:
                following = page[-1].id
                break
            page.append(session)
        if params.name is not None and not params.after and not page:
            raise RpcError(NO_SUCH_SESSION, f"no tunnel '{params.name}': 'show tunnel detail' lists those there are")
        self._refresh(page)
        strangers = islice(
            self._firewall.strangers if params.name is None and following is None else (), STRANGERS_SHOWN
        )
        return {
            "source": self._source(),
            "tunnels": [self._views.tunnel(session) for session in page],
            "strangers": [self._views.stranger(session) for session in strangers],
            "next": following,
        }

    # --- what may be typed ------------------------------------------------------------------------------

    def _complete_values(self, params: _Values) -> JSON:
        """Some of the values that begin with the prefix, each with what it is: what somebody who types may mean."""
        if params.kind == "session":
            found: Iterable[tuple[str, str]] = self._sessions_like(params.prefix)
        else:
            found = self._names_like(params.kind, params.prefix)
        values = list(islice(found, VALUES_OFFERED + 1))
        are_more = len(values) > VALUES_OFFERED
        if params.kind == "tunnel":
            are_more |= len(self._firewall.directory) > LOOKED_AT_ONCE
        return {"values": values[:VALUES_OFFERED], "more": are_more}

    def _names_like(self, kind: LiveKind, prefix: str) -> Iterator[tuple[str, str]]:
        """Names that begin so, each once."""
        offered = set()
        for name, meaning in self._names(kind, prefix):
            if name.startswith(prefix) and name not in offered:
                offered.add(name)
                yield name, meaning

    def _names(self, kind: LiveKind, prefix: str) -> Iterator[tuple[str, str]]:
        """Names, with what they are; of tunnels, which are many, only those that begin so."""
        firewall, settings = self._firewall, self._firewall.settings
        if kind == "zone":
            for pattern, zone in settings.zones.patterns:
                yield zone, f"zone of {pattern}"
            yield settings.zones.default, "zone of all other interfaces"
        elif kind == "rule":
            for rule in (*settings.policy.rules, settings.policy.default):
                yield rule.name, rule.action
        elif kind == "interface":
            for name in firewall.interfaces.names:
                yield name, f"in zone {settings.zones.zone_of(name)}"
        else:
            for known in islice(firewall.directory, LOOKED_AT_ONCE):
                sa = known.sa
                if sa.child_name.startswith(prefix):
                    yield sa.child_name, f"CHILD_SA of {sa.ike_name}"
                if sa.ike_name.startswith(prefix):
                    yield sa.ike_name, "IKE_SA"

    def _sessions_like(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Live sessions whose ids begin with these digits: for 7 those of 7, of 70 to 79, of 700 to 799, and so on."""
        if prefix and not (prefix.isascii() and prefix.isdigit() and prefix[0] != "0"):
            return
        table = self._firewall.table
        least, most = (int(prefix), int(prefix)) if prefix else (1, table.last_id)
        while least <= table.last_id:
            for session in table.after(least - 1):
                if session.id > most:
                    break
                yield str(session.id), self._views.in_short(session)
            least, most = least * 10, most * 10 + 9
            if not prefix:
                return

    # --- counters, tunnels, the host ------------------------------------------------------------------

    def _counter_list(self, _: _Nothing) -> JSON:
        self._sync()
        counters, now = self._firewall.counters, self._now()
        return {
            "elapsed_s": counters.elapsed_s(now),
            "counters": [
                {
                    "name": counter.name,
                    "value": counters.values[counter.name],
                    "rate": int(counters.rate(counter.name, now)),
                    "severity": counter.severity,
                    "category": counter.category,
                    "aspect": counter.aspect,
                    "description": counter.description,
                }
                for counter in COUNTERS
            ],
        }

    def _tunnel_list(self, params: _After) -> JSON:
        """SAs in the order in which fwd came to know them; `next` is what to go on after, None at the end."""
        directory, now = self._firewall.directory, self._now()
        page = list(islice(directory.after(params.after), SAS_PER_PAGE))
        tunnels = []
        for known in page:
            sa = known.sa
            session = self._firewall.tunnel_of(sa)
            tunnels.append(
                {
                    "ike_sa": sa.ike_name,
                    "child_sa": sa.child_name,
                    "local": str(ip_address(sa.local)),
                    "remote": str(ip_address(sa.remote)),
                    "reqid": sa.reqid,
                    "spi_in": sa.spi_in,
                    "spi_out": sa.spi_out,
                    "encap": sa.encap,
                    "nat_t_ports": [sa.local_port, sa.remote_port] if sa.encap else None,
                    "mode": sa.mode,
                    "session": session and session.id,
                    "age_s": now - known.installed_at,
                    "stale_s": directory.stale_s(sa, now),
                }
            )
        following = page[-1].number if len(page) == SAS_PER_PAGE else None
        return {"source": self._source(), "tunnels": tunnels, "next": following}

    def _source(self) -> JSON:
        directory, now = self._firewall.directory, self._now()
        return {
            "connected": directory.is_fresh,
            "socket": self._vici_socket,
            "last_answer_age_s": None if directory.answered_at is None else now - directory.answered_at,
            "reason": directory.lost_reason,
        }

    def _log_list(self, params: _Logged) -> JSON:
        """Entries of the traffic log, the newest first or the oldest; `next` is what to go on after, None at the end.

        A page may have fewer than `limit`, with a filter even none, and still not be the last.
        """
        question = LogQuestion(
            build_log_filter(params.filter),
            params.since,
            params.until,
            params.direction == "forward",
            params.after,
            min(params.limit, LOGGED_PER_PAGE),
        )
        entries, following = self._logged(question)
        return {"entries": entries, "next": following}

    def _system_info(self, _: _Nothing) -> JSON:
        return dict(self._host())


def _address(key: str, text: str) -> bytes:
    try:
        return ip_address(text).packed
    except ValueError:
        raise RpcError(INVALID_PARAMS, f"explain packet: {key}: found '{text}', want an IP address") from None
