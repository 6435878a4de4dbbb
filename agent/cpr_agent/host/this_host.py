# SPDX-License-Identifier: GPL-2.0-or-later
"""Time, identity and programs of this boot; implements core.ports.Clock, Boot, Files and Sockets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from cpr_agent.core.model import DiskIdentity, OpenFile
from cpr_agent.core.ports import Access
from cpr_agent.files import digest_of
from cpr_agent.handles import file_at
from cpr_agent.host import sockets
from cpr_agent.host.access import STRANGER, closed_place, groups_of
from cpr_agent.text import printable

_COUNTED = re.compile(r"^(?:virtio|host|nvme)\d+$|^target\d+(?=:)|^\d+(?=:\d+:\d+:\d+$)")
"""Parts of a device's way that are numbers in the order of discovery: those of virtio devices and SCSI hosts."""
_NO_SLOT = re.compile(r"virtual$|rbd$|session\d|rport-|ndbus\d")
"""What is in no slot: disks over a network, and persistent memory. They are numbered in the order of discovery, too."""
_IMAGE_OF_RBD = ("cluster_fsid", "pool_id", "pool_ns", "image_id", "current_snap")
"""Documentation/ABI/testing/sysfs-bus-rbd."""
JOURNAL_TIMEOUT_S = 60.0
MAX_PROGRAM_BYTES = 1 << 30
_SAYS_VERSION = b"QEMU emulator version "
"""In QEMU's program, as `--version` prints it (system/vl.c, version())."""
_VERSION_BYTES = 200
MAX_FIRMWARE_BYTES = 128 << 20
"""A guest stands still while they are read; the largest firmware in use has 16 MiB."""
MAX_OPEN_FILES = 4096
"""Of a process: a QEMU may open as many as its unit lets it, by names of 4 KiB."""
BLOCK_DEVICES = Path("/sys/dev/block")
BOOTLOADER_TYPE = Path("/proc/sys/kernel/bootloader_type")


