"""Python in a network namespace of its own, for what changes netfilter rules."""

import os
import subprocess
import sys

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: netfilter rules in a network namespace")

PRELUDE = """
import subprocess
from fwd.edge.ruleset import Backend, Ruleset, RulesetError

def listed(command='for p in iptables-nft ip6tables-nft; do $p -t mangle -S; done; nft list ruleset'):
    return subprocess.run(command, shell=True, capture_output=True, text=True).stdout
"""


def in_namespace(script):
    """Run a script behind the prelude; gives what it printed."""
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", PRELUDE + script],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
