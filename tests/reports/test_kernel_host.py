# SPDX-License-Identifier: GPL-2.0-or-later
"""A host whose newest kernel could not start: a real upgrade is refused, and the guests run on."""

from __future__ import annotations

from pathlib import Path

from scripts.guest.console import read_console
from tests.access.test_confinement import APPARMOR
from tests.host_vm import build_guests, run_scenario


def test_no_kernel_that_can_not_start_is_chosen_and_the_guest_runs_on(tmp_path: Path) -> None:
    scenario = Path(__file__).parent / "kernel-scenario"
    out, verdict = run_scenario(scenario, "test-kernel", [build_guests(tmp_path / "guests")], 600, "--append", APPARMOR)
    assert verdict == 0, f"see {out}"
    assert (out / "artefacts/summary").read_text() == "kernels refused 5, guests that run on 1\n"
    report = read_console(out / "artefacts/tiny.log", min_lines=10)
    assert report.problems == (), str(report)
