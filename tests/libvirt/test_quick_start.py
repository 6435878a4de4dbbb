# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of the quick start in docs/libvirt.md, as they stand there, on a host whose memory `memmap=` sets aside and
on which a domain of libvirt's runs."""

from __future__ import annotations

import json
from pathlib import Path

from tests.host_vm import ROOT, build_guests, run_scenario
from tests.libvirt.domains import QCOW2, domain_xml
from tests.packages.test_quick_start import TIMEOUT_S, write_steps


def test_its_commands_do_what_they_say(tmp_path: Path) -> None:
    memory = (ROOT / "docs/quick-start.md").read_text().partition("## 2.")[0]
    kexecs = write_steps(tmp_path / "steps", memory + (ROOT / "docs/libvirt.md").read_text())
    assert kexecs == 1
    disk = QCOW2.format(path="/var/lib/libvirt/images/web1.qcow2")
    boot = "<kernel>/var/lib/libvirt/images/tiny.elf</kernel>"
    xml = domain_xml("web1", 64, boot, Path("/var/log/libvirt/web1.log"), disk, number=1, kind="kvm")
    (tmp_path / "web1.xml").write_text(xml)
    payload = [tmp_path / "steps", tmp_path / "web1.xml", build_guests(tmp_path) / "tiny.elf"]
    # Without the NVDIMM that this host has as well: the quick start's reader has none.
    options = ("--memory", "8G", "--append", "memmap=5G!4G module_blacklist=nfit", "--allow-reboot")
    scenario = Path(__file__).parent / "quick-start-scenario"
    out, verdict = run_scenario(scenario, "test-libvirt-quick-start", payload, TIMEOUT_S, *options)
    assert verdict == 0, f"see {out}"
    history = json.loads((out / "artefacts/history.json").read_text())
    assert [entry["vm"] for entry in history] == ["web1"] * kexecs
