# SPDX-License-Identifier: GPL-2.0-or-later
"""Leave for a VM's user to open a dax device, while its QEMU starts and no longer.

QEMU opens its RAM anew, by the descriptor that it is handed (/proc/self/fd/N), and the node's owner and mode count for
that. No rule of udev's gives the nodes away: each is root's, with an entry in its access control list (acl(5)) for as long
as a start needs it. So a VM can't open the device of another one, whose QEMU has its own open already.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from cpr_agent.host import acl

_RW = 6


class DeviceGrants:
    def __init__(self) -> None:
        self._given: dict[str, tuple[list[int], int]] = {}
        """By place, descriptors of the nodes, and the user."""

    def give(self, place: str, devices: Sequence[int], uid: int) -> None:
        """Let this user open these nodes until ``take_back``. Raises OSError."""
        self.take_back(place)
        if uid == os.geteuid() or not devices:
            return
        self._given[place] = [os.dup(fd) for fd in devices], uid
        for fd in self._given[place][0]:
            self._write(fd)

    def take_back(self, place: str) -> None:
        fds, _ = self._given.pop(place, ([], 0))
        for fd in fds:
            with contextlib.suppress(OSError):  # the device may be gone
                self._write(fd)
            os.close(fd)

    def restore(self, device: int) -> None:
        """Take back what an agent before this one has left in the node's list. Raises OSError."""
        self._write(device)

    def _write(self, fd: int) -> None:
        """Whoever is to have this node now, and nobody else: several VMs may share it."""
        node = os.fstat(fd)
        uids = {uid for fds, uid in self._given.values() for one in fds if os.path.samestat(os.fstat(one), node)}
        entries = [(acl.USER_OBJ, _RW, acl.NOBODY), *((acl.USER, _RW, uid) for uid in sorted(uids))]
        entries += [(acl.GROUP_OBJ, 0, acl.NOBODY), (acl.MASK, _RW if uids else 0, acl.NOBODY), (acl.OTHER, 0, acl.NOBODY)]
        acl.write(fd, entries)
