"""fwctl: PAN-OS's operational commands for fwd."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import click

from .. import __version__
from ..rpc import DEFAULT_SOCKET, FILTER_KEYS, INVALID_PARAMS, RpcError
from . import render
from .client import Client, NoDaemon

_Command = TypeVar("_Command", bound=Callable[..., object])

_FILTERS = "\n".join(f"  {key:<19}{meaning}" for key, meaning in FILTER_KEYS.items())
_FILTER_HELP = f"""

\b
  ... all filter application ipsec-udp state active
  ... all filter source 198.51.100.0/24 to untrust
  ... all filter destination-port $((0x64f66f40))     an SPI as tcpdump shows it

\b
Filter keys, any number of them (all must match):
{_FILTERS}
"""


#: The width of a page that has none: nothing is broken or left out, for whoever searches in it.
_NO_END = 10_000


@dataclass
class _Asked:
    """What holds for the whole command line."""

    client: Client
    as_json: bool = False

    def show(self, answer: Any, text: Callable[[Any], str]) -> None:
        """Print an answer, for people or for programs."""
        click.echo(json.dumps(answer, indent=2) if self.as_json else text(answer))


def _width(otherwise: int = _NO_END) -> int:
    """The terminal's width in columns; `otherwise` if the output goes elsewhere."""
    return shutil.get_terminal_size(fallback=(otherwise, 25)).columns


def _number(minimum: int, maximum: int, *, may_be_hex: bool = False) -> Callable[[str], int]:
    """What takes a number in decimal or, if it may be, behind 0x in hex."""
    pattern = re.compile("[0-9]{1,10}|0x[0-9a-fA-F]{1,8}" if may_be_hex else "[0-9]{1,10}")
    in_hex = ", in decimal or, behind 0x, in hex" if may_be_hex else ""

    def convert(text: str) -> int:
        number = int(text, 16 if text.startswith("0x") else 10) if pattern.fullmatch(text) else -1
        if not minimum <= number <= maximum:
            raise click.BadParameter(f"found '{text}', want a number from {minimum} to {maximum}{in_hex}")
        return number

    return convert


_SESSION_ID = _number(1, 2**31 - 1)
_PORT = click.types.FuncParamType(_number(0, 65535))
#: An SPI as strongSwan, tcpdump or fwd write it.
_SPI = _number(1, 2**32 - 1, may_be_hex=True)

#: What begins with a dash may be a value, such as -1, which is then told what is wanted instead.
_VALUES = {"ignore_unknown_options": True}


