# SPDX-License-Identifier: GPL-2.0-or-later
"""What `make test-cockpit` prints last: a line is noted for each case, and one for each page that axe has looked at."""

from __future__ import annotations

import sys
from pathlib import Path

PAGES = Path(__file__).parent.parent.parent / "build/pages"
"""Screenshots, and the tally."""
TALLY = PAGES / "tally"


def note_case(version: str, *, passed: bool) -> None:
    _note("case", version, int(passed))


def note_axe(version: str, violations: int) -> None:
    _note("axe", version, violations)


def _note(kind: str, version: str, number: int) -> None:
    PAGES.mkdir(parents=True, exist_ok=True)
    with TALLY.open("a") as tally:
        print(kind, version, number, file=tally)


def main() -> int:
    noted = [line.split() for line in TALLY.read_text().splitlines()] if TALLY.exists() else []
    cases = [(version, int(passed)) for kind, version, passed in noted if kind == "case"]
    looks = [int(violations) for kind, _, violations in noted if kind == "axe"]
    passed = sum(one for _, one in cases)
    versions = ", ".join(sorted({version for version, _ in cases})) or "none"
    print(f"page cases {len(cases)}, passed {passed}; cockpit {versions}; axe violations {sum(looks)}")
    return 0 if cases and passed == len(cases) and looks and not sum(looks) else 1


if __name__ == "__main__":
    sys.exit(main())
