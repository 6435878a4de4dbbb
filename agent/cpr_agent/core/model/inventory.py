# SPDX-License-Identifier: GPL-2.0-or-later
"""What a live QEMU has: the disks and devices that its guest sees, and the files of the host that it has open."""

from __future__ import annotations

from typing import Literal

import msgspec

LOCAL_DRIVERS = ("file", "host_device", "host_cdrom")
"""Of block nodes that are a file or a device of this host (QEMU, block/file-posix.c)."""


class OpenFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file or block device of this host that a process has open, as the kernel tells it."""

    path: str
    """The kernel's name of it (proc(5), /proc/PID/fd); "" if that has characters that don't show."""
    kind: Literal["file", "device"] = "file"
    st_dev: int = 0
    """Of a block device its own number, and no inode."""
    inode: int = 0
    device_id: str = ""
    """Of a block device, what names it on any boot; "" if nothing does."""
    size_bytes: int = 0
    mtime_ns: int = 0
    nameless: bool = False
    """It was deleted, or another file was renamed over it: nobody else can open it."""

    def same_as(self, other: OpenFile, *, rebooted: bool = False) -> bool:
        """``rebooted``: a boot lies between them, which gives devices other numbers."""
        if not rebooted:
            return self.key == other.key
        if self.kind == "device":
            known = (self.kind, self.device_id, self.size_bytes) == (other.kind, other.device_id, other.size_bytes)
            return known and self.device_id != ""
        return (self.kind, self.inode) == (other.kind, other.inode)

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from others of the same boot."""
        return self.st_dev, self.inode


class BlockNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node of the graph below a disk."""

    disk: str
    """Its drive, or the id of its device where a drive has no name."""
    role: str
    """The way from the disk to the node: "" for the first, then ``file``, ``backing``, ``backing.file`` …"""
    node: str
    """Its name in QEMU, which makes one up where nobody gives one."""
    driver: str
    filename: str
    """As QEMU calls it: to show and to compare, and not to be opened."""
    size_bytes: int = 0
    """As the guest sees it."""
    read_only: bool = False
    file: OpenFile | None = None

    @property
    def depth(self) -> int:
        """How many images lie over it."""
        return self.role.split(".").count("backing")

    @property
    def is_local(self) -> bool:
        return self.driver in LOCAL_DRIVERS


class PluggedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that the command line or a hot-plug has made."""

    name: str
    """``peripheral/ID``, or ``peripheral-anon/device[N]`` of one without an id."""
    kind: str
    bus: str = ""
    address: str = ""
    drive: str = ""
    """That it has, if that has a name."""
    own: str | None = None
    """Its MAC address and serial number; None from an agent that did not ask for them."""
    traits: dict[str, str] | None = None
    """Other properties by which its guest knows it, or by which its state fits a device or not; None likewise."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What a QEMU has that is neither disk nor device of its guest: an object, a character device, a network's backend, an
    export, a bitmap."""

    name: str
    """As in "object iothread1"."""
    kind: str
    leads_to: str | None = None
    """Where a network leads; None from an agent that did not ask."""


class Throttle(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a disk, as ``block_set_io_throttle`` takes them."""

    disk: str
    by: Literal["device", "id"]
    """Whether ``disk`` is its drive, or the id or the place of its device where the drive has no name."""
    group: str
    limits: dict[str, int]
    """Those that are no limits (0) left out."""

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.limits.items())


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """``started_at``: of its QEMU's Launch, which tells a record from that of an earlier QEMU."""

    nodes: tuple[BlockNode, ...] = ()
    devices: tuple[PluggedDevice, ...] = ()
    cpus: tuple[str, ...] = ()
    """Where each CPU is."""
    memory: tuple[str, ...] = ()
    """Devices that are memory: DIMMs and their like."""
    named: tuple[OpenFile, ...] = ()
    """The paths that lead to a file that QEMU has open: those of its command line, and those that the kernel tells."""
    placed: bool = True
    """False if it has no place of any device, and neither CPUs nor memory."""
    parts: tuple[Part, ...] | None = None
    """None from an agent that did not ask for them, and of an inventory without places."""
    throttles: tuple[Throttle, ...] = ()
    started_at: float = 0.0
