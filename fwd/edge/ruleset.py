"""fwd's own netfilter rules: they send ESP, IKE and NAT-T to the queue, IPv4 and IPv6, in, out and through.

They stand in tables of their own, one for IPv4 and one for IPv6, built alike. Before the queue come two maps, one for
ESP and one for ESP in UDP: an element of theirs repeats what the daemon decided, and counts (edge/kernel_path.py writes
and reads them). What is in no map falls through to the queue. In nft's words:

    chain forward {
        type filter hook forward priority mangle; policy accept;
        ip protocol esp  esp sequence != 0  iif . oif . ip saddr . ip daddr . esp spi vmap @decided_esp
        meta l4proto esp  goto undecided
        meta l4proto udp  goto over_udp
    }
    counter undecided { }
    chain undecided { counter name undecided queue num 20 bypass comment "queue 20" }

How `undecided` gets packets to the queue depends on the kernel and is found out by trying (see Backend). An accepted
packet leaves this table only: a user's own rules still see it. Loopback is left out: its packets would be seen
twice, going out and coming in.
"""

from __future__ import annotations

import contextlib
import errno
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias

from . import nftables as nft
from .nftables import KeyField, Kind, Message, NftError, NftSocket
from .programs import ProgramFailed, run
from .queue_stats import kernel_queue_stats

TABLE = "fwd_dataplane"  # `fwd` alone is a keyword of nft
_UNDECIDED = "undecided"
ESP_MAP, ESP_IN_UDP_MAP = "decided_esp", "decided_esp_in_udp"  # `esp` alone is a keyword of nft
_OVER_UDP = "over_udp"  # so is `udp`

#: Where the two addresses stand in the IP header, and how long each is (RFC 791, RFC 8200).
_ADDRESSES = {nft.NFPROTO_IPV4: (12, 4), nft.NFPROTO_IPV6: (8, 16)}

#: To be raised whenever tables that another version of fwd left behind must not be taken over.
_LAYOUT = 3

_HOOKS = {"input": 1, "forward": 2, "output": 3}  # NF_INET_* (linux/netfilter.h)
_MANGLE = -150  # NF_IP_PRI_MANGLE (linux/netfilter_ipv4.h): before anybody's filter rules
_LOOPBACK = struct.pack("=I", 1)  # its interface index in every network namespace

#: With Backend.MARK, says "decided" to iptables' rules; fwd sets it and clears it again.
_DECIDED_MARK = 0x4000_0000

_ESP, _UDP = b"\x32", b"\x11"
_IKE_PORT, _NAT_T_PORT = struct.pack("!H", 500), struct.pack("!H", 4500)
_SPORT, _DPORT = 0, 2

#: Whose the rules are, in nft's comment and in iptables' words.
_QUEUE = re.compile(r"queue (\d+)|--queue-num (\d+)")

#: What a table says it is: see Ruleset._label.
_LABEL = re.compile(r"fwd: layout (\d+), (\S+), (\d+) elements")

#: Attributes of a table and of a rule (linux/netfilter/nf_tables.h, NFTA_TABLE_*, NFTA_RULE_*).
_TABLE_USERDATA = 6
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE, _RULE_USERDATA = 1, 2, 3, 7

#: iptables' matches for what fwd handles. A later fragment of ESP still has the protocol number 50.
_MATCHES = (
    "-p esp",
    *(f"-p udp --{side} {port}" for side in ("dport", "sport") for port in (500, 4500)),
)

#: The programs that speak to the kernel's nf_tables first: those of legacy iptables are the last resort.
_PROGRAMS = (
    ("IPv4", ("iptables-nft", "iptables")),
    ("IPv6", ("ip6tables-nft", "ip6tables")),
)


