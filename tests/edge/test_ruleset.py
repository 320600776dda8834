"""fwd's own rules, in a network namespace of each test's own, as the nft program lists them."""

import pytest

from fwd.edge.ruleset import Backend
from tests.edge.namespace import in_namespace, needs_root

pytestmark = needs_root


@pytest.mark.parametrize("backend", Backend)
def test_installing_twice_does_not_double_and_removing_leaves_nothing(backend):
    text = in_namespace(
        f"ruleset = Ruleset(20, True, 1024, Backend({backend.value!r}))\n"
        "tables = lambda: sorted(line for line in listed().splitlines() if 'fwd_' in line or 'FWD-' in line)\n"
        "try:\n"
        "    ruleset.install()\n"
        "except RulesetError as error:\n"
        "    print('REFUSED', error)\n"
        "    raise SystemExit\n"
        "once = tables()\n"
        "ruleset.install()\n"
        "print('SAME', once == tables(), len(once) > 1)\n"
        "ruleset.remove()\n"
        "ruleset.remove()\n"
        "print('LEFT', tables())\n"
    )
    if backend is Backend.NFT and "REFUSED" in text:
        assert "nft: No such file or directory" in text  # this kernel has no `queue` expression
    else:
        assert text == "SAME True True\nLEFT []\n"


def test_the_rules_read_as_they_were_meant():
    text = in_namespace(
        "Ruleset(20, False, 1024, Backend.XT).install()\nprint(listed('nft list table ip fwd_dataplane'))\n"
    )
    lines = [line.strip() for line in text.splitlines()]
    decided = "esp sequence != 0 iif . oif . ip saddr . ip daddr . esp spi vmap @decided_esp"
    in_udp = "@th,96,32 != 0x0 iif . oif . ip saddr . ip daddr . @th,0,32 . @th,64,32 vmap @decided_esp_in_udp"
    undecided = ["meta l4proto esp goto undecided", "meta l4proto udp goto over_udp"]
    for hook, loopback in (("input", ['iif "lo" accept']), ("forward", []), ("output", ['oif "lo" accept'])):
        start = lines.index(f"chain {hook} {{")
        assert lines[start + 1] == f"type filter hook {hook} priority mangle; policy accept;"
        assert lines[start + 2 : lines.index("}", start)] == [decided, *loopback, *undecided]
    start = lines.index("chain over_udp {")
    assert lines[start + 1 : start + 3] == [f"udp dport 4500 {in_udp}", f"udp sport 4500 {in_udp}"]
    start = lines.index("chain undecided {")
    assert lines[start + 1].startswith('counter name "undecided" ') and "num 20" in lines[start + 1]
    assert "bypass" not in lines[start + 1]
    assert lines.count("size 1024") == 2
    assert 'comment "fwd: layout 3, nft-xt, 1024 elements"' in lines


def test_open_and_closed():
    text = in_namespace(
        "ruleset = Ruleset(20, True, 1024, Backend.XT)\n"
        "ruleset.install()\n"
        "print('bypass' in listed(), ruleset.kept_maps)\n"
        "ruleset.change(False)\n"
        "print('bypass' in listed(), ruleset.kept_maps, ruleset.is_in_place())\n"
        "subprocess.run('nft flush ruleset', shell=True, check=True)\n"
        "print(ruleset.is_in_place())\n"
    )
    assert text == "True False\nFalse True True\nFalse\n"


def test_rules_that_are_gone_or_others_are_noticed_although_the_table_stands():
    text = in_namespace(
        "ruleset = Ruleset(20, True, 1024, Backend.XT)\n"
        "ruleset.install()\n"
        "for command in ('flush table ip fwd_dataplane', 'flush chain ip6 fwd_dataplane undecided',\n"
        "                'insert rule ip fwd_dataplane forward accept'):\n"
        "    print(ruleset.is_in_place(), end=' ')\n"
        "    subprocess.run(f'nft {command}', shell=True, check=True)\n"
        "    print(ruleset.is_in_place(), end=' ')\n"
        "    ruleset.install()\n"
        "    print(ruleset.kept_maps, ruleset.is_in_place(), ruleset.has_chains)\n"
    )
    assert text == "True False True True False\n" * 3


