# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices of a live QEMU: those of the host that it has, the chipset's S3, and the port of the guest agent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from cpr_agent.core.model import PluggedDevice
from cpr_agent.vm.qmp import Qmp
from cpr_agent.vm.replies import CURRENT_MACHINE, PCI, QOM_LIST, QOM_NUMBER, QOM_TEXT, CurrentMachine, PciDevice

PLUGGED = ("/machine/peripheral", "/machine/peripheral-anon")
"""Where the devices are that the command line or a hotplug has made."""
ONBOARD = ("/machine/unattached",)


class Device(msgspec.Struct, frozen=True):
    path: str
    """In QOM."""
    kind: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


async def devices(qmp: Qmp, parents: Iterable[str] = PLUGGED) -> list[Device]:
    return [
        Device(f"{parent}/{child.name}", child.type.removeprefix("child<").removesuffix(">"))
        for parent in parents
        for child in await qmp.ask(QOM_LIST, {"path": parent})
        if child.type.startswith("child<")
    ]


async def vfio_devices(qmp: Qmp, some: Iterable[PluggedDevice]) -> list[str]:
    found = [(device.name.rpartition("/")[2], device.kind) for device in some if device.kind.startswith("vfio-")]
    if not found:
        return []
    buses = await qmp.ask_optional(PCI, [])
    places = {device.qdev_id: _place(device) for bus in buses for device in _with_bridged(bus.devices)}
    return [f"{name} ({' '.join(filter(None, (kind, places.get(name, ''))))})" for name, kind in found]


def _place(device: PciDevice) -> str:
    return f"at {device.bus:02x}:{device.slot:02x}.{device.function:x}"


def _with_bridged(some: Iterable[PciDevice]) -> Iterator[PciDevice]:
    """These, and those behind them if they are bridges."""
    for device in some:
        yield device
        if device.pci_bridge:
            yield from _with_bridged(device.pci_bridge.devices)


async def wake_problem(qmp: Qmp) -> str:
    """Why the machine could not sleep in S3 and be woken, "" if it could."""
    if not (await qmp.ask_optional(CURRENT_MACHINE, CurrentMachine())).wakeup_suspend_support:
        return "its machine has no way to wake a guest that sleeps"
    if await _s3_is_disabled(qmp):
        return "its machine has no S3 (disable_s3): its kernel would sleep in a way of its own, which QEMU can't see"
    return ""


async def _s3_is_disabled(qmp: Qmp) -> bool:
    """By a property of the chipset's power management, which is part of the south bridge on newer QEMUs' ``pc``;
    ``wakeup-suspend-support`` is true all the same (measured on 10.0)."""
    onboard = await devices(qmp, ONBOARD)
    places = [device.path for device in onboard if device.kind in ("ICH9-LPC", "PIIX4_PM")]
    places += [f"{device.path}/pm" for device in onboard if device.kind.startswith("PIIX3")]
    for path in places:
        disabled: int = await qmp.property(QOM_NUMBER, path, "disable_s3", 0)
        if disabled:
            return True
    return False


async def chardev_of_port(qmp: Qmp, port: str) -> str:
    """The name of the character device behind the virtio-serial port that the guest knows as ``port``; "" if none."""
    for device in await devices(qmp):
        is_port = device.kind == "virtserialport"
        if is_port and await qmp.property(QOM_TEXT, device.path, "name", "") == port:
            return await qmp.property(QOM_TEXT, device.path, "chardev", "")
    return ""
