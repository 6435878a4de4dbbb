# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests in memory of all kinds; in the host VM, which has them."""

from __future__ import annotations

from pathlib import Path

from tests.guests.scenarios import in_host_vm

MEMORY = ("--nvdimm=512M", "--labelled-nvdimm=512M", "--virtio-pmem=256M", "--append=memmap=256M!4G")


def test_each_kind_of_memory_and_what_it_survives(tmp_path: Path) -> None:
    in_host_vm("memory", tmp_path, *MEMORY)
