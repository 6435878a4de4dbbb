# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's pause, split into the phases that make it up."""

from __future__ import annotations

import enum

import msgspec


class GuestTimeline(msgspec.Struct, frozen=True, kw_only=True):
    """One guest's way through a save and a load. Times are epoch seconds.

    ``shutdown_at`` (the old kernel's userspace ended) and ``userspace_at`` (the new one's began) are 0 if the host was not
    restarted in between, or if nobody knows. Across a kexec the clock comes from the RTC, so that their difference can be
    wrong by a second.
    """

    id: str
    vm: str
    upgrade: str
    kernel_before: str
    kernel_after: str
    stopped_at: float
    saved_at: float
    shutdown_at: float
    userspace_at: float
    load_at: float
    memory_at: float
    resumed_at: float
    clock_behind_s: float | None = None
    """By how much the guest's clock was wrong before the agent set it; None if nobody did."""
    clock_problem: str = ""
    by_kexec: bool = True
    """False if the host was reset, or lost its power, in between."""
    soft: bool = False
    """Its userspace alone was started anew (`systemctl soft-reboot`)."""
    loaded_at: float = 0.0
    """When its state was loaded and its guest about to run; 0 on records of an older agent, as are all below."""
    run_state: str = ""
    """Of the guest, as QEMU names it, when it was saved."""
    qemu_before: str = ""
    qemu_after: str = ""
    witness: str = ""
    state_bytes: int = 0
    memory: str = ""
    memory_bytes: int = 0
    hook_problems: tuple[str, ...] = ()
    """What the post-load hooks that failed said."""

    @property
    def pause_s(self) -> float:
        return self.resumed_at - self.stopped_at

    def phases(self) -> list[tuple[str, float]]:
        """Name and length in seconds of each phase, in order; they add up to the pause.

        "kexec + kernel" has in it the last of the shutdown, which no journal sees, and the initrd.
        """
        marks = [("save", self.saved_at)]
        if self.shutdown_at:
            marks.append(("shutdown", self.shutdown_at))
        if self.userspace_at:
            start = "kexec + kernel" if self.by_kexec else "reset + kernel"
            name = start if self.shutdown_at else "shutdown" if self.soft else f"shutdown + {start}"
            marks += [(name, self.userspace_at), ("userspace", self.load_at)]
        else:
            marks.append(("saved", self.load_at))
        marks.append(("devices", self.memory_at))
        if self.loaded_at:
            marks.append(("load", self.loaded_at))
        marks.append(("resume" if self.loaded_at else "load", self.resumed_at))
        out, last = [], self.stopped_at
        for name, mark in marks:
            out.append((name, mark - last))
            last = mark
        return out


COSTS = "pause-costs"
"""The journal's event that has the costs of an upgrade."""


class Part(enum.StrEnum):
    """Of an upgrade, while guests stand still for their host."""

    SHUTDOWN = "shutdown"
    KERNEL = "kernel"
    BOOT = "boot"


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What guests waited for, from ``begin`` to ``end`` (epoch s). All of a part's costs follow each other: had one been
    shorter, guests would have gone on sooner."""

    what: str
    """A unit; or, of the kernel's part, one of PURGATORY, KERNEL, INITRD; or PID_1."""
    part: Part
    begin: float
    end: float
    waiter: str = ""
    """The unit that could not start or stop before it had."""
    needed_by: str = ""
    """A VM, or the agent, with the reason; "" for nobody."""
    early: bool = False
    """A part of every boot's beginning: it is ordered before sysinit.target."""
    stops_first: bool = False
    """It could be stopped before the first guest is."""
    size_bytes: int = 0
    """Of the kernel and its initrd, or of the initrd."""

    @property
    def length_s(self) -> float:
        return self.end - self.begin


PURGATORY = "end of the shutdown, and purgatory"
"""systemd's last steps, which no journal sees; then the code between two kernels, which hashes the new one."""
KERNEL, INITRD = "kernel", "initrd"
PID_1 = "systemd"
"""Its own start, before that of the first unit that guests waited for."""
