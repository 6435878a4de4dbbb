# SPDX-License-Identifier: GPL-2.0-or-later
"""The bench's own sums; what it measures, `make bench` measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.bench.__main__ import PARTS
from scripts.bench.figures import Figure, Runs, table, write
from scripts.bench.goals import DOMAIN_GOALS, GOALS, HOST_GOALS, Goal
from scripts.bench.host import ended_at
from scripts.bench.host import figures as host_figures

ROOT = Path(__file__).parent.parent.parent
AT_MOST, AT_LEAST = Goal("a ratio", 1.15), Goal("times faster", 40, at_least=True)


def test_one_slow_run_does_not_move_the_median() -> None:
    assert Runs([0.02, 9.0, 0.03]).median == 0.03
    assert str(Runs([0.02, 9.0, 0.03])) == "0.03 s (0.02 to 9, 3 runs)"


@pytest.mark.parametrize(
    ("goal", "value", "met"), [(AT_MOST, 1.15, True), (AT_MOST, 1.16, False), (AT_LEAST, 40, True), (AT_LEAST, 39.9, False)]
)
def test_a_figure_is_met_on_its_own_side_of_its_goal(goal: Goal, value: float, *, met: bool) -> None:
    figure = Figure("one", goal, value, {})
    assert figure.met is met
    assert table([figure]).startswith("yes" if met else "NO")
    assert table([figure]).endswith(f"figures 1, reached {met:d}")


def test_the_json_has_each_raw_run(tmp_path: Path) -> None:
    write([Figure("one", AT_MOST, 1.5, {"agent": Runs([3, 1, 2])}, facts={"more": [1]})], tmp_path / "build/bench.json")
    (figure,) = json.loads((tmp_path / "build/bench.json").read_text())
    assert (figure["figure"], figure["value"], figure["unit"], figure["met"]) == ("a ratio", 1.5, "x", False)
    assert figure["reach"] == "<= 1.15x"
    assert figure["runs"]["agent"] == {"values": [3, 1, 2], "unit": "s", "median": 2, "min": 1, "max": 3}
    assert figure["more"] == [1]


def test_each_goal_is_measured_once() -> None:
    assert [name for part in PARTS for name in part.names] == list(GOALS)


def a_kexec(
    who: str, *, pause: float = 0.0, stopped: float = 0.0, saved: float = 0.0, resumed: float = 0.0
) -> dict[str, object]:
    times = {"pause": pause, "stopped": stopped, "saved": saved, "userspace": 2.0, "resumed": resumed, "multi_user": 14.0}
    return {"who": who, **times}


def test_a_kexec_counts_for_whose_it_was() -> None:
    kexecs = [
        a_kexec("agent", pause=30.0, stopped=50.0, saved=51.0, resumed=12.0),
        a_kexec("soft", pause=15.0, resumed=12.0),
        a_kexec("none", saved=51.0),
        a_kexec("bare", pause=20.0, resumed=10.0),
        a_kexec("slow", pause=62.0, stopped=50.0, saved=51.0, resumed=42.0),
    ]
    log = "host-vm: boot 1\nbench: kexec at 54.5\nbench: kexec at 54.25\r\nbench: kexec at 9.0\nbench: kexec at 55.0\n"
    found = host_figures(kexecs, ended_at(log), without_bus=False)
    assert [one.name for one in found] == list(HOST_GOALS)
    assert {one.name: one.value for one in found} == {
        "kexec-pause": 1.5,
        "userspace": 1.25,
        "shutdown": 0.25,
        "slow-stop": 0.5,
        "slow-boot": 30.0,
        "soft-reboot": 0.5,
        "without-bus": 0.0,
        "early": 2.0,
    }
    assert [one.name for one in found if not one.met] == ["kexec-pause", "slow-boot", "without-bus"]


def test_the_document_has_the_goals() -> None:
    rows = [
        f"| `{name}` | {goal.figure} | {goal.reach_text} |"
        for goals in (GOALS, HOST_GOALS, DOMAIN_GOALS)
        for name, goal in goals.items()
    ]
    text = (ROOT / "docs/bench.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| `")] == rows
