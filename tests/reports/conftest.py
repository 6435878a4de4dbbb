# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab of tests/bus, with each QEMU that the agent is made for."""

from __future__ import annotations

import pytest

from tests.bus.conftest import each_lab, interruptible, qemu_of, tiny

__all__ = ["each_lab", "interruptible", "tiny"]


@pytest.fixture(params=["7.2", "10.0", "11.1"])
def each_qemu(request: pytest.FixtureRequest) -> str:
    return qemu_of(request.param)
