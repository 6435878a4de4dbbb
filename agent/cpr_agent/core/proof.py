# SPDX-License-Identifier: GPL-2.0-or-later
"""What must be true of memory and disks before a QEMU may touch them. Errors name the VM, the cause and the remedy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial

import msgspec
from msgspec.structs import replace

from cpr_agent.core.inventory import differences, kept_paths, path_of, without
from cpr_agent.core.model import (
    Difference,
    DiskIdentity,
    FileDigest,
    Inventory,
    Located,
    Manifest,
    MemoryIdentity,
    OpenFile,
    QemuFacts,
    Ram,
    Survives,
    Vmstate,
    overlapping,
)
from cpr_agent.core.ports import Ports, Qemu
from cpr_agent.errors import (
    CprError,
    DiskChanged,
    MachineChanged,
    MemoryChanged,
    MemoryInUse,
    MemoryOverlap,
    MemoryUnusable,
    NotVmstate,
    ProofFailed,
    SaveFailed,
)

DRAM_PROVIDER = "e820"
"""Of persistent memory that memmap= made of ordinary RAM (drivers/nvdimm/e820.c): a power cut erases it."""
_KEPT = "the guest was not started; memory and checkpoint are kept as they are"


class Proven(msgspec.Struct, frozen=True):
    """The guest of this checkpoint may go on: its memory and disks were compared with it. Only this module makes one."""

    checkpoint: str


async def prove(ports: Ports, manifest: Manifest, located: Sequence[Located], own_pids: Collection[int]) -> Proven:
    """For a load: compare all that it depends on, at once, since a guest waits for it. ``own_pids`` as in
    ``refuse_other_users``. Raises ProofFailed, MemoryUnusable."""
    proven, _ = await asyncio.gather(
        prove_stopped(ports, manifest, located, own_pids), refuse_changed_firmware(ports, manifest)
    )
    return proven


async def prove_stopped(ports: Ports, manifest: Manifest, located: Sequence[Located], own_pids: Collection[int]) -> Proven:
    """For a guest that goes on in the QEMU that saved it, which has its firmware loaded. Raises ProofFailed,
    MemoryUnusable."""
    await asyncio.gather(
        refuse_changed_disks(ports, manifest),
        refuse_other_users(ports, manifest.vm, located, own_pids),
        refuse_changed_ram(ports, manifest, located),
    )
    return Proven(manifest.id)


@contextlib.contextmanager
def naming(vm: str) -> Iterator[None]:
    """Put the VM's name on errors of layers that know memory but no VMs."""
    try:
        yield
    except CprError as error:
        if not error.vm:
            error.vm = vm
        raise


def refuse_overlap(vm: str, ram: Ram, claims: list[tuple[str, MemoryIdentity]]) -> None:
    """Two guests on one byte of RAM would corrupt each other, two NUMA nodes their guest. Raises MemoryOverlap."""
    remedy = "give one of them another memory.offset or device"
    if both := overlapping(ram):
        what = f"its NUMA nodes {both[0]} and {both[1]} are on the same memory"
        raise MemoryOverlap(what, vm=vm, left="nothing was started", remedy=remedy)
    for other, claimed in claims:
        for identity in ram:
            if identity.overlaps(claimed):
                raise MemoryOverlap(
                    f"its memory overlaps that of VM {other}: offset {identity.offset_bytes} and size "
                    f"{identity.size_bytes}, that one has offset {claimed.offset_bytes} and size {claimed.size_bytes}",
                    vm=vm,
                    left="nothing was started",
                    remedy=remedy,
                )


async def refuse_other_users(ports: Ports, vm: str, located: Sequence[Located], own_pids: Collection[int]) -> None:
    """Only VMs of this agent, whose ranges were compared, may have the memory open. Raises MemoryInUse.

    ``own_pids`` are live QEMUs of the agent, as many as are known without asking."""
    strangers = await _strangers(ports, vm, located, own_pids)
    if strangers:
        # A QEMU may exit between the census and the owner lookup. Count again; it will be gone.
        seen = {pid for _, _, pid in strangers}
        strangers = [one for one in await _strangers(ports, vm, located, own_pids) if one[2] in seen]
    if strangers:
        node = strangers[0][0]
        users = ", ".join(f"{name} ({pid})" for at, name, pid in strangers if at == node)
        raise MemoryInUse(
            f"its memory {node} is in use by {users}",
            vm=vm,
            left="nothing was started",
            remedy="end that process, or find out why it is there",
        )


