"""The fuzzer's own process: `python -m tests.torture.guided TARGET PROGRAM`, then libFuzzer's options. See fuzz.py.

PROGRAM is what libFuzzer starts when it wants a process more: one that does the same as this command.

A module of its own, because what is to be instrumented must not have been imported before.
"""

import sys

import atheris

with atheris.instrument_imports(include=["fwd.core"]):
    from tests.torture import hostile


def main() -> None:
    """Does not return: libFuzzer ends the process."""
    target = getattr(hostile, sys.argv[1])
    atheris.Setup(sys.argv[2:], lambda octets: target(octets) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
