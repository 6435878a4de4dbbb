# SPDX-License-Identifier: GPL-2.0-or-later
"""What `make test-original` prints last. A case whose guest was not kept is counted, and fails its test."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TALLY = ROOT / "build/original"


def note(*words: str) -> None:
    TALLY.parent.mkdir(exist_ok=True)
    with TALLY.open("a") as tally:
        print(*words, file=tally)


def scripted() -> int:
    """The number of files of the tests that speak cpr-save as a QEMU would: no fake may do what the real one can."""
    command = ["git", "grep", "-l", "-E", r"def (do_)?cpr_(save|load)\(", "--", "tests", "scripts"]
    return len(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines())


def main() -> int:
    lines = [line.split(maxsplit=1) for line in TALLY.read_text().splitlines()] if TALLY.exists() else []
    counts = Counter(word for word, _ in lines)
    cases, kept, kexecs, through = (counts[word] for word in ("case", "kept", "kexec", "through"))
    fakes = scripted()
    print(f"original dialect cases {cases}, kept {kept}; kexec {through} of {kexecs}; scripted {fakes}")
    return 0 if cases and cases == kept and kexecs and kexecs == through and not fakes else 1


if __name__ == "__main__":
    sys.exit(main())