@pytest.mark.parametrize("backend", [Backend.MARK, Backend.IPTABLES])
def test_chains_of_iptables_are_looked_after_too(backend):
    text = in_namespace(
        f"ruleset = Ruleset(20, True, 1024, Backend({backend.value!r}))\n"
        "ruleset.install()\n"
        "for command in ('iptables-nft -t mangle -F FWD-INPUT', 'ip6tables-nft -t mangle -D OUTPUT -j FWD-OUTPUT',\n"
        "                'iptables-nft -t mangle -F; iptables-nft -t mangle -X'):\n"
        "    print(ruleset.has_chains, ruleset.are_chains_in_place(), end=' ')\n"
        "    subprocess.run(command, shell=True, check=True)\n"
        "    print(ruleset.is_in_place(), ruleset.are_chains_in_place(), end=' ')\n"
        "    ruleset.install()\n"
        "    print(ruleset.are_chains_in_place())\n"
    )
    assert text == "True True True False True\n" * 3


@pytest.mark.parametrize("backend", [Backend.XT, Backend.MARK, Backend.IPTABLES])
def test_rules_of_another_queue_are_anothers_while_somebody_has_it(backend):
    text = in_namespace(
        "from netfilterqueue import NetfilterQueue\n"
        f"kind = Backend({backend.value!r})\n"
        "Ruleset(20, True, 1024, kind).install()\n"
        "other = Ruleset(21, True, 1024, kind)\n"
        "queue = NetfilterQueue()\n"
        "queue.bind(20, print)\n"
        "Ruleset(20, True, 1024, kind).refuse_anothers()\n"
        "try:\n"
        "    other.refuse_anothers()\n"
        "except RulesetError as error:\n"
        "    print(error)\n"
        "queue.unbind()\n"
        "other.refuse_anothers()\n"
        "other.install()\n"
        "print(other.kept_maps, 'num 21' in listed(), 'num 20' in listed())\n"
    )
    refusal, taken_over = text.splitlines()
    assert refusal.startswith("the rules of fwd are in place for NFQUEUE 20, and a process has that queue")
    assert taken_over == f"{backend is not Backend.IPTABLES} True False"


def test_tables_of_another_layout_are_replaced():
    text = in_namespace(
        "Ruleset(20, True, 1024, Backend.MARK).install()\n"
        "for capacity in (1024, 1024, 2048):\n"
        "    ruleset = Ruleset(20, True, capacity, Backend.XT)\n"
        "    ruleset.install()\n"
        "    print(ruleset.kept_maps, ruleset.is_in_place())\n"
        "print('FWD-' in listed(), 'after_input' in listed())\n"
    )
    assert text == "False True\nTrue True\nFalse True\nFalse False\n"


def test_jumps_that_were_doubled_by_hand_become_one_again():
    text = in_namespace(
        "ruleset = Ruleset(20, True, 1024, Backend.IPTABLES)\n"
        "ruleset.install()\n"
        "subprocess.run('iptables-nft -t mangle -A INPUT -j FWD-INPUT', shell=True, check=True)\n"
        "ruleset.install()\n"
        "print(listed().count('-A INPUT -j FWD-INPUT'))\n"
    )
    assert text == "2\n"  # once in each family


def test_rules_of_others_stay():
    text = in_namespace(
        "subprocess.run('iptables-nft -t mangle -A INPUT -p esp -j MARK --set-mark 1', shell=True, check=True)\n"
        "for backend in (Backend.XT, Backend.IPTABLES):\n"
        "    ruleset = Ruleset(20, True, 1024, backend)\n"
        "    ruleset.install()\n"
        "    ruleset.remove()\n"
        "print(listed())\n"
    )
    assert "-A INPUT -p esp -j MARK" in text and "FWD-" not in text


def test_without_rights_it_says_what_to_do():
    text = in_namespace(
        "import os\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try:\n"
        "    Ruleset(20, True, 1024).install()\n"
        "except RulesetError as error:\n"
        "    print(error)\n"
    )
    assert text.startswith("cannot install netfilter rules: run as root or with CAP_NET_ADMIN")
    assert "nft: Operation not permitted" in text
