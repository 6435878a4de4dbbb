# SPDX-License-Identifier: GPL-2.0-or-later
"""The mounts of this host (proc_pid_mountinfo(5))."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

MOUNTINFO = Path("/proc/self/mountinfo")


class Mount(NamedTuple):
    """One mount. ``device`` is its number, as ``259:1``; ``options`` are those of the mount and of the file system."""

    device: str
    point: str
    kind: str
    source: str
    options: frozenset[str]


def mounts(mountinfo: Path = MOUNTINFO) -> list[Mount]:
    """In the order in which they were mounted: at one point the last one shows. Raises OSError."""
    text = mountinfo.read_bytes().decode(errors="surrogateescape")
    return [_mount(line) for line in text.removesuffix("\n").split("\n")]  # paths may have other line separators in them


def _mount(line: str) -> Mount:
    before, _, after = line.partition(" - ")
    _, _, device, _, point, options, *_ = before.split(" ")
    kind, source, more = after.split(" ", 2)
    return Mount(device, point, kind, source, frozenset(options.split(",")) | frozenset(more.split(",")))
