# SPDX-License-Identifier: GPL-2.0-or-later
"""The ranges of dax devices: which VM has them, and where a guest's RAM can go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cpr_agent.core.model import DaxDevice, MemoryIdentity
from cpr_agent.errors import InvalidArgument, MemoryUnusable
from cpr_agent.words import exact_size


class Range(NamedTuple):
    """Bytes of a device; ``vm`` is "" for a free range."""

    offset: int
    size: int
    vm: str = ""


def used(device: DaxDevice, claims: Iterable[tuple[str, MemoryIdentity]]) -> list[Range]:
    """The ranges of VMs, in order of their offsets."""
    return sorted(
        Range(memory.offset_bytes, memory.size_bytes, vm) for vm, memory in claims if memory.uuid == device.uuid != ""
    )


def free(device: DaxDevice, taken: Iterable[Range]) -> list[Range]:
    """The ranges between the ``taken`` ones (sorted), in whole units of the device's alignment; none of one that the kernel
    has as its own memory."""
    if device.system_ram:
        return []
    align = device.align_bytes or 1
    out, at = [], 0
    for end, after in [*((one.offset, one.offset + one.size) for one in taken), (device.size_bytes, 0)]:
        begin, limit = -(-at // align) * align, end // align * align
        if limit > begin:
            out.append(Range(begin, limit - begin))
        at = max(at, after)
    return out


def allocate(
    vm: str, size: int, devices: Iterable[DaxDevice], claims: list[tuple[str, MemoryIdentity]], wanted: str = ""
) -> tuple[DaxDevice, Range]:
    """The smallest free range that ``size`` bytes fit in, so that large ones stay whole. ``wanted``: a device's uuid or
    node. Raises InvalidArgument, MemoryUnusable.
    """
    if size <= 0:
        raise InvalidArgument("its memory needs a size", vm=vm, left="nothing was allocated", remedy="give one: 4G")
    usable = [device for device in devices if device.uuid and wanted in ("", device.uuid, device.node)]
    if wanted and not usable:
        raise InvalidArgument(
            f"there is no dax device {wanted}", vm=vm, left="nothing was allocated", remedy="see `cprctl devices`"
        )
    ranges = [(device, one) for device in usable for one in free(device, used(device, claims))]
    fitting = [(device, one) for device, one in ranges if one.size >= size and size % (device.align_bytes or 1) == 0]
    if not fitting:
        largest = max((one.size for _, one in ranges), default=0)
        unaligned = any(one.size >= size for _, one in ranges)
        raise MemoryUnusable(
            f"{size} bytes are no multiple of the alignment of a device that has room for them"
            if unaligned
            else f"no dax device has {exact_size(size)} free in one piece; the largest piece has {exact_size(largest)}",
            vm=vm,
            left="nothing was allocated",
            remedy="see `cprctl devices`",
        )
    device, room = min(fitting, key=lambda found: (found[1].size, found[0].node, found[1].offset))
    return device, Range(room.offset, size, vm)
