# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM as its admin wrote it."""

from __future__ import annotations

import re
from typing import Annotated, Literal, NamedTuple

import msgspec

from cpr_agent.core.model.memory import RAM_ID
from cpr_agent.core.model.units import Bytes, Seconds

MAX_ORDER = 1_000_000
VM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class VmSection(msgspec.Struct, frozen=True, kw_only=True):
    description: str = ""
    qemu: str = "/usr/bin/qemu-system-x86_64"
    arguments: tuple[str, ...] = ()
    autostart: bool = False
    user: str = ""
    """"" for a user of the VM's own, which the agent chooses."""
    shutdown_timeout: Seconds = Seconds(60)


class MemoryNode(msgspec.Struct, frozen=True, kw_only=True):
    """A range of memory; ``cpus`` are those of the guest that are near it, as ``0-3,8``."""

    size: Bytes
    device: str
    offset: Bytes = Bytes(0)
    cpus: str = ""


class MemorySection(msgspec.Struct, frozen=True, kw_only=True):
    """One range, or a ``node`` for each NUMA node of the guest."""

    size: Bytes = Bytes(0)
    device: str = ""
    offset: Bytes = Bytes(0)
    node: tuple[MemoryNode, ...] = ()

    @property
    def ranges(self) -> tuple[MemoryNode, ...]:
        return self.node or (MemoryNode(size=self.size, device=self.device, offset=self.offset),)

    @property
    def object_ids(self) -> tuple[str, ...]:
        """Of the memory backends, in the order of the ranges."""
        return tuple(f"{RAM_ID}-{number}" for number in range(len(self.node))) or (RAM_ID,)


class SaveSection(msgspec.Struct, frozen=True, kw_only=True):
    suspend: Literal["auto", "always", "never"] = "auto"
    """Whether the guest is put to sleep first: auto if it has VFIO devices."""
    suspend_timeout: Seconds = Seconds(60)
    timeout: Seconds = Seconds(60)
    order: Annotated[int, msgspec.Meta(ge=-MAX_ORDER, le=MAX_ORDER)] = 100
    when_blocked: tuple[Literal["wait", "shut-down", "refuse"], ...] = ("refuse",)
    """What to do, one after the other, when CPR is blocked and the host is to be upgraded."""
    blocked_wait: Seconds = Seconds(60)


class LoadSection(msgspec.Struct, frozen=True, kw_only=True):
    on_lost_memory: Literal["hold", "cold-start"] = "hold"
    resync_clock: Literal["auto", "never"] = "auto"


Owner = Literal["agent", "libvirt"]
"""Who defines a VM, and runs its QEMU."""


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """A VM as its admin wrote it. ``digest`` is the SHA-256 of the file, or of libvirt's XML where ``owner`` is that."""

    name: str
    vm: VmSection
    memory: MemorySection
    save: SaveSection = msgspec.field(default_factory=SaveSection)
    load: LoadSection = msgspec.field(default_factory=LoadSection)
    digest: str = ""
    owner: Owner = "agent"


class Note(NamedTuple):
    """What became of an ``argument`` of a foreign command line: "left out", "changed", or "look" if it may not do."""

    outcome: str
    argument: str
    why: str


class Imported(msgspec.Struct, frozen=True):
    """A foreign command line as the ``text`` of a definition, which the notes head as comments."""

    name: str
    text: str
    notes: tuple[Note, ...]
