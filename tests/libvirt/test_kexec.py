# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains through a real kexec of their host, with Debian 13's libvirt, systemd and AppArmor, in the host VM."""

from __future__ import annotations

from pathlib import Path

from tests.access.test_confinement import APPARMOR
from tests.host_vm import build_guests, run_scenario
from tests.libvirt.domains import QCOW2, domain_xml
from tests.libvirt.tally import take_tally

HERE = Path(__file__).parent
BOOTS = {
    "tiny": "<kernel>/srv/tiny.elf</kernel>",
    "linux": "<kernel>/srv/vmlinuz</kernel><initrd>/srv/initrd.img</initrd>"
    "<cmdline>console=ttyS0 quiet loglevel=1 panic=-1</cmdline>",
}


def test_two_domains_and_an_own_vm_live_through_an_upgrade(tmp_path: Path) -> None:
    payload = [build_guests(tmp_path / "guests", "build-all"), HERE.parent / "guests/scenario-lib"]
    for number, (name, size_mib) in enumerate((("tiny", 64), ("linux", 512))):
        disk = QCOW2.format(path=f"/var/lib/libvirt/images/{name}.qcow2")
        xml = domain_xml(name, size_mib, BOOTS[name], Path(f"/srv/consoles/{name}.log"), disk, number=number, kind="kvm")
        (tmp_path / f"{name}.xml").write_text(xml)
        payload.append(tmp_path / f"{name}.xml")
    out, verdict = run_scenario(HERE / "kexec-scenario", "test-libvirt-kexec", payload, 1800, "--append", APPARMOR)
    take_tally(out)
    assert verdict == 0, f"see {out}"
