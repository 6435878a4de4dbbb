# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that a caller names, or that root runs: whether a path leads where it says, and stays so."""

from __future__ import annotations

import os
import posixpath
import stat
from pathlib import Path

import msgspec

from cpr_agent.errors import InvalidArgument


def why_swappable(path: Path) -> str:
    """Why somebody other than root, or the user that the agent is, could make ``path`` another object than the one that
    is there now; "" if only they can. Raises OSError.

    A symbolic link anywhere on the way is a reason, and so is a place that its group or others may write to. A directory
    with a sticky bit on the way is none, because only their owners can rename its entries. One look at the whole way is
    enough: whoever can't write to a directory can't rename its entries.
    """
    if why := why_way_swappable(path):
        return why
    info = path.lstat()
    return _why_foreign(path, info) or _why_writable(path, info)


def why_way_swappable(path: Path) -> str:
    """The same of the directories that ``path`` is in alone. Raises OSError."""
    for place in reversed(path.parents):
        info = place.lstat()
        why = _why_foreign(place, info)
        if not why and not stat.S_ISDIR(info.st_mode):
            why = f"{place} is not a directory"
        if not why and not info.st_mode & stat.S_ISVTX:
            why = _why_writable(place, info)
        if why:
            return why
    return ""


def _why_foreign(place: Path, info: os.stat_result) -> str:
    if stat.S_ISLNK(info.st_mode):
        return f"{place} is a symbolic link"
    return "" if info.st_uid in (0, os.geteuid()) else f"{place} belongs to user {info.st_uid}"


def _why_writable(place: Path, info: os.stat_result) -> str:
    mode = stat.S_IMODE(info.st_mode)
    return f"others may write to {place} (mode {mode:04o})" if mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


def is_node_name(path: str) -> bool:
    """Whether it is a plain name of a device's node, or of a link of udev's to one: in /dev, and not in a part of /dev in
    which any user may make names."""
    return path.startswith("/dev/") and posixpath.normpath(path) == path and not path.startswith(_OPEN_TO_ALL)


_OPEN_TO_ALL = ("/dev/shm/", "/dev/mqueue/")  # noqa: S108 - looked at


class AllowedFiles(msgspec.Struct, frozen=True):
    """Files that callers may name: below ``directories``, which ``setting`` of agent.toml's section [files] lists."""

    noun: str
    directories: tuple[Path, ...]
    setting: str

    @property
    def remedy(self) -> str:
        return f"use a file below {', '.join(map(str, self.directories))}"

    def check(self, path: Path, *, fixed: Path, vm: str = "") -> None:
        """``fixed`` is the file itself, or the directory that it is in; root alone may be able to swap that. Raises
        InvalidArgument."""
        left = "nothing was read or written"
        if not any(fixed.is_relative_to(directory) for directory in self.directories):
            what = f"{path} is not below a directory that {self.noun}s may be in"
            remedy = f"{self.remedy}, or extend [files] {self.setting} in agent.toml"
            raise InvalidArgument(what, vm=vm, left=left, remedy=remedy)
        try:
            problem = why_swappable(fixed)
            if not problem and fixed != path and not fixed.is_dir():
                problem = f"{fixed} is not a directory"
        except OSError as error:
            problem = f"{fixed} can't be used: {error.strerror}"
        if problem:
            remedy = f"{fixed} and all directories above it must be root's, and nobody else may write to them"
            raise InvalidArgument(f"{path} can't be a {self.noun}: {problem}", vm=vm, left=left, remedy=remedy)
