"""What other firewalls' rules mean, read from what nft and iptables-save print (nft 1.0.6, iptables 1.8.9)."""

import json
import subprocess

import pytest

from fwd.doctor.firewalls import KINDS, Passes, fate, iptables_chains, nft_chains
from tests.edge.namespace import needs_root

ESP, IKE, NAT_T = KINDS


def chains_of(nft):
    """The chains as nft itself lists them, in a namespace of their own."""
    script = f"nft -f - && nft --json list table {nft.split('{')[0].removeprefix('table ')}"
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script], input=nft, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return nft_chains(json.loads(done.stdout))


def fates(chains, name="input"):
    (chain,) = (chain for chain in chains if chain.name == name)
    found = [fate(chains, chain, kind) for kind in KINDS]
    return [(one.verdict, one.passes) if one.verdict == "drop" else one.verdict for one in found]


ACCEPTED, DROPPED = "accept", ("drop", Passes.NONE)
FOR_SOME, BY_NAME = ("drop", Passes.PERHAPS), ("drop", Passes.BY_NAME)


@needs_root
@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        ("", [DROPPED] * 3),
        ("accept", [ACCEPTED] * 3),
        ("iif lo accept; ct state established,related accept; tcp dport 22 accept", [DROPPED] * 3),
        ("ip saddr 192.0.2.0/24 accept", [FOR_SOME] * 3),
        ("meta l4proto esp accept; udp dport { 500, 4500 } accept", [ACCEPTED] * 3),
        ("ip protocol { esp, ah } accept; udp dport 400-600 accept", [ACCEPTED, ACCEPTED, DROPPED]),
        ("ip saddr 192.0.2.1 ip protocol esp accept; th dport 500 accept", [BY_NAME, ACCEPTED, DROPPED]),
        ("udp dport != 500 accept; ip protocol != esp drop; accept", [ACCEPTED, DROPPED, ACCEPTED]),
        ("meta l4proto . th dport { udp . 500, tcp . 4500 } accept", [DROPPED, ACCEPTED, DROPPED]),
        ("meta l4proto vmap { esp : accept, udp : jump more }", [ACCEPTED, DROPPED, ACCEPTED]),
        ("udp dport vmap { 500 : drop, 4000-5000 : accept }; accept", [ACCEPTED, DROPPED, ACCEPTED]),
        ("ct state vmap { established : accept, invalid : drop }; goto more", [DROPPED, DROPPED, ACCEPTED]),
        ("udp dport 4500 limit rate 5/second accept", [DROPPED, DROPPED, BY_NAME]),
        ("iifname eth0 goto more", [DROPPED, DROPPED, BY_NAME]),  # as firewalld's zones
        ("ct state { new, untracked } udp dport 500 accept", [DROPPED, ACCEPTED, DROPPED]),
        ("esp spi 7 accept; reject", [BY_NAME, DROPPED, DROPPED]),
    ],
)
def test_a_packets_fate_in_nft(rules, wanted):
    lines = "\n".join(f"    {rule.strip()}" for rule in rules.split(";"))
    more = "  chain more {\n    udp dport 4500 accept\n    return\n  }"
    base = f"  chain input {{\n    type filter hook input priority 0; policy drop;\n{lines}\n  }}"
    assert fates(chains_of(f"table inet t {{\n{more}\n{base}\n}}")) == wanted


@needs_root
def test_what_else_nft_does_is_seen():
    chains = chains_of(
        "table inet t {\n chain raw {\n type filter hook prerouting priority raw\n ip protocol esp notrack\n"
        " ct state invalid drop\n ct state vmap { invalid : drop }\n }\n}"
    )
    (chain,) = chains
    assert (chain.hook, chain.priority, chain.policy) == ("prerouting", -300, "accept")
    assert [(rule.does, rule.is_about_invalid) for rule in chain.rules] == [
        ("notrack", False), ("drop", True), ("drop", True)
    ]  # fmt: skip
    assert chain.rules[0].holds[ESP] is True and chain.rules[0].holds[IKE] is False