class Backend(StrEnum):
    """How packets get to the queue, best first."""

    NFT = "nft"  # the nft `queue` statement
    XT = "nft-xt"  # the xt target NFQUEUE in the nft rule
    MARK = "iptables-mark"  # iptables queues what the maps did not decide, and mark
    IPTABLES = "iptables"  # no maps: every packet is queued

    @property
    def has_maps(self) -> bool:
        """Whether the kernel can repeat decisions."""
        return self is not Backend.IPTABLES

    @property
    def accepts(self) -> int:
        """The verdict of an element that lets packets pass: with a mark, the rule has more to do."""
        return nft.NFT_CONTINUE if self is Backend.MARK else nft.NF_ACCEPT

    @property
    def words(self) -> str:
        """For the log and `show system info`."""
        return {
            Backend.NFT: "nft queue",
            Backend.XT: "xt NFQUEUE in nft rules",
            Backend.MARK: "iptables NFQUEUE, fast path by nft mark",
            Backend.IPTABLES: "iptables NFQUEUE",
        }[self]


@dataclass(frozen=True, slots=True)
class PresentTable:
    """What is there of one family's table: its label, its backend, its rules, and how many a whole one has.

    The latter two are None in a table of another version of fwd.
    """

    label: str
    backend: Backend | None
    rules: int
    wanted_rules: int | None
    queues: frozenset[int]


#: A table's label, None if there is no such table, and chain and handle of each rule.
_Table: TypeAlias = tuple[str | None, list[tuple[bytes, bytes]]]


class RulesetError(Exception):
    """The rules cannot be installed; the message says what to do."""


