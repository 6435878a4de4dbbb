# SPDX-License-Identifier: GPL-2.0-or-later
"""The domains of libvirt on this host, which the agent can adopt as its VMs and give back."""

from __future__ import annotations

import hashlib
from typing import Protocol

import msgspec

from cpr_agent.core.model import MemoryNode
from cpr_agent.errors import NoSuchVM


class Adoptable(msgspec.Struct, frozen=True, kw_only=True):
    """A domain that can be adopted."""

    name: str
    size_bytes: int
    adopted: MemoryNode | None = None
    """The memory that it was given, if it is adopted already, also where it can't be used as it is."""
    qemu_too_old: str = ""
    """The version of its QEMU, if that can't have memory that begins behind the start of a device or file."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Of a domain's definition, which is XML. ``diff`` is for people, and has no passwords."""

    name: str
    before: str
    after: str
    diff: str

    @property
    def token(self) -> str:
        """Names this change among all others."""
        return hashlib.sha256(f"{self.before}\0{self.after}".encode()).hexdigest()[:16]


class Domains(Protocol):
    """Each call raises QemuUnreachable where libvirt does not answer, and NoSuchVM."""

    async def adoptable(self, name: str) -> Adoptable:
        """Raises NotAdoptable with every reason, InvalidDefinition."""

    async def adoption(self, name: str, memory: MemoryNode, align_bytes: int) -> Change:
        """How a domain is given this memory, in the place of other memory that it may have been given. ``align_bytes`` is
        that of the device, 0 for a file. Raises InvalidDefinition."""

    async def release(self, name: str) -> Change:
        """How it becomes again what it was. Raises NotAdoptable, InvalidDefinition, NothingToDo for one that is so."""

    async def define(self, change: Change) -> None:
        """Raises WrongState if the domain has been changed or started meanwhile; QemuRefused, and it is as it was then."""


class NoDomains:
    """Of an agent without libvirt."""

    async def adoptable(self, name: str) -> Adoptable:
        raise self._error(name)

    async def adoption(self, name: str, memory: MemoryNode, align_bytes: int) -> Change:  # noqa: ARG002
        raise self._error(name)

    async def release(self, name: str) -> Change:
        raise self._error(name)

    async def define(self, change: Change) -> None:
        raise self._error(change.name)

    def _error(self, name: str) -> NoSuchVM:
        what = f"there is no domain {name!r}: there was no libvirt when the agent was started"
        return NoSuchVM(what, left="nothing was done", remedy="systemctl restart cpr-agent")
