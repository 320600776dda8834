"""fwctl: PAN-OS's operational commands for fwd."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice

import click

from .. import __version__
from ..rpc import DEFAULT_SOCKET, FILTER_KEYS, INVALID_PARAMS, LOG_FILTER_KEYS, SORT_KEYS, FilterKey, RpcError
from . import pipes, render
from .client import Client, NoDaemon, printable
from .grammar import Asked, Group, Moment, Number, OneOf, Text, argument, clause, filtered, json_option

#: The width of a page that has none: nothing is broken or left out, for whoever searches in it.
_NO_END = 10_000

#: Of a long listing, so many lines are printed at once: about a page of the daemon's.
_LINES_AT_ONCE = 1000

_SESSION_ID = Number(1, 2**31 - 1, live="session")
_PORT = Number(0, 65535)
#: An SPI as strongSwan, tcpdump or fwd write it.
_SPI = Number(1, 2**32 - 1, may_be_hex=True)

#: What `show session all` answers by itself.
_COUNT = {"count": FilterKey("how many instead of which", ("yes", "no"), is_list=False, has_not=False)}


def _width(otherwise: int = _NO_END) -> int:
    """The terminal's width in columns; `otherwise` if the output goes elsewhere."""
    return shutil.get_terminal_size(fallback=(otherwise, 25)).columns


