# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole original sequence, with a real kexec between cpr-save and cpr-load: in the host VM."""

from __future__ import annotations

from pathlib import Path

from tests.host_vm import build_guests, run_scenario
from tests.original.machine import original_qemu
from tests.original.tally import note

HERE = Path(__file__).parent


def test_guests_live_through_a_kexec(tmp_path: Path) -> None:
    """By hand without the agent, by busctl with it, and by its units."""
    library = HERE.parent / "guests/scenario-lib"
    payload = [build_guests(tmp_path / "guests"), library, Path(original_qemu("13"))]
    out, verdict = run_scenario(HERE / "kexec-scenario", "test-original", payload, 2400)
    tally = out / "artefacts/tally"
    for line in tally.read_text().splitlines() if tally.exists() else []:
        note(line)
    assert verdict == 0, f"see {out}"
