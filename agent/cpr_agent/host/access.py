# SPDX-License-Identifier: GPL-2.0-or-later
"""Whom owner, mode and access control list of a file let in (path_resolution(7), acl(5)). The agent can't become a VM's
user to try: it has no CAP_SETUID."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Collection
from pathlib import Path

from cpr_agent.host import acl
from cpr_agent.host.users import groups_beside

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
    entries = acl.read(place) or [(acl.USER_OBJ, mode >> 6, 0), (acl.GROUP_OBJ, mode >> 3, 0), (acl.OTHER, mode, 0)]
    mask = next((bits for tag, bits, _ in entries if tag == acl.MASK), 7)
    if uid == info.st_uid:
        granted = next(bits for tag, bits, _ in entries if tag == acl.USER_OBJ)
    elif named := [bits for tag, bits, one in entries if tag == acl.USER and one == uid]:
        granted = named[0] & mask
    elif groups := [
        bits & mask
        for tag, bits, one in entries
        if (tag == acl.GROUP_OBJ and info.st_gid in gids) or (tag == acl.GROUP and one in gids)
    ]:
        granted = max(bits & wanted for bits in groups)
    else:
        granted = next(bits for tag, bits, _ in entries if tag == acl.OTHER)
    return granted & wanted == wanted
