# SPDX-License-Identifier: GPL-2.0-or-later
"""Each job cancelled once, twice, three and six times, from each of its points on: with real QEMUs."""

from __future__ import annotations

import pytest

from tests.cancel_lab import STORIES, CancelLab
from tests.faults.tally import note
from tests.kexec_lab import KexecLab
from tests.lab import Lab

ONE, PAUSED, THREE = (1, 0), (1, 1), (3, 1)
TIMES = {"SaveAll": (1, 2, 3, 6)}
"""Of a save of all each number by itself; of the others three times, which are once and twice on their way."""
CASES = [
    *((name, guests) for name in STORIES for guests in (ONE, PAUSED)),
    *((name, THREE) for name in ("SaveAll", "LoadAll", "Upgrade")),
]


@pytest.mark.parametrize(("name", "guests"), CASES, ids=[f"{name}-{count}-{paused}" for name, (count, paused) in CASES])
def test_a_job_that_is_cancelled_anywhere(lab: Lab, name: str, guests: tuple[int, int]) -> None:
    """``guests`` are how many, and how many of them are paused. With several the order of the points varies from life to
    life, so that not each is met again."""
    count, paused = guests
    cancel_lab = CancelLab(KexecLab(lab, count), paused)
    for point in cancel_lab.points(name):
        for times in TIMES.get(name, (3,)):
            result = cancel_lab.live(name, times, point)
            print(f"{name}, {times} times from {point}: {result}", flush=True)
            note(int(result == "cancelled"))
            cancel_lab.assert_nothing_is_left()
    cancel_lab.assert_all_go_on()
