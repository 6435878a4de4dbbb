# SPDX-License-Identifier: GPL-2.0-or-later
"""Libvirt's domains, looked at and defined anew; implements core.domains.Domains.

Libvirt gives XML with its passwords only to who asks for them, and a definition without them would lose them: the XML here
has them, and goes nowhere but back to libvirt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from cpr_agent.core.domains import Adoptable, Change
from cpr_agent.core.model import MemoryNode
from cpr_agent.domains import qemu_conf, xml
from cpr_agent.domains.connection import dotted, installed_version
from cpr_agent.domains.names import Places
from cpr_agent.domains.refusals import Refusal
from cpr_agent.errors import NoSuchVM, NotAdoptable, NothingToDo, QemuRefused, WrongState

T = TypeVar("T")

_XML_SECURE, _XML_INACTIVE = 1, 2
"""VIR_DOMAIN_XML_SECURE and VIR_DOMAIN_XML_INACTIVE of libvirt/libvirt-domain.h."""
OFFSET_SINCE = 8_001_000
"""QEMU 8.1, as libvirt counts versions: memory-backend-file has had ``offset`` since (QEMU, qapi/qom.json)."""
FORMATS = ("save_image_format", "snapshot_image_format")
"""Of qemu.conf. An image that is sparse is QEMU's mapped-ram, which can't leave RAM in place."""
MEBIBYTE = 1 << 20
_WITH_MEMORY = re.compile(r"<memory snapshot=['\"](internal|external)['\"]")
"""libvirt, docs/formatsnapshot.rst."""
_NOTHING = "nothing was changed"


class Session(Protocol):
    """A connection to libvirt, and the thread in which its calls are made."""

    async def ask(self, domain: str, deed: str, work: Callable[[Any], T]) -> T:
        """``work`` with libvirt's connection. Raises QemuUnreachable, QemuRefused."""


class Facts(NamedTuple):
    """What libvirt says of a domain. ``qemu_version`` is 0 where it does not say."""

    xml: str
    active: bool
    persistent: bool
    managed_save: bool
    snapshots: tuple[str, ...]
    """Names of those that have the guest's RAM."""
    qemu_version: int


