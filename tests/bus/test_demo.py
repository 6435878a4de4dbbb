# SPDX-License-Identifier: GPL-2.0-or-later
"""What the README says to try first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_demo_quick_shows_a_guest_that_goes_on() -> None:
    demo = [sys.executable, str(ROOT / "scripts/demo-quick")]
    ended = subprocess.run(demo, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "guests survived: 1 of 1, QEMU replaced 3 times" in ended.stdout
