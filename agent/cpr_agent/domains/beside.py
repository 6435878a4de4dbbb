# SPDX-License-Identifier: GPL-2.0-or-later
"""The ports of both kinds of VM as one: the agent's own VMs, and libvirt's domains beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cpr_agent.core.model import (
    BlockNode,
    Companion,
    Definition,
    Finding,
    Firmware,
    Held,
    Imported,
    Inventory,
    KeptFile,
    Launch,
    Located,
    Manifest,
    Owner,
)
from cpr_agent.core.ports import Definitions, NoSurroundings, PendingState, Place, Runner, Store, Surroundings
from cpr_agent.domains.hub import Domains
from cpr_agent.errors import InvalidDefinition


class BothRunners:
    """Implements core.ports.Runner."""

    def __init__(self, own: Runner, domains: Domains) -> None:
        self._own = own
        self._domains = domains

    def _of(self, name: str) -> Runner:
        return self._domains.runner if name in self._domains else self._own

    def own(self, name: str) -> Place:
        return self._of(name).own(name)

    def spare(self, name: str) -> Place:
        return self._of(name).spare(name)

    def adopt(self, name: str) -> None:
        self._of(name).adopt(name)

    def launched(self, name: str) -> Launch | None:
        return self._of(name).launched(name)

    def launched_all(self) -> list[str]:
        return sorted({*self._own.launched_all(), *self._domains.launched_all})

    def trim_logs(self) -> None:
        self._own.trim_logs()

    def inventory(self, name: str) -> Inventory | None:
        return self._of(name).inventory(name)

    def record_inventory(self, name: str, inventory: Inventory) -> None:
        self._of(name).record_inventory(name, inventory)

    def user(self, name: str) -> str:
        return self._of(name).user(name)

    async def assign_user(self, name: str) -> str:
        return await self._of(name).assign_user(name)

    async def prepare(self, launch: Launch) -> None:
        await self._of(launch.vm).prepare(launch)

    def unit(self, name: str) -> str:
        return self._of(name).unit(name)


class BothDefinitions:
    """Implements core.ports.Definitions."""

    def __init__(self, own: Definitions, domains: Domains, launched: Callable[[str], Launch | None]) -> None:
        """``launched``: how the own VM of this name was started since the host booted."""
        self._own = own
        self._domains = domains
        self._launched = launched

    @property
    def directory(self) -> str:
        return self._own.directory

    def owner(self, name: str) -> Owner:
        return "libvirt" if name in self._domains else self._own.owner(name)

    def parse(self, name: str, text: str) -> Definition:
        return self._own.parse(name, text)

    def import_command_line(self, text: str, *, name: str, device: str, offset: str, user: str) -> Imported:
        return self._own.import_command_line(text, name=name, device=device, offset=offset, user=user)

    def load_all(self) -> tuple[dict[str, Definition], dict[str, Exception]]:
        """A name that both have is nobody's: neither may start on the other one's memory."""
        good, bad = self._own.load_all()
        defined = {*good, *bad}

        def is_own(name: str) -> bool:
            launch = None if name in defined else self._launched(name)
            return name in defined or (launch is not None and self._domains.is_not_libvirts(name, launch.user))

        domains, unusable = self._domains.load_all(is_own)
        for name in filter(is_own, {*domains, *unusable}):
            what = "an own VM and an adopted domain of libvirt's have the same name"
            bad[name] = InvalidDefinition(what, vm=name, remedy="rename one of them")
            for some in (good, domains, unusable):
                some.pop(name, None)
        return {**good, **domains}, {**bad, **unusable}

    def plan_start(self, definition: Definition, located: Sequence[Located]) -> Launch:
        part = self._domains.definitions if definition.name in self._domains else self._own
        return part.plan_start(definition, located)

    def plan_load(self, manifest: Manifest, located: Sequence[Located]) -> Launch:
        part = self._domains.definitions if manifest.vm in self._domains else self._own
        return part.plan_load(manifest, located)

    def unshareable(self, launch: Launch) -> list[str]:
        return self._own.unshareable(self._domains.plain(launch))

    def companions(self, launch: Launch) -> list[Companion]:
        return self._own.companions(self._domains.plain(launch))

    async def missing_companions(self, launch: Launch, timeout_s: float) -> list[Companion]:
        return await self._own.missing_companions(self._domains.plain(launch), timeout_s)

    def passwords(self, launch: Launch) -> list[str]:
        return self._own.passwords(launch)

    def emptied_logs(self, launch: Launch) -> list[str]:
        return [] if launch.vm in self._domains else self._own.emptied_logs(launch)

    def images(self, arguments: Sequence[str]) -> list[str]:
        return self._own.images(arguments)

    def cpus(self, arguments: Sequence[str]) -> int:
        return self._own.cpus(arguments)

    def images_below(self, arguments: Sequence[str]) -> list[str]:
        return self._own.images_below(arguments)

    def read_at_start(self, launch: Launch) -> list[str]:
        return [] if launch.vm in self._domains else self._own.read_at_start(launch)  # libvirt makes its secrets anew

    def plan_transfer(self, draft: Manifest, located: Sequence[Located], directory: str) -> Launch:
        return self._own.plan_transfer(draft, located, directory)

    def follows(self, launch: Launch) -> bool:
        return launch.vm in self._domains

    def carry(self, launch: Launch, was: Sequence[BlockNode], now: Sequence[BlockNode]) -> Launch | None:
        return self._own.carry(launch, was, now)

    def firmware(self, launch: Launch) -> Firmware:
        return self._domains.definitions.firmware(launch) if launch.vm in self._domains else self._own.firmware(launch)

    def with_firmware(self, launch: Launch, copies: Sequence[KeptFile]) -> Launch:
        return launch if launch.vm in self._domains else self._own.with_firmware(launch, copies)

    def plan_probe(self, launch: Launch) -> Launch:
        return self._own.plan_probe(launch)


class DomainSurroundings:
    """Implements core.ports.Surroundings; ``root`` is / but for tests."""

    def __init__(self, root: Path, domains: Domains) -> None:
        self._root = root
        self._domains = domains

    def _all(self) -> Surroundings:
        if not self._domains.nodes:
            return NoSurroundings()
        from cpr_agent.domains.host_findings import LibvirtSurroundings  # a host without domains has none

        return LibvirtSurroundings(self._root, lambda: self._domains.nodes, lambda: self._domains.heard_at)

    def findings(self) -> list[Finding]:
        return self._all().findings()

    def findings_of(self, vm: str) -> list[Finding]:
        return self._all().findings_of(vm)


class BothStores:
    """Implements core.ports.Store; ``own`` has the checkpoints of both."""

    def __init__(self, own: Store, domains: Domains) -> None:
        self._own = own
        self._domains = domains

    def _of(self, name: str) -> Store:
        return self._domains.store if name in self._domains else self._own

    def live(self, vm: str) -> Manifest | None:
        return self._own.live(vm)

    def verify(self, manifest: Manifest) -> None:
        self._own.verify(manifest)

    def room_bytes(self) -> int:
        return self._own.room_bytes()

    def live_all(self) -> list[str]:
        return self._own.live_all()

    def checkpointed(self, vm: str) -> bool:
        return self._own.checkpointed(vm)

    def begin(self, vm: str, filename: str) -> PendingState:
        return self._of(vm).begin(vm, filename)

    def reopen(self, vm: str, path: str) -> PendingState:
        return self._of(vm).reopen(vm, path)

    def open_vmstate(self, manifest: Manifest, filename: str) -> int:
        return self._of(manifest.vm).open_vmstate(manifest, filename)

    def consume(self, manifest: Manifest) -> None:
        self._of(manifest.vm).consume(manifest)

    def restore(self, vm: str, checkpoint: str) -> None:
        self._of(vm).restore(vm, checkpoint)

    def discard(self, vm: str, suffix: str = "discarded") -> None:
        self._of(vm).discard(vm, suffix)

    def hold(self, vm: str, held: Held) -> None:
        self._own.hold(vm, held)

    def held(self, vm: str) -> Held | None:
        return self._own.held(vm)
