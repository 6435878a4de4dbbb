# SPDX-License-Identifier: GPL-2.0-or-later
"""The harness of the host VM, without one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from scripts.hostvm import vm


def test_an_emulator_that_stands_still_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "STILL_S", 0.5)
    heard: list[bytes] = []
    with (tmp_path / "errors").open("wb") as errors:
        cuts = vm.PowerCuts(None, tmp_path / "cuts")
        code = vm._run_qemu(["sleep", "infinity"], errors, time.monotonic() + 600.0, heard.append, cuts)
    assert code == vm.STILL_CODE
    assert heard == []