class ThisHost:
    """``userspace_at`` asks systemd when this boot's userspace began (epoch s); 0 means unknown. ``soft_reboots`` asks how
    often it has begun anew since."""

    def __init__(
        self, userspace_at: Callable[[], float] = lambda: 0.0, soft_reboots: Callable[[], int] = lambda: 0
    ) -> None:
        self._userspace_at = userspace_at
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._soft_reboots = soft_reboots()
        self._digests: dict[tuple[int, int, int], str] = {}
        self._versions: dict[str, str] = {}

    def now(self) -> float:
        return time.time()

    def uptime_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def boot_id(self) -> str:
        """random(4): new at each boot, also after a kexec."""
        return self._boot_id

    def start_id(self) -> str:
        return f"{self.boot_id()}.{self._soft_reboots}" if self._soft_reboots else self.boot_id()

    def kernel(self) -> str:
        return os.uname().release

    def name(self) -> str:
        return os.uname().nodename

    def program_digest(self, pid: int) -> str:
        fd = os.open(f"/proc/{pid}/exe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
            info = os.fstat(fd)
            key = (info.st_dev, info.st_ino, info.st_mtime_ns)
            if key not in self._digests:
                self._digests[key], _ = digest_of(file, MAX_PROGRAM_BYTES)
        return self._digests[key]

    def program_identity(self, path: str) -> str:
        if not path:  # to a Path it is the working directory
            return ""
        try:
            info = Path(path).stat()
        except OSError:
            return ""
        return f"{info.st_dev}:{info.st_ino}:{info.st_mtime_ns}:{info.st_size}"

    def program_version(self, path: str) -> str:
        """Read from the program: to run it would be to run anybody's."""
        if not (identity := self.program_identity(path)):
            return ""
        if identity not in self._versions:
            self._versions[identity] = _version_in(path)
        return self._versions[identity]

    def digest_file(self, path: str) -> str:
        """A VM's user may own the file of its firmware's variables, and the directory that it is in."""
        try:
            with file_at(Path(path)) as file:
                digest, size = digest_of(file, MAX_FIRMWARE_BYTES)
        except OSError:
            return ""
        return digest if size < MAX_FIRMWARE_BYTES else ""

    def identify_disk(self, disk: DiskIdentity) -> DiskIdentity:
        if not disk.filename.startswith("/"):
            return replace(disk, kind="remote")
        try:
            info = Path(disk.filename).stat()
        except (OSError, ValueError):
            return replace(disk, kind="missing")
        if stat.S_ISBLK(info.st_mode):
            return replace(disk, kind="device", **_block_device(info.st_rdev))
        if not stat.S_ISREG(info.st_mode):
            return replace(disk, kind="device")
        return replace(disk, kind="file", inode=info.st_ino, size_bytes=info.st_size, mtime_ns=info.st_mtime_ns)

    def open_files(self, pid: int) -> list[OpenFile]:
        found: dict[tuple[str, int, int], OpenFile] = {}
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as links:
            for link in links:
                with contextlib.suppress(OSError):  # it was closed meanwhile
                    info = link.stat()  # of the open file itself (proc(5))
                    if stat.S_ISREG(info.st_mode) or stat.S_ISBLK(info.st_mode):
                        path = os.readlink(link.path)  # noqa: PTH115 - of hundreds
                        found[path, info.st_dev, info.st_ino] = _open_file(path, info)
                if len(found) >= MAX_OPEN_FILES:
                    break
        return list(found.values())

    def working_directory(self, pid: int) -> str:
        try:
            return str(Path(f"/proc/{pid}/cwd").readlink())
        except OSError:
            return ""

    def access(self, path: str, user: str) -> Access:
        try:
            uid, gids = groups_of(user)
            closed, info = closed_place(path, uid, gids), Path(path).stat()
            loose = uid != 0 and info.st_uid == uid and stat.S_ISREG(info.st_mode) and not closed_place(path, STRANGER, ())
        except (KeyError, OSError, ValueError):
            return Access()
        return Access(closed, on_the_way=bool(closed) and Path(closed).is_dir(), loose=loose)

    def look_at(self, path: str) -> OpenFile | None:
        try:
            return _open_file(path, Path(path).stat())
        except (OSError, ValueError):
            return None

    def real_directory(self, path: str) -> str:
        return os.path.realpath(path)

    def keep_sockets(self, paths: Sequence[str], pid: int) -> None:
        sockets.keep(paths, pid)

    def settle_sockets(self, paths: Sequence[str], pid: int) -> None:
        sockets.settle(paths, pid)

    def boot_ended_at(self, boot_id: str) -> float:
        """The time of its last entry in the persistent journal (journalctl(1)); 0 without one."""
        command = ["journalctl", "--quiet", f"--boot={boot_id.replace('-', '')}", "--lines=1", "--output=json"]
        try:
            shown = subprocess.run(command, capture_output=True, timeout=JOURNAL_TIMEOUT_S, check=True)
            return int(json.loads(shown.stdout)["__REALTIME_TIMESTAMP"]) / 1e6
        except (OSError, subprocess.SubprocessError, ValueError, KeyError):
            return 0.0

    def userspace_at(self) -> float:
        return self._userspace_at()

    def booted_by_kexec(self) -> bool:
        """Read from the boot loader's type, 0xd for kexec (Documentation/arch/x86/boot.rst); True without such a file."""
        try:
            return int(BOOTLOADER_TYPE.read_text()) >> 4 == 0xD
        except OSError:
            return True


def _open_file(path: str, info: os.stat_result) -> OpenFile:
    nameless = info.st_nlink == 0
    shown = path.removesuffix(" (deleted)") if nameless else path
    shown = shown if shown.isprintable() else ""
    if stat.S_ISBLK(info.st_mode):
        return OpenFile(path=shown, kind="device", st_dev=info.st_rdev, **_block_device(info.st_rdev))
    return OpenFile(
        path=shown,
        st_dev=info.st_dev,
        inode=info.st_ino,
        size_bytes=info.st_size,
        mtime_ns=info.st_mtime_ns,
        nameless=nameless,
    )


def _block_device(number: int) -> dict[str, Any]:
    """The size, and a name that stays the same over boots if there is one."""
    sysfs = BLOCK_DEVICES / f"{os.major(number)}:{os.minor(number)}"
    return {"device_id": _device_id(sysfs), "size_bytes": int(_text(sysfs / "size") or 0) * 512}


def _device_id(sysfs: Path) -> str:
    """Documentation/ABI, block and dm; "" if there is none. A loop device is the file that it has: a file that was put in
    its place has the same path."""
    if number := _text(sysfs / "partition"):
        whole = _device_id(sysfs.resolve().parent)
        return whole and f"{whole}-part{number}"
    if path := _text(sysfs / "loop/backing_file"):
        offset = _text(sysfs / "loop/offset")
        return f"{path}{_inode_of(path)}" + (f" from {offset}" if offset not in ("", "0") else "")
    if _text(sysfs / "device/image_id"):
        return " ".join(["rbd", *(_text(sysfs / "device" / name) or "-" for name in _IMAGE_OF_RBD)])
    names = ("dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial", "device/uuid")
    return next((text for name in names if (text := _text(sysfs / name))), "") or _slot_of(sysfs)


def _inode_of(path: str) -> str:
    try:
        return f" inode {os.stat(path).st_ino}"  # noqa: PTH116 - as the kernel has it, also with "(deleted)" after it
    except (OSError, ValueError):
        return ""


def _slot_of(sysfs: Path) -> str:
    """Where a device without a name of its own is plugged in, which a kexec does not change: its way in /sys/devices
    without the numbers that the kernel gives in the order in which it finds things. "" for one that is in no slot."""
    parts = sysfs.resolve().parts
    way = parts[parts.index("devices") + 1 : -1] if "devices" in parts else ()
    if not way or any(map(_NO_SLOT.match, way)):
        return ""
    kept = [_COUNTED.sub("", part) for part in way if part != "block"]
    return f"path:{'/'.join(part for part in kept if part)}"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _version_in(path: str) -> str:
    """ "" also for a wrapper. A file that shrinks meanwhile does no harm, as one that is mapped would."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return ""
            tail = b""
            while file.tell() < MAX_PROGRAM_BYTES and (chunk := file.read(1 << 20)):
                tail += chunk
                if (at := tail.find(_SAYS_VERSION)) >= 0:
                    said = (tail + file.read(_VERSION_BYTES))[at + len(_SAYS_VERSION) :][:_VERSION_BYTES]
                    return printable(re.split(rb"[\n\0]", said)[0].decode(errors="replace"))
                tail = tail[-len(_SAYS_VERSION) :]
    except OSError:
        pass
    return ""
