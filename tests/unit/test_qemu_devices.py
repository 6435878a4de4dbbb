# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices of the host that a guest has. There are none here: QEMU's replies are written by its schema (qapi/pci.json,
qapi/qom.json), and its refusal is that of hw/vfio/cpr.c."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cpr_agent.vm.devices import vfio_devices
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
    return asyncio.run(vfio_devices(ScriptedQmp(lambda command, arguments: replies[str(arguments.get("path", command))])))


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
