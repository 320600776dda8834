"""JSON-RPC 2.0 on the control socket: the error codes and the bounds that both ends know."""

from __future__ import annotations

from typing import Final

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

DEFAULT_SOCKET: Final = "/run/fwd/control.sock"

#: The longest request, and the longest answer, in bytes with the newline.
MAX_REQUEST_BYTES: Final = 64 * 1024
MAX_ANSWER_BYTES: Final = 8 * 1024 * 1024

#: What `show session all filter` and `clear session all filter` understand, in the order of PAN-OS's help.
FILTER_KEYS: Final = {
    "application": "ipsec-esp, ipsec-udp, ipsec-esp-udp or ike",
    "source": "client's address or prefix",
    "destination": "server's address or prefix",
    "source-port": "client's port, or SPI in decimal",
    "destination-port": "server's port, or SPI in decimal",
    "protocol": "50 or 17",
    "from": "client's zone",
    "to": "server's zone",
    "state": "active, discard, opening, closing",
    "type": "flow or pred",
    "rule": "name of the rule",
    "min-age": "seconds since it started, at least",
    "min-kb": "kilobytes of both directions, at least",
    "ingress-interface": "interface of the client's packets",
    "egress-interface": "interface towards the server",
}


class RpcError(Exception):
    """A request is refused: the code, and one line that says what to do."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
