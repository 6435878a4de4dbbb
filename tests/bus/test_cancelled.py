# SPDX-License-Identifier: GPL-2.0-or-later
"""A job is cancelled at each record of its journal, and again at each record of its undo: with real QEMUs, each guest is
what it was. `make test-faults` does it around each act of the store too, in every job, and more often."""

from __future__ import annotations

import pytest

from tests.bus.mortal_agent import STORE
from tests.cancel_lab import CancelLab
from tests.kexec_lab import KexecLab
from tests.lab import Lab

COMMIT = ("before seal", "before commit", "after commit")
"""Acts in threads, which no cancellation ends."""


def places(points: list[str]) -> list[str]:
    """After each record, and around what makes a checkpoint live: the first passage of each."""
    names = list(dict.fromkeys(point.rpartition(" ")[0] for point in points))
    records = [name for name in names if name.startswith("after ") and name.split()[1] not in STORE]
    assert len(records) > 3
    return [f"{name} 1" for name in names if name in records or name in COMMIT]


@pytest.mark.parametrize(("guests", "paused"), [(1, 0), (1, 1), (2, 1)], ids=["running", "paused", "two"])
def test_a_save_of_all_that_is_cancelled_again_and_again(lab: Lab, guests: int, paused: int) -> None:
    cancel_lab = CancelLab(KexecLab(lab, guests), paused)
    cancelled = 0
    for number, point in enumerate(places(cancel_lab.points("SaveAll"))):
        times = 2 + number % 2
        result = cancel_lab.live("SaveAll", times, point)
        print(f"{times} times from {point}: {result}", flush=True)
        cancelled += result == "cancelled"
        cancel_lab.assert_nothing_is_left()
    assert cancelled > 5
    cancel_lab.live("SaveAll", 0, "never")
    cancel_lab.assert_all_go_on()


@pytest.mark.parametrize("name", ["LoadAll", "Rollback", "RefreshAll", "RefreshAll in turn", "Upgrade"])
def test_any_job_that_is_cancelled_again_and_again(lab: Lab, name: str) -> None:
    cancel_lab = CancelLab(KexecLab(lab, 1))
    cancelled = 0
    for point in places(cancel_lab.points(name)):
        result = cancel_lab.live(name, 3, point)
        print(f"{name}, 3 times from {point}: {result}", flush=True)
        cancelled += result == "cancelled"
        cancel_lab.assert_nothing_is_left()
    assert cancelled > 2
    cancel_lab.assert_all_go_on()
