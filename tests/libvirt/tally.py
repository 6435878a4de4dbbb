# SPDX-License-Identifier: GPL-2.0-or-later
"""What `make test-libvirt` prints last. A case whose guest was not kept is counted, and fails its test."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from tests.libvirt.bed import RELEASES

TALLY = Path(__file__).parent.parent.parent / "build/libvirt"


def note(*words: str) -> None:
    TALLY.parent.mkdir(exist_ok=True)
    with TALLY.open("a") as tally:
        print(*words, file=tally)


def take_tally(out: Path) -> None:
    """Of a scenario of the host VM."""
    tally = out / "artefacts/tally"
    for line in tally.read_text().splitlines() if tally.exists() else []:
        note(line)


def main() -> int:
    lines = [line.split(maxsplit=1) for line in TALLY.read_text().splitlines()] if TALLY.exists() else []
    counts = Counter(word for word, _ in lines)
    run = {what for word, what in lines if word == "pair"}
    pairs = [pair for pair in RELEASES.values() if pair in run]
    cases, kept, kexecs, through = (counts[word] for word in ("case", "kept", "kexec", "through"))
    print(
        f"libvirt cases {cases}, kept {kept}; run for real: {', '.join(pairs) or 'none'}; kexec {through} of {kexecs}",
    )
    return 0 if cases and cases == kept and len(pairs) == len(RELEASES) and kexecs and kexecs == through else 1


if __name__ == "__main__":
    sys.exit(main())