def test_what_only_newer_kernels_have_is_read():
    expressions = [
        [{"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "udp"}}, {"flow": {"op": "add"}}],
        [{"queue": {"num": 20, "flags": "bypass"}}],
        [{"xt": None}, {"accept": None}],
        [None, {"drop": None}],
        [{"vmap": {"key": {"meta": {"key": "l4proto"}}, "data": "@named"}}],
    ]
    chain = {"family": "ip", "table": "t", "name": "c", "hook": "forward", "prio": 0, "policy": "accept", "handle": 1}
    rules = [{"rule": {"family": "ip", "table": "t", "chain": "c", "expr": items}} for items in expressions]
    (found,) = nft_chains({"nftables": [{"metainfo": {}}, {"chain": chain}, *rules]})
    assert [(rule.does, rule.target, rule.holds[NAT_T]) for rule in found.rules] == [
        ("flow", "", True), ("queue", "20", True), ("accept", "", None), ("drop", "", None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        ("-i lo -j ACCEPT; -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", [DROPPED] * 3),
        ("-p esp -j ACCEPT; -p udp -m multiport --dports 500,4500 -j ACCEPT", [ACCEPTED] * 3),
        (
            "-p 50 -m set --match-set peers src -j ACCEPT; -p udp -m udp --dport 400:600 -j MORE",
            [BY_NAME, ACCEPTED, DROPPED],
        ),
        ("-s 192.0.2.0/24 -j ACCEPT; -p tcp -m tcp --dport 500 -j ACCEPT", [FOR_SOME] * 3),
        ("! -p udp -j DROP; -g MORE", [DROPPED, ACCEPTED, DROPPED]),
        ('-m socket --transparent -j ACCEPT; -m comment --comment "a -j b" -j LOG; -p esp -j REJECT', [FOR_SOME] * 3),
        ("-p udp -m udp ! --dport 500 -j ACCEPT", [DROPPED, DROPPED, ACCEPTED]),
        ("-p esp -j NFQUEUE --queue-num 7", ["queue", DROPPED, DROPPED]),
    ],
)
def test_a_packets_fate_in_iptables(rules, wanted):
    lines = [f"-A INPUT {rule.strip()}" for rule in rules.split(";")]
    more = ["-A MORE -p udp -m udp --dport 500 -j ACCEPT", "-A MORE -j RETURN"]
    saved = ["# comment", "*filter", ":INPUT DROP [1:60]", ":MORE - [0:0]", *lines, *more, "COMMIT", ""]
    assert fates(iptables_chains("iptables", "\n".join(saved)), "INPUT") == wanted


def test_what_else_iptables_does_is_seen():
    rules = [
        "-p esp -j NOTRACK",
        "-p esp -j CT --notrack",
        "-m conntrack --ctstate INVALID -j DROP",
        "-p udp -j NFQUEUE",
        "-j FLOWOFFLOAD --hw",
    ]
    saved = ["*raw", ":PREROUTING ACCEPT [0:0]", *(f"-A PREROUTING {rule}" for rule in rules), "COMMIT"]
    (chain,) = iptables_chains("ip6tables", "\n".join(saved))
    assert (chain.hook, chain.priority, chain.words) == ("prerouting", -300, "ip6tables table raw, chain PREROUTING")
    assert [(rule.does, rule.target) for rule in chain.rules] == [
        ("notrack", ""), ("notrack", ""), ("drop", ""), ("queue", "0"), ("flow", "")
    ]  # fmt: skip
    assert [rule.is_about_invalid for rule in chain.rules] == [False, False, True, False, False]


def test_chains_that_lead_to_each_other_come_to_an_end():
    saved = "*filter\n:INPUT DROP [0:0]\n:A - [0:0]\n:B - [0:0]\n-A INPUT -j A\n-A A -j B\n-A B -j A\nCOMMIT\n"
    assert fates(iptables_chains("iptables", saved), "INPUT") == [DROPPED] * 3


def test_chains_of_chains_are_looked_at_once():
    leads = [f"-A C{number} -s 192.0.2.1 -j C{number + 1}\n-A C{number} -j C{number + 1}" for number in range(40)]
    names = [f":C{number} - [0:0]" for number in range(41)]
    saved = ["*filter", ":INPUT DROP [0:0]", *names, "-A INPUT -j C0", *leads, "-A C40 -p esp -j ACCEPT", "COMMIT"]
    assert fates(iptables_chains("iptables", "\n".join(saved)), "INPUT") == [ACCEPTED, DROPPED, DROPPED]
