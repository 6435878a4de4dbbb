# SPDX-License-Identifier: GPL-2.0-or-later
"""What `make test-guests` prints last. A guest that was not kept is counted, and fails its test."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TALLY = Path(__file__).parent.parent.parent / "build/guests"


def note(*words: str) -> None:
    TALLY.parent.mkdir(exist_ok=True)
    with TALLY.open("a") as tally:
        print(*words, file=tally)


@contextlib.contextmanager
def case(name: str) -> Iterator[None]:
    """One guest, from before what is done to it until it is seen to be kept."""
    note("case", name)
    yield
    note("kept", name)


def take_tally(out: Path) -> None:
    """Of a scenario of the host VM."""
    tally = out / "artefacts/tally"
    for line in tally.read_text().splitlines() if tally.exists() else []:
        note(line)


def main() -> int:
    lines = [line.split(maxsplit=1) for line in TALLY.read_text().splitlines()] if TALLY.exists() else []
    counts = Counter(word for word, _ in lines)
    versions = sorted({what for word, what in lines if word == "dialect"}, key=lambda text: [*map(int, text.split("."))])
    print(
        f"guest cases {counts['case']}, kept {counts['kept']}; dialects run for real: {', '.join(versions) or 'none'}",
    )
    return 0 if counts["case"] and counts["case"] == counts["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
