# SPDX-License-Identifier: GPL-2.0-or-later
"""What a new kernel must be able to mount: the file systems of / and /usr, and the devices below them as /sys shows them.

Sources: sysfs(5), Documentation/ABI/testing/sysfs-{block,bus-pci}, systemd's mount units (/usr is
mounted by the initrd).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cpr_agent.host.kernels.files import children, exists, text
from cpr_agent.mounts import Mount, mounts

AT = ("/", "/usr")
NO_DRIVER = frozenset({"tmpfs", "ramfs", "rootfs"})
MOST_DEVICES = 256
"""Bounds the walk through stacks of devices."""

_LEVELS = {"raid0": "raid0", "raid1": "raid1", "raid10": "raid10", **dict.fromkeys(("raid4", "raid5", "raid6"), "raid456")}
"""Of md, and the modules that know them."""
_MAPPED = (("CRYPT-", "dm_crypt"), ("mpath-", "dm_multipath"))


class Need(NamedTuple):
    """A ``driver`` that something of the root needs. ``certain`` if the running kernel says that it is a module's name."""

    driver: str
    of: str
    certain: bool = True


def root_mounts(root: Path) -> list[Mount]:
    """Of / and /usr, those that show; none where nothing says what is mounted."""
    mountinfo = root / "proc/self/mountinfo"
    shown = {mount.point: mount for mount in mounts(mountinfo) if mount.point in AT} if exists(mountinfo) else {}
    return list(shown.values())


def devices(root: Path, mount: Mount) -> Iterator[Need]:
    """The drivers of the devices that ``mount`` is on, from the partition up to the bus."""
    start = _block_device(root, mount)
    yield from _Walk(root / "sys").needs(start) if start else ()


def _block_device(root: Path, mount: Mount) -> Path | None:
    name = mount.source.rpartition("/")[2]
    places = [root / "sys/dev/block" / mount.device]
    if mount.source.startswith("/dev/"):
        places.append(root / "sys/class/block" / name)
        places += [path.parent.parent for path in children(root / "sys/class/block", "dm-*/dm/name") if _word(path) == name]
    return next((place for place in places if exists(place)), None)


class _Walk:
    def __init__(self, sys: Path) -> None:
        self._sys = Path(os.path.realpath(sys))
        self._seen: set[Path] = set()

    def needs(self, device: Path) -> Iterator[Need]:
        place = Path(os.path.realpath(device))
        name = place.name
        while place.is_relative_to(self._sys) and place != self._sys and place not in self._seen:
            if len(self._seen) >= MOST_DEVICES:
                return
            self._seen.add(place)
            yield from self._of_one(place, name)
            for below in children(place / "slaves", "*"):
                yield from self.needs(below)
            if re.match(r"nvme-subsys\d", place.name):  # with multipath on, disks are no children of their controllers
                for controller in children(place, "nvme[0-9]*"):
                    yield from self.needs(controller) if controller.is_symlink() else ()
            place = place.parent

    def _of_one(self, place: Path, name: str) -> Iterator[Need]:
        if exists(place / "dm"):
            yield Need("dm_mod", name)
            uuid = _word(place / "dm/uuid")
            yield from (Need(driver, name) for prefix, driver in _MAPPED if uuid.startswith(prefix))
        if exists(place / "md"):
            yield Need("md_mod", name)
            if driver := _LEVELS.get(_word(place / "md/level")):
                yield Need(driver, name)
        if exists(place / "bcache"):
            yield Need("bcache", name)
        if (place / "driver").is_symlink() and not _word(place / "class").startswith("0x0604"):  # bridges can't be modules
            link = place / "driver"
            certain = (link / "module").is_symlink()
            target = (link / "module" if certain else link).readlink()
            yield Need(target.name.replace("-", "_"), name, certain)


def _word(path: Path) -> str:
    return text(path, 4096).strip()
