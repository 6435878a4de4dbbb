# SPDX-License-Identifier: GPL-2.0-or-later
"""python -m scripts.bench.host: what needs a kexec, in the host VM. Writes bench-host.json. See docs/bench.md.

exit codes: as of python -m scripts.bench
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.bench.figures import Figure, Runs, table, write
from scripts.bench.goals import HOST_GOALS
from tests.host_vm import ROOT, build_guests, run_scenario

HERE = Path(__file__).parent
TIMEOUT_S = 3600
LABELS = {"agent": "one guest", "none": "no guest", "slow": "with slow units"}
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
    kexecs = [json.loads(line) for line in (out / "artefacts/kexecs").read_text().splitlines()]
    went_on = (out / "artefacts/without-bus").read_text().strip() == "yes"
    found = figures(kexecs, ended_at((out / "scenario.log").read_text(errors="replace")), without_bus=went_on)
    print(table(found))
    write(found, ROOT / "build/bench-host.json")
    print("build/bench-host.json")
    return 0


def ended_at(log: str) -> list[float]:
    """When systemd-shutdown called kexec, by the clock of the boot that ended then, of each kexec (s)."""
    return [float(at) for at in re.findall(r"^bench: kexec at ([\d.]+)", log, re.MULTILINE)]


def figures(kexecs: Sequence[dict[str, Any]], ended: Sequence[float], *, without_bus: bool) -> list[Figure]:
    """Of the scenario's lines, one a kexec: whose it was, and times (s)."""
    ends = iter(ended)
    kexecs = [{**one, "begin": 0.0, "kexec": 0.0 if one["who"] == "soft" else next(ends)} for one in kexecs]

    def runs(who: str, begin: str, end: str) -> Runs:
        return Runs([one[end] - one[begin] for one in kexecs if one["who"] == who])

    def ratio(name: str, begin: str, end: str, note: str) -> Figure:
        ours, theirs = runs("agent", begin, end), runs("bare", begin, end)
        return Figure(name, HOST_GOALS[name], ours.median / theirs.median, {"agent": ours, "bare unit": theirs}, note)

    def longer(name: str, begin: str, end: str, sides: tuple[str, str], note: str) -> Figure:
        raw = {LABELS[who]: runs(who, begin, end) for who in sides}
        more, less = raw.values()
        return Figure(name, HOST_GOALS[name], more.median - less.median, raw, note)

    soft, kexec = runs("soft", "begin", "pause"), runs("agent", "begin", "pause")
    earlier = runs("agent", "resumed", "multi_user")
    note = "in the host VM, of one emulated processor; a kexec each, in turn"
    return [
        ratio("kexec-pause", "begin", "pause", f"{note}; the clock that lives on over a kexec has seconds"),
        ratio("userspace", "userspace", "resumed", note),
        longer(
            "shutdown",
            "saved",
            "kexec",
            ("agent", "none"),
            "from the commit; systemd-shutdown's last hook is the kexec call",
        ),
        longer("slow-stop", "stopped", "kexec", ("slow", "agent"), "from STOP to the kexec call"),
        longer(
            "slow-boot",
            "userspace",
            "resumed",
            ("slow", "agent"),
            "from systemd's first line to RESUME, in the same kexecs",
        ),
        Figure("soft-reboot", HOST_GOALS["soft-reboot"], soft.median / kexec.median, {"soft": soft, "kexec": kexec}, note),
        Figure("without-bus", HOST_GOALS["without-bus"], float(without_bus), {}, "1: yes, 0: no"),
        Figure("early", HOST_GOALS["early"], min(earlier.values), {"agent": earlier}, "the least of all runs"),
    ]


if __name__ == "__main__":
    sys.exit(main())
