# SPDX-License-Identifier: GPL-2.0-or-later
"""Units of the host's systemd, and times of a boot, as PID 1 and the journal have them."""

from __future__ import annotations

import msgspec

UNIT_NAME = (
    r"[A-Za-z0-9:_.\\-]+(@[A-Za-z0-9:_.\\-]+)?\.(service|socket|mount|automount|swap|target|timer|path|slice|scope|device)"
)
"""A name that one unit can have, which no template has (systemd.unit(5))."""
UNIT_NAME_CHARS = 255


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """``began_s`` and ``ended_s``: when it began to start, and had started (s since the kernel's own start); 0 if it has
    not in this boot."""

    name: str
    aliases: frozenset[str] = frozenset()
    load_state: str = "loaded"
    active_state: str = "active"
    startable: bool = True
    """By hand, and again after it was stopped: it has a file of its own."""
    stoppable: bool = True
    requires: frozenset[str] = frozenset()
    """Without these it does not run."""
    wants: frozenset[str] = frozenset()
    takes_along: frozenset[str] = frozenset()
    """Those that systemd stops if this one is stopped."""
    after: frozenset[str] = frozenset()
    before: frozenset[str] = frozenset()
    triggered_by: frozenset[str] = frozenset()
    """Those that can start it again: a socket, a timer, a path."""
    mount_point: str = ""
    began_s: float = 0.0
    ended_s: float = 0.0

    @property
    def exists(self) -> bool:
        return self.load_state != "not-found"

    @property
    def runs(self) -> bool:
        return self.active_state in {"active", "reloading", "activating", "refreshing"}


class UnitStop(msgspec.Struct, frozen=True):
    """A unit's stop in a shutdown (epoch s)."""

    unit: str
    began_at: float
    ended_at: float


class BootTimes(msgspec.Struct, frozen=True):
    """Of this boot, in seconds since the kernel's own start; 0 is unknown. ``initrd_bytes``: as it was in memory."""

    initrd_s: float = 0.0
    userspace_s: float = 0.0
    initrd_bytes: int = 0
