# SPDX-License-Identifier: GPL-2.0-or-later
"""The conformance suite of all dialects, and the lives of guests under the agent, on QEMUs that have cpr-save."""

from __future__ import annotations

import signal
import sys

import pytest

from cpr_agent.bus.client import CallError
from tests.bus.test_crashes import *  # noqa: F403
from tests.bus.test_crashes import dies
from tests.bus.test_dialects import *  # noqa: F403
from tests.bus.test_faults_loading import *  # noqa: F403
from tests.bus.test_faults_saving import *  # noqa: F403
from tests.bus.test_life import *  # noqa: F403
from tests.bus.test_suspended import *  # noqa: F403
from tests.lab import Lab


def test_killed_during_the_save_of_a_paused_guest(lab: Lab) -> None:  # type: ignore[no-redef] # instead of the other
    """Its QEMU says ``paused`` before and after (ADR 18): it is as if there had been no save, and can be saved."""
    guest = lab.running()
    guest.admin("stop")
    guest.until_state("paused")
    last = guest.report.last
    dies(lab, guest, "before seal", "save")
    guest.until_state("paused")
    assert "manifest.json" not in guest.checkpoint_files()
    guest.save()
    guest.load()
    assert guest.state == "paused"
    assert guest.report.last == last
    guest.call("Resume")
    guest.assert_unbroken()


def test_killed_during_the_load_of_a_paused_guest(lab: Lab) -> None:  # type: ignore[no-redef] # instead of the other
    """By the agent that saved it: another one gives the checkpoint up (ADR 18)."""
    guest = lab.running()
    guest.admin("stop")
    guest.until_state("paused")
    lab.end_agent()
    lab.start_agent((sys.executable, "-m", "tests.bus.mortal_agent", "after consume"))
    guest.save()
    with pytest.raises(CallError):
        guest.load()
    assert lab.agent_ended() == -signal.SIGKILL
    lab.start_agent()
    guest.until_state("paused")
    guest.call("Resume")
    guest.assert_unbroken()


def test_another_agent_gives_up_the_checkpoint_of_a_paused_guest(lab: Lab) -> None:
    """Whose QEMU is still there: nothing says that it has not run since (ADR 18). It is where it was, and can be saved."""
    guest = lab.running()
    guest.admin("stop")
    guest.until_state("paused")
    guest.save()
    lab.end_agent()
    lab.start_agent()
    guest.until_state("paused")
    assert "manifest.json" not in guest.checkpoint_files()
    guest.save()
    guest.load()
    guest.call("Resume")
    guest.assert_unbroken()
