"""What other firewalls' rules mean for IPsec, read from `nft --json` and from iptables-save.

A rule is known by what it does with three kinds of packets: a new one of ESP, of IKE (UDP 500) and of NAT-T (UDP 4500).
Each condition holds, does not, or holds for some of them (an address, an interface); what nobody here understands holds
for some. So what is said to be dropped is dropped, but for what a rule lets pass before for some.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias

#: Of a rule's condition, or of all of them: None is "for some".
Holds: TypeAlias = bool | None


class Kind(NamedTuple):
    """A kind of packet: name, protocol by name and number, destination port."""

    name: str
    protocol: tuple[str, int]
    port: int | None


KINDS = (Kind("ESP", ("esp", 50), None), Kind("UDP 500", ("udp", 17), 500), Kind("UDP 4500", ("udp", 17), 4500))

#: By this it is told whether a rule speaks of IPsec: then it does not hold for a packet that is none.
_OTHER = Kind("TCP 22", ("tcp", 6), 22)

_PRIORITIES = {"raw": -300, "mangle": -150, "nat": -100, "filter": 0, "security": 50}
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
#: iptables' targets that end a packet's way; others either are chains or let it go on.
_TARGETS = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return", "NFQUEUE": "queue"}
#: nft's names of what is inside of IP; "th" is whatever has ports.
_PROTOCOLS = frozenset({"th", "tcp", "udp", "udplite", "sctp", "dccp", "icmp", "icmpv6", "igmp", "ah", "comp"})


@dataclass(frozen=True, slots=True)
class Rule:
    """What a rule does (accept, drop, return, jump, goto, queue, notrack, flow, or nothing), and with what."""

    does: str
    holds: Mapping[Kind, Holds]
    target: str = ""
    is_about_invalid: bool = False

    @property
    def names_ipsec(self) -> bool:
        """Whether it is by protocol or port that it holds for any of them."""
        return self.holds[_OTHER] is False and any(self.holds[kind] is not False for kind in KINDS)


@dataclass(slots=True)
class Chain:
    """A chain, whose it is (`nft`, `iptables`, ...), and its hook if the kernel enters it there.

    `table` is as that program wants it: `inet filter` or `filter`.
    """

    program: str
    table: str
    name: str
    hook: str = ""
    priority: int = 0
    policy: str = "accept"
    rules: list[Rule] = field(default_factory=list)

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.program} table {self.table}, chain {self.name}"


class Passes(IntEnum):
    """By what some packets of a kind pass."""

    NONE = 0
    PERHAPS = 1  # by address or interface, say, whatever they are
    BY_NAME = 2  # a rule says so of IPsec


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a kind of packet (accept, queue, drop; None: the chain does not say), and by what some pass."""

    verdict: str | None
    passes: Passes


def fate(chains: Iterable[Chain], chain: Chain, kind: Kind) -> Fate:
    """What a base chain does with packets of a kind."""
    named = {other.name: other for other in chains if (other.program, other.table) == (chain.program, chain.table)}
    found = _fate(named, chain, kind, {})
    return found if found.verdict else Fate(chain.policy, found.passes)


def _fate(chains: Mapping[str, Chain], chain: Chain, kind: Kind, known: dict[str, Fate]) -> Fate:
    """The same for any chain. What is `known` of others is not found out again; a loop leads nowhere."""
    if chain.name in known:
        return known[chain.name]
    known[chain.name] = Fate(None, Passes.NONE)
    known[chain.name] = found = _walk(chains, chain, kind, known)
    return found


def _walk(chains: Mapping[str, Chain], chain: Chain, kind: Kind, known: dict[str, Fate]) -> Fate:
    passes = Passes.NONE
    for rule in chain.rules:
        holds = rule.holds[kind]
        if holds is False:
            continue
        verdict: str | None = rule.does
        by = Passes.BY_NAME if rule.names_ipsec else Passes.PERHAPS
        if rule.does in ("jump", "goto"):
            if rule.target not in chains:
                continue
            found = _fate(chains, chains[rule.target], kind, known)
            if found.passes:
                passes = max(passes, by, found.passes)
            verdict = found.verdict or ("return" if rule.does == "goto" else None)
        elif verdict in ("accept", "queue"):
            passes = max(passes, by)
        if verdict in ("accept", "queue", "drop", "return") and holds:
            return Fate(None if verdict == "return" else verdict, passes)
    return Fate(None, passes)


