# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab of tests/bus, with each QEMU that the agent is made for."""

from __future__ import annotations

import pytest

from tests.bus.conftest import any_qemu, each_lab, interruptible, lab, qemu_of, tiny

__all__ = ["any_qemu", "each_lab", "interruptible", "lab", "tiny"]

REAL = ["7.2", "10.0", "11.1"]


@pytest.fixture(params=REAL)
def each_qemu(request: pytest.FixtureRequest) -> str:
    return qemu_of(request.param)
