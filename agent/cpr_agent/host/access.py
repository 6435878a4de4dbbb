# SPDX-License-Identifier: GPL-2.0-or-later
"""Whom owner, mode and access control list of a file let in (path_resolution(7), acl(5)). The agent can't become a VM's
user to try: it has no CAP_SETUID."""

from __future__ import annotations

import grp
import os
import pwd
import stat
import struct
from collections.abc import Collection
from pathlib import Path

from cpr_agent.host.users import groups_beside

_ENTRY = struct.Struct("<HHI")
_HEADER_BYTES = 4
_USER_OBJ, USER, _GROUP_OBJ, GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
"""include/uapi/linux/posix_acl.h."""
_READ, _PASS = 4, 1
STRANGER = 65_534
"""nobody: a user in no group, and the owner of nothing."""


def groups_of(user: str) -> tuple[int, set[int]]:
    """The uid and the groups of a VM's processes. Raises KeyError if there is no such user."""
    account = pwd.getpwnam(user)
    extra = groups_beside(user)
    named = {group.gr_gid for group in grp.getgrall() if group.gr_name in extra or user in group.gr_mem}
    return account.pw_uid, {account.pw_gid, *named}


def closed_place(path: str, uid: int, gids: Collection[int]) -> str:
    """The directory that this user can't pass, or the file that it can't read; "" if it can. Raises OSError."""
    real = Path(os.path.realpath(path, strict=True))
    for place in (*reversed(real.parents), real):
        if not _permits(place, uid, gids, _READ if place == real else _PASS):
            return str(place)
    return ""


def _permits(place: Path, uid: int, gids: Collection[int], wanted: int) -> bool:
    info = place.stat()
    if uid == 0:
        return True
    mode = stat.S_IMODE(info.st_mode)
    entries = _entries(place) or [(_USER_OBJ, mode >> 6, 0), (_GROUP_OBJ, mode >> 3, 0), (_OTHER, mode, 0)]
    mask = next((bits for tag, bits, _ in entries if tag == _MASK), 7)
    if uid == info.st_uid:
        granted = next(bits for tag, bits, _ in entries if tag == _USER_OBJ)
    elif named := [bits for tag, bits, one in entries if tag == USER and one == uid]:
        granted = named[0] & mask
    elif groups := [
        bits & mask
        for tag, bits, one in entries
        if (tag == _GROUP_OBJ and info.st_gid in gids) or (tag == GROUP and one in gids)
    ]:
        granted = max(bits & wanted for bits in groups)
    else:
        granted = next(bits for tag, bits, _ in entries if tag == _OTHER)
    return granted & wanted == wanted


def _entries(place: Path) -> list[tuple[int, int, int]]:
    """Tag, permissions and ID of each; empty without a list."""
    try:
        raw = os.getxattr(place, "system.posix_acl_access")
    except OSError:
        return []
    return list(_ENTRY.iter_unpack(raw[_HEADER_BYTES:]))
