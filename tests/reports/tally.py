# SPDX-License-Identifier: GPL-2.0-or-later
"""What `make test-reports` prints last. Each test is a case, and each sequence is noted with what became of its guest.

A plugin of pytest too (``-p tests.reports.tally``), which notes the cases.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

TALLY = Path(__file__).parent.parent.parent / "build/reports"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test that was skipped is no case; nor are the sequences, which are noted one by one."""
    if "test_sequences.py" in report.nodeid:
        return
    if report.failed or (report.when == "call" and report.passed):
        note_case(report.nodeid, right=report.passed)


def note_case(name: str, *, right: bool) -> None:
    _note("case", name, "right" if right else "wrong")


def note_sequence(version: str, outcome: str) -> None:
    """``outcome`` is same, refused or wrong."""
    _note("sequence", version, outcome)


def _note(kind: str, what: str, outcome: str) -> None:
    TALLY.parent.mkdir(exist_ok=True)
    with TALLY.open("a") as tally:
        print(kind, what, outcome, sep="\t", file=tally)


def main() -> int:
    lines = [line.split("\t") for line in TALLY.read_text().splitlines()] if TALLY.exists() else []
    cases = Counter(outcome for kind, _, outcome in lines if kind == "case")
    sequences = Counter(outcome for kind, _, outcome in lines if kind == "sequence")
    for version in sorted({what for kind, what, _ in lines if kind == "sequence"}):
        of = Counter(outcome for kind, what, outcome in lines if kind == "sequence" and what == version)
        print(f"QEMU {version}: sequences {of.total()}, same {of['same']}, refused {of['refused']}")
    good = sequences["same"] + sequences["refused"]
    print(f"cases {cases.total()}, right {cases['right']}; sequences {sequences.total()}, same or refused {good}")
    return 0 if cases and sequences and cases["right"] == cases.total() and good == sequences.total() else 1


if __name__ == "__main__":
    sys.exit(main())
