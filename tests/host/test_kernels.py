# SPDX-License-Identifier: GPL-2.0-or-later
"""From one version of the kernel into another, and back."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.guest.console import read_console
from scripts.hostvm.newer_kernel import newer_kernel
from tests.host_vm import ROOT, build_guests, run_scenario

TIMEOUT_S = 1800


def version(kernel: str) -> tuple[int, int]:
    major, minor = kernel.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def test_guests_live_through_another_version_and_back(tmp_path: Path) -> None:
    payload = [build_guests(tmp_path / "guests", "build-all"), ROOT / "tests/guests/scenario-lib"]
    scenario = Path(__file__).parent / "kernels-scenario"
    options = ("--kernel", "generic", f"--disk=kernel={newer_kernel()}")
    out, verdict = run_scenario(scenario, "test-kernels", payload, TIMEOUT_S, *options)
    assert verdict == 0, f"see {out}"
    artefacts = out / "artefacts"
    print((artefacts / "tally").read_text())
    there, back = (json.loads((artefacts / f"report-{boot}.json").read_text()) for boot in (2, 3))
    assert version(there["kernel_before"]) == version(back["kernel_after"]) < version(there["kernel_after"])
    for name in ("tiny", "linux"):
        report = read_console(artefacts / f"{name}.log", min_lines=20)
        assert report.problems == (), str(report)
