# SPDX-License-Identifier: GPL-2.0-or-later
"""Each job cancelled once, twice, three and six times, from each of its points on: with real QEMUs."""

from __future__ import annotations

import pytest

from tests.cancel_lab import STORIES, CancelLab
from tests.faults.tally import note
from tests.kexec_lab import KexecLab
from tests.lab import Lab


@pytest.mark.parametrize(("guests", "paused"), [(1, 0), (1, 1), (3, 1)], ids=["running", "paused", "three"])
@pytest.mark.parametrize("name", STORIES)
def test_a_job_that_is_cancelled_anywhere(lab: Lab, name: str, guests: int, paused: int) -> None:
    """With several guests the order of the points varies from life to life, so that not each is met again."""
    cancel_lab = CancelLab(KexecLab(lab, guests), paused)
    for point in cancel_lab.points(name):
        for times in (1, 2, 3, 6):
            result = cancel_lab.live(name, times, point)
            print(f"{name}, {times} times from {point}: {result}", flush=True)
            note(int(result == "cancelled"))
            cancel_lab.assert_nothing_is_left()
    cancel_lab.assert_all_go_on()
