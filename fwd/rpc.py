"""JSON-RPC 2.0 on the control socket: the error codes and the bounds that both ends know."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

# Defined by the JSON-RPC 2.0 specification, section 5.1.
PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
# Ours, from the range that it leaves to servers.
FORBIDDEN: Final = -32001
BUSY: Final = -32002
NO_SUCH_SESSION: Final = -32004
CONFIGURATION_REFUSED: Final = -32005
NO_TRAFFIC_LOG: Final = -32006

DEFAULT_SOCKET: Final = "/run/fwd/control.sock"

#: The longest request, and the longest answer, in bytes with the newline.
MAX_REQUEST_BYTES: Final = 64 * 1024
MAX_ANSWER_BYTES: Final = 8 * 1024 * 1024


#: What has values that fwd knows and completion can offer: sessions by id, the others by name.
LiveKind = Literal["session", "zone", "rule", "interface", "tunnel"]


class FilterKey(NamedTuple):
    """What stands after a filter key: what it means, and which values there are.

    `words` is a closed set; `live` names what the daemon knows the values of (a LiveKind). `is_list`: there may be
    several, with commas between. `has_not`: `not` may stand before them.
    """

    about: str = ""
    words: tuple[str, ...] = ()
    live: LiveKind | None = None
    is_list: bool = True
    has_not: bool = True

    @property
    def meaning(self) -> str:
        """In a few words, for help."""
        return ", ".join(filter(None, (self.about, " or ".join(self.words))))


#: What `show session all filter` and `clear session all filter` understand, in the order of PAN-OS's help; the last
#: three are ours. Numbers are in decimal or, behind 0x, in hex.
FILTER_KEYS: Final = {
    "application": FilterKey(words=("ipsec-esp", "ipsec-udp", "ipsec-esp-udp", "ike")),
    "source": FilterKey("client's address or prefix"),
    "destination": FilterKey("server's address or prefix"),
    "source-port": FilterKey("client's port, or SPI"),
    "destination-port": FilterKey("server's port, or SPI"),
    "protocol": FilterKey(words=("50", "17")),
    "from": FilterKey("client's zone", live="zone"),
    "to": FilterKey("server's zone", live="zone"),
    "state": FilterKey(words=("active", "discard", "opening", "closing")),
    "type": FilterKey(words=("flow", "pred")),
    "rule": FilterKey("name of the rule", live="rule"),
    "min-age": FilterKey("seconds since it started, at least", is_list=False),
    "min-kb": FilterKey("kilobytes of both directions, at least", is_list=False),
    "ingress-interface": FilterKey("interface of the client's packets", live="interface"),
    "egress-interface": FilterKey("interface towards the server", live="interface"),
    "spi": FilterKey("SPI of either direction, those before a rekey included"),
    "tunnel": FilterKey("name of the CHILD_SA or of the IKE_SA", live="tunnel"),
    "ike-id": FilterKey("identity of either IKE peer", is_list=False),
}

#: What `show log traffic filter` understands: what it has in common with sessions, and what only an entry has.
LOG_FILTER_KEYS: Final = {
    "subtype": FilterKey(words=("end", "deny", "start")),
    **{key: value for key, value in FILTER_KEYS.items() if key not in ("state", "type", "ike-id", "min-age")},
    "action": FilterKey(words=("allow", "deny")),
    "end-reason": FilterKey(words=("aged-out", "policy-deny", "tunnel-down", "cleared")),
    "session": FilterKey("id of the session"),
    "min-age": FilterKey("seconds from its start to its end, at least", is_list=False),
}

#: What `sort` understands.
SORT_KEYS: Final = {
    "id": "id, the order in which they were opened",
    "age": "seconds since it started",
    "idle": "seconds since its last packet",
    "ttl": "seconds until it ends if no packet comes",
    "packets": "packets of both directions",
    "bytes": "bytes of both directions",
    "packet-rate": "packets a second, of both directions",
    "bit-rate": "bits a second, of both directions",
    "source": "client's address",
    "destination": "server's address",
    "from": "client's zone",
    "to": "server's zone",
    "application": "name of the application",
    "state": "state",
    "rule": "name of the rule",
    "trouble": "how many things are wrong with it, when it was last looked at; that it is discarded is one",
}


#: Those of them that are measured only while somebody asks, and for how long before all are known, in seconds.
RATE_KEYS: Final = frozenset({"packet-rate", "bit-rate"})
RATES_KNOWN_S: Final = 2.5


class RpcError(Exception):
    """A request is refused: the code, and one line that says what to do."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
