"""From what a definition or a manifest says of RAM to the object on this host, or an error that says why not."""

from __future__ import annotations

import asyncio
import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path

from cpr_agent.core.model import Bytes, DaxDevice, Located, MemoryIdentity, MemorySection, Survives, Witness
from cpr_agent.errors import DeviceMissing, MemoryChanged, MemoryUnusable
from cpr_agent.memory.devices import Devices
from cpr_agent.memory.users import Census
from cpr_agent.memory.witness import is_blank, measure_witness, new_witness, take_witness

MOUNTS = Path("/proc/self/mountinfo")
PAGE = 4096
KEPT = "the checkpoint and the memory are kept as they are"


class HostMemory:
    """Implements core.ports.Memory."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._census = Census()

    def devices(self) -> list[DaxDevice]:
        return self._devices.list()

    async def locate(self, section: MemorySection, timeout_s: float) -> Located:
        if section.device.startswith("uuid:"):
            uuid = section.device.removeprefix("uuid:")
            return _devdax(section, await self._device(lambda d: d.uuid == uuid, f"with uuid {uuid}", timeout_s))
        if section.device.startswith("/dev/dax"):
            _refuse_false_node(section.device)
            device = await self._device(lambda d: d.node == section.device, section.device, timeout_s)
            _refuse_false_node(section.device)
            return _devdax(section, device)
        return _file(Path(section.device), int(section.size), int(section.offset))

    async def relocate(self, identity: MemoryIdentity, timeout_s: float) -> Located:
        wanted = MemorySection(
            size=Bytes(identity.size_bytes),
            offset=Bytes(identity.offset_bytes),
            device=f"uuid:{identity.uuid}" if identity.kind == "devdax" else identity.path,
        )
        try:
            located = await self.locate(wanted, timeout_s)
        except DeviceMissing:
            raise
        except MemoryUnusable as error:
            raise MemoryChanged(error.what, left=KEPT, remedy=error.remedy) from error
        if differences := identity.differences(located.identity):
            raise MemoryChanged(
                f"{located.node} is not the memory that was saved: {'; '.join(map(str, differences))}",
                left=KEPT,
                remedy="bring the original memory back and load again",
                evidence=differences,
            )
        return located

    def creatable(self, section: MemorySection) -> bool:
        path = Path(section.device)
        return not _is_device(section) and path.parent.is_dir() and not os.path.lexists(path)

    async def prepare(self, section: MemorySection, user: str) -> None:
        owner = _owner(user)
        if _is_device(section):
            return
        path = Path(section.device)
        if not self.creatable(section):
            _refuse_foreign_file(path, user, {0, os.geteuid(), *(owner or ())[:1]})
            return
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise MemoryUnusable(f"its memory file {path} cannot be made: {error.strerror}") from error
        try:
            if owner:
                os.fchown(fd, *owner)
            os.truncate(fd, int(section.offset) + int(section.size))
        except OSError as error:
            path.unlink()
            raise MemoryUnusable(f"its memory file {path} cannot be made: {error.strerror}") from error
        finally:
            os.close(fd)

    def new_witness(self, kind: str) -> Witness:
        return new_witness(kind)

    async def witness(self, located: Located, like: Witness) -> Witness:
        try:
            return await asyncio.to_thread(take_witness, located, like)
        except (OSError, ValueError) as error:
            raise MemoryUnusable(f"its memory {located.node} cannot be read: {error}", left=KEPT) from error

    async def witness_cost_s(self, located: Located, kind: str) -> tuple[str, float]:
        try:
            return await asyncio.to_thread(measure_witness, located, new_witness(kind))
        except (OSError, ValueError) as error:
            raise MemoryUnusable(f"its memory {located.node} cannot be read: {error}") from error

    async def blank(self, located: Located) -> bool:
        try:
            return await asyncio.to_thread(is_blank, located)
        except (OSError, ValueError):
            return False

    async def users(self, located: Located) -> list[tuple[str, int]]:
        return await self._census.users(Path(located.node))

    async def _device(self, good: Callable[[DaxDevice], bool], what: str, timeout_s: float) -> DaxDevice:
        device = await self._devices.wait(good, timeout_s)
        if device is None:
            seen = ", ".join(f"{d.node} (uuid {d.uuid})" for d in self._devices.list()) or "none"
            raise DeviceMissing(
                f"no dax device {what} appeared within {timeout_s:.0f} s; devices that are there: {seen}",
                remedy="see `cprctl devices` and `ndctl list -Ni`; is the region's driver loaded, the namespace enabled, "
                "and memmap= on the kernel's command line?",
            )
        return device


def _refuse_false_node(node: str) -> None:
    """An ordinary file under the name of a device is what QEMU leaves when it comes before the driver (FACTS.md)."""
    try:
        mode = os.lstat(node).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISCHR(mode):
        raise MemoryUnusable(
            f"{node} is not a device but {'a symbolic link' if stat.S_ISLNK(mode) else 'an ordinary file'}",
            left="nothing was started",
            remedy=f"remove {node} and name the memory by its uuid: see `cprctl devices`",
        )


def _is_device(section: MemorySection) -> bool:
    return section.device.startswith(("uuid:", "/dev/dax"))


def _owner(user: str) -> tuple[int, int] | None:
    """Whose a new memory file is to be; None for an agent that is not root, whose own it is."""
    if os.geteuid() != 0:
        return None
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise MemoryUnusable(f"the user {user} that the VM runs as does not exist", left="nothing was started") from None
    return account.pw_uid, account.pw_gid


def _refuse_foreign_file(path: Path, user: str, owners: set[int]) -> None:
    """Anybody can put a file into /dev/shm first, and would read the guest's RAM."""
    try:
        info = path.lstat()
    except OSError:
        return  # what is wrong is said when it is located
    if stat.S_ISREG(info.st_mode) and (info.st_uid not in owners or info.st_mode & 0o007):
        raise MemoryUnusable(
            f"its memory file {path} belongs to user {info.st_uid} with mode {stat.S_IMODE(info.st_mode):o}: "
            "others could read the guest's RAM",
            left="nothing was started",
            remedy=f"remove {path}, the agent makes a new one; or: chown {user} and chmod 600",
        )


