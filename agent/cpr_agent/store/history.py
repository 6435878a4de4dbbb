# SPDX-License-Identifier: GPL-2.0-or-later
"""The timelines of past loads, a JSON file each, for reports and predictions. Recovery does not need them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from cpr_agent.core.timeline import GuestTimeline
from cpr_agent.files import make_private_directory, write_atomically

_TIMELINE = msgspec.json.Decoder(GuestTimeline)
"""See store/schema.py, READ."""


class History:
    """Reads each file once: only the agent writes to the directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._read: dict[str, GuestTimeline | None] = {}

    def add(self, timeline: GuestTimeline) -> None:
        make_private_directory(self._root)
        path = self._root / f"{timeline.id}.json"
        write_atomically(path, msgspec.json.encode(timeline))
        self._read[path.name] = timeline

    def all(self) -> list[GuestTimeline]:
        """Every readable record, oldest first."""
        paths = {path.name: path for path in self._root.glob("*.json")}
        for name in paths.keys() - self._read.keys():
            self._read[name] = _decoded(paths[name])
        there = [timeline for name in paths if (timeline := self._read[name])]
        return sorted(there, key=lambda timeline: timeline.resumed_at)


def _decoded(path: Path) -> GuestTimeline | None:
    try:
        return _TIMELINE.decode(path.read_bytes())
    except msgspec.MsgspecError:
        return None
