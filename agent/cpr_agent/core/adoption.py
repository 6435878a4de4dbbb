# SPDX-License-Identifier: GPL-2.0-or-later
"""Make a domain of libvirt a VM of the agent, where it is; or give it back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple, Protocol

from cpr_agent.core.allocation import allocate, free, used
from cpr_agent.core.domains import Adoptable, Change
from cpr_agent.core.model import Bytes, Located, MemoryIdentity, MemoryNode, MemorySection, ram_of
from cpr_agent.core.ports import Ports
from cpr_agent.core.proof import naming, refuse_overlap
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CprError, InvalidArgument, MemoryOverlap, MemoryUnusable, WrongState

NOTHING = "nothing was changed"
_NEWER_QEMU = "use QEMU 8.1 or newer, or a device or file of which the domain gets the start"
"""``offset`` of memory-backend-file is there since then (QEMU, qapi/qom.json)."""


class Wanted(NamedTuple):
    """``device`` and ``offset`` say which memory; "" for a free range. Not ``act``: say alone what would be changed. With
    a ``token``, only the change that it names is made."""

    device: str = ""
    offset: str = ""
    act: bool = True
    token: str = ""


class Outcome(NamedTuple):
    """A change, and the memory that the domain has with it, or had before a release."""

    change: Change
    memory: MemoryNode | None = None


class Household(Protocol):
    """The VMs of this host; Manager is one."""

    vms: dict[str, Vm]

    async def claimed(self, asking: str) -> list[tuple[str, MemoryIdentity]]: ...

    async def reload(self) -> None: ...


class Adoption:
    """One change at a time: two domains must not be given one range."""

    def __init__(self, ports: Ports, household: Household) -> None:
        self._ports = ports
        self._household = household
        self._turn = asyncio.Lock()

    async def adopt(self, name: str, wanted: Wanted) -> Outcome:
        """Give the domain memory of the agent's, and the agent a way to its QEMU. Raises NotAdoptable, InvalidArgument,
        MemoryUnusable, WrongState; the domain is as it was then."""
        async with self._turn:
            async with self._changing(name):
                found = await self._ports.domains.adoptable(name)
                with _changing_nothing(name):
                    memory, align = await self._memory(found, wanted)
                change = await self._ports.domains.adoption(name, memory, align)
                await self._define(change, wanted)
            if wanted.act:
                await self._household.reload()
            return Outcome(change, memory)

    async def release(self, name: str, wanted: Wanted) -> Outcome:
        """Give the domain back as it was. Its guest is shut off, and its RAM is not needed any more. Raises NothingToDo,
        WrongState, InvalidDefinition."""
        async with self._turn:
            vm = self._household.vms.get(name)
            memory = vm.definition.memory.ranges[0] if vm and vm.definition else None
            if vm and vm.owner == "agent":
                raise InvalidArgument("is a VM of the agent's own, and no adopted domain", vm=name, left=NOTHING)
            async with self._changing(name):
                change = await self._ports.domains.release(name)
                await self._define(change, wanted)
            if wanted.act:
                await self._household.reload()
            return Outcome(change, memory)

    @contextlib.asynccontextmanager
    async def _changing(self, name: str) -> AsyncIterator[None]:
        """The VM is at rest, if there is one, and errors name it. Raises InvalidArgument for one whose definition is no
        domain."""
        vm = self._household.vms.get(name)
        if vm and vm.owner == "agent":
            raise InvalidArgument(
                "is a VM of the agent, by its definition or its guest",
                vm=name,
                left=NOTHING,
                remedy="rename the domain, `virsh domrename`; or remove the VM's definition",
            )
        async with vm.at_rest() if vm else contextlib.nullcontext():
            with naming(name):
                yield

    async def _define(self, change: Change, wanted: Wanted) -> None:
        if not wanted.act:
            return
        if wanted.token and wanted.token != change.token:
            raise WrongState(
                "is not what it was when the change was shown, or its memory is taken by now",
                vm=change.name,
                left=NOTHING,
                remedy="look at the change again",
            )
        await self._ports.domains.define(change)

    async def _memory(self, found: Adoptable, wanted: Wanted) -> tuple[MemoryNode, int]:
        """The range that it gets, and its alignment; nobody else has a byte of it. Raises InvalidArgument, MemoryUnusable,
        MemoryOverlap."""
        claims = await self._household.claimed(found.name)
        one = self._chosen(found, wanted, claims)
        if one.offset and found.qemu_too_old:
            what = f"its QEMU {found.qemu_too_old} can't have memory that begins at offset {int(one.offset)}"
            raise MemoryUnusable(what, remedy=_NEWER_QEMU)
        section = MemorySection(size=one.size, device=one.device, offset=one.offset)
        align = 0
        if not self._ports.memory.creatable(section):
            located: list[Located] = await self._ports.memory.locate(section, 0)
            refuse_overlap(found.name, ram_of(located), claims)
            align = located[0].identity.align_bytes
        self._refuse_same_place(found.name, one)
        return one, align

    def _chosen(self, found: Adoptable, wanted: Wanted, claims: list[tuple[str, MemoryIdentity]]) -> MemoryNode:
        device, offset, size = wanted.device, _offset(wanted.offset), Bytes(found.size_bytes)
        was = found.adopted
        if was and not device and offset is None:
            if was.size == size:
                return was
            device = was.device
            offset = was.offset if _is_file(device) else None
        if offset is not None and not device:
            raise InvalidArgument("an offset needs a device", remedy="name it: see `cprctl devices`")
        if not device.isprintable():
            raise InvalidArgument("the name of its memory has a character that does not show")
        if _is_file(device):
            return MemoryNode(size=size, device=device, offset=offset or Bytes(0))
        bare = device.removeprefix("uuid:")
        if offset is not None:
            return self._range_at(offset, bare, size)
        if found.qemu_too_old:
            return self._range_at_a_start(found, bare, claims)
        chosen, place = allocate(found.name, size, self._ports.memory.devices(), claims, bare)
        return MemoryNode(size=size, device=f"uuid:{chosen.uuid}", offset=Bytes(place.offset))

    def _range_at(self, offset: Bytes, device: str, size: Bytes) -> MemoryNode:
        """Raises InvalidArgument."""
        known = next((one for one in self._ports.memory.devices() if one.uuid and device in (one.uuid, one.node)), None)
        if known is None:
            raise InvalidArgument(f"there is no dax device {device}", remedy="see `cprctl devices`")
        return MemoryNode(size=size, device=f"uuid:{known.uuid}", offset=offset)

    def _range_at_a_start(self, found: Adoptable, device: str, claims: list[tuple[str, MemoryIdentity]]) -> MemoryNode:
        """Raises MemoryUnusable."""
        for one in self._ports.memory.devices():
            first = next(iter(free(one, used(one, claims))), None)
            fits = first and first.offset == 0 and first.size >= found.size_bytes
            if one.uuid and device in ("", one.uuid, one.node) and fits:
                return MemoryNode(size=Bytes(found.size_bytes), device=f"uuid:{one.uuid}")
        what = f"no dax device has {found.size_bytes} bytes free at its start, where alone its QEMU can have them"
        raise MemoryUnusable(f"{what} ({found.qemu_too_old})", remedy=_NEWER_QEMU)

    def _refuse_same_place(self, name: str, one: MemoryNode) -> None:
        """Memory that is not there yet, or that its VM could not have, has no identity to compare: another VM's definition
        may name it all the same. Raises MemoryOverlap."""
        for vm in self._household.vms.values():
            for other in vm.definition.memory.ranges if vm.definition and vm.name != name else ():
                apart = one.offset >= other.offset + other.size or other.offset >= one.offset + one.size
                if other.device == one.device and not apart:
                    raise MemoryOverlap(f"its memory {one.device} is that of VM {vm.name}", remedy="use another one")


@contextlib.contextmanager
def _changing_nothing(name: str) -> Iterator[None]:
    """Name the domain in errors of memory, by which nothing was started here."""
    try:
        yield
    except CprError as error:
        error.vm, error.left = name, NOTHING
        raise


def _is_file(device: str) -> bool:
    """Whether a definition that names this device names a file."""
    return device.startswith("/") and not device.startswith("/dev/dax")


def _offset(text: str) -> Bytes | None:
    """Raises InvalidArgument."""
    try:
        return Bytes.parse(text) if text else None
    except ValueError as error:
        raise InvalidArgument(str(error), left=NOTHING) from error
