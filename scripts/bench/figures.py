# SPDX-License-Identifier: GPL-2.0-or-later
"""A figure: what was measured, what it is to reach, and every raw run behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from scripts.bench.goals import Goal


@dataclass(frozen=True)
class Runs:
    """Raw values of one thing that was measured several times, in ``unit``."""

    values: Sequence[float]
    unit: str = "s"

    @property
    def median(self) -> float:
        return median(self.values)

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        if len(self.values) == 1:
            return f"{number(low)} {self.unit}"
        return f"{number(self.median)} {self.unit} ({number(low)} to {number(high)}, {len(self.values)} runs)"


@dataclass(frozen=True)
class Figure:
    """``raw`` has the runs by what they are runs of, ``facts`` what else belongs into the JSON."""

    name: str
    goal: Goal
    value: float
    raw: Mapping[str, Runs]
    note: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        return self.value >= self.goal.reach if self.goal.at_least else self.value <= self.goal.reach

    def as_json(self) -> dict[str, object]:
        raw = {
            name: {**asdict(runs), "median": runs.median, "min": min(runs.values), "max": max(runs.values)}
            for name, runs in self.raw.items()
        }
        return {
            "name": self.name,
            "figure": self.goal.figure,
            "value": self.value,
            "unit": self.goal.unit,
            "reach": self.goal.reach_text,
            "met": self.met,
            "runs": raw,
            "note": self.note,
            **self.facts,
        }


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def table(figures: Sequence[Figure]) -> str:
    """A line a figure, whether it was reached, and below it what it is made of."""
    lines = []
    for one in figures:
        value = f"{number(one.value)} {one.goal.unit}"
        lines.append(f"{'yes' if one.met else 'NO':3}  {value:>10}  {one.goal.reach_text:>10}  {one.goal.figure}")
        lines += [f"{'':29}{name}: {runs}" for name, runs in one.raw.items()]
        lines += [f"{'':29}({one.note})"] if one.note else []
    met = sum(one.met for one in figures)
    return "\n".join([*lines, f"figures {len(figures)}, reached {met}"])


def write(figures: Sequence[Figure], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([one.as_json() for one in figures], indent=2) + "\n")
