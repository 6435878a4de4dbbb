# SPDX-License-Identifier: GPL-2.0-or-later
"""Reasons why a save, or a load after a kexec, would fail now. Looks, and touches nothing that a guest could notice."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

from cpr_agent.core.hooks import vetoes
from cpr_agent.core.inventory import carried_now, lost, recorded_of, unnamed_devices
from cpr_agent.core.model import Companion, Finding, Launch, Manifest, MemoryIdentity, Ram, Survives, overlapping, ram_of
from cpr_agent.core.ports import Ports
from cpr_agent.core.proof import DRAM_PROVIDER, refuse_changed_disks, refuse_changed_firmware, refuse_spent
from cpr_agent.core.run_states import SAVEABLE
from cpr_agent.core.saveable import obstacle
from cpr_agent.core.separation import image_findings, sharing_findings
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CheckpointUnreadable, CprError, DeviceMissing, MemoryChanged, MemoryUnusable

MEMORY_SURVIVES = "memory-survives"


async def check_vm(
    vm: Vm, ports: Ports, claims: list[tuple[str, MemoryIdentity]], users: Mapping[str, str]
) -> list[Finding]:
    """Each finding says what is so, why it matters and how to mend it. ``claims`` and ``users`` are the memory and the
    users of the other VMs."""
    found = _definition_findings(vm)
    launch, manifest = vm.launched(), _live_checkpoint(vm, found)
    memory = launch.memory if launch else manifest.memory if manifest else await _defined_memory(vm, ports, found)
    if memory:
        found += _memory_findings(vm, memory, claims)
    found += sharing_findings(vm.name, vm.user, users, memory, claims)
    plan = launch or (manifest.launch if manifest else None)
    if arguments := plan.argv if plan else vm.definition.vm.arguments if vm.definition else ():
        found += await ports.threads.run(vm.name, partial(image_findings, ports, vm.name, vm.user, arguments))
    if vm.definition_state == "changed":
        what, why = "its definition changed since it was started", "a load uses what it was started with"
        found.append(Finding(severity="info", code="definition-changed", what=what, why=why, vm=vm.name))
    found += ports.surroundings.findings_of(vm.name)
    found += _state_findings(vm)
    if launch and _has_live_guest(vm):
        found += await _guest_findings(vm, launch)
        found += await _disk_findings(vm, ports, launch)
        found += await _lost_findings(vm, ports, launch)
        found += _log_findings(vm, ports.definitions.emptied_logs(launch))
        found += _companion_findings(vm, ports.definitions.companions(launch))
        found += await _witness_findings(vm, ports, launch)
    elif manifest and not vm.busy:
        found += await _load_findings(vm, ports, manifest)
    return found


async def check_hooks(vm: Vm) -> list[Finding]:
    """Reasons that the admin's hooks have against a save."""
    if not _has_live_guest(vm):
        return []
    why, remedy = "an upgrade or a save would be refused", "see /usr/share/doc/cpr-agent/insight.md, hooks"
    return [
        Finding(severity="error", code="hook", what=said, why=why, remedy=remedy, vm=vm.name)
        for said in await vetoes(vm.machine)
    ]


def _has_live_guest(vm: Vm) -> bool:
    return vm.qemu is not None and vm.launched() is not None and vm.run_state in SAVEABLE


def _state_findings(vm: Vm) -> list[Finding]:
    """Why its guest could not be saved as it stands now, in the words of the save."""
    error = obstacle(vm.machine) if vm.pid else None
    if error is None:
        return []
    why = "a save would be refused"
    return [Finding(severity="error", code="state", what=error.what, why=why, remedy=error.remedy, vm=vm.name)]


def _definition_findings(vm: Vm) -> list[Finding]:
    found = []
    if vm.definition is None:
        what, why = str(vm.problem or "its definition is gone"), "it could not be started"
        found.append(Finding(severity="error", code="definition", what=what, why=why, vm=vm.name))
    if held := vm.held():
        why, remedy = "the guest waits in its memory", f"see `cprctl status {vm.name}`"
        found.append(Finding(severity="error", code="held", what=held.reason, why=why, remedy=remedy, vm=vm.name))
    return found


