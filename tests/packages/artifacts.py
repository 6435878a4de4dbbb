# SPDX-License-Identifier: GPL-2.0-or-later
"""The packages that `make` has built, and how to build others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def built(pattern: str) -> Path:
    """The one package in build/ that the pattern names."""
    (found,) = ROOT.glob(f"build/{pattern}")
    return found


def build(out: Path) -> Path:
    """A package of this tree; the version in its name need not be the tree's."""
    subprocess.run([ROOT / "scripts/build-package", sys.prefix, out], check=True)
    return out
