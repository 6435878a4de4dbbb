# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs in the list of a real systemd-machined, over a save, a refresh, a restart of the agent and a kexec, with
AppArmor's profiles enforced."""

from __future__ import annotations

from pathlib import Path

from tests.host_vm import ROOT, build_guests, run_scenario

TIMEOUT_S = 2400
APPARMOR = "lsm=capability,landlock,yama,apparmor"
"""The last lsm= on a command line counts: the leader is confined as QEMU is."""


def test_machinectl_knows_vms_and_shuts_their_guests_down(tmp_path: Path) -> None:
    payload = [build_guests(tmp_path / "guests"), ROOT / "tests/guests/scenario-lib"]
    scenario = Path(__file__).parent / "machines-scenario"
    out, verdict = run_scenario(scenario, "test-machines", payload, TIMEOUT_S, "--append", APPARMOR)
    assert verdict == 0, f"see {out}"
    print((out / "artefacts/machinectl").read_text())