async def _strangers(
    ports: Ports, vm: str, located: Sequence[Located], own_pids: Collection[int]
) -> list[tuple[str, str, int]]:
    """Node, name and PID of each process that has some of the memory and is no QEMU of this agent."""
    found = await asyncio.gather(*(ports.memory.users(one, own_pids) for one in located))
    # Afterwards: a QEMU may have come up meanwhile, also the VM's own.
    runner = ports.runner
    own = {*own_pids, await runner.own(vm).pid()}
    if {pid for users in found for _, pid in users} <= own:
        return []  # the units of many other VMs take long to ask
    names = runner.launched_all()
    own |= {await runner.own(name).pid() for name in names}
    own |= {await runner.spare(name).pid() for name in names if name != vm}
    pairs = zip(located, found, strict=True)
    return [(one.node, name, pid) for one, users in pairs for name, pid in users if pid not in own]


def refuse_spent(ports: Ports, manifest: Manifest) -> None:
    """A checkpoint out of a backup: its guest has run since, and its RAM has moved on (invariant 2). Raises ProofFailed."""
    if event := ports.journal.past(manifest.vm).spent_by(manifest.id):
        raise ProofFailed(
            "the guest has run since this checkpoint was made: its RAM is not what belongs to it",
            vm=manifest.vm,
            left=_KEPT,
            remedy=f"give the checkpoint up with: cprctl discard {manifest.vm}",
            evidence=[Difference(f"checkpoint {manifest.id}", "not resumed", event)],
        )


async def refuse_changed_ram(ports: Ports, manifest: Manifest, located: Sequence[Located]) -> None:
    """The witness; and where there is none, what must not be taken on trust. Raises MemoryChanged."""
    if manifest.witness.kind == "off" and _power_was_cut_from(manifest, ports):
        raise MemoryChanged(
            "its RAM is ordinary memory (memmap=), the host was not started by kexec, and the checkpoint has no witness",
            vm=manifest.vm,
            left=_KEPT,
            remedy=f"give the checkpoint up with `cprctl discard {manifest.vm}`, and let [witness] take them",
        )
    found = await ports.memory.witness(located, manifest.witness)
    if found.digest != manifest.witness.digest:
        raise MemoryChanged(
            f"its RAM is not what it was: witness {manifest.witness.digest} ({manifest.witness.kind}), "
            f"found {found.digest}",
            vm=manifest.vm,
            left=_KEPT,
            remedy=f"the guest can't be continued from this memory; see `cprctl status {manifest.vm}`",
            evidence=[
                Difference(f"witness of its RAM ({manifest.witness.kind})", manifest.witness.digest, found.digest),
            ],
        )


async def identify_disks(ports: Ports, vm: str, disks: Iterable[DiskIdentity]) -> list[DiskIdentity]:
    """Raises StorageSilent."""
    listed = list(disks)
    return await ports.threads.run(vm, lambda: [ports.files.identify_disk(disk) for disk in listed]) if listed else []


def identify_open(
    listed: Iterable[DiskIdentity], opened: Iterable[OpenFile], draft: Manifest, kept: Collection[str]
) -> list[DiskIdentity]:
    """``listed`` by what QEMU has open, as far as the guest sees it: a node that no disk has is lost with its QEMU. Files
    are those of ``draft``, but for firmware that is ``kept``; the rest is not of this host. Raises SaveFailed."""
    by_key, disks = {file.key: file for file in opened}, {disk.node: disk for disk in listed}
    inventory = draft.inventory or Inventory()
    nodes = {node.node: node for node in inventory.nodes if node.file and path_of(node) not in kept}
    others = {node.node for node in inventory.nodes} - nodes.keys()
    out = []
    for name, node in nodes.items():
        file = by_key.get(node.file.key) if node.file and name in disks else None
        if file is None:
            raise SaveFailed(f"its disk {node.disk} (node {name}) was changed while it was saved", vm=draft.vm)
        identity = DiskIdentity(
            node=name,
            driver=node.driver,
            filename=file.path,
            kind=file.kind,
            device_id=file.device_id,
            inode=file.inode if file.kind == "file" else 0,
            size_bytes=file.size_bytes,
            mtime_ns=file.mtime_ns,
        )
        out.append(identity)
    return out + [disk for disk in disks.values() if disk.node in others and not disk.filename.startswith("/")]


async def refuse_changed_disks(ports: Ports, manifest: Manifest) -> None:
    """A guest has its disks' contents in its RAM: what somebody wrote meanwhile it would overwrite, or mix up.

    Raises DiskChanged, StorageSilent.
    """
    now = await identify_disks(ports, manifest.vm, manifest.qemu.disks)
    changed = [
        difference for was, found in zip(manifest.qemu.disks, now, strict=True) for difference in was.differences(found)
    ]
    what = "its disks are not what they were when it was saved"
    _refuse(DiskChanged, what, changed, manifest, "bring the original contents back and load again")


async def digest_firmware(ports: Ports, vm: str, files: Iterable[FileDigest]) -> tuple[FileDigest, ...]:
    """Of a file that was kept: as the guest was started with. Raises StorageSilent."""
    listed = tuple(files)
    if not listed:
        return ()

    def digested() -> tuple[FileDigest, ...]:
        kept = {file.path: file for file in ports.firmware.kept(vm)}
        return tuple(
            replace(one, sha256=kept[one.path].sha256, size_bytes=kept[one.path].size_bytes)
            if one.path in kept
            else replace(one, sha256=ports.files.digest_file(one.path))
            for one in listed
        )

    return await ports.threads.run(vm, digested)


