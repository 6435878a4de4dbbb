# SPDX-License-Identifier: GPL-2.0-or-later
"""The timelines of past loads, a JSON file each, for reports and predictions. Recovery does not need them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from cpr_agent.core.timeline import GuestTimeline
from cpr_agent.files import make_private_directory, read_own, write_atomically

KEPT = 10_000
"""Timelines, of 1 KB each: those of 100 guests that are loaded twice a week, for a year."""
_TIMELINE = msgspec.json.Decoder(GuestTimeline)
"""See store/schema.py, READ."""


class History:
    """Reads each file once: only the agent writes to the directory. ``all`` may run in a thread beside the others."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._read: dict[str, GuestTimeline | None] = {}
        self._last: dict[str, GuestTimeline] = {}

    def add(self, timeline: GuestTimeline) -> None:
        make_private_directory(self._root)
        path = self._root / f"{timeline.id}.json"
        write_atomically(path, msgspec.json.encode(timeline))
        self._read[path.name] = timeline
        self._note(timeline)
        if len(self._read) > KEPT:
            for old in self.all()[:-KEPT]:
                (self._root / f"{old.id}.json").unlink(missing_ok=True)
                self._read.pop(f"{old.id}.json", None)

    def last(self, vm: str) -> GuestTimeline | None:
        return self._last.get(vm)

    def _note(self, timeline: GuestTimeline) -> None:
        had = self._last.get(timeline.vm)
        if had is None or had.resumed_at <= timeline.resumed_at:
            self._last[timeline.vm] = timeline

    def all(self) -> list[GuestTimeline]:
        paths = {path.name: path for path in self._root.glob("*.json")}
        for name in [name for name in paths if name not in self._read]:
            if timeline := _decoded(paths[name]):
                self._note(timeline)
            self._read[name] = timeline
        there = [timeline for name in paths if (timeline := self._read.get(name))]
        return sorted(there, key=lambda timeline: timeline.resumed_at)


def _decoded(path: Path) -> GuestTimeline | None:
    try:
        return _TIMELINE.decode(read_own(path))
    except (msgspec.MsgspecError, OSError):
        return None
