# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of other people's making, opened so that none can hold the agent up."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

NOT_REGULAR = "not a regular file"


def open_regular(path: str | Path, *, follow: bool = True) -> BinaryIO:
    """``path`` for reading, if it is a regular file: a FIFO or a device would make its reader wait. Raises OSError."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    fd = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
        return open(fd, "rb")  # noqa: PTH123 - a descriptor
    except BaseException:
        os.close(fd)
        raise


def head(path: str | Path, size_bytes: int) -> bytes:
    """Its first bytes. Raises OSError."""
    with open_regular(path) as file:
        return file.read(size_bytes)


def text(path: Path, limit_bytes: int) -> str:
    """All of it, as far as it is text; "" if there is none, it can't be read, or it is longer."""
    try:
        with open_regular(path) as file:
            raw = file.read(limit_bytes + 1)
    except OSError:
        return ""
    return raw.decode(errors="surrogateescape") if len(raw) <= limit_bytes else ""


def exists(path: str | Path) -> bool:
    """Also if it is in a directory that can't be looked into: False then."""
    try:
        return Path(path).exists()
    except OSError:
        return False


def children(directory: Path, pattern: str, most: int = 4096) -> list[Path]:
    """What of ``directory`` matches, in order; nothing where it can't be read. Not more than ``most``."""
    try:
        return sorted(path for path, _ in zip(directory.glob(pattern), range(most), strict=False))
    except OSError:
        return []