async def _guest_findings(vm: Vm, launch: Launch) -> list[Finding]:
    """Reasons why its QEMU could not save it, or the installed QEMU could not load it."""
    refused = "QEMU or the agent would refuse to save it"
    held = "after a kexec its guest would be held, and not run until a QEMU is installed that can load it"
    newer = f"install the QEMU that it runs in, or a newer one, as {launch.base_argv[0]}"
    return [
        *(
            Finding(severity="error", code="blocked", what=reason, why=refused, vm=vm.name)
            for reason in await vm.blocked_reasons()
        ),
        *(
            Finding(severity="error", code="successor", what=reason, why=held, remedy=newer, vm=vm.name)
            for reason in await vm.successor_reasons()
        ),
    ]


async def _disk_findings(vm: Vm, ports: Ports, launch: Launch) -> list[Finding]:
    recorded = recorded_of(ports, launch)
    found = await _carried_findings(vm, ports, launch)
    why = "it can be saved for a restart of QEMU, but an upgrade of the host will refuse it"
    remedy = "give it a serial number, or have the disk in a logical volume"
    return found + [
        Finding(severity="warning", code="unnamed-disk", what=what, why=why, remedy=remedy, vm=vm.name)
        for what in (unnamed_devices(recorded) if recorded else ())
    ]


async def _lost_findings(vm: Vm, ports: Ports, launch: Launch) -> list[Finding]:
    """What its guest does not see, and its next QEMU would not have."""
    if vm.qemu is None:
        return []
    said = [str(one) for one in await lost(ports, vm.qemu, launch)]
    said += [f"its password for {display} was set on the monitor" for display in ports.definitions.passwords(launch)]
    why = "its guest sees nothing of it, and a load has what its QEMU was started with"
    remedy = (
        "let the definition say so, or do it again after the load: a hook can (/usr/share/doc/cpr-agent/insight.md, hooks)"
    )
    return [Finding(severity="warning", code="not-carried", what=what, why=why, remedy=remedy, vm=vm.name) for what in said]


def _companion_findings(vm: Vm, companions: list[Companion]) -> list[Finding]:
    """Programs of this host that must be there before a load, and after a kexec are not by themselves."""
    remedy = (
        "have a unit start it before cpr-load.service, and again whenever it ends: /usr/share/doc/cpr-agent/companions.md"
    )
    return [
        Finding(
            severity="warning",
            code="companion",
            what=f"it needs {one}, which {'ends with its QEMU' if one.ends else 'ends with this kernel'}",
            why="a load waits a few seconds for another one to be there, and fails without it; the checkpoint is kept then"
            + ("; a refresh is refused" if one.ends else ""),
            remedy=remedy,
            vm=vm.name,
        )
        for one in companions
        if one.is_local
    ]


def _log_findings(vm: Vm, ports: list[str]) -> list[Finding]:
    why = "QEMU begins the file anew whenever it starts, that for a load and for a refresh included"
    remedy = "have a character device for it: -chardev file,id=…,path=…,append=on -serial chardev:…"
    return [
        Finding(
            severity="info",
            code="emptied-log",
            what=f"a load empties the file of {one}",
            why=why,
            remedy=remedy,
            vm=vm.name,
        )
        for one in ports
    ]


async def _carried_findings(vm: Vm, ports: Ports, launch: Launch) -> list[Finding]:
    """What its next QEMU gets, and a start by its definition would not."""
    if vm.qemu is None:
        return []
    why = "a save and a load carry it over, but a fresh start has what the definition says"
    remedy = "let the definition say so, before the guest is shut down"
    return [
        Finding(severity="warning", code="carried-over", what=str(one), why=why, remedy=remedy, vm=vm.name)
        for one in (await carried_now(ports, vm.qemu, launch)).disks.values()
    ]


async def _witness_findings(vm: Vm, ports: Ports, launch: Launch) -> list[Finding]:
    """The time that the proof of the RAM's contents adds to the guest's pause, twice: measured here and now."""
    try:
        located = await ports.memory.relocate(launch.memory, 0.5)
        kind, seconds = await ports.memory.witness_cost_s(located, vm.machine.settings.witness.kind)
    except (DeviceMissing, MemoryChanged):  # it is told among what blocks a save
        return []
    except CprError as error:
        return [Finding(severity="error", code=error.kind, what=error.what, remedy=error.remedy, vm=vm.name)]
    what = f"the witness of its RAM ({kind}) takes {seconds:.3f} s, at the save and at the load"
    return [Finding(severity="info", code="witness", what=what, vm=vm.name, seconds=seconds)]


