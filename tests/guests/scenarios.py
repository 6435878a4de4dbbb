# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests in the host VM: what the tests of tests/guests that need one share."""

from __future__ import annotations

from pathlib import Path

from tests.guests.tally import take_tally
from tests.host_vm import build_guests, run_scenario

HERE = Path(__file__).parent


def in_host_vm(name: str, directory: Path, *options: str, timeout_s: float = 2400) -> Path:
    """Run NAME-scenario with the tiny guest, and count its cases. Returns the directory of what it left."""
    payload = [build_guests(directory / "guests"), HERE / "scenario-lib"]
    out, verdict = run_scenario(HERE / f"{name}-scenario", f"test-{name}", payload, timeout_s, *options)
    take_tally(out)
    assert verdict == 0, f"see {out}"
    return out