class LibvirtDomains:
    """``conf`` is the path of qemu.conf."""

    def __init__(self, session: Session, places: Places, conf: Path) -> None:
        self._session = session
        self._places = places
        self._conf = conf

    async def adoptable(self, name: str) -> Adoptable:
        facts = await self._facts(name)
        domain = xml.read(facts.xml, self._places)
        bare = xml.release(facts.xml)
        if found := [*_not_now(facts, name), *self._not_with(bare, domain.memory_bytes)]:
            remedies = dict.fromkeys(one.remedy for one in found if one.remedy)
            raise NotAdoptable([one.cause for one in found], vm=name, remedy="; ".join(remedies))
        one = xml.settings(facts.xml)
        version = facts.qemu_version
        return Adoptable(
            name=name,
            size_bytes=domain.memory_bytes,
            adopted=MemoryNode(size=one.size, device=one.device, offset=one.offset) if one else None,
            qemu_too_old=dotted(version) if 0 < version < OFFSET_SINCE else "",
        )

    async def adoption(self, name: str, memory: MemoryNode, align_bytes: int) -> Change:
        before = (await self._facts(name)).xml
        adopted = xml.with_memory(xml.settings(before), memory, align_bytes)
        return _change(name, before, xml.adopt(before, adopted, self._places))

    async def release(self, name: str) -> Change:
        facts = await self._facts(name)
        if not xml.is_touched(facts.xml):
            raise NothingToDo("is a libvirt domain that was not adopted", vm=name, left=_NOTHING)
        if found := _not_now(facts, name):
            first = found[0]
            raise WrongState(f"can't be released: it {first.cause}", vm=name, left=_NOTHING, remedy=first.remedy)
        return _change(name, facts.xml, xml.release(facts.xml))

    async def define(self, change: Change) -> None:
        facts = await self._facts(change.name)
        if facts.xml != change.before or facts.active:
            what = "was started" if facts.active else "was changed"
            raise WrongState(f"{what} by somebody else meanwhile", vm=change.name, left=_NOTHING, remedy="try again")
        await self._define(change.name, change.after)
        after = await self._facts(change.name)
        problem = "it was started meanwhile" if after.active else self._problem(change, after.xml)
        if problem:
            await self._define(change.name, change.before)
            what = f"was defined anew, and then as before: {problem}"
            raise QemuRefused(
                what, vm=change.name, left="it is as it was", remedy="try again, or see its XML: virsh dumpxml"
            )

    def _problem(self, change: Change, now: str) -> str:
        """Why libvirt's XML is not what the change was to make of it; "" if it is."""
        wanted, found = xml.read(change.after, self._places), xml.read(now, self._places)
        if found.problem or found.adopted != wanted.adopted or xml.is_touched(now) != xml.is_touched(change.after):
            return found.problem or "libvirt has not taken all of it"
        return ""

    async def _define(self, name: str, text: str) -> None:
        await self._session.ask(name, "defined the domain", lambda connection: connection.defineXML(text))

    async def _facts(self, name: str) -> Facts:
        """Raises NoSuchVM, QemuUnreachable, QemuRefused."""
        facts = await self._session.ask(name, "told of the domain", lambda connection: _look(connection, name))
        if facts is None:
            raise NoSuchVM(f"there is no libvirt domain {name!r}", left="nothing was done", remedy="see `virsh list --all`")
        return facts

    def _not_with(self, bare: str, memory_bytes: int) -> Iterator[Refusal]:
        """Reasons in the domain's XML, or in libvirt's settings."""
        yield from xml.reasons(bare)
        if memory_bytes % MEBIBYTE:
            cause = f"has {memory_bytes} bytes of RAM, which libvirt rounds up as it starts"
            yield Refusal(cause, "give it whole MiB: virsh setmaxmem --config")
        try:
            settings = qemu_conf.read(self._conf)
        except (ValueError, OSError) as error:
            yield Refusal(f"is of a libvirt whose {self._conf} can't be read: {error}", f"mend {self._conf}")
            return
        for name in FORMATS:
            if (value := qemu_conf.text(settings, name, "raw")) != "raw":
                cause = f'is of a libvirt whose {name} is "{value}", in which no state can be loaded in place'
                yield Refusal(cause, f'set {name} = "raw" in {self._conf}, and restart libvirt\'s daemon')


def _not_now(facts: Facts, name: str) -> list[Refusal]:
    """Reasons in the domain's state."""
    found = []
    if not facts.persistent:
        found.append(
            Refusal("is transient: libvirt forgets it when it is shut off", f"virsh define its XML: virsh dumpxml {name}")
        )
    if facts.active:
        found.append(Refusal("is running", f"shut its guest off first: virsh shutdown {name}"))
    if facts.managed_save:
        remedy = f"start it and shut it off, or give that state up: virsh managedsave-remove {name}"
        found.append(Refusal("has a saved state (managed save), which other RAM belongs to", remedy))
    if facts.snapshots:
        what = f"has snapshots with memory ({', '.join(facts.snapshots[:5])}), which have other RAM"
        found.append(Refusal(what, f"remove them: virsh snapshot-delete {name}"))
    return found


def _look(connection: Any, name: str) -> Facts | None:
    """Blocking, in the session's thread. None if there is no such domain."""
    domain = next((one for one in connection.listAllDomains(0) if one.name() == name), None)
    if domain is None:
        return None
    text = str(domain.XMLDesc(_XML_SECURE | _XML_INACTIVE))
    persistent = bool(domain.isPersistent())
    snapshots = domain.listAllSnapshots(0) if persistent else []
    emulator = re.search(r"<emulator>([^<]*)</emulator>", text)
    return Facts(
        xml=text,
        active=bool(domain.isActive()),
        persistent=persistent,
        managed_save=bool(domain.hasManagedSaveImage(0)),
        snapshots=tuple(one.getName() for one in snapshots if _WITH_MEMORY.search(one.getXMLDesc(0))),
        qemu_version=installed_version(connection, emulator[1]) if emulator else 0,
    )


def _change(name: str, before: str, after: str) -> Change:
    """Raises NothingToDo."""
    if before == after:
        raise NothingToDo("is adopted already, with that memory", vm=name, left=_NOTHING)
    return Change(name=name, before=before, after=after, diff=xml.diff(before, after, name))
