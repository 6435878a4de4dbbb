"""What can happen to dax devices: in the host VM, which has an NVDIMM, and RAM that memmap= keeps from the kernel."""

from __future__ import annotations

import subprocess
from pathlib import Path

from scripts.guest.console import read_console

from tests.corruption.tally import note

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 1200


def test_devices_that_are_not_what_they_were(tmp_path: Path) -> None:
    guests, out = tmp_path / "guests", ROOT / "build/test-devices"
    subprocess.run(["rm", "-rf", out], check=True)
    subprocess.run([ROOT / "scripts/guest/build-tiny", guests / "tiny.elf"], check=True)
    (deb,) = ROOT.glob("build/cpr-agent_*_all.deb")
    ended = subprocess.run(
        [
            *(ROOT / "scripts/host-vm", "run", "--follow", "--smp", "1", f"--timeout={TIMEOUT_S}", "--out", out),
            *("--append", "memmap=512M!4G", "--deb", deb, "--scenario", ROOT / "tests/corruption/devices-scenario"),
            *("--payload", guests, ROOT / "scripts/guest/console.py"),
        ],
        check=False,
    )
    tally = out / "artefacts/tally"
    for line in tally.read_text().splitlines() if tally.exists() else []:
        note(line)
    assert ended.returncode == 0, f"see {out}"
    for name in ("before", "one", "two"):
        report = read_console(out / "artefacts/consoles" / f"{name}.log", min_lines=10)
        assert report.problems == (), str(report)