def _devdax(section: MemorySection, device: DaxDevice) -> Located:
    size, offset, align = int(section.size), int(section.offset), device.align_bytes or PAGE
    if not device.uuid:
        raise MemoryUnusable(
            f"{device.node} has no uuid, so that it could not be told from another after a kexec",
            remedy="make its namespace with: ndctl create-namespace -f -e NAMESPACE -m devdax",
        )
    for what, value in (("size", size), ("offset", offset)):
        if value % align:
            raise MemoryUnusable(
                f"memory.{what} {value} is not a multiple of the alignment of {device.node}, {align} bytes",
                remedy=f"use {value - value % align} or {value - value % align + align}",
            )
    if offset + size > device.size_bytes:
        raise MemoryUnusable(
            f"memory.offset + memory.size is {offset + size} bytes, but {device.node} has {device.size_bytes}",
            remedy="use a smaller size, or a larger namespace",
        )
    identity = MemoryIdentity(
        kind="devdax",
        size_bytes=size,
        offset_bytes=offset,
        survives=Survives.KEXEC,
        uuid=device.uuid,
        resource=device.resource,
        device_size_bytes=device.size_bytes,
        align_bytes=device.align_bytes,
        region=device.region,
        provider=device.provider,
    )
    return Located(identity=identity, node=device.node)


def _file(path: Path, size: int, offset: int) -> Located:
    try:
        info = path.lstat()
    except OSError as error:
        raise DeviceMissing(f"its memory {path} cannot be found: {error.strerror}") from error
    if not stat.S_ISREG(info.st_mode):
        kind = "a directory: QEMU would make a nameless file in it" if stat.S_ISDIR(info.st_mode) else "not a regular file"
        raise MemoryUnusable(f"its memory {path} is {kind}", remedy="name a file, or a dax device by its uuid")
    filesystem, options = filesystem_of(info.st_dev)
    block = os.statvfs(path).f_bsize if filesystem == "hugetlbfs" else PAGE
    if size % block or offset % block:
        raise MemoryUnusable(f"memory.size and memory.offset must be multiples of {block} bytes on {filesystem}")
    if info.st_size < offset + size:
        raise MemoryUnusable(f"its memory {path} has {info.st_size} bytes, the VM needs {offset + size}")
    identity = MemoryIdentity(
        kind="file",
        size_bytes=size,
        offset_bytes=offset,
        survives=_survives(filesystem, options),
        path=str(path),
        filesystem=filesystem,
        st_dev=info.st_dev,
        inode=info.st_ino,
        device_size_bytes=info.st_size,
        page_bytes=block if filesystem == "hugetlbfs" else 0,
    )
    return Located(identity=identity, node=str(path))


def filesystem_of(st_dev: int) -> tuple[str, set[str]]:
    """Type and options of the mounted file system with this device number (proc(5), mountinfo); "" if not found."""
    wanted = f"{os.major(st_dev)}:{os.minor(st_dev)}"
    for line in MOUNTS.read_text().splitlines():
        head, _, tail = line.partition(" - ")
        if head.split()[2] == wanted:
            kind, _, options = tail.split(" ", 2)
            return kind, set(head.split()[5].split(",")) | set(options.split(","))
    return "", set()


def _survives(filesystem: str, options: set[str]) -> Survives:
    """DESIGN.md, "What counts as persistent". An ordinary disk file is written back before a kexec, but slowly and
    unproved: it counts as lost."""
    if filesystem == "tmpfs" and any(option.startswith("pkram") for option in options):
        return Survives.KEXEC
    if filesystem in ("ext4", "xfs") and options & {"dax", "dax=always"}:
        return Survives.KEXEC
    return Survives.QEMU_RESTART
