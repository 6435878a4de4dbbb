# SPDX-License-Identifier: GPL-2.0-or-later
"""A program beside a QEMU, without which that does not start, or its guest lacks a device."""

from __future__ import annotations

import msgspec


class Companion(msgspec.Struct, frozen=True, kw_only=True):
    """``where`` is the path of its Unix socket, or its address."""

    name: str
    """As in "the NBD server"."""
    where: str
    ends: bool = False
    """It ends with the QEMU that it serves."""
    shared: bool = False
    """It serves two QEMUs at once."""
    listens: bool = True
    """It is there before QEMU starts; False where QEMU makes the socket, and waits for it, or starts without it."""

    @property
    def is_local(self) -> bool:
        """Whether a kexec of this host ends it."""
        return self.where.startswith(("/", "localhost:", "127.", "::1"))

    def __str__(self) -> str:
        return f"{self.name} at {self.where}"
