# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may call what, by a real polkitd: in the host VM, as root, as an operator, and as others."""

from __future__ import annotations

from pathlib import Path

from cpr_agent.bus.contract import read_contract, standard_interfaces
from scripts.guest.console import read_console
from tests.access.probe import OPEN
from tests.access.tally import take_tally
from tests.host_vm import build_guests, run_scenario


def methods() -> int:
    """Of the contract, and of Properties on each of its objects, and of the one ObjectManager."""
    contract, standard = read_contract(), standard_interfaces()
    own = sum(len(interface.methods) for interface in contract.values())
    on_each = [name for name in standard if name not in OPEN and not name.endswith("ObjectManager")]
    return own + len(contract) * sum(len(standard[name].methods) for name in on_each) + 1


def test_every_method_as_root_as_an_operator_and_as_nobody(tmp_path: Path) -> None:
    here = Path(__file__).parent
    payload = [build_guests(tmp_path / "guests"), here / "probe.py", here / "terminal.py"]
    out, verdict = run_scenario(here / "access-scenario", "test-access", payload, 900)
    take_tally(out)
    assert verdict == 0, f"see {out}"
    counts = (out / "artefacts/tally").read_text().split()
    assert counts == [str(methods())] * 3
    report = read_console(out / "artefacts/consoles/one.log", min_lines=10)
    assert report.problems == (), str(report)
