# SPDX-License-Identifier: GPL-2.0-or-later
"""The host VM as tests run it: one processor, and the built package installed."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from scripts.hostvm.cli import EXIT_CODES
from scripts.hostvm.vm import Outcome

ROOT = Path(__file__).parent.parent


def build_guests(directory: Path, builder: str = "build-tiny") -> Path:
    """A directory for the payload, with the tiny guest; by ``build-all`` with the Linux one too."""
    target = directory if builder == "build-all" else directory / "tiny.elf"
    subprocess.run([ROOT / "scripts/guest" / builder, target], check=True)
    return directory


def run_scenario(scenario: Path, name: str, payload: Sequence[Path], timeout_s: float, *options: str) -> tuple[Path, int]:
    """Run it, with the guests' judge in the payload; once more, if the emulator stood still. Returns the directory of what
    it left, build/NAME, and its verdict."""
    for _ in range(2):
        out, command = scenario_command(scenario, name, payload, timeout_s, *options)
        if (verdict := subprocess.run(command, check=False).returncode) != EXIT_CODES[Outcome.STILL]:
            break
    return out, verdict


def scenario_command(
    scenario: Path, name: str, payload: Sequence[Path], timeout_s: float, *options: str
) -> tuple[Path, list[str]]:
    """What ``run_scenario`` runs, for who has something else to do meanwhile; what an earlier run left is gone."""
    out = ROOT / "build" / name
    subprocess.run(["rm", "-rf", out], check=True)
    (deb,) = ROOT.glob("build/cpr-agent_*_all.deb")
    return out, [
        *(str(ROOT / "scripts/host-vm"), "run", "--follow", "--smp", "1", f"--timeout={timeout_s}", *options),
        *("--out", str(out), "--scenario", str(scenario), "--deb", str(deb)),
        *("--payload", *map(str, payload), str(ROOT / "scripts/guest/console.py")),
    ]