async def refuse_changed_firmware(ports: Ports, manifest: Manifest) -> None:
    """A guest goes on with the variables that it knows, and writes them over those in the file. Raises MachineChanged,
    StorageSilent."""
    firmware = manifest.qemu.firmware
    found = await ports.threads.run(manifest.vm, partial(_digests_now, ports, manifest.vm, firmware)) if firmware else []
    changed = [
        Difference(f"{was.path}: SHA-256", was.sha256, now or "there is no such file")
        for was, now in zip(firmware, found, strict=True)
        if was.sha256 != now
    ]
    what = "its firmware is not what it was when it was saved"
    _refuse(MachineChanged, what, changed, manifest, "bring the original file back and load again")


def _digests_now(ports: Ports, vm: str, files: Iterable[FileDigest]) -> list[str]:
    """Of the files that a load reads: the copies of those that changed. Blocking."""
    copies = {file.path: file.copy for file in ports.firmware.changed(vm)}
    return [ports.files.digest_file(copies.get(file.path, file.path)) for file in files]


async def refuse_lesser_machine(qemu: Qemu, manifest: Manifest) -> None:
    """What the guest has seen must still be there. The QEMU is new and has loaded nothing yet. Raises MachineChanged."""
    lacking = await qemu.differences(manifest.qemu, manifest.launch)
    remedy = "use the kernel and the QEMU that it was saved with, or newer ones: see `cprctl upgrade --back`"
    _refuse(MachineChanged, "the machine that it would go on in lacks what it had", lacking, manifest, remedy)


async def refuse_other_devices(ports: Ports, manifest: Manifest, found: Inventory) -> None:
    """The new QEMU must have all that the guest had, and nothing else. It has loaded nothing yet. Raises DiskChanged,
    MachineChanged."""
    if manifest.inventory is None:
        return
    kept = kept_paths(ports, manifest.vm)  # firmware is proved by its contents
    rebooted = manifest.saved_in != ports.boot.start_id()
    disks, devices = differences(without(manifest.inventory, kept), without(found, kept), anew=True, rebooted=rebooted)
    remedy = "bring back what it had, and load again"
    _refuse(DiskChanged, "the QEMU that it would go on in has other disks", disks, manifest, remedy)
    _refuse(MachineChanged, "the QEMU that it would go on in has other devices", devices, manifest, remedy)


def _refuse(
    error: type[ProofFailed], what: str, differences: Sequence[Difference], manifest: Manifest, remedy: str
) -> None:
    if differences:
        text = f"{what}: {'; '.join(map(str, differences))}"
        raise error(text, vm=manifest.vm, left=_KEPT, remedy=remedy, evidence=differences)


def _power_was_cut_from(manifest: Manifest, ports: Ports) -> bool:
    """Whether it may have been off: RAM that memmap= made persistent outlives nothing but a kexec."""
    rebooted = manifest.boot_id != ports.boot.boot_id()
    of_dram = any(one.provider == DRAM_PROVIDER for one in manifest.memory)
    return rebooted and of_dram and not ports.boot.booted_by_kexec()


async def provably_lost(ports: Ports, manifest: Manifest, error: CprError) -> str:
    """Why the RAM that was saved is no more, beyond any doubt; "" if it may still be somewhere. ``error`` is how the
    memory failed its proof; a device that is not there (yet), or another one, proves nothing."""
    rebooted = manifest.boot_id != ports.boot.boot_id()
    for one in manifest.memory:
        if rebooted and one.survives is not Survives.KEXEC and one.in_ram:
            return f"{one.path} was a file in RAM ({one.filesystem}), and the host was started anew"
    if not isinstance(error, MemoryChanged):
        return ""
    try:
        located = await ports.memory.relocate(manifest.memory, 0.0)
    except (MemoryUnusable, MemoryChanged):
        return ""
    nodes = " and ".join(one.node for one in located)
    if _power_was_cut_from(manifest, ports):
        return f"{nodes} is ordinary RAM of the host (memmap=), which was started without a kexec"
    if await ports.memory.blank(located):
        return f"each byte of it in {nodes} is zero"
    return ""


def refuse_foreign_state(vmstate: Vmstate, facts: QemuFacts) -> None:
    """What a save has written must be the state of the VM that it asked. Raises NotVmstate."""
    said = [
        Difference("machine type", facts.machine_type, vmstate.machine),
        Difference("number of CPUs", str(facts.cpu.count), str(vmstate.cpus)),
    ]
    if wrong := [one for one in said if one.found not in ("", "0", one.expected)]:
        raise NotVmstate(f"the state that QEMU wrote is not of this VM: {'; '.join(map(str, wrong))}", evidence=wrong)
