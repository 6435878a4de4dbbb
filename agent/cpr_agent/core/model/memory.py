# SPDX-License-Identifier: GPL-2.0-or-later
"""Which memory a VM's RAM is."""

from __future__ import annotations

from collections.abc import Iterable
from posixpath import normpath
from typing import Literal

import msgspec

from cpr_agent.core.states import Survives
from cpr_agent.errors import Difference

RAM_ID = "cpr-ram"
"""Id of the memory backend, and by that the name of the RAM block in every vmstate; with ``-0``, ``-1``, … those of a VM
with NUMA nodes. Never change it."""


class MemoryIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which memory a VM's RAM is, or one NUMA node of it, in terms that stay true across a kexec. Sizes in bytes.

    A device is known by the uuid of its parent nd device, cross-checked with where and how big it is, in which region, and
    who provides that; its node's name changes from boot to boot (measured) and plays no part. A file is known by
    file system, inode and size, one in hugetlbfs by the size of its pages too. A file system that has a UUID is known by
    that: the number of the device that it is on changes as names do.
    """

    kind: Literal["devdax", "file"]
    size_bytes: int
    offset_bytes: int
    survives: Survives
    object_id: str = RAM_ID
    uuid: str = ""
    resource: int | None = None
    device_size_bytes: int = 0
    align_bytes: int = 0
    region: str = ""
    """Where it begins and how long it is, as ``"0x100000000+4294967296"``; its name moves."""
    provider: str = ""
    """Of its bus, as ``ndctl list -B`` shows it: ``ACPI.NFIT``, ``e820``, ``virtio_pmem``."""
    path: str = ""
    filesystem: str = ""
    st_dev: int = 0
    inode: int = 0
    page_bytes: int = 0
    """Of hugetlbfs."""
    volume: str = ""
    """The UUID of the file system."""

    @property
    def place(self) -> str:
        """As a definition names it."""
        return f"uuid:{self.uuid}" if self.kind == "devdax" else self.path

    def differences(self, found: MemoryIdentity) -> list[Difference]:
        """Each field that is not what it was; empty if this is the same memory."""
        out = []
        for name in self.__struct_fields__:
            was, now = getattr(self, name), getattr(found, name)
            if name in _MAY_BE_UNKNOWN and (not was or now is None):
                continue
            if name == "st_dev" and self.volume and found.volume:
                continue
            if was != now:
                out.append(Difference(name, _show(name, was), _show(name, now)))
        return out

    @property
    def in_ram(self) -> bool:
        """Its file system is gone with the boot."""
        return self.filesystem in ("tmpfs", "hugetlbfs")

    def outlives(self, need: Survives) -> bool:
        """Of all file systems in RAM, a soft reboot leaves those mounted that are below /dev (fstab_is_extrinsic() in
        systemd's src/shared/fstab-util.c); RAM can't be in the others that it leaves."""
        if need is Survives.QEMU_RESTART or self.survives is Survives.KEXEC:
            return True
        return need is Survives.SOFT_REBOOT and self.in_ram and normpath(self.path).startswith("/dev/")

    def overlaps(self, other: MemoryIdentity) -> bool:
        """True if the two share a byte of the same device or file."""
        return (
            self.kind == other.kind
            and self._object(other) == other._object(self)
            and self.offset_bytes < other.offset_bytes + other.size_bytes
            and other.offset_bytes < self.offset_bytes + self.size_bytes
        )

    def _object(self, other: MemoryIdentity) -> tuple[object, ...]:
        """The device or file, by what both of them have."""
        if self.kind == "devdax":
            return (self.uuid,)
        return (self.volume if self.volume and other.volume else self.st_dev, self.inode)


_MAY_BE_UNKNOWN = ("resource", "region", "provider", "page_bytes", "volume")
"""Only root may read where memory is; the others were not noted for guests that an older agent started. The uuid, or
the inode, has always been compared."""


Ram = tuple[MemoryIdentity, ...]
"""All of a VM's memory: one range, or one for each NUMA node, in the order of these. Of a VM without any it is empty."""


def survives(ram: Ram) -> Survives:
    """What all of it outlives."""
    return Survives.KEXEC if all(one.survives is Survives.KEXEC for one in ram) else Survives.QEMU_RESTART


def overlapping(ram: Ram) -> tuple[int, int] | None:
    """Two NUMA nodes of one VM that share a byte, if there are any."""
    pairs = ((a, b) for b in range(len(ram)) for a in range(b) if ram[a].overlaps(ram[b]))
    return next(pairs, None)


def _show(name: str, value: object) -> str:
    return f"{value:#x}" if name == "resource" and isinstance(value, int) else str(value)


class DaxDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device-DAX instance as sysfs shows it now. ``uuid`` is that of the parent nd device."""

    node: str
    uuid: str
    size_bytes: int
    align_bytes: int
    resource: int | None
    numa_node: int
    region: str = ""
    provider: str = ""
    drivers: tuple[str, ...] = ()
    """Kernel modules (or built-in drivers) that the device and its parents are bound to, as /sys/module names them."""
    system_ram: bool = False
    """The kernel has it as ordinary memory (driver kmem, daxctl-reconfigure-device(1)): no guest's."""


class Located(msgspec.Struct, frozen=True, kw_only=True):
    """Memory found on this host: what it is, and by which path it can be opened now."""

    identity: MemoryIdentity
    node: str


def ram_of(located: Iterable[Located]) -> Ram:
    return tuple(one.identity for one in located)
