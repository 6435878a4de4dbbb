# SPDX-License-Identifier: GPL-2.0-or-later
"""The main job, whole and real: an installed package, systemd as PID 1, a dax device, a kexec into another kernel."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from scripts.guest.console import read_console
from tests.host_vm import build_guests, run_scenario

TIMEOUT_S = 2400


def test_two_guests_live_through_a_kexec_of_their_host(tmp_path: Path) -> None:
    here = Path(__file__).parent
    payload = [build_guests(tmp_path / "guests", "build-all"), *here.glob("*-kexec"), here / "after-reboot"]
    out, verdict = run_scenario(here / "kexec-scenario", "test-host", payload, TIMEOUT_S, "--allow-reboot")
    assert verdict == 0, f"see {out}"
    artefacts = out / "artefacts"
    assert (artefacts / "summary").read_text().startswith("guests survived: 2 of 2, ")
    for name in ("tiny", "linux"):
        report = read_console(artefacts / f"{name}.log", min_lines=20)
        assert report.problems == (), str(report)
    picture = "".join(ElementTree.parse(artefacts / "report.svg").getroot().itertext())  # noqa: S314 - the agent's own
    assert all(name in picture for name in ("tiny", "linux", "kexec + kernel"))
    assert (artefacts / "report.html").read_text().rstrip().endswith("</html>")
    assert ".SaveAll" in (artefacts / "introspect").read_text()