class Ruleset:
    """The rules of one queue. `fail_open` lets packets pass while nobody reads it; `capacity` is each map's size.

    `wanted` leaves no choice of how packets get to the queue.
    """

    def __init__(self, queue: int, fail_open: bool, capacity: int, wanted: Backend | None = None) -> None:
        self.queue = queue
        self.fail_open = fail_open
        self._capacity = capacity
        self._choice = [wanted] if wanted else list(Backend)
        #: What was chosen; None before the first installation.
        self.backend: Backend | None = None
        #: The same in words, and what the kernel refused.
        self.description = ""
        #: Whether the maps were found with their elements in them, and kept.
        self.kept_maps = False
        self._tables: dict[int, _Table] = {}
        self._chains: dict[str, list[str]] = {}

    def refuse_anothers(self) -> None:
        """See to it that rules that are there are nobody's. Raises RulesetError if another fwd lives by them."""
        for queue in sorted(_queues_named() - {self.queue}):
            if kernel_queue_stats(queue) is not None:
                raise RulesetError(
                    f"the rules of fwd are in place for NFQUEUE {queue}, and a process has that queue: one fwd only can"
                    " be in a network namespace, so stop the other one. If it is another program that has the queue,"
                    " fwd --remove-rules takes out what an fwd left"
                )

    def install(self) -> str:
        """Put the rules in place of any that are there; gives what was chosen, in words. Raises RulesetError.

        What the kernel has of fwd's changes in one transaction: no packet meets half a set. Maps of the right
        layout stay as they are, with their elements.
        """
        refusals = []
        for backend in self._choice:
            try:
                note = self._install(backend)
            except (ProgramFailed, NftError, OSError) as error:
                refusals.append(f"{backend}: {error}")
                continue
            self.backend = backend
            self.description = "; ".join([backend.words + note, *(f"not {refusal}" for refusal in refusals)])
            return self.description
        raise RulesetError(
            "cannot install netfilter rules: run as root or with CAP_NET_ADMIN, and install iptables if the kernel"
            f" has no nf_tables; tried {'; '.join(refusals)}"
        )

    def change(self, fail_open: bool) -> str:
        """Install with the other choice. Raises RulesetError, and then the old one stays."""
        before, self.fail_open = self.fail_open, fail_open
        try:
            return self.install()
        except RulesetError:
            self.fail_open = before
            raise

    def is_in_place(self) -> bool:
        """Whether tables and rules are those that were installed, as nf_tables tells. Raises OSError."""
        if not self._tables:
            return True
        with contextlib.closing(NftSocket()) as socket:
            return self._tables == {family: _table(socket, family) for family in _families()}

    @property
    def has_chains(self) -> bool:
        """Whether iptables' chains are part of it: those have to be looked after, too."""
        return bool(self._chains)

    def are_chains_in_place(self) -> bool:
        """Whether iptables' chains are those that were installed. Waits for programs. Raises RulesetError."""
        installed = self._chains
        try:
            return all(_ours(_listed(program)) == ours for program, ours in installed.items()) or (
                self._chains is not installed  # installed anew meanwhile
            )
        except ProgramFailed as error:
            raise RulesetError(str(error)) from None

    def undecided(self) -> int | None:
        """Packets that came to the queue's rule since the maps are there; None if nobody counts. Raises OSError."""
        if not self._tables:
            return None
        with contextlib.closing(NftSocket()) as socket:
            try:
                answers = [socket.ask(nft.get_named_counter(family, TABLE, _UNDECIDED)) for family in self._tables]
            except NftError:
                return None
        return sum(nft.named_count_in(answer) for (answer,) in answers)

    @staticmethod
    def detach() -> None:
        """Send nothing to the queue any more, and decide nothing; the maps stay, with their last counts.

        Where there are no rules this does nothing. Raises OSError.
        """
        _remove_iptables()
        with contextlib.closing(NftSocket()) as socket:
            for family in _ADDRESSES:
                with contextlib.suppress(NftError):
                    socket.transact([Message(Kind.DELRULE, family, nft.string(1, TABLE))])

    @staticmethod
    def remove() -> None:
        """Take the rules out, whichever fwd left them; where there are none this does nothing."""
        _remove_nft()
        _remove_iptables()

    def _install(self, backend: Backend) -> str:
        tables: dict[int, _Table] = {}
        if backend.has_maps:
            with contextlib.closing(NftSocket()) as socket:
                label = self._label(backend)
                families = _families()
                self.kept_maps = all(_label(socket, family) == label for family in families)
                socket.transact([message for family in families for message in self._nft(family, backend, label)])
                tables = {family: _table(socket, family) for family in families}
        else:
            _remove_nft()
            self.kept_maps = False
        note = ""
        if backend in (Backend.MARK, Backend.IPTABLES):
            note = self._install_iptables(but_marked=backend is Backend.MARK)
        elif self.backend is None or self._chains:  # what a former fwd, or this one with another backend, left
            _remove_iptables()
            self._chains = {}
        self._tables = tables
        return note

    def _label(self, backend: Backend) -> str:
        """What a table says it is: one that says the same can be kept."""
        return f"fwd: layout {_LAYOUT}, {backend}, {self._capacity} elements"

    # --- nft --------------------------------------------------------------------------------------------

    def _nft(self, family: int, backend: Backend, label: str) -> Iterator[Message]:
        table = nft.string(1, TABLE)
        if self.kept_maps:
            yield Message(Kind.DELRULE, family, table)
        else:
            yield Message(Kind.NEWTABLE, family, table, nft.NLM_F_CREATE)  # so that there is one to delete
            yield Message(Kind.DELTABLE, family, table)
            yield Message(Kind.NEWTABLE, family, table + nft.comment(6, label), nft.NLM_F_CREATE)
            yield nft.named_counter(family, TABLE, _UNDECIDED)
            for name in (ESP_MAP, ESP_IN_UDP_MAP):
                yield nft.verdict_map(family, TABLE, name, _key_fields(family, name), self._capacity)
            for chain in (_OVER_UDP, _UNDECIDED):
                yield nft.chain(family, TABLE, chain)
            for hook, number in _HOOKS.items():
                if backend is Backend.MARK:
                    yield nft.chain(family, TABLE, hook, number, _MANGLE - 10)
                    yield nft.chain(family, TABLE, f"after_{hook}", number, _MANGLE + 10)
                else:
                    yield nft.chain(family, TABLE, hook, number, _MANGLE)
        is_marked = backend is Backend.MARK
        # An element whose verdict is to go on leads to this; see `decided`.
        go_on = nft.mark(_DECIDED_MARK) + nft.verdict(nft.NF_ACCEPT) if is_marked else b""
        for hook in _HOOKS:
            yield nft.rule(family, TABLE, hook, _decided(family, ESP_MAP), go_on)
            if hook != "forward":
                side = nft.NFT_META_OIF if hook == "output" else nft.NFT_META_IIF
                loopback = nft.meta(side, nft.NFT_REG_1) + nft.compare(_LOOPBACK, nft.NFT_REG_1)
                yield nft.rule(family, TABLE, hook, loopback, nft.verdict(nft.NF_ACCEPT))
            yield nft.rule(family, TABLE, hook, _protocol(_ESP), nft.verdict(nft.NFT_GOTO, _UNDECIDED))
            yield nft.rule(family, TABLE, hook, _protocol(_UDP), nft.verdict(nft.NFT_GOTO, _OVER_UDP))
            if is_marked:
                yield nft.rule(family, TABLE, f"after_{hook}", nft.is_marked(_DECIDED_MARK), nft.unmark(_DECIDED_MARK))
        for side in (_DPORT, _SPORT):
            yield nft.rule(family, TABLE, _OVER_UDP, _port(side, _NAT_T_PORT), _decided(family, ESP_IN_UDP_MAP), go_on)
        for side in (_DPORT, _SPORT):
            for port in (_IKE_PORT, _NAT_T_PORT):
                yield nft.rule(family, TABLE, _OVER_UDP, _port(side, port), nft.verdict(nft.NFT_GOTO, _UNDECIDED))
        match backend:
            case Backend.NFT:
                undecided = nft.count_in(_UNDECIDED) + nft.queue(self.queue, bypass=self.fail_open)
            case Backend.XT:
                undecided = nft.count_in(_UNDECIDED) + nft.xt_queue(self.queue, bypass=self.fail_open)
            case _:  # whatever set the bit before: it was not fwd
                undecided = nft.count_in(_UNDECIDED) + nft.unmark(_DECIDED_MARK)
        yield nft.rule(family, TABLE, _UNDECIDED, undecided, remark=f"queue {self.queue}")

    # --- iptables ---------------------------------------------------------------------------------------

    def _install_iptables(self, *, but_marked: bool) -> str:
        """Queue by iptables in the mangle table; gives what of it was left out, in words."""
        failed = []
        chains = {}
        for family, programs in _PROGRAMS:
            try:
                program = self._install_one_iptables(programs, but_marked)
                chains[program] = _ours(_listed(program))
            except ProgramFailed as error:
                failed.append(f"{family}: {error}")
        if len(failed) == len(_PROGRAMS):
            raise ProgramFailed("; ".join(failed))
        self._chains = chains
        return f" (left out: {'; '.join(failed)})" if failed else ""

    def _install_one_iptables(self, programs: Sequence[str], but_marked: bool) -> str:
        """Install one family's rules with the first program that can, and say which."""
        refusal = ProgramFailed("none of its programs was tried")
        target = f"NFQUEUE --queue-num {self.queue}{' --queue-bypass' if self.fail_open else ''}"
        if but_marked:
            target = f"{target} -m mark ! --mark {_DECIDED_MARK:#x}/{_DECIDED_MARK:#x}"
        for program in programs:
            try:
                rules = ["*mangle", *(f":{_chain(hook)} - [0:0]" for hook in _HOOKS)]
                present = _listed(program)
                for hook in _HOOKS:
                    jump = f"{hook.upper()} -j {_chain(hook)}"
                    rules += [f"-D {jump}"] * present.count(f"-A {jump}")
                    rules.append(f"-I {hook.upper()} 1 -j {_chain(hook)}")
                    rules.append(f"-A {_chain(hook)} {'-o' if hook == 'output' else '-i'} lo -j RETURN")
                    rules += [f"-A {_chain(hook)} {match} -j {target}" for match in _MATCHES]
                run([f"{program}-restore", "-w", "--noflush"], "\n".join([*rules, "COMMIT", ""]))
                return program
            except ProgramFailed as error:
                refusal = error
        raise refusal


