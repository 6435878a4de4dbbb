# SPDX-License-Identifier: GPL-2.0-or-later
"""What confines the agent and QEMU, enforced: in the host VM, whose kernel has AppArmor for once."""

from __future__ import annotations

from pathlib import Path

from scripts.guest.console import read_console
from tests.host_vm import build_guests, run_scenario

APPARMOR = "lsm=capability,landlock,yama,apparmor"
"""The last lsm= on a command line counts."""


def test_a_whole_life_in_confinement_and_what_is_denied(tmp_path: Path) -> None:
    scenario = Path(__file__).parent / "confinement-scenario"
    payload = [build_guests(tmp_path / "guests")]
    out, verdict = run_scenario(scenario, "test-confinement", payload, 1200, "--append", APPARMOR, "--allow-reboot")
    assert verdict == 0, f"see {out}"
    report = read_console(out / "artefacts/consoles/dax.log", min_lines=10)
    assert report.problems == (), str(report)
