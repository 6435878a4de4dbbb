"""Whether a path that a caller names leads where it says, and nobody can make it lead elsewhere meanwhile."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def doubt(path: Path) -> str:
    """Why somebody other than root, or the user that the agent is, could make ``path`` another object than the one that
    is checked now; "" if nobody can. A symbolic link anywhere on the way is a reason, and so is a directory that others
    may write to, but for one with a sticky bit that is not the last. Raises OSError.

    Looking at all of it beforehand is enough: who can't write to a directory can't rename what is in it.
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
        others = stat.S_IWOTH if info.st_gid == 0 else stat.S_IWOTH | stat.S_IWGRP
        if info.st_mode & others and not sticky:
            return f"others may write to {place} (mode {stat.S_IMODE(info.st_mode):o})"
    return ""
