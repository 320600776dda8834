"""What else belongs to a session's tunnel, as far as can be seen: other sessions, and IKE_SAs on the wire."""

from __future__ import annotations

from itertools import islice

from .between import ends_of
from .constants import LINKED_ENDED, LINKED_ENDED_LOOKS
from .firewall import Firewall
from .ike import IkeSa, of_tunnel
from .packet import Kind, Packet
from .session import Application, Session, flow_key


def ike_sas_of(firewall: Firewall, session: Session) -> list[IkeSa]:
    """The IKE_SAs seen on the wire that a session belongs to, or may belong to; the one used last first."""
    seen = firewall.ike.ike_sas(session.client.address, session.server.address)
    if session.application is Application.IKE:
        return [sa for sa in seen if session.id in sa.session_ids]
    if session.application is Application.IPSEC_ESP_UDP:
        return of_tunnel(seen, (session.client.port, session.server.port))
    return list(seen)


def linked_sessions(firewall: Firewall, session: Session) -> list[Session]:
    """Other sessions of the same peers that are part of the same tunnel: ESP, and the IKE beside it.

    Those that have ended are named as long as they are readable, the last LINKED_ENDED of them.
    """
    table = firewall.table
    a, b = session.client.address, session.server.address
    ids: list[int] = []
    for sa in ike_sas_of(firewall, session):
        ids += sa.session_ids
        for port in {0, *sa.ports}:
            kind = Kind.ESP_IN_UDP if port else Kind.ESP
            for zones in {(session.client.zone, session.server.zone), (None, None)}:
                ports = sa.ports if sa.initiator == a else sa.ports[::-1]
                packet = Packet(kind, a, b, 0, None, None, *(ports if port else (0, 0)))
                if flow := table.lookup(flow_key(packet, *zones)):
                    ids.append(flow.session.id)
    ids += [other.id for other in firewall.spi_sessions.between(a, b)]
    if session.application is Application.IKE:
        ids += [tunnel.id for tunnel in firewall.tunnels.between(a, b)]
    ends = ends_of(session)
    ended = (other.id for other in islice(table.ended_last, LINKED_ENDED_LOOKS) if ends_of(other) == ends)
    ids += reversed(list(islice(ended, LINKED_ENDED)))
    found = (table.find(number) for number in dict.fromkeys(ids))
    return [other for other in found if other is not None and other is not session]
