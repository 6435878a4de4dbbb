# SPDX-License-Identifier: GPL-2.0-or-later
"""python -m scripts.bench.host: what needs a kexec, in the host VM. Writes bench-host.json. See docs/bench.md.

exit codes: as of python -m scripts.bench
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from scripts.bench.figures import Figure, Runs, table, write
from scripts.bench.goals import HOST_GOALS
from tests.host_vm import ROOT, build_guests, run_scenario

HERE = Path(__file__).parent
TIMEOUT_S = 1800
CLOCK = "clocksource=acpi_pm"
"""On a busy machine an emulated host's kernel can misjudge how fast its time stamp counter is, thirtyfold once."""


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        payload = [build_guests(Path(scratch) / "guests"), ROOT / "tests/guests/scenario-lib", HERE / "bare-guest"]
        out, verdict = run_scenario(
            HERE / "host-scenario", "bench-host", payload, TIMEOUT_S, "--kernel", "generic", "--append", CLOCK
        )
    if verdict:
        print(f"bench: could not be measured; see {out}", file=sys.stderr)
        return 1
    found = figures((out / "artefacts/boots").read_text())
    print(table(found))
    write(found, ROOT / "build/bench-host.json")
    print("build/bench-host.json")
    return 0


def figures(boots: str) -> list[Figure]:
    """Of the scenario's lines: WHO, and when userspace began, the guest ran, and multi-user.target was reached (s)."""
    to_cont: dict[str, list[float]] = {"agent": [], "bare": []}
    earlier: list[float] = []
    for line in boots.splitlines():
        who, *times = line.split()
        userspace, resumed, multi_user = map(float, times)
        to_cont[who].append(resumed - userspace)
        if who == "agent":
            earlier.append(multi_user - resumed)
    ours, theirs = Runs(to_cont["agent"]), Runs(to_cont["bare"])
    raw = {"agent": ours, "bare unit": theirs}
    note = "in the host VM, of one emulated processor; a boot each, in turn"
    return [
        Figure("boot", HOST_GOALS["boot"], ours.median / theirs.median, raw, note),
        Figure("early", HOST_GOALS["early"], min(earlier), {"agent": Runs(earlier)}, "the least of all runs"),
    ]


if __name__ == "__main__":
    sys.exit(main())