def _all_of(conditions: Iterable[Holds]) -> Holds:
    found = set(conditions)
    return False if False in found else None if None in found else True


def _any_of(conditions: Iterable[Holds]) -> Holds:
    found = set(conditions)
    return True if True in found else None if None in found else False


# --- nft -------------------------------------------------------------------------------------------------


def nft_chains(answer: Mapping[str, Any]) -> list[Chain]:
    """The chains in what `nft --json list table` prints (libnftables-json(5))."""
    chains: dict[tuple[str, str, str], Chain] = {}
    for item in answer.get("nftables", ()):
        (what, body), *_ = item.items()
        if what == "chain":
            chain = Chain("nft", f"{body['family']} {body['table']}", body["name"])
            if "hook" in body:
                priority = body.get("prio", 0)
                chain.hook, chain.policy = body["hook"], body.get("policy", "accept")
                chain.priority = priority if isinstance(priority, int) else 0
            chains[body["family"], body["table"], body["name"]] = chain
        elif what == "rule":
            chains[body["family"], body["table"], body["chain"]].rules += _nft_rules(body.get("expr", ()))
    return list(chains.values())


def _nft_rules(expressions: Sequence[Any]) -> Iterator[Rule]:
    """A rule as one, or as many as its map has elements, for each thing that it does."""
    conditions: list[Callable[[Kind], Holds]] = []
    is_about_invalid = False

    def rule(
        does: str, target: str = "", more: Callable[[Kind], Holds] = lambda _: True, invalid: bool = False
    ) -> Rule:
        holds = {kind: _all_of(condition(kind) for condition in (*conditions, more)) for kind in (*KINDS, _OTHER)}
        return Rule(does, holds, target, is_about_invalid or invalid)

    for expression in expressions:
        if not isinstance(expression, Mapping):
            conditions.append(lambda _: None)
            continue
        (what, body), *_ = expression.items()
        if what == "match":
            conditions.append(_nft_match(body["left"], body.get("op", "=="), body["right"]))
            is_about_invalid |= _is_state(body["left"]) and "invalid" in _elements(body["right"])
        elif what == "vmap":
            for value, verdict in _pairs(body["data"]):
                (does, more), *_ = verdict.items()
                target = more["target"] if isinstance(more, Mapping) else ""
                about = _is_state(body["key"]) and value == "invalid"
                yield rule(_verdict(does), target, _nft_match(body["key"], "==", value), about)
        elif what in ("accept", "drop", "reject", "return", "notrack", "flow"):
            yield rule(_verdict(what))
        elif what in ("jump", "goto"):
            yield rule(what, body["target"])
        elif what == "queue":
            yield rule("queue", str(body.get("num", "")) if isinstance(body, Mapping) else "")
        elif what not in ("counter", "log", "mangle", "comment"):
            conditions.append(lambda _: None)


def _verdict(word: str) -> str:
    return "drop" if word == "reject" else word


def _pairs(data: Any) -> list[Any]:
    return data["set"] if isinstance(data, Mapping) and "set" in data else []  # a named map may change at any time


def _is_state(left: Any) -> bool:
    return isinstance(left, Mapping) and left.get("ct", {}).get("key") == "state"


def _elements(right: Any) -> list[Any]:
    if isinstance(right, Mapping) and "set" in right:
        return list(right["set"])
    return list(right) if isinstance(right, list) else [right]


def _nft_match(left: Any, operator: str, right: Any) -> Callable[[Kind], Holds]:
    """The condition `left operator right`."""

    def holds(kind: Kind) -> Holds:
        found = _any_of(_nft_is(left, element, kind) for element in _elements(right))
        return found if operator in ("==", "in") or found is None else not found

    return holds


