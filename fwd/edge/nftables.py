"""nf_tables over netlink: messages, transactions, and the few expressions that fwd's rules are made of.

Why not a program or a library: an xt target in an nft rule is beyond the nft program; reading counters of single
elements and taking them along with a deletion is beyond pyroute2's nftables part, which also costs fifty
microseconds an element where this costs eight.

Names and numbers are those of linux/netlink.h, linux/netfilter/nfnetlink.h and linux/netfilter/nf_tables.h. All
attributes are big-endian, but for the header's and for what a set is keyed with.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

NFPROTO_IPV4 = 2  # linux/netfilter.h
NFPROTO_IPV6 = 10

_NETLINK_NETFILTER = 12
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NFNL_SUBSYS_NFTABLES = 10
_NFNL_MSG_BATCH_BEGIN = 0x10
_NFNL_MSG_BATCH_END = 0x11

#: Echoed, too: the number of the ruleset's new generation.
_NFT_MSG_NEWGEN = _NFNL_SUBSYS_NFTABLES << 8 | 15

_NLM_F_REQUEST = 0x001
_NLM_F_ACK = 0x004
NLM_F_ECHO = 0x008
NLM_F_DUMP = 0x300
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800

NESTED = 0x8000
_NLA_TYPE_MASK = 0x3FFF

_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h
#: Room for what one transaction echoes: the kernel charges up to 4 KiB for an element of a hundred bytes.
_RECEIVE_BYTES = 16 * 2**20
_SEND_BYTES = 4 * 2**20
_TIMEOUT_S = 5.0
_READ_BYTES = 1 << 16

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port id
_GENERIC = struct.Struct("!BBH")  # nfgenmsg: family, version, resource id
_ATTRIBUTE = struct.Struct("=HH")
_ERROR = struct.Struct("=i")


class Kind(IntEnum):
    """NFT_MSG_*."""

    NEWTABLE = 0
    GETTABLE = 1
    DELTABLE = 2
    NEWCHAIN = 3
    NEWRULE = 6
    GETRULE = 7
    DELRULE = 8
    NEWSET = 9
    NEWSETELEM = 12
    GETSETELEM = 13
    DELSETELEM = 14
    NEWOBJ = 18
    GETOBJ = 19


class NftError(Exception):
    """The kernel refused; nothing of the transaction took place. `number` is the errno."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


@dataclass(frozen=True, slots=True)
class Message:
    """One request: what, for which address family, its attributes, and flags besides the usual ones."""

    kind: Kind
    family: int
    body: bytes
    flags: int = 0


_NFTA_LIST_ELEM = 1
_NFTA_DATA_VALUE, _NFTA_DATA_VERDICT = 1, 2
_COUNT = struct.Struct("!Q")


# --- attributes --------------------------------------------------------------------------------------


