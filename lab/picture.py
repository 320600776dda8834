"""The picture of `fwctl top` in the README: the real screen, on a gateway whose tunnels carry real ESP."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import click

from fwd.cli.top_data import Question
from fwd.cli.top_screen import TopApp
from fwd.rpc import DEFAULT_SOCKET

from .lab import Lab, default_config
from .topology import Tunnel

#: Traffic by tunnel: packets a second into the gateway and out of it, at most; bytes a packet; seconds a wave.
#: `oslo` has none.
_TRAFFIC = {
    "berlin": (900, 300, 1200, 37),
    "hamburg": (250, 500, 1000, 23),
    "wien": (300, 280, 700, 51),
    "lyon": (120, 60, 1100, 29),
    "porto": (0, 70, 600, 17),
    "gent": (45, 40, 300, 13),
    "turin": (8, 8, 120, 41),
}
_WATCHED_S = 85
_WAVE = Path(__file__).parent / "wave.py"


def draw(path: Path, columns: int, lines: int) -> None:
    """Draw it as SVG. Two tunnels are broken on the branch's side: `lyon` loses packets, of `porto` nothing comes."""
    with Lab("branches", say=click.echo) as lab:
        fwd_host, branches = lab.hosts["fwd"], lab.hosts["branches"]
        fwd_host.run(["hostname", "gateway"])
        lab.start_fwd(f"{default_config()}\n[dataplane]\ntunnel-silent-after = 20\n")
        lab.initiate()
        broken = {"lyon": "numgen random mod 100 < 3 drop", "porto": "drop"}
        branches.run(
            ["nft", "add table ip broken; add chain ip broken out { type filter hook postrouting priority 0; }"]
        )
        for name, verdict in broken.items():
            outer = lab.tunnel(name).outer[0]
            branches.run(["nft", f"add rule ip broken out ip saddr {outer} ip protocol esp {verdict}"])
        for name in _TRAFFIC:
            _start(lab, lab.tunnel(name))
        click.echo(f"watching for {_WATCHED_S} s ...")
        app = TopApp(str(fwd_host.path(DEFAULT_SOCKET)), Question(), 1.0)
        path.write_text(_by_itself(asyncio.run(_watch(app, columns, lines))))
    click.echo(f"{path}: {path.stat().st_size} bytes")


def _by_itself(svg: str) -> str:
    """The picture with fonts that readers have, instead of some from elsewhere."""
    svg = re.sub(r"@font-face \{.*?\}\s*|<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")


def _start(lab: Lab, tunnel: Tunnel) -> None:
    """Let both ends of a tunnel send."""
    into, out, size, period = _TRAFFIC[tunnel.name]
    branch, gateway = tunnel.inner
    for host, source, destination, peak in (("branches", branch, gateway, into), ("fwd", gateway, branch, out)):
        words = ["--peak", peak, "--size", size, "--period", period, "--seconds", _WATCHED_S + 30]
        if peak:
            lab.hosts[host].start([sys.executable, str(_WAVE), source, destination, *map(str, words)])


async def _watch(app: TopApp, columns: int, lines: int) -> str:
    async with app.run_test(size=(columns, lines)) as pilot:
        await asyncio.sleep(_WATCHED_S)
        await pilot.press("down", "down", "down")
        await pilot.pause(1.5)
        return app.export_screenshot(title="fwctl top")
