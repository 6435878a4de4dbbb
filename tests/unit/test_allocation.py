# SPDX-License-Identifier: GPL-2.0-or-later
"""Ranges of devices: nobody gets a byte that is somebody's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from cpr_agent.core.allocation import Range, allocate, free, used
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import DaxDevice, MemoryIdentity, Survives
from cpr_agent.errors import InvalidArgument, MemoryUnusable
from tests.bench import RAM_BYTES, Bench

MIB = 1 << 20
DEVICE = DaxDevice(node="/dev/dax0.0", uuid="one", size_bytes=64 * MIB, align_bytes=2 * MIB, resource=None, numa_node=0)


def memory(offset: int, size: int, uuid: str = "one") -> MemoryIdentity:
    return MemoryIdentity(kind="devdax", uuid=uuid, offset_bytes=offset, size_bytes=size, survives=Survives.KEXEC)


def test_an_empty_device_is_free_as_a_whole() -> None:
    assert free(DEVICE, []) == [Range(0, 64 * MIB)]
    assert allocate("web1", 4 * MIB, [DEVICE], []) == (DEVICE, Range(0, 4 * MIB, "web1"))


def test_what_the_kernel_has_as_memory_is_not_free() -> None:
    taken = replace(DEVICE, system_ram=True)
    assert free(taken, []) == []
    with pytest.raises(MemoryUnusable):
        allocate("web1", 4 * MIB, [taken], [])


def test_what_others_have_is_left_out() -> None:
    claims = [("web1", memory(0, 8 * MIB)), ("web2", memory(16 * MIB, 8 * MIB)), ("web3", memory(0, 64 * MIB, "other"))]
    assert used(DEVICE, claims) == [Range(0, 8 * MIB, "web1"), Range(16 * MIB, 8 * MIB, "web2")]
    assert free(DEVICE, used(DEVICE, claims)) == [Range(8 * MIB, 8 * MIB), Range(24 * MIB, 40 * MIB)]
    assert allocate("new", 8 * MIB, [DEVICE], claims)[1] == Range(8 * MIB, 8 * MIB, "new")
    assert allocate("new", 10 * MIB, [DEVICE], claims)[1] == Range(24 * MIB, 10 * MIB, "new")


def test_the_smallest_gap_of_all_devices_is_taken() -> None:
    small = replace(DEVICE, node="/dev/dax1.0", uuid="small", size_bytes=16 * MIB)
    assert allocate("new", 8 * MIB, [DEVICE, small], [])[0] == small
    assert allocate("new", 8 * MIB, [DEVICE, small], [], "one")[0] == DEVICE
    assert allocate("new", 8 * MIB, [DEVICE, small], [], "/dev/dax0.0")[0] == DEVICE


def test_a_device_without_a_uuid_is_never_chosen() -> None:
    with pytest.raises(MemoryUnusable, match="largest piece has 0"):
        allocate("new", 2 * MIB, [replace(DEVICE, uuid="")], [])


def test_why_there_is_none() -> None:
    with pytest.raises(MemoryUnusable, match="the largest piece has 64M"):
        allocate("new", 66 * MIB, [DEVICE], [])
    with pytest.raises(MemoryUnusable, match="no multiple of the alignment"):
        allocate("new", 3 * MIB, [DEVICE], [])
    with pytest.raises(InvalidArgument, match="no dax device /dev/dax9"):
        allocate("new", 2 * MIB, [DEVICE], [], "/dev/dax9.0")
    with pytest.raises(InvalidArgument, match="needs a size"):
        allocate("new", 0, [DEVICE], [])


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20))), st.integers(1, 40))
def test_nobody_gets_a_byte_that_is_somebodys(taken: list[tuple[int, int]], wanted: int) -> None:
    """Also where the others overlap each other, lie on odd offsets or beyond the end."""
    claims = [(f"vm{n}", memory(offset * MIB, size * MIB)) for n, (offset, size) in enumerate(taken)]
    pieces = free(DEVICE, used(DEVICE, claims))
    assert all(piece.offset % DEVICE.align_bytes == piece.size % DEVICE.align_bytes == 0 for piece in pieces)
    units = [range(piece.offset // MIB, (piece.offset + piece.size) // MIB) for piece in pieces]
    ours = {unit for piece in units for unit in piece}
    theirs = {unit for offset, size in taken for unit in range(offset, offset + size)}
    assert not ours & theirs
    whole = {pair for pair in range(32) if not {2 * pair, 2 * pair + 1} & theirs}
    assert ours == {unit for pair in whole for unit in (2 * pair, 2 * pair + 1)}
    try:
        _, got = allocate("new", wanted * 2 * MIB, [DEVICE], claims)
    except MemoryUnusable:
        assert all(piece.size < wanted * 2 * MIB for piece in pieces)
    else:
        assert not set(range(got.offset // MIB, (got.offset + got.size) // MIB)) & theirs


def test_the_agent_allocates_beside_its_guests(tmp_path: Path) -> None:
    """By the size that the definition has, or another; running, saved or only defined is the same."""
    bench = Bench(tmp_path)
    bench.define("web1", bench.define_device("web1"))
    device = bench.devices.list()[0]
    bench.devices = type(bench.devices)(replace(device, size_bytes=4 * RAM_BYTES))

    async def ask(manager: Manager) -> list[Range]:
        sizes = ("", str(2 * RAM_BYTES))
        return [(await manager.allocate("web1", size, f"uuid:{device.uuid}"))[1] for size in sizes]

    assert bench.run(ask) == [Range(RAM_BYTES, RAM_BYTES, "web1"), Range(RAM_BYTES, 2 * RAM_BYTES, "web1")]
    with pytest.raises(InvalidArgument, match="is not a size such as"):
        bench.run(lambda manager: manager.allocate("new", "much", ""))
    with pytest.raises(InvalidArgument, match="needs a size"):
        bench.run(lambda manager: manager.allocate("new", "", ""))
