# SPDX-License-Identifier: GPL-2.0-or-later
"""Access control lists as the kernel has them in an extended attribute (acl(5); include/uapi/linux/posix_acl.h and
posix_acl_xattr.h)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NOBODY = 0xFFFFFFFF
"""The ID of an entry that names nobody."""
Entry = tuple[int, int, int]
"""Tag, permissions and ID; a list has them in the order of their tags."""
_NAME = "system.posix_acl_access"
_HEADER = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")


def read(place: Path) -> list[Entry]:
    """Empty without a list, or where it can't be read."""
    try:
        raw = os.getxattr(place, _NAME)
    except OSError:
        return []
    return list(_ENTRY.iter_unpack(raw[len(_HEADER) :]))


def write(fd: int, entries: Iterable[Entry]) -> None:
    """Raises OSError."""
    os.setxattr(fd, _NAME, _HEADER + b"".join(_ENTRY.pack(*entry) for entry in entries))
