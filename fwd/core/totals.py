"""What was carried since fwd began, by zones and by tunnel: totals that outlive the sessions in which it was counted.

They are fed where packets are counted, `Firewall._account` and `Firewall.count`, so at every instant the sum of all
zones is what `pkt_session` grew by. Zones are a session's as they were when a packet was counted. A firewall that goes
on where another one stopped begins its totals anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Final, NamedTuple, TypeAlias

from .constants import TOTALS_KEPT_S, TOTALS_LOOK_S
from .session import Flow, Session

#: (zone of the client, zone of the server, c2s?)
Zones: TypeAlias = tuple[str, str, bool]


class TunnelName(NamedTuple):
    """What a tunnel goes by: connection and CHILD_SA as configured, and who is at its other end.

    All SAs of it count together: a reqid is a number of charon's that is another one after its restart.
    """

    connection: str
    child: str
    remote_id: str


#: The tunnels that have no totals of their own, taken together.
OTHERS: Final = TunnelName("", "", "")


@dataclass(slots=True)
class Carried:
    """Packets, and their bytes, IP header included."""

    packets: int = 0
    octets: int = 0


@dataclass(slots=True)
class OneWay(Carried):
    """What a tunnel carried in one direction, and what its sequence numbers tell of that (see sequence.py).

    `lost`: not found late any more. The others are told one by one only among packets that were looked at.
    """

    lost: int = 0
    late: int = 0
    duplicates: int = 0


@dataclass(slots=True)
class TunnelTotals:
    """One tunnel; `looked_at` is when a session of it was last looked at, in monotonic seconds: it lived then."""

    looked_at: float = inf
    inbound: OneWay = field(default_factory=OneWay)
    outbound: OneWay = field(default_factory=OneWay)


class Totals:
    """All totals; `capacity` tunnels at most have their own. Times are monotonic seconds.

    A tunnel keeps its place as long as nobody else needs it, and for TOTALS_KEPT_S after its end at least, so
    that none comes and goes among the others. With its place its counts go.
    """

    def __init__(self, capacity: int, now: float) -> None:
        self.capacity = capacity
        #: What all sessions carried.
        self.by_zones: dict[Zones, Carried] = {}
        #: What the tunnels carried that end on this host; OTHERS is one of them.
        self.by_tunnel: dict[TunnelName, TunnelTotals] = {OTHERS: TunnelTotals()}
        self._began_at = now
        self._next_look_at = 0.0

    def name_of(self, session: Session) -> TunnelName:
        """Under which name a tunnel's session counts."""
        sa = session.generations[-1].sa
        name = TunnelName(sa.ike_name, sa.child_name, sa.remote_id)
        if name in self.by_tunnel:
            return name
        if len(self.by_tunnel) > self.capacity:  # the others are one of them
            return OTHERS
        self.by_tunnel[name] = TunnelTotals()
        return name

    def count(self, flow: Flow, packets: int, octets: int) -> None:
        """Packets were counted in a flow."""
        session = flow.session
        client = session.c2s
        is_c2s = flow is client
        zones = (client.zone, session.s2c.zone, is_c2s)
        carried = self.by_zones.get(zones)
        if carried is None:
            carried = self.by_zones[zones] = Carried()
        carried.packets += packets
        carried.octets += octets
        if session.generations:
            self._count_in_tunnel(session, is_c2s, packets, octets)

    def move(self, flow: Flow, packets: int, octets: int) -> None:
        """What was counted before in another session is a flow's now."""
        session = flow.session
        if session.generations:
            self._count_in_tunnel(session, flow is session.c2s, packets, octets)

    def _count_in_tunnel(self, session: Session, is_c2s: bool, packets: int, octets: int) -> None:
        totals = self.by_tunnel[self.name_of(session)]
        way = totals.outbound if is_c2s is session.is_client_here else totals.inbound
        way.packets += packets
        way.octets += octets

    def look(self, session: Session, now: float) -> None:
        """Take down what the sequence numbers of a live tunnel's session told since the last look."""
        name = self.name_of(session)
        if name is OTHERS and self._make_room(now):
            name = self.name_of(session)
        totals = self.by_tunnel[name]
        if name is not OTHERS:
            totals.looked_at = now
        for flow, way in ((session.inbound, totals.inbound), (session.outbound, totals.outbound)):
            for use in flow.uses:
                if (numbers := use.sequence) is None:
                    continue
                seen = (numbers.settled, numbers.late, numbers.duplicates + numbers.surplus)
                told = use.told
                if told is None:  # what a former fwd saw is none of these totals
                    told = seen if use.first_seen_at < self._began_at else (0, 0, 0)
                lost, late, duplicates = use.told = (
                    # A balance may fall again; what was told may not.
                    max(seen[0], told[0]),
                    max(seen[1], told[1]),
                    max(seen[2], told[2]),
                )
                way.lost += lost - told[0]
                way.late += late - told[1]
                way.duplicates += duplicates - told[2]

    def _make_room(self, now: float) -> bool:
        """Whether there is a place now, if need be that of the tunnel that has been gone for longest."""
        if len(self.by_tunnel) <= self.capacity:
            return True
        if now < self._next_look_at:
            return False
        self._next_look_at = now + TOTALS_LOOK_S
        gone = min(self.by_tunnel, key=lambda name: self.by_tunnel[name].looked_at)
        if self.by_tunnel[gone].looked_at >= now - TOTALS_KEPT_S:
            return False
        del self.by_tunnel[gone]
        return len(self.by_tunnel) <= self.capacity
