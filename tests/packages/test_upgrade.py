# SPDX-License-Identifier: GPL-2.0-or-later
"""Upgrade, removal and purge of the package on a host whose guests run."""

from __future__ import annotations

from pathlib import Path

from tests.host_vm import ROOT, build_guests, run_scenario
from tests.packages.artifacts import build

TIMEOUT_S = 2400


def test_guests_do_not_notice_what_happens_to_the_package(tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    newer.mkdir()
    build(newer / "cpr-agent_99.0_all.deb")
    payload = [build_guests(tmp_path / "guests"), newer, ROOT / "packaging/debian/tests"]
    out, verdict = run_scenario(ROOT / "tests/packages/upgrade-scenario", "test-packages", payload, TIMEOUT_S)
    assert verdict == 0, f"see {out}"
