# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains as virt-install writes them (tests/unit/libvirt/virt-install.xml), with a file for a console."""

from __future__ import annotations

from pathlib import Path

_DOMAIN = """<domain type='{kind}'>
  <name>{name}</name>
  <metadata>
    <libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
      <libosinfo:os id="http://debian.org/debian/12"/>
    </libosinfo:libosinfo>
  </metadata>
  <memory unit='KiB'>{size_kib}</memory>
  <currentMemory unit='KiB'>{size_kib}</currentMemory>
  <vcpu placement='static'>1</vcpu>
  <os{firmware}>
    <type arch='x86_64' machine='q35'>hvm</type>
    {boot}
  </os>
  <features><acpi/><apic/></features>
  {cpu}
  <clock offset='utc'>
    <timer name='rtc' tickpolicy='catchup'/>
    <timer name='pit' tickpolicy='delay'/>
    <timer name='hpet' present='no'/>
  </clock>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <pm><suspend-to-mem enabled='no'/><suspend-to-disk enabled='no'/></pm>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {disks}
    <controller type='usb' model='qemu-xhci' ports='15'/>
    <controller type='pci' model='pcie-root'/>
    {ports}
    <interface type='user'>
      <mac address='52:54:00:{mac}'/>
      <model type='virtio'/>
    </interface>
    <serial type='file'>
      <source path='{console}' append='on'/>
      <target type='isa-serial' port='0'/>
    </serial>
    <channel type='unix'>
      <source mode='bind'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
    <input type='tablet' bus='usb'/>
    <graphics type='vnc' port='-1' autoport='yes' listen='127.0.0.1'/>
    <video><model type='virtio' heads='1' primary='yes'/></video>
    <memballoon model='virtio'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    {more}
  </devices>
</domain>
"""
ROOT_PORTS = 14
QCOW2 = """<disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='{path}'/>
      <target dev='vda' bus='virtio'/>
    </disk>"""


def domain_xml(  # noqa: PLR0913 - what differs between guests
    name: str,
    size_mib: int,
    boot: str,
    console: Path,
    disks: str,
    *,
    number: int,
    kind: str = "qemu",
    firmware: str = "",
    more: str = "",
) -> str:
    """``number`` tells it from others on the network; ``more`` are further devices; ``kind`` may be kvm, too."""
    return _DOMAIN.format(
        kind=kind,
        name=name,
        size_kib=size_mib << 10,
        boot=boot,
        firmware=f" firmware='{firmware}'" if firmware else "",
        cpu="<cpu mode='host-passthrough' check='none' migratable='on'/>" if kind == "kvm" else "",
        disks=disks,
        ports="\n    ".join(["<controller type='pci' model='pcie-root-port'/>"] * ROOT_PORTS),
        mac=f"{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}",
        console=console,
        more=more,
    )
