"""What must be true of memory and disks before a QEMU may touch them. Errors name the VM, the cause and the remedy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator

from cpr_agent.core.model import DiskIdentity, Located, Manifest, MemoryIdentity
from cpr_agent.core.ports import Ports
from cpr_agent.errors import CprError, DiskChanged, MemoryChanged, MemoryInUse, MemoryOverlap

_KEPT = "nothing was started; memory and checkpoint are kept as they are"


@contextlib.contextmanager
def naming(vm: str) -> Iterator[None]:
    """Put the VM's name on errors of layers that know memory but no VMs."""
    try:
        yield
    except CprError as error:
        if not error.vm:
            error.vm = vm
        raise


def refuse_overlap(vm: str, identity: MemoryIdentity, claims: list[tuple[str, MemoryIdentity]]) -> None:
    """Two guests on one byte of RAM would corrupt each other. Raises MemoryOverlap."""
    for other, claimed in claims:
        if identity.overlaps(claimed):
            raise MemoryOverlap(
                f"its memory overlaps that of VM {other}: offset {identity.offset_bytes} and size "
                f"{identity.size_bytes}, that one has offset {claimed.offset_bytes} and size {claimed.size_bytes}",
                vm=vm,
                left="nothing was started",
                remedy="give one of them another memory.offset or device",
            )


async def refuse_other_users(ports: Ports, vm: str, located: Located, own_pid: int) -> None:
    """Nobody but other VMs of this agent (their ranges were compared) may have the memory. Raises MemoryInUse."""
    own = {own_pid, *[await ports.runner.active(name) for name in ports.runner.launched_all()]}
    users = [f"{name} ({pid})" for name, pid in await ports.memory.users(located) if pid not in own]
    if users:
        raise MemoryInUse(
            f"its memory {located.node} is in use by {', '.join(users)}",
            vm=vm,
            left="nothing was started",
            remedy="end that process, or find out why it is there",
        )


async def refuse_changed_ram(ports: Ports, manifest: Manifest, located: Located) -> None:
    """The witness. Raises MemoryChanged."""
    found = await ports.memory.witness(located, manifest.witness)
    if found.digest != manifest.witness.digest:
        raise MemoryChanged(
            f"its RAM is not what it was: witness {manifest.witness.digest} ({manifest.witness.kind}), "
            f"found {found.digest}",
            vm=manifest.vm,
            left=_KEPT,
            remedy=f"the guest can't be continued from this memory; see `cprctl status {manifest.vm}`",
        )


async def identify_disks(ports: Ports, disks: Iterable[DiskIdentity]) -> list[DiskIdentity]:
    return await asyncio.to_thread(lambda: [ports.host.identify_disk(disk) for disk in disks])


async def refuse_changed_disks(ports: Ports, manifest: Manifest) -> None:
    """A guest has its disks' contents in its RAM: what somebody wrote meanwhile it would overwrite, or mix up.

    Raises DiskChanged.
    """
    now = await identify_disks(ports, manifest.qemu.disks)
    changed = [
        f"{was.filename}: {', '.join(differences)}"
        for was, found in zip(manifest.qemu.disks, now, strict=True)
        if (differences := was.differences(found))
    ]
    if changed:
        raise DiskChanged(
            f"its disks are not what they were when it was saved: {'; '.join(changed)}",
            vm=manifest.vm,
            left=_KEPT,
            remedy="bring the original contents back and load again",
        )
