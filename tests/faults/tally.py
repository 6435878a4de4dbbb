# SPDX-License-Identifier: GPL-2.0-or-later
"""What `make test-faults` prints last. Each test notes the faults that it injected, once all guests have stood them."""

from __future__ import annotations

import sys
from pathlib import Path

TALLY = Path(__file__).parent.parent.parent / "build/faults"


def note(injected: int, lost: int = 0, twice: int = 0) -> None:
    TALLY.parent.mkdir(exist_ok=True)
    with TALLY.open("a") as tally:
        print(injected, lost, twice, file=tally)


def main() -> int:
    noted = [tuple(map(int, line.split())) for line in TALLY.read_text().splitlines()] if TALLY.exists() else []
    injected, lost, twice = (sum(column) for column in zip(*noted, strict=True)) if noted else (0, 0, 0)
    print(f"faults injected {injected}, guests lost {lost}, loaded twice {twice}")
    return 1 if lost or twice or not injected else 0


if __name__ == "__main__":
    sys.exit(main())
