# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest RAM, opened once and proved on the descriptor that QEMU gets."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cpr_agent.core.model import MemoryIdentity
from cpr_agent.errors import MemoryUnusable


def open_memory(node: str, wanted: MemoryIdentity) -> int:
    """Open the RAM and prove on the open descriptor that it is the memory that ``wanted`` describes. Raises MemoryUnusable.

    Never creates anything: QEMU would make an ordinary file of a missing /dev/daxX.Y and start on it (measured up to 11.1).
    """
    try:
        fd = os.open(node, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise MemoryUnusable(f"{node} can't be opened: {error.strerror}", left="nothing was started") from error
    why = _why_another(os.fstat(fd), wanted)
    if why:
        os.close(fd)
        raise MemoryUnusable(f"{node} is not the memory that was proved: {why}", left="nothing was started")
    return fd


def _why_another(info: os.stat_result, wanted: MemoryIdentity) -> str:
    """What tells it from the one that was proved; "" for the same."""
    found: dict[str, object]
    expected: dict[str, object]
    if wanted.kind == "devdax":
        if not stat.S_ISCHR(info.st_mode):
            return "it is not a character device"
        sysfs = Path(f"/sys/dev/char/{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}").resolve()
        found = {
            "subsystem": (sysfs / "subsystem").resolve().name,
            "uuid": _attribute(sysfs.parent / "uuid"),
            "size": _attribute(sysfs / "size"),
        }
        expected = {"subsystem": "dax", "uuid": wanted.uuid, "size": str(wanted.device_size_bytes)}
    else:
        found = {"regular": stat.S_ISREG(info.st_mode), "st_dev": info.st_dev, "inode": info.st_ino}
        expected = {"regular": True, "st_dev": wanted.st_dev, "inode": wanted.inode}
        if found == expected and info.st_size < wanted.offset_bytes + wanted.size_bytes:
            return f"it has {info.st_size} bytes, too few"
    return "" if found == expected else f"expected {expected}, found {found}"


def _attribute(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
