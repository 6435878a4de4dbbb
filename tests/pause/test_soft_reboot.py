# SPDX-License-Identifier: GPL-2.0-or-later
"""A new userspace under the same kernel: `systemctl soft-reboot`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.host_vm import ROOT, build_guests, run_scenario

TIMEOUT_S = 1800


def test_guests_live_through_a_soft_reboot(tmp_path: Path) -> None:
    payload = [build_guests(tmp_path / "guests"), ROOT / "tests/guests/scenario-lib"]
    scenario = Path(__file__).parent / "soft-reboot-scenario"
    out, verdict = run_scenario(scenario, "test-soft-reboot", payload, TIMEOUT_S)
    assert verdict == 0, f"see {out}"
    kexec, soft, again = (json.loads((out / f"artefacts/report-{boot}.json").read_text()) for boot in (2, 3, 4))
    assert [one["kind"] for one in (kexec, soft, again)] == ["drill", "soft-reboot", "soft-reboot"]
    for one in (soft, again):
        assert one["outcome"] == "done"
        assert {guest["vm"] for guest in one["guests"]} == {"dax", "shm"}
        print(f"pause over a soft reboot {pause_s(one):.1f} s, over a kexec {pause_s(kexec):.1f} s")


def pause_s(story: dict[str, Any]) -> float:
    return max(float(guest["pause_s"]) for guest in story["guests"])