def attribute(kind: int, payload: bytes) -> bytes:
    """One netlink attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    """An attribute made of attributes."""
    return attribute(kind | NESTED, b"".join(parts))


def value(kind: int, octets: bytes) -> bytes:
    """Bytes to be compared, as an attribute of this kind."""
    return nested(kind, attribute(_NFTA_DATA_VALUE, octets))


def string(kind: int, text: str) -> bytes:
    """A string, with the zero at its end."""
    return attribute(kind, text.encode() + b"\0")


def number(kind: int, value: int) -> bytes:
    """A 32-bit number."""
    return attribute(kind, struct.pack("!I", value & 0xFFFFFFFF))


def attributes(octets: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """The attributes in these bytes: type and payload."""
    end = len(octets)
    while offset + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(octets, offset)
        if length < 4:
            return
        yield kind & _NLA_TYPE_MASK, octets[offset + 4 : offset + length]
        offset += (length + 3) & ~3


# --- expressions: what a rule is made of ---------------------------------------------------------------

NFT_REG_VERDICT = 0
NFT_REG_1 = 1
NFT_REG32_00 = 8  # sixteen registers of four bytes; NFT_REG_1 is the first four of them

NFT_META_MARK = 3
NFT_META_IIF = 4
NFT_META_OIF = 5
NFT_META_L4PROTO = 16

NFT_PAYLOAD_NETWORK_HEADER = 1
NFT_PAYLOAD_TRANSPORT_HEADER = 2

NF_DROP = 0
NF_ACCEPT = 1
NFT_CONTINUE = -1
NFT_GOTO = -4


def expression(name: str, *parts: bytes) -> bytes:
    """One expression of a rule, by its name in the kernel."""
    return nested(_NFTA_LIST_ELEM, string(1, name), nested(2, *parts))


def meta(key: int, register: int) -> bytes:
    """Load what the kernel knows of the packet besides its bytes."""
    return expression("meta", number(2, key), number(1, register))


def payload(base: int, offset: int, length: int, register: int) -> bytes:
    """Load bytes of the packet; one that is shorter does not match."""
    return expression("payload", number(1, register), number(2, base), number(3, offset), number(4, length))


def compare(wanted: bytes, register: int, *, equal: bool = True) -> bytes:
    """Go on only if the register holds this value, or does not."""
    return expression("cmp", number(1, register), number(2, 0 if equal else 1), value(3, wanted))


def lookup_verdict(name: str, register: int) -> bytes:
    """Go on only if the map has the key in the registers from here on, and then do what it says."""
    return expression("lookup", string(1, name), number(2, register), number(3, NFT_REG_VERDICT))


def verdict(code: int, chain_name: str = "") -> bytes:
    """Do this with the packet."""
    return expression("immediate", number(1, NFT_REG_VERDICT), verdict_data(2, code, chain_name))


def verdict_data(kind: int, code: int, chain_name: str = "") -> bytes:
    """A verdict as an attribute of this kind."""
    target = string(2, chain_name) if chain_name else b""
    return nested(kind, nested(_NFTA_DATA_VERDICT, number(1, code), target))


def verdict_in(octets: bytes) -> int:
    """The code of a verdict, unsigned."""
    return int.from_bytes(dict(attributes(dict(attributes(octets))[_NFTA_DATA_VERDICT]))[1])


def mark(bits: int) -> bytes:
    """Set bits of the packet's mark."""
    return _masked_mark(bits, bits) + expression("meta", number(2, NFT_META_MARK), number(3, NFT_REG_1))


def unmark(bits: int) -> bytes:
    """Clear bits of the packet's mark."""
    return _masked_mark(bits, 0) + expression("meta", number(2, NFT_META_MARK), number(3, NFT_REG_1))


def is_marked(bits: int) -> bytes:
    """Go on only if all these bits of the packet's mark are set."""
    load = meta(NFT_META_MARK, NFT_REG_1) + _bitwise(bits, 0)
    return load + compare(struct.pack("=I", bits), NFT_REG_1)


def _masked_mark(clear: int, flip: int) -> bytes:
    return meta(NFT_META_MARK, NFT_REG_1) + _bitwise(~clear & 0xFFFFFFFF, flip)


def _bitwise(mask: int, flip: int) -> bytes:
    """Register 1 = (register 1 & mask) ^ flip, in the host's byte order as marks are."""
    word = struct.Struct("=I").pack
    return expression(
        "bitwise",
        number(1, NFT_REG_1),
        number(2, NFT_REG_1),
        number(3, 4),
        value(4, word(mask)),
        value(5, word(flip)),
    )


def counter(kind: int = _NFTA_LIST_ELEM, packets: int = 0, octets: int = 0) -> bytes:
    """Count what comes so far in a rule, or under an element of a map: then `kind` is the attribute's there."""
    counts = attribute(1, _COUNT.pack(octets)) + attribute(2, _COUNT.pack(packets))
    return nested(kind, string(1, "counter"), nested(2, counts))


def counter_in(octets: bytes) -> tuple[int, int]:
    """Packets and bytes that a counter has counted."""
    counts = dict(attributes(dict(attributes(octets))[2]))
    return _COUNT.unpack(counts[2])[0], _COUNT.unpack(counts[1])[0]


_OBJECT_COUNTER = 1


def named_counter(family: int, table: str, name: str) -> Message:
    """A counter of its own, which outlives the rules that count in it (NFTA_OBJ_*)."""
    return Message(Kind.NEWOBJ, family, _object(table, name) + nested(4), NLM_F_CREATE)


