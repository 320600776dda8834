"""What the control socket shows of the core's objects: plain values that JSON can carry.

Times are seconds since the epoch; spans are seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import Any, TypeAlias

from .core.events import (
    CounterRose,
    Event,
    SessionAbsorbed,
    SessionRekeyed,
    TunnelsStale,
    TunnelTrouble,
)
from .core.explain import removal
from .core.firewall import Firewall
from .core.health import uses_of
from .core.ike import IkeSa
from .core.pairing import Observation, observe
from .core.related import ike_sas_of, linked_sessions
from .core.session import Application, Flow, Generation, Place, Session, SpiUse
from .core.state import State
from .times import time_of_day

JSON: TypeAlias = dict[str, Any]

VSYS = "vsys1"  # fwd has one virtual system, as a PAN-OS device without the licence for more


class Views:
    """Views of one firewall. `now` gives monotonic seconds."""

    def __init__(self, firewall: Firewall, now: Callable[[], float]) -> None:
        self._firewall = firewall
        self._now = now

    def clock(self, at: float) -> str:
        """The time of day of a monotonic time, as text."""
        return time_of_day(self._epoch(at))

    def _epoch(self, at: float) -> float:
        return time.time() - (self._now() - at)

    def _epoch_or_none(self, at: float | None) -> float | None:
        return None if at is None else self._epoch(at)

    # --- sessions -------------------------------------------------------------------------------------

    def session(self, session: Session, *, is_detailed: bool = False, is_live: bool = False) -> JSON:
        """One session; in detail with what PAN-OS has no field for; live with its rates and what is wrong with it."""
        now = self._now()
        is_there = session.state is not State.INIT
        view: JSON = {
            "id": session.id,
            "vsys": VSYS,
            "application": session.application,
            "state": session.state,
            "type": session.type,
            "start_time": self._epoch(session.created_at),
            "timeout_s": session.timeout_s,
            "time_to_live_s": int(self._firewall.ager.time_to_live_s(session, now)) if is_there else None,
            "c2s": flow(session.c2s, session.s2c),
            "s2c": flow(session.s2c, session.c2s),
            "rule": session.rule.name,
            "log_at_end": session.rule.log_at_end,
            "in_ager": is_there,
            "terminated_on_host": session.is_terminated,
            "ingress_interface": session.ingress,
            "egress_interface": session.egress,
            "end_reason": session.end_reason,
            "ipsec": None if session.application is Application.IKE else self._ipsec(session, now),
        }
        if is_live:
            view["idle_s"] = session.idle_s(now)
            view["rates"] = {"c2s": self._rate(session.c2s, now), "s2c": self._rate(session.s2c, now)}
            view["findings"] = self.findings(session)
        if is_detailed:
            view["linked"] = [
                {"id": o.id, "application": o.application, "state": o.state, "end_reason": o.end_reason}
                for o in linked_sessions(self._firewall, session)
            ]
            view["ike"] = [self.ike_sa(sa) for sa in ike_sas_of(self._firewall, session)]
            view["nat_keepalives"] = self._firewall.ike.keepalives(session.client.address, session.server.address)
            if view["ipsec"] is not None:
                view["ipsec"]["spis"] = self._spis(session, now)
                view["ipsec"]["generations"] = self.generations(session)
                view["ipsec"]["findings"] = self.findings(session)
        return view

    def in_short(self, session: Session) -> str:
        """A session in a few words."""
        ends = " -> ".join(str(ip_address(end.address)) for end in (session.client, session.server))
        return f"{session.sa.child_name if session.sa else session.application} {ends} {session.state}"

    def _rate(self, one_way: Flow, now: float) -> JSON | None:
        rate = self._firewall.rate(one_way, now)
        return rate and {"packets": rate.packets, "bits": rate.octets * 8}

    def _ipsec(self, session: Session, now: float) -> JSON:
        sa = session.sa
        gone = removal(self._firewall.directory, session.generations[-1]) if sa else None
        return {
            "spis_seen": {"c2s": session.c2s.spis, "s2c": session.s2c.spis},
            "child_sa": sa and sa.child_name,
            "ike_sa": sa and sa.ike_name,
            "local_id": sa and sa.local_id,
            "remote_id": sa and sa.remote_id,
            "reqid": sa and sa.reqid,
            "outbound": ("c2s" if session.is_client_here else "s2c") if sa else None,
            "rekeys": session.rekeys if sa else None,
            "spis_in_kernel": sum(element.place is Place.KERNEL for element in session.elements),
            "nat_t_ports": session.udp_ports,
            "sa_stale_s": sa and self._firewall.directory.stale_s(sa, now),
            "sa_removed": gone and self._epoch(gone.removed_at),
            "sa_end": gone and gone.end,
            "fragments": {"c2s": session.c2s.fragment_count, "s2c": session.s2c.fragment_count},
        }

    def _spis(self, session: Session, now: float) -> JSON:
        """Each SPI seen, by direction; for a session in transit with what is known of its partner."""
        seen = {} if session.is_terminated else observe(session.c2s.uses, session.s2c.uses, now)
        return {
            name: [self._use(use, seen.get(use)) for use in one_way.uses]
            for name, one_way in (("c2s", session.c2s), ("s2c", session.s2c))
        }

    def _use(self, use: SpiUse, seen: Observation | None = None) -> JSON:
        view: JSON = {
            "spi": use.spi,
            "first_seen": self._epoch(use.first_seen_at),
            "last_seen": self._epoch(use.last_seen_at),
            "packets": use.packet_count,
            "bytes": use.byte_count,
            "sequence": sequence(use),
        }
        if seen is not None:
            view |= {
                "relation": seen.relation,
                "before": seen.before,
                "evidence": seen.evidence,
                "partner": seen.partner,
            }
        return view

    def generations(self, session: Session) -> list[JSON]:
        """The SPI pairs of a tunnel that ends here, the newest last."""
        views = []
        previous: Generation | None = None
        for generation in session.generations:
            sa = generation.sa
            into, out = uses_of(session, generation)
            before = uses_of(session, previous) if previous else (None, None)
            gone = removal(self._firewall.directory, generation)
            views.append(
                {
                    "uniqueid": sa.uniqueid,
                    "local": str(ip_address(sa.local)),
                    "remote": str(ip_address(sa.remote)),
                    "spi_in": sa.spi_in,
                    "spi_out": sa.spi_out,
                    "esn": sa.esn,
                    "installed": self._epoch(generation.installed_at),
                    "removed": gone and self._epoch(gone.removed_at),
                    "end": gone and gone.end,
                    "moves": generation.moves,
                    "packets_after_end": generation.after_end_count,
                    "in": into and self._use(into),
                    "out": out and self._use(out),
                    "overlap_s": {"in": _overlap(before[0], into), "out": _overlap(before[1], out)},
                    "strongswan": self._comparison(generation),
                }
            )
            previous = generation
        return views

    def _comparison(self, generation: Generation) -> JSON | None:
        seen = generation.comparison
        if seen is None:
            return None
        return {
            "at": self._epoch(seen.at),
            "age_s": self._now() - seen.at,
            "packets_in": seen.theirs[0],
            "packets_out": seen.theirs[1],
            "fwd_more_in": seen.drift[0],
            "fwd_more_out": seen.drift[1],
        }

    def stranger(self, session: Session) -> JSON:
        """A session of this host that is no tunnel's."""
        return {
            "session": session.id,
            "source": str(ip_address(session.client.address)),
            "destination": str(ip_address(session.server.address)),
            "state": session.state,
            "packets": session.packet_count,
            "findings": self.findings(session),
        }

    def findings(self, session: Session) -> list[JSON]:
        """What is wrong with a tunnel."""
        found = self._firewall.findings(session, self._now())
        return [{"trouble": finding.trouble, "text": finding.text} for finding in found]

    def ike_sa(self, sa: IkeSa) -> JSON:
        """An IKE_SA as it was seen on the wire."""
        return {
            "initiator_spi": f"{sa.initiator_spi:016x}",
            "responder_spi": f"{sa.responder_spi:016x}",
            "version": f"{sa.major}.{sa.minor}",
            "initiator": str(ip_address(sa.initiator)),
            "ports": sa.ports,
            "messages": sa.message_count,
            "retransmits": sa.retransmit_count,
            "last_exchange": sa.last_exchange,
            "first_seen": self._epoch(sa.first_seen_at),
            "last_seen": self._epoch(sa.last_seen_at),
            "floated": self._epoch_or_none(sa.floated_at),
            "completed": self._epoch_or_none(sa.completed_at),
            "sessions": sa.session_ids,
        }

    # --- tunnels, events ------------------------------------------------------------------------------

    def tunnel(self, session: Session) -> JSON:
        """A tunnel that ends here or did so until a while ago, with all that is known of it."""
        sa = session.sas[-1] if session.sas else session.sa
        assert sa is not None
        return {
            "ike_sa": sa.ike_name,
            "child_sa": sa.child_name,
            "reqid": sa.reqid,
            "local": str(ip_address(sa.local)),
            "remote": str(ip_address(sa.remote)),
            "local_id": sa.local_id,
            "remote_id": sa.remote_id,
            "mode": sa.mode,
            "nat_t_ports": session.udp_ports,
            "session": session.id,
            "state": session.state,
            "ended": self._epoch_or_none(session.ended_at),
            "end_reason": session.end_reason,
            "rekeys": session.rekeys,
            "generations": self.generations(session),
            "ike": [self.ike_sa(seen) for seen in ike_sas_of(self._firewall, session)],
            "findings": self.findings(session),
        }

    def event(self, number: int, at: float, event: Event) -> JSON:
        """One event."""
        view: JSON = {"number": number, "time": self._epoch(at), "event": event_name(event)}
        match event:
            case CounterRose(name, description, amount, value):
                return {**view, "counter": name, "description": description, "amount": amount, "value": value}
            case TunnelsStale(reason, is_over):
                return {**view, "reason": reason, "over": is_over}
            case TunnelTrouble(_, finding, is_over):
                view |= {"trouble": finding.trouble, "text": finding.text, "over": is_over}
            case SessionRekeyed(_, sa):
                view |= {"spi_in": sa.spi_in, "spi_out": sa.spi_out}
            case SessionAbsorbed(_, into):
                view |= {"into": into}
        session = event.session
        tunnel = session.sa
        return {
            **view,
            "id": session.id,
            "application": session.application,
            "state": session.state,
            "tunnel": tunnel and f"{tunnel.ike_name}/{tunnel.child_name}",
            "source": str(ip_address(session.client.address)),
            "sport": session.client.port,
            "destination": str(ip_address(session.server.address)),
            "dport": session.server.port,
            "rule": session.rule.name,
            "packets": session.packet_count,
            "bytes": session.byte_count,
            "end_reason": session.end_reason,
        }


