# SPDX-License-Identifier: GPL-2.0-or-later
"""The corruption catalogue on a QEMU that has cpr-save: machines and disks."""

from __future__ import annotations

from pathlib import Path

from tests.corruption.test_machine import *  # noqa: F403
from tests.corruption.test_machine import tpm_is_gone
from tests.lab import Lab


def test_a_tpm_that_is_gone(each_lab: Lab, tmp_path: Path) -> None:  # type: ignore[no-redef] # instead of the other
    """Without its physical presence interface, which is memory of QEMU's own: cpr-save refuses that."""
    tpm_is_gone(each_lab, tmp_path, "tpm-tis,tpmdev=tpm0,ppi=off")
