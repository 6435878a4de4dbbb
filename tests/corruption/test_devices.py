# SPDX-License-Identifier: GPL-2.0-or-later
"""What can happen to dax devices: in the host VM, which has an NVDIMM, and RAM that memmap= keeps from the kernel."""

from __future__ import annotations

from pathlib import Path

from scripts.guest.console import read_console
from tests.corruption.tally import note
from tests.host_vm import build_guests, run_scenario

TIMEOUT_S = 1200


def test_devices_that_are_not_what_they_were(tmp_path: Path) -> None:
    scenario = Path(__file__).parent / "devices-scenario"
    payload = [build_guests(tmp_path / "guests")]
    out, verdict = run_scenario(scenario, "test-devices", payload, TIMEOUT_S, "--append", "memmap=512M!4G")
    tally = out / "artefacts/tally"
    for line in tally.read_text().splitlines() if tally.exists() else []:
        note(line)
    assert verdict == 0, f"see {out}"
    for name in ("before", "one", "two"):
        report = read_console(out / "artefacts/consoles" / f"{name}.log", min_lines=10)
        assert report.problems == (), str(report)
