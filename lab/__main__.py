"""`python -m lab`: testbeds to watch fwd in, from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec

import click
from vici.exception import CommandException

from .demo import demonstrate
from .lab import PROGRAMS, Lab
from .running import Running, find, running
from .sandbox import LabError, enter
from .topology import drawing, load, names, summary
from .vm import RELEASES, Image, Machine

_Given = ParamSpec("_Given")
_TREE = Path(__file__).parents[1]


def _plainly(command: Callable[_Given, None]) -> Callable[_Given, None]:
    """Give what goes wrong as one message and exit status 1."""

    @wraps(command)
    def run(*args: _Given.args, **options: _Given.kwargs) -> None:
        try:
            if os.geteuid() != 0:
                raise LabError("a lab is made of namespaces: run this as root")
            command(*args, **options)
        except (LabError, CommandException, OSError, subprocess.SubprocessError) as error:
            raise click.ClickException(str(error)) from None

    return run


def _name(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.replace("-", "").isalnum():
        raise click.BadParameter("want letters, digits and dashes")
    return value


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def lab() -> None:
    """Testbeds for fwd: hosts that are network namespaces, with real strongSwan, IKEv2 and ESP between them.

    \b
      python -m lab demo               see it work, from nothing to nothing, in half a minute
      python -m lab up demo            start a lab that stays, with fwd running and its tunnels up
      python -m lab shell demo fwd     a shell on one of its hosts; try: fwctl show session all
      python -m lab list               which labs run, which topologies there are
      python -m lab down demo          end a lab
      python -m lab vm                 a whole machine, with a kernel and systemd of its own

    The first lab makes a root folder with Debian's strongSwan in ~/.cache/fwd-lab, once. Labs run side by side. Nothing
    of a lab is visible outside of it, and nothing of it is left when it ends, whatever ends it.
    """


@lab.command()
@_plainly
def demo() -> None:
    """Show what fwd shows, beside what tcpdump saw and what strongSwan says.

    Builds the topology `demo`, brings its four tunnels up, pings through them and goes through fwd's sessions. If the
    three do not agree it says in what, with exit status 1.
    """
    demonstrate()


@lab.command()
@click.argument("topology", type=click.Choice(names()))
@click.option("--name", callback=_name, help="Name of the lab; default: that of its topology.")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What fwd runs with; default: lab/topologies/fwd.toml.",
)
@_plainly
def up(topology: str, name: str | None, config: Path | None) -> None:
    """Start a lab that stays until `down`: fwd runs, all tunnels are up."""
    name = name or topology
    testbed = Lab(topology, is_detached=True, say=click.echo)
    try:
        entry = Running.of(name, topology, testbed.sandbox.first_pid)
        entry.save()
        testbed.start_fwd(_text(config) if config else None)
        testbed.initiate()
        testbed.sandbox.release()
    except BaseException:
        testbed.close()
        list(running())  # forgets the one that has just ended
        raise
    click.echo(drawing(topology))
    click.echo(f"lab {name} runs, its tunnels are up. Go on with:")
    click.echo(f"  python -m lab shell {name} fwd                          and there: fwctl show session all")
    for tunnel in testbed.topology.tunnels:
        source, destination = tunnel.inner
        ping = f"ping -c 3 -I {source} {destination}"
        click.echo(f"  python -m lab shell {name} {tunnel.initiator} {ping}   # tunnel {tunnel.name}")
    click.echo(f"  python -m lab down {name}")


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise LabError(f"{path}: byte {error.start} is not UTF-8: want a TOML file for fwd") from None


@lab.command()
@click.argument("name", callback=_name)
@_plainly
def down(name: str) -> None:
    """End the lab NAME."""
    find(name).end()
    click.echo(f"lab {name} is gone")


@lab.command(context_settings={"ignore_unknown_options": True})
@click.argument("name", callback=_name)
@click.argument("host")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@_plainly
def shell(name: str, host: str, command: tuple[str, ...]) -> None:
    """Open a shell on HOST of the lab NAME, or run COMMAND there.

    \b
      python -m lab shell demo fwd                           then: fwctl show session all
      python -m lab shell demo fwd fwctl show tunnel
      python -m lab shell demo fwd tcpdump -ni to-peer esp
    """
    entry = find(name)
    if entry.topology not in names():
        raise LabError(f"lab {name} has a topology {entry.topology}, which this checkout has not: use the one it is of")
    hosts = [plan.name for plan in load(entry.topology).hosts]
    if host not in hosts:
        raise LabError(f"lab {name} has no host {host}; there are: {', '.join(hosts)}")
    words = [*enter(entry.first_pid, host), *(command or ("bash", "--noprofile", "--norc", "-i"))]
    environment = {**os.environ, "PATH": f"{PROGRAMS}:{os.environ['PATH']}", "PS1": rf"[lab {name}: {host}] \w \$ "}
    sys.stdout.flush()
    os.execvpe(words[0], words, environment)


@lab.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), default=Path("docs/top.svg"))
@click.option("--columns", default=120, help="Width of the screen.")
@click.option("--lines", default=26, help="Height of the screen.")
@_plainly
def picture(path: Path, columns: int, lines: int) -> None:
    """Draw the README's picture of `fwctl top`: on real tunnels, in two minutes."""
    from .picture import draw  # which loads the library of the screen

    draw(path, columns, lines)


