# SPDX-License-Identifier: GPL-2.0-or-later
"""Who costs the pause of a real host: a service that is slow to stop, a mount that is slow to come."""

from __future__ import annotations

import json
from pathlib import Path

from tests.host_vm import ROOT, build_guests, run_scenario

TIMEOUT_S = 1800


def test_a_slow_unit_is_named_and_then_stops_before_the_guests(tmp_path: Path) -> None:
    payload = [build_guests(tmp_path / "guests"), ROOT / "tests/guests/scenario-lib"]
    scenario = Path(__file__).parent / "stop-first-scenario"
    out, verdict = run_scenario(scenario, "test-stop-first", payload, TIMEOUT_S)
    assert verdict == 0, f"see {out}"
    artefacts = out / "artefacts"
    print((artefacts / "tally").read_text())
    costs = {one["what"]: one for one in json.loads((artefacts / "report-2.json").read_text())["costs"]}
    assert costs["slow-stop.service"]["stops_first"]
    assert costs["srv-backup.mount"]["waiter"] == "local-fs.target"
    assert costs["initrd"]["size_bytes"] > 0
    assert "slow-stop.service" in (artefacts / "report-2.svg").read_text()