def event_name(event: Event) -> str:
    """`created`, `promoted`, `rekeyed`, `discarded`, `absorbed`, `ended`, `trouble`, `stale` or `counter`."""
    return _EVENT_NAMES[type(event).__name__]


_EVENT_NAMES: Mapping[str, str] = {
    "SessionCreated": "created",
    "SessionPromoted": "promoted",
    "SessionRekeyed": "rekeyed",
    "SessionDiscarded": "discarded",
    "SessionAbsorbed": "absorbed",
    "SessionEnded": "ended",
    "TunnelTrouble": "trouble",
    "TunnelsStale": "stale",
    "CounterRose": "counter",
}


def brief(session: Session) -> JSON:
    """Of a session what `show session all` prints, where it stands in the whole."""
    return {
        "id": session.id,
        "vsys": VSYS,
        "application": session.application,
        "state": session.state,
        "type": session.type,
        "c2s": _ends(session.c2s, session.s2c),
    }


def _ends(one_way: Flow, reply: Flow) -> JSON:
    return {
        "source": str(ip_address(one_way.address)),
        "source_zone": one_way.zone,
        "destination": str(ip_address(reply.address)),
        "destination_zone": reply.zone,
        "protocol": one_way.session.application.protocol,
        "sport": one_way.port,
        "dport": reply.port,
    }


def flow(one_way: Flow, reply: Flow) -> JSON:
    """One direction of a session."""
    session = one_way.session
    return {
        **_ends(one_way, reply),
        "state": session.state,
        "type": session.type,
        "packets": one_way.packet_count,
        "bytes": one_way.byte_count,
    }


def sequence(use: SpiUse) -> JSON:
    """What the sequence numbers of an SPI tell, as observed: they are not authenticated."""
    numbers = use.sequence
    return {
        "looked_at": use.packet_count - use.unseen_count,
        "of": use.packet_count,
        "highest": None if use.next_seq < 0 else use.next_seq - 1,
        "lost": numbers.lost if numbers else 0,
        "late": numbers.late if numbers else 0,
        "depth": numbers.depth if numbers else 0,
        "duplicates": numbers.duplicates + numbers.surplus if numbers else 0,
        "outliers": numbers.outliers if numbers else 0,
        "resets": numbers.resets if numbers else 0,
        "wraps": numbers.wraps if numbers else 0,
    }


def _overlap(before: SpiUse | None, after: SpiUse | None) -> float | None:
    """How long an older SPI was seen beside its successor, in seconds; None if one was never seen."""
    return max(0.0, before.last_seen_at - after.first_seen_at) if before and after else None