@lab.command("list")
@_plainly
def list_() -> None:
    """Show which labs run and which topologies there are."""
    for entry in running():
        is_known = entry.topology in names()  # else it was started from another checkout
        hosts = ", ".join(plan.name for plan in load(entry.topology).hosts) if is_known else "unknown here"
        click.echo(f"runs: {entry.name} (topology {entry.topology}; hosts {hosts}; first process {entry.first_pid})")
    for topology in names():
        click.echo(f"topology: {topology:<11} {summary(topology)}")


@lab.group()
def vm() -> None:
    """A whole machine in qemu: Debian's own kernel, systemd and strongSwan, with this tree in it.

    \b
      python -m lab vm run                                tests/vm, in it
      python -m lab vm run tests/namespaces -k transit    other tests, with any words of pytest's
      python -m lab vm shell                              a root shell in it; it goes off with the shell
      python -m lab vm build                              only make its disk, once; `run` and `shell` do so, too

    It has no network to the outside, and what happens in it changes nothing here: its disk, in ~/.cache/fwd-lab, is
    never written to. It wants qemu-system-x86, qemu-utils and mmdebstrap, and uses KVM where that boots a kernel.
    """


_release = click.option(
    "--release", type=click.Choice(RELEASES), default=RELEASES[0], show_default=True, help="Which Debian it is."
)
_acceleration = click.option(
    "--accel",
    type=click.Choice(["auto", "kvm", "tcg"]),
    default="auto",
    show_default=True,
    help="Of the hardware, or emulated; auto: KVM if it boots a kernel here.",
)


@vm.command()
@_release
@click.option("--again", is_flag=True, help="Even if there is one: with the packages of today.")
@_plainly
def build(release: str, again: bool) -> None:
    """Make the machine's disk, if it is not there."""
    image = Image(release)
    image.ensure(click.echo, again=again)
    click.echo(f"{image.disk} is there")


@vm.command(context_settings={"ignore_unknown_options": True})
@_release
@_acceleration
@click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for junit.xml, the journal and the console; those of the last run go.  [default: build/vm/RELEASE]",
)
@click.option("--time-limit", type=click.IntRange(min=60), default=7200, show_default=True, help="Seconds, in all.")
@click.argument("tests", nargs=-1, type=click.UNPROCESSED)
@_plainly
def run(release: str, accel: str, results: Path | None, time_limit: int, tests: tuple[str, ...]) -> None:
    """Run TESTS (words for pytest; default: tests/vm) in a machine; its exit status is pytest's."""
    machine = _machine(release, accel)
    results = results or Path("build/vm", release)
    words = ["-v", "--timeout=300", "--junitxml=/lab/out/junit.xml", "-p", "no:cacheprovider", *tests]
    if not any((_TREE / word.partition("::")[0]).exists() for word in tests if not word.startswith("-")):
        words.append("tests/vm")
    outcome = machine.run(["python", "-m", "pytest", *words], results, click.echo, time_limit)
    click.echo(f"--- status {outcome.status} after {outcome.took_s:.0f} s ({outcome.acceleration}); more in {results}")
    raise SystemExit(outcome.status)


@vm.command("shell")
@_release
@_acceleration
@_plainly
def vm_shell(release: str, accel: str) -> None:
    """Open a root shell in a machine, with the tree in /lab/tree and its Python in /opt/fwd-test.

    `exit` turns the machine off, and so does Ctrl-a x, whatever it does.
    """
    machine = _machine(release, accel)
    click.echo("Ctrl-a x ends it, whatever it does")
    raise SystemExit(machine.shell())


def _machine(release: str, accel: str) -> Machine:
    image = Image(release)
    image.ensure(click.echo)
    machine = Machine(image, accel)
    why = " (KVM boots no kernel here)" if accel == "auto" else ""
    click.echo(
        f"Debian {release}, " + ("with KVM" if machine.acceleration == "kvm" else f"emulated{why}: have patience")
    )
    return machine


if __name__ == "__main__":
    lab(prog_name="python -m lab")
