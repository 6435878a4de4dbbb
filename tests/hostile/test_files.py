# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of the agent's own that are something else when it starts: a restored backup, a mistake, a disk that was mended."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.conftest import assert_contained
from tests.lab import Guest, Lab, until

SPARSE_BYTES = 3 << 30


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, SPARSE_BYTES)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


PLACES = [
    *("state/checkpoints/web1/manifest.json", "state/checkpoints/web1/held"),
    *("run/launched/web1.json", "state/history/x.json"),
]


@pytest.mark.parametrize("make", [os.mkfifo, sparse, endless], ids=["fifo", "sparse", "endless"])
@pytest.mark.parametrize("place", PLACES)
def test_the_agent_starts_beside_it(lab: Lab, good: Guest, place: str, make: Callable[[Path], None]) -> None:
    saved = lab.running("web1")
    saved.save()
    lab.end_agent()
    base, _, rest = place.partition("/")
    path = {"state": lab.state, "run": lab.run}[base] / rest
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)
    lab.start_agent()
    until(lambda: saved.state, "the agent has looked at it")
    lab.client(lambda client: client.manager("Check", "a{sv}", {}))
    good.save()
    good.load()
    assert_contained(lab, good)
