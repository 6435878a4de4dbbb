# SPDX-License-Identifier: GPL-2.0-or-later
"""After a kexec a guest goes on once what is its own is there, and before the host's services are (ADR 33).

This module waits, and decides nothing: each proof of a load is made as ever. A guest that lacks something is left to the
load of all, which comes with the host's services.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Iterable

import msgspec

from cpr_agent.core.acts.requests import LoadRequest
from cpr_agent.core.jobs import Job, Step
from cpr_agent.core.model import Manifest
from cpr_agent.core.ports import Ports
from cpr_agent.core.proof import naming, refuse_changed_disks
from cpr_agent.core.turns import Places, PlaceTurn
from cpr_agent.core.upgrade.ledger import Phase
from cpr_agent.core.upgrade.load_all import GROUP_S
from cpr_agent.core.upgrade.scope import Failure, Scope, in_turn, names, on_all, on_each
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CprError, LoadFailed, NothingToDo

log = logging.getLogger(__name__)

KVM = "/dev/kvm"
ROUNDS = 8
"""A link may lead to another mount, and so on."""
_LEFT = "it is loaded with the host's services"


class Needs(msgspec.Struct, frozen=True):
    """What of the host a guest's QEMU opens: paths of files, nodes of devices, and network interfaces. Each name is a
    definition's or the kernel's own."""

    paths: frozenset[str]
    devices: frozenset[str]
    interfaces: frozenset[str]

    @classmethod
    def of(cls, manifest: Manifest, ports: Ports) -> Needs:
        launch, inventory = manifest.launch, manifest.inventory
        images = ports.definitions.images(launch.base_argv)
        named = [
            *(manifest.vmstate.path, launch.log, launch.argv[0]),
            *images,
            *(one.path for one in manifest.memory if one.kind == "file"),
            *(node.file.path for node in (inventory.nodes if inventory else ()) if node.file),
        ]
        return cls(
            paths=frozenset(path for path in named if path.startswith("/")),
            devices=frozenset(path for path in (*images, *launch.opened) if path.startswith("/dev/")),
            interfaces=frozenset(name for word in launch.argv for name in re.findall(r"(?:^|,)ifname=([^,]+)", word)),
        )


async def load_early(scope: Scope, job: Job, services: asyncio.Event) -> None:
    """Load what the last kexec has saved, each guest as soon as it can be; ``services`` ends the wait for what is missing.
    The upgrade goes on until the load of all. Raises LoadFailed, NothingToDo."""
    upgrade = scope.ledger.require_current().id
    first = [vm for vm in scope.vms() if vm.checkpointed and not _told(vm, _why_later(vm, upgrade))]
    if not first:
        raise NothingToDo("no guest can go on before the host's services are there")
    scope.ledger.enter(Phase.LOADING)
    places = Places()

    async def load(vm: Vm) -> None:
        if not await _unless(services, _until_there(vm)):
            job.forget(vm.name)
            return
        with job.guest(vm.name, Step.LOADING, Step.LOADED):
            await vm.idle()
            if vm.checkpointed:
                await vm.load(LoadRequest(turn=PlaceTurn(places), cold_start=False))

    job.expect(vm.name for vm in first)
    late = [vm for vm in first if _lacking(vm)]
    failures: list[Failure] = []
    async with asyncio.TaskGroup() as loads:
        tasks = [loads.create_task(on_each(late, load))]
        for group in in_turn(vm for vm in first if vm not in late):
            job.enter(f"loading {names(group)}")
            tasks.append(loads.create_task(on_each(group, load)))
            await asyncio.wait(tasks[-1:], timeout=GROUP_S)
        if late:
            job.enter(f"waiting for what {names(late)} needs")
    for task in tasks:
        failures += task.result()
    await on_all(first, lambda vm: vm.settled())
    if failures:
        raise LoadFailed("; ".join(map(str, failures)), left=f"{_LEFT}, once more")


def _told(vm: Vm, why: str) -> bool:
    if why:
        log.info("VM %s: %s: %s", vm.name, _LEFT, why)
    return bool(why)


def _why_later(vm: Vm, upgrade: str) -> str:
    """Why its guest waits for the host's services; "" if it does not."""
    manifest, ports = vm.machine.readable_checkpoint(), vm.machine.ports
    if manifest is None:
        return "its checkpoint can't be read"
    if vm.machine.own.delegated:
        return "another program runs its QEMU"
    if manifest.upgrade != upgrade:
        return "this kexec has not saved it"
    if vm.held():
        return "it is held"
    if any(disk.kind == "remote" for disk in manifest.qemu.disks):
        return "a disk of it is not on this host"
    words = manifest.launch.argv
    if any("vfio" in word for word in words):
        return "it has devices of the host"
    if any("kvm" in word for word in words) and (
        not ports.files.look_at(KVM) or ports.files.access(KVM, manifest.launch.user).closed
    ):
        return f"{KVM} is not there for its user"
    return ""


def _lacking(vm: Vm, paths: Iterable[str] = ()) -> list[str]:
    """Units that it waits for, where ``paths`` are what its own lead to."""
    manifest = vm.machine.readable_checkpoint()
    if manifest is None:
        return []
    needs = Needs.of(manifest, vm.machine.ports)
    return vm.machine.ports.units.lacking(needs.paths | set(paths), needs.devices, needs.interfaces)


async def _until_there(vm: Vm) -> bool:
    """Wait for what is its own. Returns whether all is as it was saved: what is not need not have come to its end."""
    machine, ports = vm.machine, vm.machine.ports
    manifest = machine.readable_checkpoint()
    if manifest is None:
        return False
    paths = set(Needs.of(manifest, ports).paths)
    try:
        for _ in range(ROUNDS):
            if lacking := _lacking(vm, paths):
                log.info("VM %s: waits for %s", vm.name, ", ".join(lacking))
                said = [one for one in await asyncio.gather(*map(ports.units.start, lacking)) if one]
                if _told(vm, "; ".join(said)):
                    return False
            elif (real := await _real(ports, vm.name, paths)) <= paths:
                break
            else:
                paths |= real
        with naming(vm.name):
            await ports.memory.relocate(manifest.memory, machine.settings.agent.device_timeout)
            await refuse_changed_disks(ports, manifest)
        missing = await ports.definitions.missing_companions(manifest.launch, 0)
        return not _told(vm, f"not there yet: {', '.join(map(str, missing))}" if missing else "")
    except CprError as error:
        return not _told(vm, error.what)


async def _real(ports: Ports, vm: str, paths: Iterable[str]) -> set[str]:
    """Where links lead. Raises StorageSilent."""
    listed = sorted(paths)
    return await ports.threads.run(vm, lambda: {ports.files.real_directory(path) for path in listed})


async def _unless(event: asyncio.Event, work: Awaitable[bool]) -> bool:
    """What ``work`` returns; False if the event comes first."""
    task, waiter = asyncio.ensure_future(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        return task.done() and task.result()
    finally:
        waiter.cancel()
        task.cancel()
        await asyncio.gather(task, waiter, return_exceptions=True)
