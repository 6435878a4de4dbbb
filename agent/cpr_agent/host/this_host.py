# SPDX-License-Identifier: GPL-2.0-or-later
"""Time, identity and programs of this boot; implements core.ports.Clock, Boot, Files and Sockets."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from cpr_agent.core.model import DiskIdentity
from cpr_agent.host import sockets

JOURNAL_TIMEOUT_S = 60.0
BLOCK_DEVICES = Path("/sys/dev/block")
BOOTLOADER_TYPE = Path("/proc/sys/kernel/bootloader_type")


class ThisHost:
    """``userspace_at`` asks systemd when this boot's userspace began (epoch s); 0 means unknown."""

    def __init__(self, userspace_at: Callable[[], float] = lambda: 0.0) -> None:
        self._userspace_at = userspace_at
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._digests: dict[tuple[int, int, int], str] = {}

    def now(self) -> float:
        return time.time()

    def uptime_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def boot_id(self) -> str:
        """random(4): new at each boot, also after a kexec."""
        return self._boot_id

    def kernel(self) -> str:
        return os.uname().release

    def name(self) -> str:
        return os.uname().nodename

    def program_digest(self, pid: int) -> str:
        program = Path(f"/proc/{pid}/exe")
        info = program.stat()
        key = (info.st_dev, info.st_ino, info.st_mtime_ns)
        if key not in self._digests:
            with program.open("rb") as file:
                self._digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._digests[key]

    def program_identity(self, path: str) -> str:
        try:
            info = Path(path).stat()
        except OSError:
            return ""
        return f"{info.st_dev}:{info.st_ino}:{info.st_mtime_ns}:{info.st_size}"

    def digest_file(self, path: str) -> str:
        try:
            with Path(path).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return ""

    def identify_disk(self, disk: DiskIdentity) -> DiskIdentity:
        if not disk.filename.startswith("/"):
            return replace(disk, kind="remote")
        try:
            info = Path(disk.filename).stat()
        except OSError:
            return replace(disk, kind="missing")
        if stat.S_ISBLK(info.st_mode):
            number = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
            return replace(disk, kind="device", **_block_device(BLOCK_DEVICES / number))
        if not stat.S_ISREG(info.st_mode):
            return replace(disk, kind="device")
        return replace(disk, kind="file", inode=info.st_ino, size_bytes=info.st_size, mtime_ns=info.st_mtime_ns)

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


def _block_device(sysfs: Path) -> dict[str, Any]:
    """The size, and a name that stays the same over boots if there is one (Documentation/ABI, block and dm)."""
    names = ("dm/uuid", "wwid", "device/wwid", "serial", "device/serial", "loop/backing_file")
    name = next((text for name in names if (text := _text(sysfs / name))), "")
    return {"device_id": name, "size_bytes": int(_text(sysfs / "size") or 0) * 512}


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
