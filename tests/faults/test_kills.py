# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent killed around each record of its journal and each act of its store, at each repetition, with real QEMUs."""

from __future__ import annotations

import pytest

from tests.faults.tally import note
from tests.kexec_lab import KexecLab, Story, every_point, kill_at
from tests.lab import Lab


@pytest.mark.parametrize("name", ["upgrade", "rollback", "load"])
def test_an_agent_that_is_killed_anywhere(lab: Lab, name: str) -> None:
    """Points are found by living through the story once; two guests at once make their order vary from life to life, so
    that not each point is met again: then nothing was killed, and nothing is counted."""
    kexec_lab, story = KexecLab(lab, 2), Story(name)
    points = every_point(kexec_lab, story)
    assert len(points) > 20
    for point in points:
        killed = kill_at(kexec_lab, story, point)
        print(f"{name}: {'killed' if killed else 'did not pass'} {point}", flush=True)
        note(1 if killed else 0)
