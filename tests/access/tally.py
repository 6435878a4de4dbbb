# SPDX-License-Identifier: GPL-2.0-or-later
"""What `make test-access` prints last, and the counts that it stands on: those of the scenario."""

from __future__ import annotations

import sys
from pathlib import Path

TALLY = Path(__file__).parent.parent.parent / "build/access"
TABLE = TALLY.with_name("isolation")


def take_tally(out: Path) -> None:
    """Of a scenario of the host VM: how many methods, refused to nobody, to a member as ruled."""
    tally = out / "artefacts/tally"
    TALLY.parent.mkdir(exist_ok=True)
    TALLY.write_text(tally.read_text() if tally.exists() else "")


def take_table(out: Path) -> None:
    """Of another scenario: what VMs reach of each other."""
    table = out / "artefacts/table"
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table.read_text() if table.exists() else "")


def main() -> int:
    counts = TALLY.read_text().split() if TALLY.exists() else []
    methods, refused, ruled = map(int, counts or (0, 0, 0))
    print(f"methods {methods}, refused to nobody {refused}, to member as ruled {ruled}")
    table = TABLE.read_text() if TABLE.exists() else ""
    print(table or "no table of isolation", end="" if table else "\n")
    apart = "of its own, reached" in table and "REACHED" not in table
    return 0 if apart and methods and methods == refused == ruled else 1


if __name__ == "__main__":
    sys.exit(main())
