"""docs/PERFORMANCE.md's tables and its plot, from the results of one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

matplotlib.use("svg")
matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: a tenth of the size
FOLDER = Path(__file__).parent.parent / "docs"
PAGE = FOLDER / "PERFORMANCE.md"
PLOT = FOLDER / "performance.svg"

_BEGIN, _END = "<!-- measured: written by make bench -->", "<!-- end of what was measured -->"


def write(everything: Mapping[str, Any]) -> None:
    """Put the tables in their place in the page, and draw the plot."""
    text = PAGE.read_text()
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    PAGE.write_text("\n".join([before + _BEGIN, "", *_tables(everything), "", _END + after]))
    _draw(everything["results"])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _tables(everything: Mapping[str, Any]) -> Iterator[str]:
    machine = everything["machine"]
    yield f"{machine['cores']} cores, {machine['cpu']}, Linux {machine['kernel']}, Python {machine['python']}."
    yield ""
    yield "| ratio in one run | value | target | |"
    yield "| --- | --- | --- | --- |"
    for row in everything["ratios"]:
        yield f"| {row['name']} | {_number(row['value'])} | {row['target']} | {'met' if row['met'] else '**missed**'} |"
    yield ""
    yield "| measurement | median | lowest | highest | unit |"
    yield "| --- | --- | --- | --- | --- |"
    for result in everything["results"]:
        numbers = [result["median"], min(result["values"]), max(result["values"])]
        yield f"| {result['name']} | {' | '.join(map(_number, numbers))} | {result['unit']} |"
    yield from _profiles(everything["profiles"])
    yield ""
    yield "| a session with one SPI in fwd's memory | bytes |"
    yield "| --- | --- |"
    for part, octets in everything["weights"].items():
        yield f"| {part} | {octets} |"


def _profiles(profiles: Mapping[str, Sequence[tuple[str, float]]]) -> Iterator[str]:
    """Where the time goes, by py-spy: own time of the ten largest functions."""
    for name, functions in profiles.items():
        yield ""
        yield f"| {name} | own time |"
        yield "| --- | --- |"
        for function, share in functions:
            yield f"| `{function}` | {share:.0%} |"


def _draw(results: Sequence[Mapping[str, Any]]) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in ("plain forwarding", "fast path"):
        points = {
            int(result["name"].split(", ")[1].split()[0].replace(",", "")): result
            for result in results
            if result["group"] == "forwarding" and result["name"].startswith(name)
        }
        medians = [result["median"] for result in points.values()]
        spread = [
            [result["median"] - min(result["values"]) for result in points.values()],
            [max(result["values"]) - result["median"] for result in points.values()],
        ]
        left.errorbar(list(points), medians, yerr=spread, marker="o", capsize=3, label=name)
    left.set(xscale="log", ylim=(0, None), xlabel="sessions", ylabel="ns of CPU a packet", title="Forwarding")
    left.legend()
    readers = [result for result in results if result["group"] == "slow path"]
    readers.sort(key=lambda result: -float(result["median"]))
    names = [result["name"] for result in readers]
    colours = ["tab:orange" if name.startswith("fwd") else "tab:gray" for name in names]
    right.barh(names, [result["median"] / 1000 for result in readers], color=colours)
    right.set(xlabel="µs a packet, one CPU", title="A flooded queue: time its reader takes")
    figure.savefig(PLOT, metadata={"Date": None})
