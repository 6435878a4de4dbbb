# SPDX-License-Identifier: GPL-2.0-or-later
"""What `make test-access` prints last, and the counts that it stands on: those of the scenario."""

from __future__ import annotations

import sys
from pathlib import Path

TALLY = Path(__file__).parent.parent.parent / "build/access"


def take_tally(out: Path) -> None:
    """Of a scenario of the host VM: how many methods, refused to nobody, to a member as ruled."""
    tally = out / "artefacts/tally"
    TALLY.parent.mkdir(exist_ok=True)
    TALLY.write_text(tally.read_text() if tally.exists() else "")


def main() -> int:
    counts = TALLY.read_text().split() if TALLY.exists() else []
    methods, refused, ruled = map(int, counts or (0, 0, 0))
    print(f"methods {methods}, refused to nobody {refused}, to member as ruled {ruled}")
    return 0 if methods and methods == refused == ruled else 1


if __name__ == "__main__":
    sys.exit(main())
