"""Coverage-guided fuzzing of what hostile.py promises, with atheris: `python -m tests.torture.fuzz TARGET --runs N`.

The fuzzer begins with the corpus in the repository (the seeds, if there is none) and goes wherever an input reaches a
place in fwd.core that none before it did. `--keep` adds what it found to the corpus. An input that breaks a promise is
printed in hex, for a test of its own.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.torture.seeds import CORPUS, PACKETS, PROGRAMS, read_corpus, write_corpus

#: The longest input in bytes, and the seeds.
TARGETS = {"decoder": (256, PACKETS), "firewall": (512, PROGRAMS)}

_DONE = re.compile(r"Done (\d+) runs in (\d+) second")
_COVERED = re.compile(r"cov: (\d+)")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many inputs were tried, in how many seconds, which places of the core they reached, and what is wrong."""

    runs: int
    seconds: int
    covered: int
    failing: bytes | None
    words: str


def fuzz(target: str, runs: int, seed: int, folder: Path, longest_s: float, *, says: bool = False) -> Outcome:
    """Try `runs` inputs; those found that are worth keeping are in `folder` then.

    In a process of its own, which libFuzzer ends. The same seed leads to the same inputs.
    """
    longest, seeds = TARGETS[target]
    inputs, bad = folder / "inputs", folder / "bad"
    inputs.mkdir(parents=True, exist_ok=True)
    bad.mkdir(exist_ok=True)
    kept = read_corpus(target) if (CORPUS / f"{target}.hex").exists() else []
    for number, octets in enumerate([*seeds, *kept]):
        (inputs / f"seed-{number}").write_bytes(octets)
    options = [f"-runs={runs}", f"-seed={seed}", f"-max_len={longest}", "-timeout=20", f"-artifact_prefix={bad}/"]
    with (folder / "log").open("w") as log:
        subprocess.run([_program(target, folder), *options, inputs], stdout=log, stderr=log, timeout=longest_s)
    words = (folder / "log").read_text(errors="replace")
    if says:
        print(words[-4000:])
    done = _DONE.search(words)
    covered = _COVERED.findall(words)
    failing = next((path.read_bytes() for path in sorted(bad.iterdir())), None)
    return Outcome(
        int(done[1]) if done else 0,
        int(done[2]) if done else 0,
        int(covered[-1]) if covered else 0,
        failing,
        words[-4000:],
    )


def smallest(target: str, folder: Path) -> list[bytes]:
    """Of the inputs in `folder`, so many that together reach what all of them do."""
    merged = folder / "merged"
    merged.mkdir()
    options = ["-merge=1", f"-max_len={TARGETS[target][0]}", merged, folder / "inputs"]
    subprocess.run([_program(target, folder), *options], capture_output=True, timeout=600, check=True)
    return [path.read_bytes() for path in merged.iterdir()]


def _program(target: str, folder: Path) -> Path:
    """A program that is the fuzzer. It finds the same in each run, for the order of sets is always the same."""
    path = folder / "guided"
    words = ["exec", "env", "PYTHONHASHSEED=0", sys.executable, "-m", "tests.torture.guided", target, str(path)]
    path.write_text(f'#!/bin/sh\n{shlex.join(words)} "$@"\n')
    path.chmod(0o700)
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="add what was found to the corpus")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = fuzz(given.target, given.runs, given.seed, Path(folder), 3600, says=True)
        if outcome.failing is not None:
            print(f"this input breaks a promise: {outcome.failing.hex()}")
            raise SystemExit(1)
        if given.keep:
            write_corpus(given.target, smallest(given.target, Path(folder)))


if __name__ == "__main__":
    main()