def _json_option(command: _Command) -> _Command:
    """Let `--json` stand after the command's words as well as before them."""

    def remember(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            context.ensure_object(_Asked).as_json = True

    return click.option(
        "--json", is_flag=True, expose_value=False, callback=remember, help="Print JSON, for programs."
    )(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    "path",
    default=lambda: os.environ.get("FWD_SOCKET") or DEFAULT_SOCKET,
    help=f"Control socket of the daemon; default $FWD_SOCKET, else {DEFAULT_SOCKET}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.version_option(__version__, prog_name="fwctl")
@click.pass_context
def fwctl(context: click.Context, path: str, as_json: bool) -> None:
    """Ask the fwd daemon, and tell it what to forget.

    \b
      fwctl show session all                          every session, two lines each
      fwctl show session all filter application ipsec-udp state active
      fwctl show session id 7                         one session in full
      fwctl show tunnel                               the SAs that strongSwan told of
      fwctl show tunnel detail                        their health: control against data
      fwctl explain session 7                         why it is as it is, in sentences
      fwctl monitor                                   what happens, as it happens
      fwctl show counter global                       what was counted, and dropped
      fwctl clear session id 7                        forget a session
      fwctl reload                                    read the configuration again

    A tunnel that ends on this host shows its SPIs as ports, in decimal: sport is the SPI that the client receives on,
    dport the one that the server receives on. ESP in transit shows 20033.

    \b
    Exit status: 0 done, 1 the daemon said no, 2 wrong usage, 3 no daemon answers. The reason is on stderr, with --json
    as JSON: {"error": {"message": ..., "exit_status": ...}}.
    """
    if not path:
        raise click.UsageError("--socket is empty: name fwd's control socket")
    context.obj = _Asked(Client(path), as_json)


@fwctl.group()
def show() -> None:
    """Show sessions, tunnels, counters, the system."""


@show.group("session")
def show_session() -> None:
    """Show sessions."""


@show_session.command(
    "all", context_settings=_VALUES, help="Show all sessions, or how many with 'filter ... count yes'." + _FILTER_HELP
)
@click.argument("words", nargs=-1, metavar="[filter KEY VALUE ...]")
@_json_option
@click.pass_obj
def show_session_all(asked: _Asked, words: tuple[str, ...]) -> None:
    chosen = _filter(words)
    count = chosen.pop("count", "no")
    if count not in ("yes", "no"):
        raise click.UsageError(f"count: found '{count}', want yes or no")
    if count == "yes":
        asked.show(asked.client.session_count(chosen), lambda answer: render.session_count(answer["count"]))
    elif asked.as_json:
        click.echo(json.dumps({"sessions": list(asked.client.sessions(chosen))}, indent=2))
    else:
        _print_lines(render.session_rows(asked.client.sessions(chosen)))


@show_session.command("id", context_settings=_VALUES)
@click.argument("session_id", metavar="N", type=_SESSION_ID)
@_json_option
@click.pass_obj
def show_session_id(asked: _Asked, session_id: int) -> None:
    """Show one session in full, also for a while after it ended.

    Below PAN-OS's fields stands what PAN-OS has no field for: the CHILD_SA, its SPIs in decimal and hex, and the SPIs
    that were seen on the wire.
    """
    answer = asked.client.call("session.get", id=session_id)
    asked.show(answer, lambda answer: render.session_detail(answer, _width()))


@show_session.command("info")
@_json_option
@click.pass_obj
def show_session_info(asked: _Asked) -> None:
    """Show how full the session table is, rates, and timeouts."""
    asked.show(asked.client.call("session.info"), render.session_info)


@show.group("counter")
def show_counter() -> None:
    """Show counters."""


@show_counter.command("global")
@_json_option
@click.pass_obj
def show_counter_global(asked: _Asked) -> None:
    """Show the global counters that ever counted anything (--json shows all).

    Every packet is in exactly one session or one counter of severity drop: pkt_recv is pkt_session plus those of
    category flow and severity drop.
    """
    asked.show(asked.client.call("counter.list"), render.counters)


@show.group("tunnel", invoke_without_command=True)
@_json_option
@click.pass_context
def show_tunnel(context: click.Context) -> None:
    """Show the SAs of tunnels that end here, as strongSwan told of them, with their age.

    An SA is stale while strongSwan does not answer: it stays in use, but nobody vouches for it.
    """
    if context.invoked_subcommand is None:
        asked = context.find_object(_Asked)
        assert asked is not None
        asked.show(asked.client.sas(), lambda answer: render.tunnels(answer, _width()))


@show_tunnel.command("detail")
@click.argument("name", required=False)
@_json_option
@click.pass_obj
def show_tunnel_detail(asked: _Asked, name: str | None) -> None:
    """Show what is known of tunnels that end here, or of the one named: control against data.

    \b
    For each: its SPI generations with what each carried and how healthy it looks, strongSwan's own packet counts
    beside fwd's, and what is wrong: no packets, one way only, lost or late ones, packets on a deleted SA, counts
    that differ, fragments. NAME is that of a CHILD_SA or of its IKE_SA. A tunnel that ended is shown for as long
    as its session can be read. Without NAME, what comes to this host under SPIs that strongSwan does not own follows.
    """
    asked.show(asked.client.tunnels(name), lambda answer: render.tunnel_detail(answer, _width()))


@show.group("system")
def show_system() -> None:
    """Show the daemon and its host."""


@show_system.command("info")
@_json_option
@click.pass_obj
def show_system_info(asked: _Asked) -> None:
    """Show version, uptime, configuration, queue and strongSwan's state."""
    asked.show(asked.client.call("system.info"), render.system_info)


@fwctl.group()
def explain() -> None:
    """Say in plain sentences why something is as it is."""


@explain.command("session", context_settings=_VALUES)
@click.argument("session_id", metavar="N", type=_SESSION_ID)
@_json_option
@click.pass_obj
def explain_session(asked: _Asked, session_id: int) -> None:
    """Say why a session has these ports, which rule decided, which timers run, what the next packet would meet."""
    answer = asked.client.call("explain.session", id=session_id)
    asked.show(answer, lambda answer: render.explanation(answer, _width(100)))


@explain.command("packet")
@click.option("--src", required=True, help="Source address.")
@click.option("--dst", required=True, help="Destination address.")
@click.option("--spi", required=True, type=_SPI, metavar="SPI", help="SPI, in decimal or, behind 0x, in hex.")
@click.option("--ports", type=(_PORT, _PORT), metavar="PORT PORT", help="Source and destination port, for ESP in UDP.")
@_json_option
@click.pass_obj
def explain_packet(asked: _Asked, src: str, dst: str, spi: int, ports: tuple[int, int] | None) -> None:
    """Say which tunnel an ESP packet belongs to, as tcpdump shows it, and what would become of it.

    \b
      fwctl explain packet --src 192.0.2.2 --dst 192.0.2.1 --spi 0xc6f2a1b0
    """
    answer = asked.client.call("explain.packet", src=src, dst=dst, spi=spi, ports=ports and list(ports))
    asked.show(answer, lambda answer: render.explanation(answer, _width(100)))


@fwctl.command(
    context_settings=_VALUES,
    help="Show events as they happen, until Ctrl-C: sessions created, promoted, rekeyed, discarded, absorbed by"
    " another one, ended; troubles of tunnels; strongSwan away or back; counters of warnings and drops. With --json,"
    " a line of JSON each. A reader that is too slow is told how many events it missed.",
)
@click.argument("words", nargs=-1, metavar="[filter KEY VALUE ...]")
@click.option("--limit", type=_number(1, 2**31 - 1), metavar="N", help="Stop after so many events.")
@_json_option
@click.pass_obj
def monitor(asked: _Asked, words: tuple[str, ...], limit: int | None) -> None:
    chosen = _filter(words)
    if "count" in chosen:
        raise click.UsageError("count is for 'show session all'; monitor --limit N stops after so many events")
    for number, event in enumerate(asked.client.events(chosen), 1):
        click.echo(json.dumps(event) if asked.as_json else render.event(event, _width()))
        if number == limit:
            return


@fwctl.command()
@_json_option
@click.pass_obj
def reload(asked: _Asked) -> None:
    """Let the daemon read its configuration again, whole or not at all.

    If the file is wrong nothing changes, and it says why. Else all sessions meet the new rules, zones and timeouts:
    what is denied now goes to DISCARD; what was discarded and is allowed now ends, and its next packet opens another
    session. `systemctl reload fwd` does the same. `fwd --check` only looks whether the file is right.
    """
    asked.show(asked.client.call("system.reload"), render.reloaded)


@fwctl.group()
def clear() -> None:
    """End sessions."""


@clear.group("session")
def clear_session() -> None:
    """End sessions. The next packet opens a new one, if the rules allow it."""


@clear_session.command("id", context_settings=_VALUES)
@click.argument("session_id", metavar="N", type=_SESSION_ID)
@_json_option
@click.pass_obj
def clear_session_id(asked: _Asked, session_id: int) -> None:
    """End one session."""
    asked.show(
        asked.client.call("session.clear", id=session_id),
        lambda answer: render.cleared(answer["cleared"], session_id),
    )


@clear_session.command(
    "all", context_settings=_VALUES, help="End all sessions, or those that match the filter." + _FILTER_HELP
)
@click.argument("words", nargs=-1, metavar="[filter KEY VALUE ...]")
@_json_option
@click.pass_obj
def clear_session_all(asked: _Asked, words: tuple[str, ...]) -> None:
    chosen = _filter(words)
    if "count" in chosen:
        raise click.UsageError("count is for 'show session all'; nothing was cleared")
    asked.show(
        asked.client.call("session.clear", filter=chosen), lambda answer: render.cleared(answer["cleared"], None)
    )


def _filter(words: tuple[str, ...]) -> dict[str, str]:
    """`filter KEY VALUE ...` as a mapping. Raises click.UsageError that says what to write instead."""
    if not words:
        return {}
    if words[0] != "filter":
        raise click.UsageError(f"found '{words[0]}', want 'filter KEY VALUE ...'")
    keys = (*FILTER_KEYS, "count")
    for key in words[1::2]:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(keys)}"
            raise click.UsageError(f"no filter key '{key}': {hint}")
        if words[1::2].count(key) > 1:
            raise click.UsageError(f"filter key '{key}' stands there twice")
    if len(words) % 2 == 0 or len(words) == 1:
        raise click.UsageError(f"'{words[-1]}' wants a value after it" if len(words) > 1 else "filter wants KEY VALUE")
    return dict(zip(words[1::2], words[2::2], strict=True))


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def main() -> None:
    """The console script."""
    try:
        fwctl(standalone_mode=False)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except RpcError as error:
        _leave(error.message, 2 if error.code == INVALID_PARAMS else 1)
    except NoDaemon as error:
        _leave(str(error), 3)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.UsageError as error:
        _leave(" ".join(error.format_message().split()), error.exit_code, error.ctx)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:  # the reader, `head` perhaps, has enough
        _give_up_stdout()
        sys.exit(0)
    except OSError as error:
        _give_up_stdout()
        _leave(f"cannot write the answer: {error.strerror}", 1)


def _give_up_stdout() -> None:
    """Let what is yet to be written go nowhere, for Python writes it at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(reason: str, exit_status: int, context: click.Context | None = None) -> NoReturn:
    """Give the reason, as JSON to who wants that, and where the words are taught."""
    if "--json" in sys.argv[1:]:
        click.echo(json.dumps({"error": {"message": reason, "exit_status": exit_status}}), err=True)
    else:
        click.echo(f"fwctl: {reason}", err=True)
        if context is not None:
            click.echo(f"'{context.command_path} --help' tells more", err=True)
    sys.exit(exit_status)
