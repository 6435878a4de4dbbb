"""A drill, a shutdown that hangs, a kernel that can not load the guests, the way back, a kexec refused at the last step."""

from __future__ import annotations

import subprocess
from pathlib import Path

from scripts.guest.console import read_console

from tests.faults.tally import note

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 2400


def test_guests_stand_what_can_go_wrong_with_a_kexec(tmp_path: Path) -> None:
    guests, out = tmp_path / "guests", ROOT / "build/test-kexec-faults"
    subprocess.run(["rm", "-rf", out], check=True)
    subprocess.run([ROOT / "scripts/guest/build-tiny", guests / "tiny.elf"], check=True)
    here = ROOT / "tests/faults"
    (deb,) = ROOT.glob("build/cpr-agent_*_all.deb")
    ended = subprocess.run(
        [
            *(ROOT / "scripts/host-vm", "run", "--follow", "--smp", "1", "--allow-reboot", f"--timeout={TIMEOUT_S}"),
            *("--out", out, "--scenario", here / "kexec-faults-scenario", "--deb", deb),
            *("--payload", guests, ROOT / "scripts/guest/console.py"),
        ],
        check=False,
    )
    assert ended.returncode == 0, f"see {out}"
    assert (out / "artefacts/summary").read_text() == "faults stood: 4\n"
    for name in ("one", "two"):
        report = read_console(out / "artefacts/consoles" / f"{name}.log", min_lines=20)
        assert report.problems == (), str(report)
    note(4)