def present() -> dict[str, PresentTable]:
    """The tables that are there now, by family, whichever fwd made them. Raises OSError."""
    found = {}
    with contextlib.closing(NftSocket()) as socket:
        for family, name in ((nft.NFPROTO_IPV4, "IPv4"), (nft.NFPROTO_IPV6, "IPv6")):
            label, rules = _label(socket, family), _rules(socket, family)
            if label is not None or rules:
                backend, wanted = _wanted(family, label or "")
                queues = _queues_in(nft.comment_in(rule.get(_RULE_USERDATA, b"")) or "" for rule in rules)
                found[name] = PresentTable(label or "", backend, len(rules), wanted, frozenset(queues))
    return found


def _wanted(family: int, label: str) -> tuple[Backend | None, int | None]:
    """How a table that says this of itself gets packets to the queue, and how many rules it has when it is whole."""
    said = _LABEL.fullmatch(label)
    if said is None or int(said[1]) != _LAYOUT or said[2] not in list(Backend):
        return None, None
    whole = Ruleset(0, True, int(said[3]))
    backend = Backend(said[2])
    return backend, sum(message.kind is Kind.NEWRULE for message in whole._nft(family, backend, label))


def maps() -> dict[int, tuple[int, str]]:
    """Family and name of each map, by the length of its keys in bytes."""
    return {
        nft.key_length(_key_fields(family, name)): (family, name)
        for family in _ADDRESSES
        for name in (ESP_MAP, ESP_IN_UDP_MAP)
    }


