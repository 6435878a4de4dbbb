# SPDX-License-Identifier: GPL-2.0-or-later
"""What the user of one VM can reach of another, by enumeration: in the host VM, with AppArmor and without."""

from __future__ import annotations

from pathlib import Path

from scripts.guest.console import read_console
from tests.access.tally import take_table
from tests.access.test_confinement import APPARMOR
from tests.host_vm import build_guests, run_scenario


def test_no_vm_reaches_what_is_another_s_but_a_shared_device(tmp_path: Path) -> None:
    here = Path(__file__).parent
    payload = [build_guests(tmp_path / "guests"), here / "reach.py"]
    out, verdict = run_scenario(here / "isolation-scenario", "test-isolation", payload, 1200, "--append", APPARMOR)
    take_table(out)
    assert verdict == 0, f"see {out}"
    for guest in ("one", "two", "three", "saved"):
        report = read_console(out / f"artefacts/consoles/{guest}.log", min_lines=10)
        assert report.problems == (), f"{guest}: {report}"
