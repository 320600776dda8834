"""What can be asked of the daemon: the methods of the control socket, from parameters to JSON-able answers.

No I/O: the methods work on the core alone, so they are tested without a socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .config import explain
from .core.counters import COUNTERS
from .core.firewall import Firewall
from .core.session import Application, Flow, Place, Session, SessionType
from .core.session_filter import FilterError, Predicate, build_filter
from .core.state import State
from .rpc import INVALID_PARAMS, METHOD_NOT_FOUND, NO_SUCH_SESSION, RpcError

JSON: TypeAlias = dict[str, Any]

VSYS = "vsys1"  # fwd has one virtual system, as a PAN-OS device without the licence for more

SessionId = Annotated[int, Field(ge=1)]


class _Params(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Nothing(_Params):
    pass


class _Filtered(_Params):
    filter: dict[str, str] = {}


class _Page(_Filtered):
    after: int = Field(default=0, ge=0)
    limit: int = Field(default=500, ge=1, le=1000)


class _One(_Params):
    id: SessionId


class _Clear(_Params):
    id: SessionId | None = None
    filter: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """A method: which right it needs (`read` or `change`), its parameters, what answers it."""

    right: str
    params: type[_Params]
    answer: Callable[[Any], JSON]


class Api:
    """The methods by name. `now` gives monotonic seconds; `host` what only the daemon knows of itself.

    `sync` brings the global counters up to date, `refresh` the counts of sessions that are about to be shown.
    """

    def __init__(
        self,
        firewall: Firewall,
        now: Callable[[], float],
        vici_socket: str,
        host: Callable[[], Mapping[str, object]],
        sync: Callable[[], None],
        refresh: Callable[[Iterable[Session]], None],
    ) -> None:
        self._firewall = firewall
        self._now = now
        self._vici_socket = vici_socket
        self._host = host
        self._sync = sync
        self._refresh = refresh
        self.methods: Mapping[str, Method] = {
            "session.list": Method("read", _Page, self._session_list),
            "session.count": Method("read", _Filtered, self._session_count),
            "session.get": Method("read", _One, self._session_get),
            "session.clear": Method("change", _Clear, self._session_clear),
            "session.info": Method("read", _Nothing, self._session_info),
            "counter.list": Method("read", _Nothing, self._counter_list),
            "tunnel.list": Method("read", _Nothing, self._tunnel_list),
            "system.info": Method("read", _Nothing, self._system_info),
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
            raise RpcError(INVALID_PARAMS, f"{name}: {'; '.join(explain(error))}") from None
        except FilterError as error:
            raise RpcError(INVALID_PARAMS, str(error)) from None

    # --- sessions -----------------------------------------------------------------------------------

    def _matching(self, words: Mapping[str, str]) -> Callable[[Session], bool]:
        predicate: Predicate = build_filter(words)
        now = self._now()
        return lambda session: predicate(session, now)

    def _session_list(self, params: _Page) -> JSON:
        matches = self._matching(params.filter)
        page: list[Session] = []
        following = None
        for session in sorted(self._firewall.table, key=lambda session: session.id):
            if session.id > params.after and matches(session):
                if len(page) == params.limit:
                    following = page[-1].id
                    break
                page.append(session)
        self._refresh(page)
        return {"sessions": [self._view(session) for session in page], "next": following}

    def _session_count(self, params: _Filtered) -> JSON:
        return {"count": sum(map(self._matching(params.filter), self._firewall.table))}

    def _session_get(self, params: _One) -> JSON:
        session = self._found(params.id, self._firewall.table.find(params.id))
        self._refresh([session])
        return self._view(session)

    def _session_clear(self, params: _Clear) -> JSON:
        if (params.id is None) == (params.filter is None):
            raise RpcError(INVALID_PARAMS, "session.clear: give either an id or a filter (an empty one for all)")
        if params.id is not None:
            chosen = [self._found(params.id, self._firewall.table.live(params.id))]
        else:
            chosen = list(filter(self._matching(params.filter or {}), self._firewall.table))
        self._firewall.clear(chosen, self._now())
        return {"cleared": len(chosen)}

    def _found(self, session_id: int, session: Session | None) -> Session:
        if session is None:
            raise RpcError(NO_SUCH_SESSION, f"no session {session_id}: 'show session all' lists those there are")
        return session

    def _view(self, session: Session) -> JSON:
        now = self._now()
        is_live = session.state is not State.INIT
        return {
            "id": session.id,
            "vsys": VSYS,
            "application": session.application,
            "state": session.state,
            "type": session.type,
            "start_time": time.time() - (now - session.created_at),
            "timeout_s": session.timeout_s,
            "time_to_live_s": int(self._firewall.ager.time_to_live_s(session, now)) if is_live else None,
            "c2s": _flow_view(session.c2s, session.s2c),
            "s2c": _flow_view(session.s2c, session.c2s),
            "rule": session.rule.name,
            "log_at_end": session.rule.log_at_end,
            "in_ager": is_live,
            "terminated_on_host": session.is_terminated,
            "ingress_interface": session.ingress,
            "egress_interface": session.egress,
            "end_reason": session.end_reason,
            "ipsec": None if session.application is Application.IKE else self._ipsec_view(session, now),
        }

    def _ipsec_view(self, session: Session, now: float) -> JSON:
        sa = session.sas[-1] if session.sas else None
        return {
            "spis_seen": {"c2s": session.c2s.spis, "s2c": session.s2c.spis},
            "child_sa": sa and sa.child_name,
            "ike_sa": sa and sa.ike_name,
            "local_id": sa and sa.local_id,
            "remote_id": sa and sa.remote_id,
            "reqid": sa and sa.reqid,
            "rekeys": session.rekeys if sa else None,
            "spis_in_kernel": sum(element.place is Place.KERNEL for element in session.elements),
            "nat_t_ports": session.udp_ports,
            "sa_stale_s": sa and self._firewall.directory.stale_s(sa, now),
        }

    def _session_info(self, _: _Nothing) -> JSON:
        firewall, now = self._firewall, self._now()
        active = dict.fromkeys(map(str, Application), 0)
        predicted = discard = 0
        for session in firewall.table:
            if session.type is SessionType.PRED:
                predicted += 1
            elif session.state is State.DISCARD:
                discard += 1
            else:
                active[session.application] += 1
        settings = firewall.settings
        rate = firewall.counters.rate
        return {
            "sessions_supported": firewall.table.capacity,
            "sessions_allocated": len(firewall.table),
            "active": active,
            "predicted": predicted,
            "discard": discard,
            "ended_readable": sum(1 for _ in firewall.table.ended),
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
            "accelerated_ageing": {
                "enabled": settings.ageing_factor > 1,
                "active": firewall.ager.factor > 1,
                "threshold_percent": round(settings.ageing_threshold * 100),
                "factor": settings.ageing_factor,
            },
        }

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

    def _tunnel_list(self, _: _Nothing) -> JSON:
        directory, now = self._firewall.directory, self._now()
        tunnels = []
        for known in directory:
            sa = known.sa
            session = self._firewall.tunnel_session(sa)
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
        return {
            "source": {
                "connected": directory.is_fresh,
                "socket": self._vici_socket,
                "last_answer_age_s": None if directory.answered_at is None else now - directory.answered_at,
                "reason": directory.lost_reason,
            },
            "tunnels": tunnels,
        }

    def _system_info(self, _: _Nothing) -> JSON:
        return dict(self._host())


def _flow_view(flow: Flow, reply: Flow) -> JSON:
    session = flow.session
    return {
        "source": str(ip_address(flow.address)),
        "source_zone": flow.zone,
        "destination": str(ip_address(reply.address)),
        "destination_zone": reply.zone,
        "protocol": session.application.protocol,
        "sport": flow.port,
        "dport": reply.port,
        "state": session.state,
        "type": session.type,
        "packets": flow.packet_count,
        "bytes": flow.byte_count,
    }
