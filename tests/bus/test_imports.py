# SPDX-License-Identifier: GPL-2.0-or-later
"""No module is imported while a guest stands still (ADR 27): what an act needs it has before it stops one."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable

import pytest

from cpr_agent import core, vm
from cpr_agent.core import acts, upgrade
from tests.lab import Guest, Lab, until

NOTES_IMPORTS = """
import sys, time

class Note:
    def find_spec(name, path=None, target=None):
        print("import", name, time.time(), file=sys.stderr, flush=True)

sys.meta_path.insert(0, Note)
import cpr_agent.__main__
"""
"""The agent, with a line in its log for each module, and when it was looked for (epoch s)."""


def refresh(guest: Guest) -> None:
    guest.call("Refresh", "a{sv}", {})


def save_and_load(guest: Guest) -> None:
    guest.save()
    guest.load()


def restart(lab: Lab) -> None:
    lab.end_agent()
    lab.start_agent((sys.executable, "-c", NOTES_IMPORTS, "--runner", "process"))


def imported(lab: Lab) -> dict[str, float]:
    """Each module, and when it was looked for first (epoch s)."""
    found = re.findall(r"^import (\S+) (\S+)$", lab.log.read_text(), re.MULTILINE)
    return {name: float(at) for name, at in reversed(found)}


@pytest.mark.parametrize("act", [save_and_load, refresh])
def test_no_module_is_imported_while_a_guest_stands_still(lab: Lab, act: Callable[[Guest], None]) -> None:
    guest = lab.running()
    restart(lab)
    act(guest)
    guest.assert_unbroken()
    (path,) = until(lambda: [*(lab.state / "history").glob("*.json")], "its timeline is stored")
    timeline = json.loads(path.read_bytes())
    found = imported(lab)
    assert found["cpr_agent.core.acts.save"] < timeline["stopped_at"]
    assert [name for name, at in found.items() if timeline["stopped_at"] < at < timeline["resumed_at"]] == []


def test_an_agent_has_all_its_acts_a_while_after_its_start(lab: Lab) -> None:
    """Of those of a package that is upgraded under it none is imported."""
    restart(lab)
    late = {f"{package.__name__}.{name}" for package in (core, acts, upgrade, vm) for name in package.__all__}
    until(lambda: late <= imported(lab).keys(), "all late modules are imported")