async def _load_findings(vm: Vm, ports: Ports, manifest: Manifest) -> list[Finding]:
    """Why a load of its checkpoint would be refused now, by what the load itself asks: but for the contents of its RAM, and
    for the QEMU that it would go on in."""
    errors = []
    for proof in _PROOFS:
        try:
            await proof(ports, manifest)
        except CprError as error:
            errors.append(error)
    live = None if vm.busy else vm.machine.readable_checkpoint()
    if live is None or live.id != manifest.id:  # its guest has gone on meanwhile
        return []
    why, remedy = "a load would be refused, and its guest could not go on", "bring back what it was saved with"
    return [
        Finding(severity="error", code=error.kind, what=error.what, why=why, remedy=error.remedy or remedy, vm=vm.name)
        for error in errors
    ]


async def _refuse_spent(ports: Ports, manifest: Manifest) -> None:
    refuse_spent(ports, manifest)


async def _refuse_other_state(ports: Ports, manifest: Manifest) -> None:
    """It has some hundred KB, and is read whole."""

    def look() -> None:
        os.close(ports.store.open_vmstate(manifest, ""))

    await ports.threads.run(manifest.vm, look)


async def _refuse_lost_memory(ports: Ports, manifest: Manifest) -> None:
    await ports.memory.relocate(manifest.memory, 0.5)


_PROOFS = (_refuse_spent, _refuse_other_state, _refuse_lost_memory, refuse_changed_disks, refuse_changed_firmware)
"""Those of a load that cost little, and touch nothing."""


def _live_checkpoint(vm: Vm, found: list[Finding]) -> Manifest | None:
    try:
        return vm.live_checkpoint()
    except CheckpointUnreadable as error:
        code = "checkpoint-unreadable"
        found.append(Finding(severity="error", code=code, what=error.what, why=error.left, remedy=error.remedy, vm=vm.name))
        return None


async def _defined_memory(vm: Vm, ports: Ports, found: list[Finding]) -> Ram:
    if vm.definition is None or ports.memory.creatable(vm.definition.memory):
        return ()
    try:
        return ram_of(await ports.memory.locate(vm.definition.memory, 0.5))
    except MemoryUnusable as error:
        why = "the VM cannot be started"
        found.append(Finding(severity="error", code=error.kind, what=error.what, why=why, remedy=error.remedy, vm=vm.name))
        return ()


def _memory_findings(vm: Vm, ram: Ram, claims: list[tuple[str, MemoryIdentity]]) -> list[Finding]:
    found = [_survival(vm.name, one) for one in ram]
    others = {other: None for other, claimed in claims for one in ram if one.overlaps(claimed)}
    found += [
        Finding(
            severity="error",
            code="overlap",
            what=f"its memory overlaps that of VM {other}",
            why="each would corrupt the other",
            vm=vm.name,
        )
        for other in others
    ]
    if both := overlapping(ram):
        what, why = f"its NUMA nodes {both[0]} and {both[1]} are on the same memory", "the guest would corrupt itself"
        found.append(Finding(severity="error", code="overlap", what=what, why=why, vm=vm.name))
    return found


def _survival(vm: str, memory: MemoryIdentity) -> Finding:
    """Whether this memory outlives a kexec, and why."""
    if memory.survives is Survives.KEXEC:
        what = f"its RAM in {memory.place} survives a kexec"
        return Finding(severity="info", code=MEMORY_SURVIVES, what=what, why=_why_it_survives(memory), vm=vm)
    return Finding(
        severity="warning",
        code="volatile-memory",
        what=f"its RAM is in {memory.path} ({memory.filesystem or 'unknown file system'}), which a kexec erases",
        why="it can be saved for a restart of QEMU, but an upgrade of the host will refuse it",
        remedy="move it to a dax device: see `cprctl devices`",
        vm=vm,
    )


def _why_it_survives(memory: MemoryIdentity) -> str:
    if memory.kind == "file":
        return (
            "the memory file system is handed on to the next kernel (pkram=)"
            if memory.filesystem == "tmpfs"
            else f"a file on {memory.filesystem} with dax is in persistent memory itself, not in the page cache"
        )
    if memory.provider == DRAM_PROVIDER:
        return "memmap= keeps it from the kernel, and from the next one if it has the same; a power cut erases it"
    return f"it is persistent memory ({memory.provider or 'of an unknown provider'}), which no kernel uses as its own"
