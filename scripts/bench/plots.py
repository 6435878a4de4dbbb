# SPDX-License-Identifier: GPL-2.0-or-later
"""Pictures of what the figures are made of."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure as Picture

from scripts.bench.figures import Figure

BY_RAM, BY_VMS = "pause-by-ram.svg", "pause-by-vms.svg"
_AGENT, _OTHER, _FLOOR = "#1f77b4", "#d62728", "#7f7f7f"


def draw(figures: Sequence[Figure], directory: Path) -> list[Path]:
    """What can be drawn of these figures; returns the files."""
    measured = {one.name: one for one in figures}
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    if "by-ram" in measured:
        drawn.append(_by_ram(measured, directory / BY_RAM))
    if "many-mean" in measured:
        drawn.append(_by_vms(measured["many-mean"], directory / BY_VMS))
    return drawn


def _by_ram(measured: dict[str, Figure], path: Path) -> Path:
    picture, axes = _axes("A guest's pause against its RAM, 70 % of it written", "RAM (MiB)", "pause (s)")
    sizes = [int(name.split()[0]) for name in measured["by-ram"].raw]
    _line(axes, sizes, [runs.values for runs in measured["by-ram"].raw.values()], "cpr-agent, CprSave + CprLoad", _AGENT)
    virsh = {int(name.partition("-")[2]): one.raw["virsh"].values for name, one in measured.items() if "virsh" in name}
    if virsh:
        _line(axes, list(virsh), list(virsh.values()), "virsh managedsave + start", _OTHER)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(10 ** floor(log10(low)), 10 ** ceil(log10(high)))  # whole decades: those have numbers
    axes.set_xscale("log", base=2)
    _finish(axes, sizes)
    picture.savefig(path)
    return path


def _by_vms(measured: Figure, path: Path) -> Path:
    by_vms: Any = measured.facts["pause_by_vms"]
    picture, axes = _axes("Mean pause against the number of VMs, all saved and loaded at once", "VMs", "mean pause (s)")
    numbers = list(by_vms)
    for kind, label, colour in (
        ("agent", "cpr-agent, SaveAll + LoadAll", _AGENT),
        ("bare script", "bare script, a thread for each VM", _OTHER),
        ("explained", "QEMU's own CPU time over the cores", _FLOOR),
    ):
        _line(axes, numbers, [by_vms[number][kind] for number in numbers], label, colour)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    _finish(axes, numbers)
    picture.savefig(path)
    return path


def _axes(title: str, x: str, y: str) -> tuple[Picture, Any]:
    picture = Picture(figsize=(7, 4.2), layout="constrained")
    axes = picture.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return picture, axes


def _line(axes: Any, at: Sequence[int], values: Sequence[Sequence[float]], label: str, colour: str) -> None:
    """Through the medians, with all runs as faint points."""
    axes.plot(at, [median(runs) for runs in values], marker="o", label=label, color=colour)
    for x, runs in zip(at, values, strict=True):
        axes.plot([x] * len(runs), runs, ".", color=colour, alpha=0.35, markeredgewidth=0)


def _finish(axes: Any, ticks: Sequence[int]) -> None:
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
