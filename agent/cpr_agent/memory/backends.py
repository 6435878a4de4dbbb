# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory that a definition or a manifest names, located on this host and checked."""

from __future__ import annotations

import asyncio
import errno
import os
import pwd
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from cpr_agent.core.model import (
    Bytes,
    DaxDevice,
    Located,
    MemoryIdentity,
    MemoryNode,
    MemorySection,
    Ram,
    Survives,
    Witness,
)
from cpr_agent.errors import DeviceMissing, MemoryChanged, MemoryUnusable
from cpr_agent.memory.devices import Devices
from cpr_agent.memory.users import Census
from cpr_agent.memory.witness import is_blank, measure_witness, new_witness, prepared_witness, take_witness
from cpr_agent.mounts import mounts

PAGE = 4096
T = TypeVar("T")
KEPT = "the checkpoint and the memory are kept as they are"
REMEDIES = {
    errno.ENOMEM: "if it is in hugetlbfs: see HugePages_Free in /proc/meminfo, free as many as it lacks, and try again",
    errno.ENOSPC: "make room on its file system, or use a smaller size",
}


class HostMemory:
    """Implements core.ports.Memory."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        # One thread for work that goes through thousands of pages or files in Python: two threads that want the
        # interpreter at each system call take nearly twice as long as one thread alone.
        self._thread = ThreadPoolExecutor(1, "memory")
        self._census = Census(self._thread)
        self._measuring = ThreadPoolExecutor(1, "measure")
        """For a check, which anybody may ask for: one at a time, and none in a thread that a guest may wait for."""

    def devices(self) -> list[DaxDevice]:
        return self._devices.list()

    def drivers(self, ram: Ram) -> set[str]:
        uuids = {one.uuid for one in ram if one.kind == "devdax"}
        found = {driver for device in self._devices.list() if device.uuid in uuids for driver in device.drivers}
        for one in ram:
            if one.kind == "file" and one.survives is Survives.KEXEC and (below := self._devices.drivers_below(one.st_dev)):
                found.update((one.filesystem, *below))
        return found

    async def locate(self, section: MemorySection, timeout_s: float) -> list[Located]:
        ranges = zip(section.object_ids, section.ranges, strict=True)
        return [await self._locate(name, one, timeout_s) for name, one in ranges]

    async def relocate(self, ram: Ram, timeout_s: float) -> list[Located]:
        return [await self._relocate(one, timeout_s) for one in ram]

    async def _locate(self, object_id: str, wanted: MemoryNode, timeout_s: float) -> Located:
        if wanted.device.startswith("uuid:"):
            uuid = wanted.device.removeprefix("uuid:")
            found = _devdax(wanted, await self._device(lambda d: d.uuid == uuid, f"with uuid {uuid}", timeout_s))
        elif wanted.device.startswith("/dev/dax"):
            _refuse_false_node(wanted.device)
            device = await self._device(lambda d: d.node == wanted.device, wanted.device, timeout_s)
            _refuse_false_node(wanted.device)
            found = _devdax(wanted, device)
        else:
            found = self._file(Path(wanted.device), int(wanted.size), int(wanted.offset))
        return replace(found, identity=replace(found.identity, object_id=object_id))

    async def _relocate(self, identity: MemoryIdentity, timeout_s: float) -> Located:
        size, offset = Bytes(identity.size_bytes), Bytes(identity.offset_bytes)
        wanted = MemoryNode(size=size, offset=offset, device=identity.place)
        try:
            located = await self._locate(identity.object_id, wanted, timeout_s)
        except DeviceMissing:
            raise
        except MemoryUnusable as error:
            raise MemoryChanged(error.what, left=KEPT, remedy=error.remedy) from error
        if differences := identity.differences(located.identity):
            raise MemoryChanged(
                f"{located.node} is not the memory that its guest is in: {'; '.join(map(str, differences))}",
                left=KEPT,
                remedy="bring the original memory back and load again",
                evidence=differences,
            )
        return located

    def creatable(self, section: MemorySection) -> bool:
        return any(map(_creatable, section.ranges))

    async def prepare(self, section: MemorySection, user: str) -> None:
        owner = _owner(user)
        for one in section.ranges:
            path = Path(one.device)
            if _creatable(one):
                filesystem, _ = filesystem_of(path.parent.stat().st_dev)
                _page_bytes(filesystem, path.parent, int(one.size), int(one.offset))
                _create(path, int(one.offset) + int(one.size), owner)
            elif not _is_device(one):
                _refuse_foreign_file(path, user, {0, os.geteuid(), *(owner or ())[:1]})

    def new_witness(self, kind: str) -> Witness:
        return new_witness(kind)

    async def witness(self, located: Sequence[Located], like: Witness) -> Witness:
        with _reading(located, left=KEPT):
            return await self._run(like, partial(take_witness, located, like))

    async def _run(self, like: Witness, work: Callable[[], T]) -> T:
        """A full witness takes long and has threads of its own: it must not occupy the one thread."""
        return await asyncio.get_running_loop().run_in_executor(None if like.kind == "full" else self._thread, work)

    @asynccontextmanager
    async def prepared_witness(
        self, located: Sequence[Located], like: Witness
    ) -> AsyncIterator[Callable[[], Awaitable[Witness]]]:
        async def taken() -> Witness:
            with _reading(located):
                return await self._run(like, take)

        at_end = ExitStack()
        try:
            with _reading(located):
                take = await self._run(like, partial(at_end.enter_context, prepared_witness(located, like)))
            yield taken
        finally:
            self._thread.submit(at_end.close)  # after work that is still under way; no guest need wait for it

    async def witness_cost_s(self, located: Sequence[Located], kind: str) -> tuple[str, float]:
        with _reading(located):
            measure = partial(measure_witness, located, new_witness(kind))
            return await asyncio.get_running_loop().run_in_executor(self._measuring, measure)

    async def blank(self, located: Sequence[Located]) -> bool:
        try:
            return await asyncio.to_thread(is_blank, located)
        except (OSError, ValueError):
            return False

    async def users(self, located: Located, own: Collection[int]) -> list[tuple[str, int]]:
        return await self._census.users(Path(located.node), own)

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

    def _file(self, path: Path, size: int, offset: int) -> Located:
        found = _file(path, size, offset)
        return replace(found, identity=replace(found.identity, volume=self._devices.volume(found.identity.st_dev)))


@contextmanager
def _reading(located: Sequence[Located], left: str = "") -> Iterator[None]:
    """Raises MemoryUnusable if the memory cannot be opened or mapped."""
    try:
        yield
    except (OSError, ValueError) as error:
        what = f"its memory {', '.join(one.node for one in located)} cannot be read: {error}"
        raise MemoryUnusable(what, left=left, remedy=_remedy(error)) from error


def _remedy(error: Exception) -> str:
    return REMEDIES.get(error.errno or 0, "") if isinstance(error, OSError) else ""


def _refuse_false_node(node: str) -> None:
    """A QEMU that starts before the driver makes an ordinary file under its name (file_ram_open() in system/physmem.c)."""
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


def _is_device(wanted: MemoryNode) -> bool:
    return wanted.device.startswith(("uuid:", "/dev/dax"))


def _creatable(wanted: MemoryNode) -> bool:
    path = Path(wanted.device)
    return not _is_device(wanted) and os.path.isdir(path.parent) and not os.path.lexists(path)  # noqa: PTH112 - never raises


def _create(path: Path, size: int, owner: tuple[int, int] | None) -> None:
    """Make a file of ``size`` zeros. Raises MemoryUnusable, and leaves no file then."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MemoryUnusable(f"its memory file {path} cannot be made: {error.strerror}") from error
    try:
        if owner:
            os.fchown(fd, *owner)
        os.truncate(fd, size)
        filesystem, options = filesystem_of(os.fstat(fd).st_dev)
        if _survives(filesystem, options) is Survives.KEXEC and filesystem != "tmpfs":
            # Otherwise a full file system ends QEMU (SIGBUS) when the guest touches a hole. In a tmpfs it would be memory
            # of the agent, which has a bound (MemoryMax=).
            os.posix_fallocate(fd, 0, size)
    except OSError as error:
        path.unlink()
        what = f"its memory file {path} cannot be made: {error.strerror}"
        raise MemoryUnusable(what, left="nothing was started", remedy=_remedy(error)) from error
    finally:
        os.close(fd)


