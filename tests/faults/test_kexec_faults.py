# SPDX-License-Identifier: GPL-2.0-or-later
"""A drill, a shutdown that hangs, a kernel that can not load the guests, the way back, a kexec refused at the last step."""

from __future__ import annotations

from pathlib import Path

from scripts.guest.console import read_console
from tests.faults.tally import note
from tests.host_vm import build_guests, run_scenario

TIMEOUT_S = 2400


def test_guests_stand_what_can_go_wrong_with_a_kexec(tmp_path: Path) -> None:
    scenario = Path(__file__).parent / "kexec-faults-scenario"
    payload = [build_guests(tmp_path / "guests")]
    out, verdict = run_scenario(scenario, "test-kexec-faults", payload, TIMEOUT_S, "--allow-reboot")
    assert verdict == 0, f"see {out}"
    assert (out / "artefacts/summary").read_text() == "faults stood: 4\n"
    for name in ("one", "two"):
        report = read_console(out / "artefacts/consoles" / f"{name}.log", min_lines=20)
        assert report.problems == (), str(report)
    note(4)