def _key_fields(family: int, name: str) -> list[KeyField]:
    """Interfaces in and out, source and destination, both UDP ports if it is UDP, SPI."""
    address = KeyField.IPV4_ADDRESS if family == nft.NFPROTO_IPV4 else KeyField.IPV6_ADDRESS
    word = KeyField.IPV4_ADDRESS
    ports = [word] if name == ESP_IN_UDP_MAP else []
    return [KeyField.INTERFACE, KeyField.INTERFACE, address, address, *ports, word]


def _families() -> list[int]:
    return [nft.NFPROTO_IPV4, *([nft.NFPROTO_IPV6] if Path("/proc/net/if_inet6").exists() else [])]


def _label(socket: NftSocket, family: int) -> str | None:
    """What the table there says it is; None if there is none, or nobody labelled it."""
    try:
        (table,) = socket.ask(Message(Kind.GETTABLE, family, nft.string(1, TABLE)))
    except (NftError, ValueError):
        return None
    return nft.comment_in(dict(nft.attributes(table)).get(_TABLE_USERDATA, b""))


def _rules(socket: NftSocket, family: int) -> list[dict[int, bytes]]:
    """The rules of the table there, chain by chain; none if there is no table."""
    try:
        answers = socket.ask(Message(Kind.GETRULE, family, nft.string(_RULE_TABLE, TABLE), nft.NLM_F_DUMP))
    except NftError:
        return []
    return [dict(nft.attributes(answer)) for answer in answers]


def _table(socket: NftSocket, family: int) -> _Table:
    """What the table there says it is, and which rules it has: a handle is never used twice."""
    rules = [(rule[_RULE_CHAIN], rule[_RULE_HANDLE]) for rule in _rules(socket, family)]
    return _label(socket, family), rules


def _queues_named() -> set[int]:
    """The queues that fwd's rules name, whichever fwd left them."""
    words = []
    with contextlib.suppress(OSError), contextlib.closing(NftSocket()) as socket:
        for family in _ADDRESSES:
            words += [nft.comment_in(rule.get(_RULE_USERDATA, b"")) or "" for rule in _rules(socket, family)]
    for _, programs in _PROGRAMS:
        for program in programs:
            with contextlib.suppress(ProgramFailed):
                words += _ours(_listed(program))
    return _queues_in(words)


def _queues_in(words: Iterable[str]) -> set[int]:
    return {int(found[1] or found[2]) for word in words if (found := _QUEUE.search(word))}


