# SPDX-License-Identifier: GPL-2.0-or-later
"""Power cuts at random instants of upgrades: with an installed package, systemd as PID 1, a dax device and real kexecs.

Not part of ``make test``: a cut takes two to three minutes. ``CPR_TEST_CUTS`` is how many, ``CPR_TEST_SEED`` repeats
their instants.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.faults.judge import check_order, parse
from tests.faults.tally import note
from tests.host_vm import build_guests, run_scenario

FIRST_BOOT_S = 900
CUT_S = 900
"""What they may take on a slow day; on a good one it is a third of that."""


def test_guests_that_were_saved_live_through_power_cuts(tmp_path: Path) -> None:
    cuts = int(os.environ.get("CPR_TEST_CUTS", "10"))
    seed = int(os.environ.get("CPR_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"{cuts} power cuts; to repeat them: CPR_TEST_CUTS={cuts} CPR_TEST_SEED={seed}")
    here, wanted = Path(__file__).parent, tmp_path / "cuts"
    wanted.write_text(f"{cuts}\n")
    payload = [build_guests(tmp_path / "guests"), wanted, here / "judge.py"]
    timeout_s = FIRST_BOOT_S + CUT_S * cuts
    options = ("--power-cuts", "--seed", str(seed))
    out, verdict = run_scenario(here / "power-cut-scenario", "test-power-cuts", payload, timeout_s, *options)
    assert verdict == 0, f"see {out}"
    done = len((out / "power-cuts").read_text().splitlines())
    assert done >= cuts
    # No console in the host VM is proof against a cut; what was seen from outside is.
    assert check_order(parse((out / "scenario.log").read_bytes()), gaps=True) == []
    summary = (out / "artefacts/summary").read_text()
    assert summary.startswith(f"power cuts {done}: "), summary
    assert summary.endswith(", corrupted 0, loaded twice 0\n"), summary
    note(done)