def _nft_is(left: Any, value: Any, kind: Kind) -> Holds:
    if not isinstance(left, Mapping):
        return None
    if "concat" in left:
        values = value.get("concat", ()) if isinstance(value, Mapping) else ()
        return _all_of(_nft_is(*pair, kind) for pair in zip(left["concat"], values, strict=True)) if values else None
    if isinstance(value, str) and value.startswith("@"):
        return None
    (what, body), *_ = left.items()
    key = body.get("key") if isinstance(body, Mapping) else None
    protocol, its_field = (body.get("protocol"), body.get("field")) if what == "payload" else (None, None)
    if (what, key) == ("meta", "l4proto") or (protocol, its_field) in (("ip", "protocol"), ("ip6", "nexthdr")):
        return value in kind.protocol
    if (what, key) == ("ct", "state"):
        return bool(value == "new")
    if what == "meta" and key in ("iif", "iifname", "oif", "oifname") and value == "lo":
        return False
    if protocol == "esp":
        return None if kind.protocol[0] == "esp" else False
    if protocol in _PROTOCOLS:
        if kind.port is None or protocol not in ("th", kind.protocol[0]):
            return False
        return _is_in(kind.port, value) if its_field == "dport" else None
    return None


def _is_in(port: int, value: Any) -> Holds:
    if isinstance(value, Mapping):
        low, high = value.get("range", (None, None))
        return low <= port <= high if isinstance(low, int) and isinstance(high, int) else None
    return bool(value == port)


# --- iptables ----------------------------------------------------------------------------------------------


def iptables_chains(program: str, saved: str) -> list[Chain]:
    """The chains in what iptables-save prints; `program` is whose they are, such as `iptables`."""
    chains: dict[tuple[str, str], Chain] = {}
    table = ""
    names: set[str] = set()
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
            names.clear()
        elif line.startswith(":"):
            name, policy, *_ = line[1:].split()
            chain = Chain(program, table, name)
            if policy != "-":
                hook = name.lower()
                chain.hook = hook if hook in _HOOKS else ""
                chain.priority, chain.policy = _PRIORITIES.get(table, 0), policy.lower()
            chains[table, name] = chain
        elif line.startswith("-A "):
            name, rule = _iptables_rule(
                (shlex.split(line) if '"' in line else line.split())[1:], {chain for of, chain in chains if of == table}
            )
            if (table, name) in chains:
                chains[table, name].rules.append(rule)
    return list(chains.values())


def _iptables_rule(words: Sequence[str], chains: set[str]) -> tuple[str, Rule]:
    """A rule, and the chain that it stands in."""
    conditions: list[Callable[[Kind], Holds]] = []
    chain, *rest = words
    does, target, is_negated, is_about_invalid = "", "", False, False
    for position, word in enumerate(rest):
        value = next(iter(rest[position + 1 :]), "")
        if word in ("-j", "-g"):
            options = rest[position + 2 :]
            does = _TARGETS.get(value, "")
            if value in chains:
                does, target = ("jump" if word == "-j" else "goto"), value
            elif value == "NOTRACK" or (value == "CT" and "--notrack" in options):
                does = "notrack"
            elif value == "FLOWOFFLOAD":
                does = "flow"
            elif does == "queue":
                target = options[options.index("--queue-num") + 1] if "--queue-num" in options else "0"
            break
        if word.startswith("-") and word != "-m":
            conditions.append(_iptables_match(word, value, is_negated))
            is_about_invalid |= word in ("--ctstate", "--state") and "INVALID" in value.split(",")
        is_negated = word == "!"
    holds = {kind: _all_of(condition(kind) for condition in conditions) for kind in (*KINDS, _OTHER)}
    return chain, Rule(does, holds, target, is_about_invalid)


def _iptables_match(option: str, value: str, is_negated: bool) -> Callable[[Kind], Holds]:
    def holds(kind: Kind) -> Holds:
        match option:
            case "-p":
                found: Holds = value in ("all", *map(str, kind.protocol))
            case "--dport" | "--dports" | "--destination-ports":
                found = _any_of(_is_between(kind.port, part) for part in value.split(",")) if kind.port else False
            case "--ctstate" | "--state":
                found = "NEW" in value.split(",")
            case "-i" | "-o" if value == "lo":
                found = False
            case _:
                found = None
        return found if not is_negated or found is None else not found

    return holds


def _is_between(port: int | None, part: str) -> Holds:
    low, colon, high = part.partition(":")
    if not (low or "0").isdigit() or not (high or "0").isdigit():
        return None
    return port is not None and int(low or 0) <= port <= int((high or 65535) if colon else low)
