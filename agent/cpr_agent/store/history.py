"""What past loads measured: one JSON file each in ``history/``, for reports and predictions. Not needed for recovery."""

from __future__ import annotations

from pathlib import Path

import msgspec

from cpr_agent.report.timeline import GuestTimeline
from cpr_agent.store.atomic import make_private_directory, write_atomically


class History:
    def __init__(self, root: Path) -> None:
        self._root = root

    def add(self, timeline: GuestTimeline) -> None:
        make_private_directory(self._root)
        write_atomically(self._root / f"{timeline.id}.json", msgspec.json.encode(timeline))

    def all(self) -> list[GuestTimeline]:
        """Every readable record, oldest first."""
        out = []
        for path in self._root.glob("*.json"):
            try:
                out.append(msgspec.json.decode(path.read_bytes(), type=GuestTimeline))
            except msgspec.MsgspecError:
                continue
        return sorted(out, key=lambda timeline: timeline.resumed_at)
