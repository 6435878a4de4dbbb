# SPDX-License-Identifier: GPL-2.0-or-later
"""What `make test-corruption` prints last. A corruption that a load did not notice is counted, and fails its test."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from cpr_agent.bus.client import CallError
from tests.lab import Guest

TALLY = Path(__file__).parent.parent.parent / "build/corruptions"
PROOFS = ("MemoryChanged", "DiskChanged", "MachineChanged", "NotVmstate", "ProofFailed", "CheckpointUnreadable")
"""Errors by which a VM is held."""
OTHERS = ("DeviceMissing", "MemoryInUse", "LoadFailed", "NoCheckpoint", "AlreadySaved")
"""Errors by which a load is refused and can be repeated."""


def note(*words: str) -> None:
    TALLY.parent.mkdir(exist_ok=True)
    with TALLY.open("a") as tally:
        print(*words, file=tally)


def caught(guest: Guest, kind: str, *words: str) -> str:
    """The load must be refused by this error, before the guest has run, with its checkpoint kept; returns the text."""
    assert kind in PROOFS + OTHERS
    note("corruption", kind)
    said = guest.console.stat().st_size
    with pytest.raises(CallError) as refusal:
        guest.load()
    text = str(refusal.value)
    assert refusal.value.kind == kind, text
    for word in (f"VM {guest.name}", *words):
        assert word in text, text
    assert guest.pid == 0, text
    assert guest.console.stat().st_size == said, "the guest ran"
    if kind != "NoCheckpoint":
        assert "manifest.json" in guest.checkpoint_files()
        assert guest.state == ("held" if kind in PROOFS else "saved"), text
    note("caught", kind)
    return text


def loads(guest: Guest) -> None:
    """What was done is harmless, or was put right: the guest goes on where it was."""
    note("harmless")
    guest.load()
    guest.assert_unbroken()
    note("loaded")


def main() -> int:
    counts = Counter(line.split()[0] for line in TALLY.read_text().splitlines()) if TALLY.exists() else Counter()
    print(
        f"corruptions {counts['corruption']}, caught {counts['caught']}, "
        f"harmless loaded {counts['loaded']} of {counts['harmless']}"
    )
    good = counts["corruption"] and counts["corruption"] == counts["caught"] and counts["loaded"] == counts["harmless"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
