# SPDX-License-Identifier: GPL-2.0-or-later
"""What `make test-hostile` prints last: a line is noted for each test, and one for each fuzzer."""

from __future__ import annotations

import sys
from pathlib import Path

TALLY = Path(__file__).parent.parent.parent / "build/hostile"


def note_case(*, contained: bool) -> None:
    _note("case", 1, int(contained))


def note_fuzz(inputs: int, surprises: int) -> None:
    _note("fuzz", inputs, surprises)


def _note(kind: str, first: int, second: int) -> None:
    TALLY.parent.mkdir(exist_ok=True)
    with TALLY.open("a") as tally:
        print(kind, first, second, file=tally)


def main() -> int:
    noted = [line.split() for line in TALLY.read_text().splitlines()] if TALLY.exists() else []
    cases = [int(contained) for kind, _, contained in noted if kind == "case"]
    fuzzed = [(int(inputs), int(surprises)) for kind, inputs, surprises in noted if kind == "fuzz"]
    inputs, surprises = sum(one for one, _ in fuzzed), sum(one for _, one in fuzzed)
    print(f"hostile cases {len(cases)}, contained {sum(cases)}; fuzzed {inputs} inputs, surprises {surprises}")
    return 1 if not cases or sum(cases) < len(cases) or surprises or not inputs else 0


if __name__ == "__main__":
    sys.exit(main())
