# SPDX-License-Identifier: GPL-2.0-or-later
"""Which user a VM runs as whose definition names none (ADR 24)."""

from __future__ import annotations

import contextlib
import grp
import pwd
import re
import threading
from pathlib import Path

from cpr_agent.errors import QemuFailed
from cpr_agent.files import make_private_directory, read_own, write_atomically

SHARED_USER = "cpr-vm"
"""Of VMs that were defined before each had a user of its own, and where no unit runs them."""
FIRST_UID, LAST_UID = 66_000, 98_999
"""Above every user of 16 bits, and below the first range that subuid(5) gives away (login.defs(5), SUB_UID_MIN)."""
_OWN = re.compile(rf"{SHARED_USER}-([1-9]\d{{0,5}})", re.ASCII)


def uid_of_user(user: str) -> int:
    """Of a user ``cpr-vm-N``, which need not be there yet; 0 for any other."""
    match = _OWN.fullmatch(user)
    uid = FIRST_UID + int(match[1]) if match else 0
    return uid if uid <= LAST_UID else 0


def groups_beside(user: str) -> tuple[str, ...]:
    """Those that its unit adds. A user whom an admin has named may have disks by the group that all VMs had once."""
    return ("kvm",) if uid_of_user(user) else ("kvm", SHARED_USER)


class Users:
    """``root`` has a file for each VM, with its user. No file is ever deleted, so that no VM gets what another one left:
    RAM, disks, a checkpoint."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()

    def recorded(self, vm: str) -> str:
        """ "" if the VM has none yet."""
        try:
            user = read_own(self._root / vm).decode().strip()
        except (OSError, UnicodeError):
            return ""
        return user if user == SHARED_USER or uid_of_user(user) else ""

    def assign(self, vm: str) -> str:
        """The VM's own for good, durably. Blocking. Raises QemuFailed."""
        with self._lock:
            if user := self.recorded(vm):
                return user
            try:
                user = f"{SHARED_USER}-{self._next()}"
                make_private_directory(self._root)
                write_atomically(self._root / vm, f"{user}\n".encode())
            except OSError as error:
                raise QemuFailed(f"has no user of its own: {error}", vm=vm, left="nothing was started") from error
            return user

    def _next(self) -> int:
        """Above all that VMs have, or have had as far as the host knows; and nobody else's. Raises OSError."""
        files = self._root.iterdir() if self._root.is_dir() else ()
        given = {uid_of_user(user) for user in (*map(self.recorded, (file.name for file in files)), *_accounts())}
        for uid in range(max(given | {FIRST_UID}) + 1, LAST_UID + 1):
            if not _is_somebody(uid):
                return uid - FIRST_UID
        raise OSError(f"all users up to {LAST_UID} are taken; name one in the definition (vm.user)")


def _accounts() -> list[str]:
    return [account.pw_name for account in pwd.getpwall()]


def _is_somebody(uid: int) -> bool:
    """Also one of a directory service, which lists no users. systemd-sysusers gives no user the number of a group."""
    for known in (pwd.getpwuid, grp.getgrgid):
        with contextlib.suppress(KeyError):
            known(uid)
            return True
    return False
