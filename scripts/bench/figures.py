"""A figure: what was measured, what it is to reach, and every raw run behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median


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
    """``reach`` is what ``value`` has to be: at most, unless ``at_least``. ``raw`` has the runs by what they are runs of."""

    figure: str
    value: float
    unit: str
    reach: float
    raw: Mapping[str, Runs]
    at_least: bool = False
    note: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        return self.value >= self.reach if self.at_least else self.value <= self.reach

    def as_json(self) -> dict[str, object]:
        raw = {
            name: {**asdict(runs), "median": runs.median, "min": min(runs.values), "max": max(runs.values)}
            for name, runs in self.raw.items()
        }
        return {
            "figure": self.figure,
            "value": self.value,
            "unit": self.unit,
            "reach": f"{'>=' if self.at_least else '<='} {number(self.reach)}",
            "met": self.met,
            "runs": raw,
            "note": self.note,
            **self.facts,
        }


def ratio(
    figure: str, ours: tuple[str, Runs], theirs: tuple[str, Runs], reach: float, *, at_least: bool = False, note: str = ""
) -> Figure:
    """Median against median."""
    value = ours[1].median / theirs[1].median
    return Figure(figure, value, "x", reach, dict([ours, theirs]), at_least=at_least, note=note)


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def table(figures: Sequence[Figure]) -> str:
    """One figure a paragraph: whether it was reached, and what it is made of."""
    lines = []
    for one in figures:
        reach = f"{'>=' if one.at_least else '<='} {number(one.reach)} {one.unit}".rstrip()
        lines.append(f"{'yes' if one.met else 'NO ':3}  {number(one.value):>7} {one.unit:4} {reach:>12}   {one.figure}")
        lines += [f"{'':31} {name}: {runs}" for name, runs in one.raw.items()]
        lines += [f"{'':31} {one.note}"] if one.note else []
    met = sum(one.met for one in figures)
    return "\n".join([*lines, f"figures {len(figures)}, reached {met}"])


def write(figures: Sequence[Figure], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([one.as_json() for one in figures], indent=2) + "\n")
