"""Which processes have a memory object open or mapped: QEMU takes no lock on it (FACTS.md), two of them would share RAM."""

from __future__ import annotations

import os
import stat
from pathlib import Path

PROC = Path("/proc")


def find_users(node: Path) -> list[tuple[str, int]]:
    """Name and PID of other processes that use ``node``, as far as we may look (proc(5), fd and maps). Blocking."""
    info = node.stat()
    # What maps shows: the device and inode of the node itself, also for a device.
    mapped = f" {os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x} {info.st_ino} "
    found = []
    for process in PROC.iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            if _has_open(process, info) or mapped in (process / "maps").read_text():
                found.append(((process / "comm").read_text().strip(), int(process.name)))
        except OSError:
            continue  # it has ended, or is not ours to look at
    return found


def _has_open(process: Path, wanted: os.stat_result) -> bool:
    for descriptor in os.scandir(process / "fd"):
        try:
            info = os.stat(descriptor.path)  # noqa: PTH116 - one call for each descriptor of each process
        except OSError:
            continue
        if stat.S_ISCHR(wanted.st_mode):
            if stat.S_ISCHR(info.st_mode) and info.st_rdev == wanted.st_rdev:
                return True
        elif (info.st_dev, info.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False