@click.group(cls=Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    "path",
    metavar="PATH",
    default=lambda: os.environ.get("FWD_SOCKET") or DEFAULT_SOCKET,
    help=f"Control socket of the daemon; default $FWD_SOCKET, else {DEFAULT_SOCKET}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.version_option(__version__, prog_name="fwctl")
@click.pass_context
def fwctl(context: click.Context, path: str, as_json: bool) -> int:
    """Ask the fwd daemon, and tell it what to forget.

    \b
      fwctl                                           a shell: Tab completes, ? helps at every place, exit leaves
      fwctl show session all                          every session, two lines each
      fwctl show session all filter application ipsec-udp state active
      fwctl show session id 7                         one session in full
      fwctl show tunnel                               the SAs that strongSwan told of
      fwctl show tunnel detail                        their health: control against data
      fwctl explain session 7                         why it is as it is, in sentences
      fwctl top                                       who sends how much, and how tunnels do, live
      fwctl monitor                                   what happens, as it happens
      fwctl show log traffic last-hour                sessions that ended
      fwctl show counter global                       what was counted, and dropped
      fwctl clear session id 7                        forget a session
      fwctl reload                                    read the configuration again
      fwctl doctor                                    what is wrong on this machine, and what to do

    A tunnel that ends on this host shows its SPIs as ports, in decimal: sport is the SPI that the client receives on,
    dport the one that the server receives on. ESP in transit shows 20033.

    \b
    From anything but a terminal, fwctl without a command reads commands from stdin, one a line, `#` begins a comment;
    after a failure it goes on, and its exit status is that of the first.

    \b
    Exit status: 0 done, 1 the daemon said no, 2 wrong usage, 3 no daemon answers. The reason is on stderr, with --json
    as JSON: {"error": {"message": ..., "exit_status": ...}}.
    """
    if not path:
        raise click.UsageError("--socket is empty: name fwd's control socket")
    if context.invoked_subcommand is None:
        from .shell import start  # which imports this module

        return start(fwctl, path, as_json)
    client = Client(path)
    context.call_on_close(client.close)
    context.obj = Asked(client, as_json)
    return 0


@fwctl.group()
def show() -> None:
    """Show sessions, tunnels, counters, the system."""


@show.group("session")
def show_session() -> None:
    """Show sessions."""


@show_session.command("all")
@filtered({**FILTER_KEYS, **_COUNT})
@clause("sort", type=OneOf(SORT_KEYS), metavar="KEY", help="In this order; of equals the older first.")
@clause("descending", is_flag=True, help="The other way round: the largest first.")
@clause("limit", type=Number(1, 2**31 - 1), metavar="N", help="So many at most.")
@json_option
@click.pass_obj
def show_session_all(
    asked: Asked, chosen: dict[str, str], sort: str | None, descending: bool, limit: int | None
) -> None:
    """Show all sessions, or how many with 'filter ... count yes'.

    They come in the order of their ids, if no other is asked for.

    \b
      ... all filter application ipsec-udp state active
      ... all filter source 198.51.100.0/24,2001:db8::/32 to untrust
      ... all filter state not active,opening
      ... all filter spi 0x64f66f40                       an SPI as tcpdump shows it
      ... all sort bytes descending limit 10
    """
    count = chosen.pop("count", "no")
    if count not in ("yes", "no"):
        raise click.UsageError(f"filter count: found '{count}', want yes or no")
    if descending and sort is None:
        sort = "id"
    if count == "yes":
        if sort or limit:
            raise click.UsageError("filter count yes says how many: sort and limit make no sense with it")
        asked.show(asked.client.session_count(chosen), lambda answer: render.session_count(answer["count"]))
        return
    sessions = asked.client.sessions(chosen, sort, descending=descending, limit=limit, brief=not asked.as_json)
    _print_lines(render.json_list("sessions", sessions) if asked.as_json else render.session_rows(sessions))


@show_session.command(
    "id",
)
@argument("session_id", metavar="N", type=_SESSION_ID, help="The session's id.")
@json_option
@click.pass_obj
def show_session_id(asked: Asked, session_id: int) -> None:
    """Show one session in full, also for a while after it ended.

    Below PAN-OS's fields stands what PAN-OS has no field for: the CHILD_SA, its SPIs in decimal and hex, and the SPIs
    that were seen on the wire.
    """
    answer = asked.client.call("session.get", id=session_id)
    asked.show(answer, lambda answer: render.session_detail(answer, _width()))


@show_session.command("info")
@json_option
@click.pass_obj
def show_session_info(asked: Asked) -> None:
    """Show use of the session table, rates, timeouts, limits."""
    asked.show(asked.client.call("session.info"), render.session_info)


@show.group("counter")
def show_counter() -> None:
    """Show counters."""


@show_counter.command("global")
@json_option
@click.pass_obj
def show_counter_global(asked: Asked) -> None:
    """Show the global counters that ever counted anything (--json shows all).

    Every packet is in exactly one session or one counter of severity drop: pkt_recv is pkt_session plus those of
    category flow and severity drop.
    """
    asked.show(asked.client.call("counter.list"), render.counters)


@show.group("tunnel", invoke_without_command=True)
@json_option
@click.pass_context
def show_tunnel(context: click.Context) -> None:
    """Show the SAs of tunnels that end here, as strongSwan told of them, with their age.

    An SA is stale while strongSwan does not answer: it stays in use, but nobody vouches for it.
    """
    if context.invoked_subcommand is None:
        asked = context.find_object(Asked)
        assert asked is not None
        asked.show(asked.client.sas(), lambda answer: render.tunnels(answer, _width()))


@show_tunnel.command("detail")
@argument("name", required=False, type=Text("tunnel"), help="Name of a CHILD_SA or of an IKE_SA.")
@json_option
@click.pass_obj
def show_tunnel_detail(asked: Asked, name: str | None) -> None:
    """Show what is known of tunnels that end here, or of the one named: control against data.

    \b
    For each: its SPI generations with what each carried and how healthy it looks, strongSwan's own packet counts
    beside fwd's, and what is wrong: no packets, one way only, lost or late ones, packets on a deleted SA, counts
    that differ, fragments. NAME is that of a CHILD_SA or of its IKE_SA. A tunnel that ended is shown for as long
    as its session can be read. Without NAME, what comes to this host under SPIs that strongSwan does not own follows.
    """
    asked.show(asked.client.tunnels(name), lambda answer: render.tunnel_detail(answer, _width()))


@show.group("log")
def show_log() -> None:
    """Show what was logged."""


@show_log.command("traffic")
@filtered(LOG_FILTER_KEYS)
@clause("since", type=Moment(), metavar="TIME", help="From then on: 20:00, 2026-11-25T20:00, or how long ago: 15m, 3d.")
@clause("until", type=Moment(), metavar="TIME", help="Until then.")
@clause("last-hour", is_flag=True, help="Since an hour ago.")
@clause("last-day", is_flag=True, help="Since 24 hours ago.")
@clause("forward", is_flag=True, help="The oldest first; else the newest.")
@clause("limit", type=Number(1, 2**31 - 1), metavar="N", help="So many at most.")
@json_option
@click.pass_obj
def show_log_traffic(
    asked: Asked,
    chosen: dict[str, str],
    since: float | None,
    until: float | None,
    last_hour: bool,
    last_day: bool,
    forward: bool,
    limit: int | None,
) -> None:
    """Show the traffic log: a record of each session that ended, if its rule logs at end; with --json, a line each.

    \b
      ... traffic last-hour
      ... traffic filter end-reason tunnel-down,aged-out since 2026-11-25T03:00
      ... traffic filter source 198.51.100.0/24 action deny limit 20
      ... traffic filter spi 0x64f66f40
    """
    if [since is not None, last_hour, last_day].count(True) > 1:
        raise click.UsageError("since, last-hour and last-day say the same thing: want one of them")
    if last_hour or last_day:
        since = time.time() - (3600 if last_hour else 86400)
    direction = "forward" if forward else "backward"
    entries = asked.client.logged(chosen, since=since, until=until, direction=direction)
    found = entries if limit is None else islice(entries, limit)
    _print_lines(map(json.dumps, found) if asked.as_json else render.log_rows(found))


@show.group("system")
def show_system() -> None:
    """Show the daemon and its host."""


@show_system.command("info")
@json_option
@click.pass_obj
def show_system_info(asked: Asked) -> None:
    """Show version, uptime, configuration, queue and strongSwan's state."""
    asked.show(asked.client.call("system.info"), render.system_info)


@fwctl.group()
def explain() -> None:
    """Say in plain sentences why something is as it is."""


@explain.command(
    "session",
)
@argument("session_id", metavar="N", type=_SESSION_ID, help="The session's id.")
@json_option
@click.pass_obj
def explain_session(asked: Asked, session_id: int) -> None:
    """Say why a session has these ports, which rule decided, which timers run, what the next packet would meet."""
    answer = asked.client.call("explain.session", id=session_id)
    asked.show(answer, lambda answer: render.explanation(answer, _width(100)))


@explain.command("packet")
@clause("src", required=True, metavar="ADDRESS", help="Source address.")
@clause("dst", required=True, metavar="ADDRESS", help="Destination address.")
@clause("spi", required=True, type=_SPI, metavar="SPI", help="SPI, in decimal or, behind 0x, in hex.")
@clause("ports", type=(_PORT, _PORT), metavar="PORT PORT", help="Source and destination port, for ESP in UDP.")
@json_option
@click.pass_obj
def explain_packet(asked: Asked, src: str, dst: str, spi: int, ports: tuple[int, int] | None) -> None:
    """Say which tunnel an ESP packet belongs to, as tcpdump shows it, and what would become of it.

    \b
      fwctl explain packet src 192.0.2.2 dst 192.0.2.1 spi 0xc6f2a1b0
    """
    answer = asked.client.call("explain.packet", src=src, dst=dst, spi=spi, ports=ports and list(ports))
    asked.show(answer, lambda answer: render.explanation(answer, _width(100)))


@fwctl.command()
@filtered(FILTER_KEYS)
@clause("limit", type=Number(1, 2**31 - 1), metavar="N", help="Stop after so many events.")
@json_option
@click.pass_obj
def monitor(asked: Asked, chosen: dict[str, str], limit: int | None) -> None:
    """Show events as they happen, until Ctrl-C.

    Sessions created, promoted, rekeyed, discarded, absorbed by another one, ended; troubles of tunnels; strongSwan
    away or back; counters of warnings and drops. With --json, a line of JSON each. A reader that is too slow is told
    how many events it missed.
    """
    for number, event in enumerate(asked.client.events(chosen), 1):
        click.echo(json.dumps(event) if asked.as_json else render.event(event, _width()))
        if number == limit:
            return


@fwctl.command()
@clause("sessions", is_flag=True, help="All sessions; else the tunnels that end here.")
@filtered(FILTER_KEYS)
@clause("sort", type=OneOf(SORT_KEYS), default="bit-rate", metavar="KEY", help=f"By {', '.join(SORT_KEYS)}.")
@clause("reverse", is_flag=True, help="The other way round.")
@clause("limit", type=Number(1, 1000), default=100, metavar="N", help="So many at most; default 100.")
@clause("interval", type=Number(1, 3600), default=2, metavar="SECONDS", help="How often to look; default 2.")
@clause("once", is_flag=True, help="One picture as a plain table, or with --json, for scripts.")
@json_option
@click.pass_obj
def top(
    asked: Asked,
    sessions: bool,
    chosen: dict[str, str],
    sort: str,
    reverse: bool,
    limit: int,
    interval: int,
    once: bool,
) -> None:
    """Show who sends how much, and how each tunnel does, live: rates, their course, and what is wrong.

    \b
      fwctl top                                       the tunnels that end here, the fastest first
      fwctl top sort trouble                          those first that something is wrong with
      fwctl top sessions filter to untrust            all sessions, or some of them
      fwctl top once limit 5                          one picture, for a script

    On the screen: Enter shows one in full, / filters as you type, s sorts, t switches between tunnels and sessions,
    ? tells all keys, q quits. Colours are the terminal's, none with NO_COLOR. Without a terminal it is as with 'once'.
    """
    from . import top as live
    from .top_data import Filter, Kind, Question, order_by

    question = Question(
        kind=Kind.SESSIONS if sessions or "application" in chosen else Kind.TUNNELS,
        order=order_by(sort),
        is_reversed=reverse,
        filter=Filter(chosen),
        limit=limit,
    )
    path = asked.client.path
    if once or asked.as_json or not live.has_terminal():
        click.echo(live.once(path, question, _width(), as_json=asked.as_json))
    else:
        live.show(path, question, interval)


@fwctl.command()
@json_option
@click.pass_obj
def reload(asked: Asked) -> None:
    """Let the daemon read its configuration again, whole or not at all.

    If the file is wrong nothing changes, and it says why. Else all sessions meet the new rules, zones and timeouts:
    what is denied now goes to DISCARD; what was discarded and is allowed now ends, and its next packet opens another
    session. `systemctl reload fwd` does the same. `fwd --check` only looks whether the file is right.
    """
    asked.show(asked.client.call("system.reload"), render.reloaded)


@fwctl.command()
@json_option
@click.pass_obj
def doctor(asked: Asked) -> int:
    """Look for what keeps fwd from its work on this machine, and say what to do about it.

    Kernel, rights, strongSwan's socket, fwd's rules, other firewalls, clock, files, the daemon's alarming counters.
    Each finding is ok, a note, a warning or a problem, with the command that mends or shows it. Nothing is changed.
    It needs no daemon, and no root: without, it says what it could not look at (unknown).

    Exit status 1 if there is a problem, else 0.
    """
    # The one command that looks at the machine itself; all others speak to the socket only.
    from ..doctor.checks import examine
    from ..doctor.look import look

    facts = look(asked.client.path)
    findings = [asdict(finding) for finding in examine(facts)]
    asked.show(
        {"hostname": facts.hostname, "user": facts.me.identity.name, "findings": findings},
        lambda answer: render.diagnosis(answer, _width(100)),
    )
    return int(any(finding["level"] == "problem" for finding in findings))


@fwctl.group()
def clear() -> None:
    """End sessions."""


@clear.group("session")
def clear_session() -> None:
    """End sessions. The next packet opens a new one, if the rules allow it."""


@clear_session.command(
    "id",
)
@argument("session_id", metavar="N", type=_SESSION_ID, help="The session's id.")
@json_option
@click.pass_obj
def clear_session_id(asked: Asked, session_id: int) -> None:
    """End one session."""
    asked.client.call("session.clear", id=session_id)
    asked.show({"cleared": 1}, lambda answer: render.cleared(answer["cleared"], session_id))


@clear_session.command("all")
@filtered(FILTER_KEYS)
@json_option
@click.pass_obj
def clear_session_all(asked: Asked, chosen: dict[str, str]) -> None:
    """End all sessions, or those that match the filter.

    \b
      ... all filter application ipsec-esp state discard
      ... all filter source 198.51.100.0/24
    """
    asked.show({"cleared": asked.client.clear(chosen)}, lambda answer: render.cleared(answer["cleared"], None))


def _print_lines(lines: Iterable[str]) -> None:
    """Print very many lines: many at once, because each that is printed is flushed."""
    coming = iter(lines)
    while some := list(islice(coming, _LINES_AT_ONCE)):
        click.echo("\n".join(some))


def run(tree: click.Command, words: Sequence[str], asked: Asked | None = None, prefix: str = "fwctl: ") -> int:
    """Run one command line, whatever comes of it. Gives the exit status; the reason is on stderr then.

    `asked` is what is there already of a shell; `prefix` stands before the reason.
    """
    is_shell = asked is not None
    as_json = "--json" in words or (asked is not None and asked.as_json)

    def refuse(reason: str, exit_status: int, context: click.Context | None = None) -> int:
        """Give the reason, as JSON to who wants that, and where the words are taught."""
        reason = printable(reason)
        if as_json:
            click.echo(json.dumps({"error": {"message": reason, "exit_status": exit_status}}), err=True)
        else:
            click.echo(f"{prefix}{reason}", err=True)
            if context is not None and not is_shell:
                click.echo(f"'{context.command_path} --help' tells more", err=True)
        return exit_status

    command, *behind = pipes.split(words)
    out, err = sys.stdout, sys.stderr
    try:
        with pipes.through(behind):
            result = tree.main(command, prog_name="" if is_shell else "fwctl", standalone_mode=False, obj=asked)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except RpcError as error:
        return refuse(error.message, 2 if error.code == INVALID_PARAMS else 1)
    except NoDaemon as error:
        return refuse(str(error), 3)
    except click.exceptions.NoArgsIsHelpError as error:
        if is_shell and isinstance(error.ctx.command, click.Group):
            words = ", ".join(error.ctx.command.commands)
            return refuse(f"'{error.ctx.info_name}' wants a word after it: {words}", error.exit_code)
        error.show()
        return error.exit_code
    except click.UsageError as error:
        return refuse(" ".join(error.format_message().split()), error.exit_code, error.ctx)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # the reader, `head` perhaps, has enough
        _give_up_stdout()
        return 0
    except SystemExit:
        if sys.stderr is err:  # completion is answered
            raise
        sys.stdout, sys.stderr = out, err  # click heard first that the reader has enough, and put something before them
        _give_up_stdout()
        return 0
    except OSError as error:
        _give_up_stdout()
        return refuse(f"cannot write the answer: {error.strerror}", 1)


def main() -> None:
    """The console script."""
    sys.exit(run(fwctl, sys.argv[1:]))


def _give_up_stdout() -> None:
    """Let what is yet to be written go nowhere, for Python writes it at the exit."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
