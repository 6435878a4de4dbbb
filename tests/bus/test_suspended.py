# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that sleeps (S3) by its own will stays asleep over a save and a load. A real Linux: the tiny one can't."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpr_agent.bus.client import CallError
from tests.lab import Guest, Lab


@pytest.fixture
def sleeper(each_lab: Lab, linux: Path) -> Guest:
    guest = each_lab.linux_guest("sleeper", linux, "cpr.suspend", size="256M")
    guest.start()
    guest.until_state("suspended")
    return guest


def test_a_suspended_guest_stays_suspended(sleeper: Guest) -> None:
    """QEMU before 9.0 would wake it by the save, so that is refused there."""
    last = sleeper.report.last
    version = sleeper.admin("query-version")["qemu"]
    if version["major"] < 9:
        with pytest.raises(CallError, match="would wake it by saving"):
            sleeper.save()
        assert sleeper.state == "suspended"
        return
    sleeper.save()
    assert sleeper.properties["Checkpoint"]["run-state"] == "suspended"
    sleeper.load()
    assert sleeper.state == "suspended"
    assert sleeper.report.last == last
    sleeper.save()
    sleeper.call("Resume")
    assert sleeper.state == "suspended"
    sleeper.admin("system_wakeup")
    sleeper.until_state("running")
    sleeper.assert_unbroken()