def get_named_counter(family: int, table: str, name: str) -> Message:
    """The question for one; `named_count_in` reads the answer."""
    return Message(Kind.GETOBJ, family, _object(table, name))


def named_count_in(answer: bytes) -> int:
    """How many packets it has counted."""
    counts = dict(attributes(dict(attributes(answer))[4]))
    return int(_COUNT.unpack(counts[2])[0])


def count_in(name: str) -> bytes:
    """Count what comes so far in a rule in a counter of its own (NFTA_OBJREF_*)."""
    return expression("objref", number(1, _OBJECT_COUNTER), string(2, name))


def _object(table: str, name: str) -> bytes:
    return string(1, table) + string(2, name) + number(3, _OBJECT_COUNTER)


_QUEUE_BYPASS = 1


def queue(number_: int, *, bypass: bool) -> bytes:
    """The nft `queue` statement (linux/netfilter/nf_tables.h NFTA_QUEUE_*)."""
    half = struct.Struct("!H").pack
    return expression(
        "queue", attribute(1, half(number_)), attribute(2, half(1)), attribute(3, half(_QUEUE_BYPASS if bypass else 0))
    )


def xt_queue(number_: int, *, bypass: bool) -> bytes:
    """The iptables target NFQUEUE inside an nft rule (linux/netfilter/xt_NFQUEUE.h, struct xt_NFQ_info_v3).

    nft_compat wants the structure at its size aligned to eight bytes.
    """
    info = struct.pack("=HHHxx", number_, 1, _QUEUE_BYPASS if bypass else 0)
    return expression("target", string(1, "NFQUEUE"), number(2, 3), attribute(3, info))


# --- tables' parts ---------------------------------------------------------------------------------------

_NFT_SET_MAP = 0x8
_NFT_DATA_VERDICT = 0xFFFFFF00
_POLICY_ACCEPT = 1


def chain(family: int, table: str, name: str, hook: int | None = None, priority: int = 0) -> Message:
    """A chain; with a hook, one that the kernel itself enters there, in the order of priorities."""
    body = string(1, table) + string(3, name)
    if hook is not None:
        body += nested(4, number(1, hook), number(2, priority)) + number(5, _POLICY_ACCEPT) + string(7, "filter")
    return Message(Kind.NEWCHAIN, family, body, NLM_F_CREATE)


def rule(family: int, table: str, chain_name: str, *expressions: bytes, remark: str = "") -> Message:
    """A rule at the end of a chain."""
    body = string(1, table) + string(2, chain_name) + nested(4, *expressions)
    if remark:
        body += comment(7, remark)
    return Message(Kind.NEWRULE, family, body, NLM_F_CREATE | NLM_F_APPEND)


class KeyField(Enum):
    """What a part of a key is, for the nft program to print: its number there (nft's datatype.h), and its bytes."""

    INTERFACE = (20, 4)
    IPV4_ADDRESS = (7, 4)  # and any four bytes in network order: nft prints 0x0102ffff as 1.2.255.255
    IPV6_ADDRESS = (8, 16)


def key_length(fields: Iterable[KeyField]) -> int:
    """Bytes of a key made of these fields."""
    return sum(field.value[1] for field in fields)


def verdict_map(family: int, table: str, name: str, fields: Sequence[KeyField], size: int) -> Message:
    """A map from keys to verdicts, of a fixed size (so that no look-up waits for it to grow), which counts."""
    kind = 0  # the kernel does not care; nft has room for five fields
    for field in fields[:5]:
        kind = kind << 6 | field.value[0]
    body = (
        string(1, table)
        + string(2, name)
        + number(3, _NFT_SET_MAP)
        + number(4, kind)
        + number(5, key_length(fields))
        + number(6, _NFT_DATA_VERDICT)
        + nested(9, number(1, size))
        + number(10, 1)  # an id within the transaction, which nobody refers to
        + counter(17)
    )
    return Message(Kind.NEWSET, family, body, NLM_F_CREATE)


def comment(kind: int, text: str) -> bytes:
    """User data that nft prints as a comment: type 0, length, text with its zero (libnftnl udata)."""
    octets = text.encode()[:127] + b"\0"
    return attribute(kind, bytes((0, len(octets))) + octets)


