"""fwd's own netfilter rules: they send ESP, IKE and NAT-T to the queue, IPv4 and IPv6, in, out and through.

With nft they are a table of their own. Where the kernel has no nft `queue` expression they are chains of
their own in iptables' mangle table: an accepted packet leaves the table that queued it, and in mangle that
skips nobody's filter rules. Loopback is left out: its packets would be seen twice, going out and coming in.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence

TABLE = "fwd_dataplane"  # `fwd` alone is a keyword of nft
_HOOKS = ("INPUT", "OUTPUT", "FORWARD")
_TIMEOUT_S = 10

#: iptables' matches for what fwd handles. A later fragment of ESP still has the protocol number 50.
_MATCHES = (
    "-p esp",
    *(f"-p udp --{side} {port}" for side in ("dport", "sport") for port in (500, 4500)),
)

#: The programs that speak to the kernel's nf_tables first: those of legacy iptables are the last resort.
_FAMILIES = (
    ("IPv4", ("iptables-nft", "iptables")),
    ("IPv6", ("ip6tables-nft", "ip6tables")),
)


class RulesetError(Exception):
    """The rules cannot be installed; the message says what to do."""


class _ProgramFailed(Exception):
    """A program is missing or said no; the message is its own."""


class Ruleset:
    """The rules of one queue; `fail_open` lets packets pass while nobody reads it."""

    def __init__(self, queue: int, fail_open: bool) -> None:
        self.queue = queue
        self.fail_open = fail_open
        #: What was chosen, in words; empty before the first installation.
        self.backend = ""

    def install(self) -> str:
        """Put the rules in place of any left there before; gives what was chosen. Raises RulesetError.

        Each family's rules change in one transaction: no packet meets half a set.
        """
        try:
            _run(["nft", "-f", "-"], self._nft())
        except _ProgramFailed as error:
            refusal = str(error)
        else:
            _remove_iptables()
            self.backend = "nft queue"
            return self.backend
        installed, failed = [], []
        for family, programs in _FAMILIES:
            try:
                program = self._install_iptables(programs)
            except _ProgramFailed as error:
                failed.append(f"{family}: {error}")
            else:
                installed.append(f"{program} ({family})")
        if not installed:
            raise RulesetError(
                "cannot install netfilter rules: run as root or with CAP_NET_ADMIN, and install nftables or iptables;"
                f" nft said: {refusal}; iptables said: {'; '.join(failed)}"
            )
        _remove_nft()
        self.backend = f"{', '.join(installed)} with NFQUEUE; nft cannot queue here: {refusal}"
        if failed:
            self.backend += f"; left out: {'; '.join(failed)}"
        return self.backend

    @staticmethod
    def remove() -> None:
        """Take the rules out, whichever fwd left them; where there are none this does nothing."""
        _remove_nft()
        _remove_iptables()

    def _nft(self) -> str:
        queue = f"counter queue num {self.queue}{' bypass' if self.fail_open else ''}"
        chains = "\n".join(
            f"""  chain {hook.lower()} {{
    type filter hook {hook.lower()} priority mangle; policy accept;
    {"oif" if hook == "OUTPUT" else "iif"} lo accept
    meta l4proto esp {queue}
    udp dport {{ 500, 4500 }} {queue}
    udp sport {{ 500, 4500 }} {queue}
  }}"""
            for hook in _HOOKS
        )
        # Naming the table first makes the deletion succeed whether or not there was one.
        return f"table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n{chains}\n}}\n"

    def _install_iptables(self, programs: Sequence[str]) -> str:
        """Install one family's rules with the first program that can; gives its name."""
        refusal = _ProgramFailed("none of its programs was tried")
        for program in programs:
            try:
                rules = ["*mangle", *(f":FWD-{hook} - [0:0]" for hook in _HOOKS)]
                present = _run([program, "-w", "-t", "mangle", "-S"])
                for hook in _HOOKS:
                    jump = f"{hook} -j FWD-{hook}"
                    rules += [f"-D {jump}"] * present.splitlines().count(f"-A {jump}")
                    rules.append(f"-I {hook} 1 -j FWD-{hook}")
                    rules.append(f"-A FWD-{hook} {'-o' if hook == 'OUTPUT' else '-i'} lo -j RETURN")
                    bypass = " --queue-bypass" if self.fail_open else ""
                    rules += [
                        f"-A FWD-{hook} {match} -j NFQUEUE --queue-num {self.queue}{bypass}" for match in _MATCHES
                    ]
                _run([f"{program}-restore", "-w", "--noflush"], "\n".join([*rules, "COMMIT", ""]))
                return program
            except _ProgramFailed as error:
                refusal = error
        raise refusal


def _remove_nft() -> None:
    with contextlib.suppress(_ProgramFailed):  # no nft, no table
        _run(["nft", "-f", "-"], f"table inet {TABLE}\ndelete table inet {TABLE}\n")


def _remove_iptables() -> None:
    for _, programs in _FAMILIES:
        for program in programs:
            try:
                present = _run([program, "-w", "-t", "mangle", "-S"]).splitlines()
                rules = []
                for hook in _HOOKS:
                    if f"-N FWD-{hook}" in present:
                        jumps = present.count(f"-A {hook} -j FWD-{hook}")
                        rules += [f"-D {hook} -j FWD-{hook}"] * jumps + [f"-F FWD-{hook}", f"-X FWD-{hook}"]
                if rules:
                    _run([f"{program}-restore", "-w", "--noflush"], "\n".join(["*mangle", *rules, "COMMIT", ""]))
            except _ProgramFailed:
                pass  # not this program's rules


def _run(command: Sequence[str], stdin: str = "") -> str:
    """Run a program of netfilter's; gives what it prints. Raises _ProgramFailed with its own words."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise _ProgramFailed(f"{command[0]} is not installed") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _ProgramFailed(f"{command[0]}: {error}") from None
    if done.returncode:
        words = next((line for line in done.stderr.splitlines() if line.strip()), f"exit status {done.returncode}")
        raise _ProgramFailed(f"{command[0]}: {words.strip()}")
    return done.stdout