def _owner(user: str) -> tuple[int, int] | None:
    """Owner (uid, gid) of a new memory file; None when the agent is not root."""
    if os.geteuid() != 0:
        return None
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise MemoryUnusable(f"the user {user} that the VM runs as does not exist", left="nothing was started") from None
    return account.pw_uid, account.pw_gid


def _refuse_foreign_file(path: Path, user: str, owners: set[int]) -> None:
    """Another user may have put the file into /dev/shm, and could read the guest's RAM there."""
    try:
        info = path.lstat()
    except OSError:
        return  # locating it reports the error
    if stat.S_ISREG(info.st_mode) and (info.st_uid not in owners or info.st_mode & 0o007):
        raise MemoryUnusable(
            f"its memory file {path} belongs to user {info.st_uid} with mode {stat.S_IMODE(info.st_mode):o}: "
            "others could read the guest's RAM",
            left="nothing was started",
            remedy=f"remove {path}, the agent makes a new one; or: chown {user} and chmod 600",
        )


def _devdax(wanted: MemoryNode, device: DaxDevice) -> Located:
    size, offset, align = int(wanted.size), int(wanted.offset), device.align_bytes or PAGE
    if not device.uuid:
        raise MemoryUnusable(
            f"{device.node} has no uuid, so that it could not be told from another after a kexec",
            remedy="make its namespace with: ndctl create-namespace -f -e NAMESPACE -m devdax",
        )
    if device.system_ram:
        raise MemoryUnusable(
            f"{device.node} is in system-ram mode: it is the kernel's own memory, and what a guest had there is gone",
            remedy=f"make it a device again: daxctl reconfigure-device --mode=devdax {Path(device.node).name}",
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
    page_bytes = _page_bytes(filesystem, path, size, offset)
    if info.st_size < offset + size:
        raise MemoryUnusable(
            f"its memory {path} has {info.st_size} bytes, the VM needs {offset + size}",
            remedy=f"extend it: truncate --size={offset + size} {path}",
        )
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
        page_bytes=page_bytes if filesystem == "hugetlbfs" else 0,
    )
    return Located(identity=identity, node=str(path))


def _page_bytes(filesystem: str, path: Path, size: int, offset: int) -> int:
    """Raises MemoryUnusable if the memory is not whole pages."""
    page_bytes = os.statvfs(path).f_bsize if filesystem == "hugetlbfs" else PAGE
    if size % page_bytes or offset % page_bytes:
        raise MemoryUnusable(f"memory.size and memory.offset must be multiples of {page_bytes} bytes on {filesystem}")
    return page_bytes


def filesystem_of(st_dev: int) -> tuple[str, frozenset[str]]:
    """Type and options of the mounted file system with this device number; "" if it is not mounted."""
    device = f"{os.major(st_dev)}:{os.minor(st_dev)}"
    return next(((mount.kind, mount.options) for mount in mounts() if mount.device == device), ("", frozenset()))


def _survives(filesystem: str, options: frozenset[str]) -> Survives:
    """See docs/memory.md. An ordinary disk file is written back before a kexec, but slowly and without proof: it counts as
    lost."""
    if filesystem == "tmpfs" and any(option.startswith("pkram") for option in options):
        return Survives.KEXEC
    if filesystem in ("ext4", "xfs") and options & {"dax", "dax=always"}:
        return Survives.KEXEC
    return Survives.QEMU_RESTART