def comment_in(userdata: bytes) -> str | None:
    """The comment in an object's user data."""
    if len(userdata) < 3 or userdata[0] != 0:
        return None
    return userdata[2 : 2 + userdata[1]].rstrip(b"\0").decode(errors="replace")


# --- the socket ------------------------------------------------------------------------------------------


class NftSocket:
    """A netlink connection to nf_tables of this network namespace. All methods wait for the kernel's answer."""

    def __init__(self) -> None:
        self._socket = self._open()
        self._sequence = 0

    @staticmethod
    def _open() -> socket.socket:
        connection = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        connection.bind((0, 0))
        connection.settimeout(_TIMEOUT_S)
        for force, option, size in (
            (_SO_SNDBUFFORCE, socket.SO_SNDBUF, _SEND_BYTES),
            (_SO_RCVBUFFORCE, socket.SO_RCVBUF, _RECEIVE_BYTES),
        ):
            try:
                connection.setsockopt(socket.SOL_SOCKET, force, size)
            except PermissionError:
                connection.setsockopt(socket.SOL_SOCKET, option, size)
        return connection

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def transact(self, messages: Sequence[Message]) -> list[bytes]:
        """Do all of it or nothing; gives the bodies of what was echoed. Raises NftError or OSError."""
        if not messages:
            return []
        begin = self._message(_NFNL_MSG_BATCH_BEGIN, 0, 0, b"")
        *others, last = messages
        request = [begin, *map(self._request, others)]
        # Errors come for every message that has one, and before this acknowledgement of the last one.
        request.append(self._request(last, _NLM_F_ACK))
        last_sequence = self._sequence
        request.append(self._message(_NFNL_MSG_BATCH_END, 0, 0, b""))
        return self._exchange(b"".join(request), last_sequence)

    def ask(self, message: Message) -> list[bytes]:
        """The bodies that answer a question. Raises NftError (ENOENT: no such thing) or OSError."""
        request = self._request(message, _NLM_F_ACK)
        return self._exchange(request, self._sequence)

    def _exchange(self, request: bytes, last: int) -> list[bytes]:
        """Send, and collect answers until the one to the request with this sequence number says how it went.

        Echoes bear no sequence number (Linux 6.18). So an answer that did not come in time must never be met
        later: the socket goes, and its answers with it.
        """
        bodies: list[bytes] = []
        failed = 0
        try:
            self._socket.send(request)
            while True:
                for kind, sequence, body in _messages(self._socket.recv(_READ_BYTES)):
                    if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                        failed = failed or (-_ERROR.unpack_from(body)[0] if kind == _NLMSG_ERROR else 0)
                        if sequence == last or failed in _FATAL:
                            if failed:
                                raise NftError(failed)
                            return bodies
                    elif kind != _NFT_MSG_NEWGEN:
                        bodies.append(body)
        except OSError:
            self._socket.close()
            self._socket = self._open()
            raise

    def _request(self, message: Message, flags: int = 0) -> bytes:
        kind = _NFNL_SUBSYS_NFTABLES << 8 | message.kind
        return self._message(kind, message.flags | flags, message.family, message.body)

    def _message(self, kind: int, flags: int, family: int, body: bytes) -> bytes:
        self._sequence = self._sequence % 0xFFFFFFF0 + 1
        resource = _NFNL_SUBSYS_NFTABLES if kind in (_NFNL_MSG_BATCH_BEGIN, _NFNL_MSG_BATCH_END) else 0
        header = _HEADER.pack(20 + len(body), kind, _NLM_F_REQUEST | flags, self._sequence, 0)
        return header + _GENERIC.pack(family, 0, resource) + body


#: Refusals of the whole batch, which name its first message: no acknowledgement of the last one will follow.
_FATAL = (errno.EPERM, errno.EOPNOTSUPP)


def _messages(octets: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, sequence number and body (behind nfgenmsg, if it has one) of each netlink message."""
    offset = 0
    while offset + 16 <= len(octets):
        length, kind, _, sequence, _ = _HEADER.unpack_from(octets, offset)
        if length < 16:
            return
        skip = 16 if kind in (_NLMSG_ERROR, _NLMSG_DONE) else 20
        yield kind, sequence, octets[offset + skip : offset + length]
        offset += (length + 3) & ~3
