# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that a caller names, or that root runs: whether a path leads where it says, and stays so."""

from __future__ import annotations

import os
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
    for place in (*reversed(path.parents), path):
        info = place.lstat()
        if stat.S_ISLNK(info.st_mode):
            return f"{place} is a symbolic link"
        if place != path and not stat.S_ISDIR(info.st_mode):
            return f"{place} is not a directory"
        if info.st_uid not in (0, os.geteuid()):
            return f"{place} belongs to user {info.st_uid}"
        sticky = place != path and info.st_mode & stat.S_ISVTX
        if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
            return f"others may write to {place} (mode {stat.S_IMODE(info.st_mode):04o})"
    return ""


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
