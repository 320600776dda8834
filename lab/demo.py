"""The demonstration: each number that fwd shows, beside what tcpdump saw and what strongSwan says of it."""

from __future__ import annotations

from typing import Any

import click

from .capture import Capture
from .lab import Fwd, Lab, wait_for
from .sandbox import LabError
from .topology import Tunnel, drawing

_PINGS = 5

GO_ON = """\
  python -m lab up demo                                 the same testbed, kept running
  python -m lab shell demo fwd                          a shell on the host that runs fwd, then:
      fwctl show session all filter application ipsec-udp
      fwctl show counter global
      tcpdump -ni to-peer esp
  python -m lab shell demo peer ping -c 3 -I 10.3.0.1 10.9.0.1      traffic through tunnel peer-v4
  python -m lab down demo                               all of it gone again"""


def demonstrate() -> None:
    """Run it and print it. Raises LabError as soon as fwd, tcpdump and strongSwan do not agree."""
    _head("A firewall, two sites whose tunnels cross it, and a peer whose tunnels end on it")
    click.echo(drawing("demo"))
    with Lab("demo", say=click.echo) as lab:
        fwd = lab.start_fwd()
        lab.initiate()
        tunnels = lab.topology.tunnels
        ends_here = [tunnel for tunnel in tunnels if "fwd" in tunnel.ends]

        _head("All tunnels are up (IKEv2), and no packet has been through them yet")
        click.echo("A tunnel that ends on fwd's host has its session all the same: type PRED, its SPIs as ports.\n")
        for tunnel in ends_here:
            _session(fwd, tunnel)
        _show(fwd, "session", "all")

        _head(f"{_PINGS} pings through each tunnel, while tcpdump listens on both sides of fwd")
        host = lab.hosts["fwd"]
        with host.capture("to-a") as to_a, host.capture("to-peer") as to_peer:
            for tunnel in tunnels:
                answers = lab.ping(tunnel.name, _PINGS)
                click.echo(f"{tunnel.name}: {tunnel.inner[0]} -> {tunnel.inner[1]}: {answers} of {_PINGS} answered")
                _agree(f"answers through {tunnel.name}", answers, _PINGS)
        click.echo()
        _show(fwd, "session", "all")

        _head("A tunnel that ends here: the ports are the SPIs, whole and in decimal")
        _beside(lab, fwd, lab.tunnel("peer-v4"), to_peer)

        _head("A tunnel in transit: nobody in the middle knows its SPI pair, so both ports are 20033")
        _beside(lab, fwd, lab.tunnel("sites-v4"), to_a)

        _head("What strongSwan told fwd")
        _show(fwd, "tunnel")

        _head("A forced rekey of peer-v4: the session stays, its ports become the new SPIs")
        before = _session(fwd, lab.tunnel("peer-v4"))
        after = lab.charon("fwd").rekey("peer-v4")
        wait_for(
            lambda: _ports(_session(fwd, lab.tunnel("peer-v4"))) == {after.spi_in, after.spi_out},
            "the session shows the SPIs of the rekeyed SA",
        )
        _agree("answers after the rekey", lab.ping("peer-v4", _PINGS), _PINGS)
        _agree("the session's id after the rekey", _session(fwd, lab.tunnel("peer-v4"))["id"], before["id"])
        _show(fwd, "session", "all", "filter", "application", "ipsec-udp")

    _head("All of it is gone again. How to go on")
    click.echo(GO_ON)


def _beside(lab: Lab, fwd: Fwd, tunnel: Tunnel, capture: Capture) -> None:
    """Show a tunnel's session, then the same SPIs and counts as tcpdump and both charons have them."""
    session = _session(fwd, tunnel)
    _show(fwd, "session", "id", str(session["id"]))

    initiator, responder = (lab.charon(end).installed(tunnel.name) for end in tunnel.ends)
    click.echo("\nstrongSwan (list-sas over VICI):")
    for end, sa in zip(tunnel.ends, (initiator, responder), strict=True):
        click.echo(f"  {end:<7} {sa.name}: spi-in {_spi(sa.spi_in)}   spi-out {_spi(sa.spi_out)}")

    click.echo("\ntcpdump, the first two packets of each SPI:")
    printed = capture.printed()
    for spi in (initiator.spi_out, initiator.spi_in):
        of_spi = [line for line in printed if f"spi=0x{spi:08x}" in line]
        _agree(f"packets with SPI {_spi(spi)} on the wire", len(of_spi), _PINGS)
        click.echo("\n".join(f"  {line}" for line in of_spi[:2]))

    is_here = "fwd" in tunnel.ends
    wanted = {initiator.spi_in, initiator.spi_out} if is_here else {20033}
    _agree(f"ports of session {session['id']}", _ports(session), wanted)
    seen = session["ipsec"]["spis_seen"]
    _agree("SPIs that fwd saw", (seen["c2s"], seen["s2c"]), ([initiator.spi_out], [initiator.spi_in]))
    for flow, ends in (("c2s", tunnel.outer), ("s2c", tunnel.outer[::-1])):
        counted = session[flow]["packets"], session[flow]["bytes"]
        _agree(f"{flow} packets and bytes", counted, capture.total(*ends))
        click.echo(f"\n{flow}: fwd and tcpdump both counted {counted[0]} packets, {counted[1]} bytes", nl=False)
    click.echo()


def _session(fwd: Fwd, tunnel: Tunnel) -> dict[str, Any]:
    """The one session of a tunnel's ESP, as soon as fwd has it."""
    application = "ipsec-udp" if "fwd" in tunnel.ends else "ipsec-esp"

    def found() -> list[dict[str, Any]]:
        source, destination = tunnel.outer
        return fwd.sessions(application=application, source=source, destination=destination)

    sessions: list[dict[str, Any]] = wait_for(found, f"fwd has a session for tunnel {tunnel.name}")
    _agree(f"sessions of tunnel {tunnel.name}", len(sessions), 1)
    return sessions[0]


def _ports(session: dict[str, Any]) -> set[int]:
    return {session["c2s"]["sport"], session["c2s"]["dport"]}


def _agree(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise LabError(f"{what}: found {found}, want {wanted}")


def _head(title: str) -> None:
    click.secho(f"\n=== {title} ===\n", bold=True)


def _show(fwd: Fwd, *words: str) -> None:
    click.secho(f"# fwctl show {' '.join(words)}", bold=True)
    click.echo(fwd.fwctl("show", *words).stdout, nl=False)


def _spi(spi: int) -> str:
    return f"0x{spi:08x} = {spi}"
