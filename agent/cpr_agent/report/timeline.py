"""A guest's pause, split into the phases that make it up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GuestTimeline:
    """One guest's way through a save and a load. Times are epoch seconds; ``kernel_at`` and ``userspace_at`` are 0 if
    the host was not restarted in between."""

    id: str
    vm: str
    upgrade: str
    kernel_before: str
    kernel_after: str
    stopped_at: float
    saved_at: float
    kernel_at: float
    userspace_at: float
    load_at: float
    memory_at: float
    resumed_at: float

    @property
    def pause_s(self) -> float:
        return self.resumed_at - self.stopped_at

    def phases(self) -> list[tuple[str, float]]:
        """Name and length in seconds of each phase, in order; they add up to the pause.

        The moment at which the old kernel hands over is not recorded by anyone: "shutdown" lasts from the durable save
        to the new kernel's own start of time (CLOCK_BOOTTIME 0), so that decompression of the kernel is part of it.
        """
        marks = [("save", self.saved_at)]
        if self.kernel_at:
            marks += [("shutdown + kexec", self.kernel_at), ("kernel", self.userspace_at), ("userspace", self.load_at)]
        else:
            marks += [("saved", self.load_at)]
        marks += [("devices", self.memory_at), ("load", self.resumed_at)]
        out, last = [], self.stopped_at
        for name, mark in marks:
            out.append((name, mark - last))
            last = mark
        return out
