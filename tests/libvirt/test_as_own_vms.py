# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of the agent's own VMs (tests/bus), with domains in their place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bus.test_crashes import *  # noqa: F403 - the suite
from tests.libvirt.conftest import a_lab
from tests.libvirt.lab import DomainLab, LibvirtLab


@pytest.fixture
def lab(tmp_path: Path, tiny: Path) -> Iterator[LibvirtLab]:
    yield from a_lab("13", tmp_path, tiny, DomainLab)
