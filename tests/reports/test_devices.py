# SPDX-License-Identifier: GPL-2.0-or-later
"""A devdax that daxctl has made the kernel's own memory: its node stays, and no guest's RAM is there any more."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cpr_agent.bus.objects import _device
from cpr_agent.core.allocation import allocate
from cpr_agent.core.model import DaxDevice, MemorySection
from cpr_agent.errors import MemoryUnusable
from cpr_agent.memory import devices
from cpr_agent.memory.backends import HostMemory
from tests.fakes import FakeDevices
from tests.unit.test_memory import Sysfs

UUID = "21dfda89-0355-4462-b7ed-7d7a01837540"
SIZE = 1 << 30


def device(root: Path, driver: str) -> DaxDevice:
    """As the kernel has it in sysfs, bound to this driver."""
    (root / "dax0.0").mkdir()
    (root / driver).mkdir()
    (root / "dax0.0/driver").symlink_to(root / driver)
    namespace = Sysfs(root, "namespace0.0", None, uuid=UUID)
    found = devices._read(Sysfs(root, "dax0.0", namespace, size=str(SIZE), align="2097152", resource="0x100200000"))
    assert found
    return found


def test_it_is_listed_as_such_and_nothing_is_put_there(tmp_path: Path) -> None:
    taken = device(tmp_path, "kmem")
    assert _device(taken, [])["mode"].value == "system-ram"
    with pytest.raises(MemoryUnusable, match="the largest piece has 0"):
        allocate("web1", 64 << 20, [taken], [])
    section = MemorySection(size=64 << 20, device=f"uuid:{UUID}")  # type: ignore[arg-type]  # an int does
    with pytest.raises(MemoryUnusable, match="system-ram mode: it is the kernel's own memory") as caught:
        asyncio.run(HostMemory(FakeDevices(taken)).locate(section, 0.0))
    assert "daxctl reconfigure-device --mode=devdax dax0.0" in caught.value.remedy


def test_one_that_is_a_device_is_one(tmp_path: Path) -> None:
    free = device(tmp_path, "device_dax")
    assert _device(free, [])["mode"].value == "devdax"
    assert allocate("web1", 64 << 20, [free], [])
