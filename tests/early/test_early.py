# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests go on before the host's services, by systemd and real kexecs; a bus and mounts come late, or never."""

from __future__ import annotations

from pathlib import Path

from tests.host_vm import ROOT, build_guests, run_scenario

TIMEOUT_S = 2400


def test_guests_wait_for_nothing_but_what_is_their_own(tmp_path: Path) -> None:
    payload = [build_guests(tmp_path / "guests"), ROOT / "tests/guests/scenario-lib"]
    scenario = Path(__file__).parent / "early-scenario"
    out, verdict = run_scenario(scenario, "test-early", payload, TIMEOUT_S)
    assert verdict == 0, f"see {out}"
    print((out / "artefacts/tally").read_text())