def _protocol(number: bytes) -> bytes:
    return nft.meta(nft.NFT_META_L4PROTO, nft.NFT_REG_1) + nft.compare(number, nft.NFT_REG_1)


def _is_esp(family: int) -> bytes:
    """Cheaper than asking for the protocol, which the kernel finds behind IPv6's extension headers."""
    if family == nft.NFPROTO_IPV6:
        return _protocol(_ESP)
    load = nft.payload(nft.NFT_PAYLOAD_NETWORK_HEADER, 9, 1, nft.NFT_REG_1)
    return load + nft.compare(_ESP, nft.NFT_REG_1)


def _port(side: int, port: bytes) -> bytes:
    load = nft.payload(nft.NFT_PAYLOAD_TRANSPORT_HEADER, side, 2, nft.NFT_REG_1)
    return _protocol(_UDP) + load + nft.compare(port, nft.NFT_REG_1)


def _decided(family: int, name: str) -> bytes:
    """Look up what was decided for the packet's interfaces, addresses, UDP ports and SPI.

    A packet that is too short for a sequence number is malformed. To load that number makes the rule fail, as does
    comparing it with zero, which no sender uses but when a 64-bit number begins anew: the daemon has a look at it.
    """
    offset, length = _ADDRESSES[family]
    esp = 8 if name == ESP_IN_UDP_MAP else 0
    register = nft.NFT_REG32_00
    parts = [
        *([] if esp else [_is_esp(family)]),
        nft.payload(nft.NFT_PAYLOAD_TRANSPORT_HEADER, esp + 4, 4, register),
        nft.compare(bytes(4), register, equal=False),
        nft.meta(nft.NFT_META_IIF, register),
        nft.meta(nft.NFT_META_OIF, register + 1),
    ]
    register += 2
    for base, start, size in (
        (nft.NFT_PAYLOAD_NETWORK_HEADER, offset, length),
        (nft.NFT_PAYLOAD_NETWORK_HEADER, offset + length, length),
        *([(nft.NFT_PAYLOAD_TRANSPORT_HEADER, 0, 4)] if esp else []),
        (nft.NFT_PAYLOAD_TRANSPORT_HEADER, esp, 4),
    ):
        parts.append(nft.payload(base, start, size, register))
        register += size // 4
    return b"".join([*parts, nft.lookup_verdict(name, nft.NFT_REG32_00)])


def _remove_nft() -> None:
    with contextlib.suppress(OSError), contextlib.closing(NftSocket()) as socket:
        for family in _ADDRESSES:
            try:
                socket.transact([Message(Kind.DELTABLE, family, nft.string(1, TABLE))])
            except NftError as error:
                if error.number not in (errno.ENOENT, errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
                    raise OSError(error.number, str(error)) from None


def _chain(hook: str) -> str:
    return f"FWD-{hook.upper()}"


def _listed(program: str) -> list[str]:
    """The mangle table, a rule a line. Raises ProgramFailed."""
    return run([program, "-w", "-t", "mangle", "-S"]).splitlines()


def _ours(lines: Sequence[str]) -> list[str]:
    """What of the mangle table is fwd's: its chains, and what leads to them."""
    return [line for line in lines if any(_chain(hook) in line for hook in _HOOKS)]


def _remove_iptables() -> None:
    for _, programs in _PROGRAMS:
        for program in programs:
            try:
                present = _listed(program)
                rules = []
                for hook in _HOOKS:
                    chain = _chain(hook)
                    if f"-N {chain}" in present:
                        jumps = present.count(f"-A {hook.upper()} -j {chain}")
                        rules += [f"-D {hook.upper()} -j {chain}"] * jumps + [f"-F {chain}", f"-X {chain}"]
                if rules:
                    run([f"{program}-restore", "-w", "--noflush"], "\n".join(["*mangle", *rules, "COMMIT", ""]))
            except ProgramFailed:
                pass  # not this program's rules
