"""Completion of fwctl's command line in another shell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FWCTL = Path(sys.executable).parent / "fwctl"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("fwctl sho", "show"),
        ("fwctl sh sess id 1", "1 10"),
        ("fwctl show session all filter from ", "any not trust untrust"),
    ],
)
def test_completion_in_bash(small_daemon, line, offered):
    words = line.split(" ")
    script = (
        f'eval "$(_FWCTL_COMPLETE=bash_source fwctl)"; COMP_WORDS=({line});'
        f'COMP_CWORD={len(words) - 1}; _fwctl_completion fwctl; echo "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        env={"PATH": f"{FWCTL.parent}:{os.environ['PATH']}", "FWD_SOCKET": str(small_daemon)},
        check=False,
    )
    assert (sorted(done.stdout.split()), done.stderr) == (sorted(offered.split()), "")
