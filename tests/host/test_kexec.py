"""The main job, whole and real: an installed package, systemd as PID 1, a dax device, a kexec into another kernel."""

from __future__ import annotations

import subprocess
from pathlib import Path

from scripts.guest.console import read_console

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 2400


def test_two_guests_live_through_a_kexec_of_their_host(tmp_path: Path) -> None:
    guests, out = tmp_path / "guests", ROOT / "build/test-host"
    subprocess.run(["rm", "-rf", out], check=True)
    subprocess.run([ROOT / "scripts/guest/build-all", guests], check=True)
    here = ROOT / "tests/host"
    (deb,) = ROOT.glob("build/cpr-agent_*_all.deb")
    payload = [guests, ROOT / "scripts/guest/console.py", *here.glob("*-kexec"), here / "after-reboot"]
    ended = subprocess.run(
        [
            *(
                ROOT / "scripts/host-vm",
                "run",
                "--follow",
                "--smp",
                "1",
                "--allow-reboot",
                f"--timeout={TIMEOUT_S}",
                "--out",
                out,
            ),
            *("--scenario", here / "kexec-scenario", "--deb", deb, "--payload", *payload),
        ],
        check=False,
    )
    assert ended.returncode == 0, f"see {out}"
    artefacts = out / "artefacts"
    assert (artefacts / "summary").read_text().startswith("guests survived: 2 of 2, ")
    for name in ("tiny", "linux"):
        report = read_console(artefacts / f"{name}.log", min_lines=20)
        assert report.problems == (), str(report)
    assert ".SaveAll" in (artefacts / "introspect").read_text()
