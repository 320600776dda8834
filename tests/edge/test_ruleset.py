"""fwd's own rules, in a network namespace of each test's own."""

import os
import subprocess
import sys

import pytest

from fwd.edge.ruleset import Ruleset

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: netfilter rules in a network namespace")

LIST = "for p in iptables-nft ip6tables-nft; do $p -t mangle -S; done; nft list tables | grep fwd_dataplane"


def in_namespace(script):
    """Run Python in a new network namespace; gives what it printed."""
    prelude = (
        "import subprocess\nfrom fwd.edge.ruleset import Ruleset, RulesetError\n"
        f"def listed(): return subprocess.run({LIST!r}, shell=True, capture_output=True, text=True).stdout\n"
    )
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", prelude + script],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_installing_twice_does_not_double_and_removing_leaves_nothing():
    text = in_namespace(
        "before = listed()\n"
        "for fail_open in (True, True, False):\n"
        "    ruleset = Ruleset(20, fail_open)\n"
        "    print(ruleset.install())\n"
        "print('INSTALLED', listed())\n"
        "ruleset.remove()\n"
        "ruleset.remove()\n"
        "print('REMOVED', listed() == before or listed())\n"
    )
    installed = text[text.index("INSTALLED") :]
    assert "REMOVED True" in installed
    if "fwd_dataplane" not in installed:  # the iptables way
        for hook in ("INPUT", "OUTPUT", "FORWARD"):
            assert installed.count(f"-A {hook} -j FWD-{hook}\n") == 2  # IPv4 and IPv6
        assert "--queue-bypass" not in installed and installed.count("--queue-num 20") == 30


def test_jumps_that_were_doubled_by_hand_become_one_again():
    text = in_namespace(
        "ruleset = Ruleset(20, True)\n"
        "if ruleset.install().startswith('nft'): raise SystemExit(0)\n"
        "subprocess.run('iptables-nft -t mangle -A INPUT -j FWD-INPUT', shell=True, check=True)\n"
        "ruleset.install()\n"
        "print(listed().count('-A INPUT -j FWD-INPUT'))\n"
    )
    assert text in ("", "2\n")  # once in each family


def test_rules_of_others_stay():
    text = in_namespace(
        "subprocess.run('iptables-nft -t mangle -A INPUT -p esp -j MARK --set-mark 1', shell=True, check=True)\n"
        "ruleset = Ruleset(20, True)\n"
        "ruleset.install()\n"
        "ruleset.remove()\n"
        "print(listed())\n"
    )
    assert "-A INPUT -p esp -j MARK" in text and "FWD-" not in text


def test_without_rights_it_says_what_to_do():
    text = in_namespace(
        "import os\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try:\n"
        "    Ruleset(20, True).install()\n"
        "except RulesetError as error:\n"
        "    print(error)\n"
    )
    assert text.startswith("cannot install netfilter rules: run as root or with CAP_NET_ADMIN")


@pytest.mark.parametrize("fail_open", [True, False])
def test_the_nft_rules_are_good_nft(fail_open):
    """Where the kernel cannot queue from nft it says so; whatever else it says is an error of ours."""
    done = subprocess.run(
        ["unshare", "--net", "nft", "--check", "--file", "-"],
        input=Ruleset(20, fail_open)._nft(),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if "Error" in line]
    assert all("Could not process rule: No such file or directory" in line for line in complaints)
    assert ("bypass" in Ruleset(20, fail_open)._nft()) == fail_open
