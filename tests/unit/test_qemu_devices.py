# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices of the host that a guest has. There are none here: QEMU's replies are written by its schema (qapi/pci.json,
qapi/qom.json), and its refusal is that of hw/vfio/cpr.c."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cpr_agent.core.model import Inventory, PluggedDevice
from cpr_agent.vm.devices import devices as find_devices
from cpr_agent.vm.devices import vfio_devices
from cpr_agent.vm.inventory import Places, whole
from tests.scripted_qmp import ScriptedQmp


def pci(slot: int, qdev_id: str, **more: Any) -> dict[str, Any]:
    ids = {"device": 0x10ED, "vendor": 0x8086}
    return {"bus": 0, "slot": slot, "function": 0, "qdev_id": qdev_id, "id": ids, "regions": [], **more}


def child(name: str, kind: str) -> dict[str, str]:
    return {"name": name, "type": f"child<{kind}>"}


BEHIND = {"devices": [{**pci(0, "gpu0"), "bus": 1}], "bus": {"number": 0, "secondary": 1, "subordinate": 1}}
REPLIES: dict[str, Any] = {
    "query-pci": [{"bus": 0, "devices": [pci(3, "net0"), pci(4, "port1", pci_bridge=BEHIND), pci(5, "disk0")]}],
    "/machine/peripheral": [
        child("net0", "vfio-pci"),
        child("port1", "pcie-root-port"),
        child("gpu0", "vfio-pci-nohotplug"),
        child("disk0", "virtio-blk-pci"),
        {"name": "type", "type": "string"},
    ],
    "/machine/peripheral-anon": [child("device[0]", "vfio-ap"), child("device[1]", "virtio-serial-pci")],
}


def devices(replies: dict[str, Any]) -> list[str]:
    """Of a QEMU with VFIO devices, which can't be had here."""
    qmp = ScriptedQmp(lambda command, arguments: replies[str(arguments.get("path", command))])

    async def listed() -> list[str]:
        found = await find_devices(qmp)
        return await vfio_devices(qmp, [PluggedDevice(name=f"peripheral/{one.name}", kind=one.kind) for one in found])

    return asyncio.run(listed())


@pytest.mark.parametrize("pci_is_known", [True, False])
def test_devices_of_the_host_are_found_also_behind_bridges(*, pci_is_known: bool) -> None:
    """A machine without PCI has no query-pci."""
    replies = REPLIES if pci_is_known else {key: value for key, value in REPLIES.items() if key != "query-pci"}
    places = (" at 00:03.0", " at 01:00.0") if pci_is_known else ("", "")
    assert devices(replies) == [
        f"net0 (vfio-pci{places[0]})",
        f"gpu0 (vfio-pci-nohotplug{places[1]})",
        "device[0] (vfio-ap)",
    ]


def test_a_guest_without_them() -> None:
    assert devices({"query-pci": [], "/machine/peripheral": [], "/machine/peripheral-anon": []}) == []


class Plugged(ScriptedQmp):
    """A QEMU with network cards, by their MAC addresses; it tells of one that has gone."""

    def __init__(self, **macs: str) -> None:
        self.macs = macs
        self.deleted: int | None = 0
        super().__init__(self._answer)

    @property
    def unplugged(self) -> int | None:
        return self.deleted

    def _answer(self, command: str, arguments: dict[str, object]) -> object:
        path = str(arguments.get("path", ""))
        if command == "qom-get" and arguments["property"] == "mac":
            return self.macs[path.rpartition("/")[2]]
        if path == "/machine/peripheral":
            return [child(name, "virtio-net-pci") for name in self.macs]
        return {"query-named-block-nodes": [], "x-debug-query-block-graph": {"nodes": [], "edges": []}}[command]

    def look(self, places: Places) -> dict[str, str]:
        found: Inventory = asyncio.run(whole(self, places))
        return {device.name: device.own or "" for device in found.devices}


def test_a_device_is_asked_once_for_what_never_changes() -> None:
    qemu, places = Plugged(net0="52:54:00:00:00:01"), Places()
    first = qemu.look(places)
    asked = qemu.asked.count("qom-get")
    qemu.macs["net1"] = "52:54:00:00:00:02"
    assert qemu.look(places) == {**first, "peripheral/net1": "mac 52:54:00:00:00:02"}
    assert qemu.asked.count("qom-get") == 2 * asked


def test_another_device_by_the_name_of_one_that_has_gone_is_asked() -> None:
    qemu, places = Plugged(net0="52:54:00:00:00:01"), Places()
    qemu.look(places)
    qemu.macs["net0"] = "52:54:00:00:00:02"
    qemu.deleted = 1
    assert qemu.look(places) == {"peripheral/net0": "mac 52:54:00:00:00:02"}


def test_where_nothing_tells_of_what_has_gone_all_is_asked_each_time() -> None:
    qemu, places = Plugged(net0="52:54:00:00:00:01"), Places()
    qemu.deleted = None
    qemu.look(places)
    qemu.macs["net0"] = "52:54:00:00:00:02"
    assert qemu.look(places) == {"peripheral/net0": "mac 52:54:00:00:00:02"}
