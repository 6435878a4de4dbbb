# SPDX-License-Identifier: GPL-2.0-or-later
"""The disks and devices that a live QEMU's guest sees.

All questions are sent in two goes: before a loaded guest runs, it waits for the answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from cpr_agent.core.model import BlockNode, Inventory, PluggedDevice
from cpr_agent.errors import QemuFailed
from cpr_agent.text import printable
from cpr_agent.vm import replies
from cpr_agent.vm.devices import PLUGGED, Device
from cpr_agent.vm.qmp import Qmp
from cpr_agent.vm.replies import (
    BLOCK_BACKENDS,
    BLOCK_GRAPH,
    BLOCK_NODES,
    CPU_SLOTS,
    MAX_NODES,
    MEMORY_DEVICES,
    QOM_LIST,
    QOM_NUMBER,
    QOM_TEXT,
    BlockBackend,
    BlockGraph,
    CpuSlot,
    MemoryDevice,
)

MAX_DEPTH = 256
"""Of a block graph: QEMU itself takes backing chains of at most 200 images."""
_ADDRESSES = {"scsi": ("scsi-id", "lun")}
"""The properties that say where a device of this kind is on its bus; ``addr`` of all others, which those of PCI have."""


async def inventory(qmp: Qmp) -> Inventory:
    """But for the files that it has open, which the kernel tells. Raises QemuFailed."""
    asked: list[tuple[replies.Query[Any], dict[str, object]]] = [
        (BLOCK_BACKENDS, {}),
        (BLOCK_NODES, {"flat": True}),
        (BLOCK_GRAPH, {}),
        (CPU_SLOTS, {}),
        (MEMORY_DEVICES, {}),
    ]
    asked += [(QOM_LIST, {"path": parent}) for parent in PLUGGED]
    backends, nodes, graph, cpus, memory, *children = await qmp.ask_all(asked)
    if backends is None or nodes is None or graph is None:
        raise QemuFailed("QEMU does not tell what disks it has", vm=qmp.vm)
    plugged = [
        Device(f"{parent}/{child.name}", child.type.removeprefix("child<").removesuffix(">"))
        for parent, listed in zip(PLUGGED, children, strict=True)
        for child in listed or ()
        if child.type.startswith("child<")
    ]
    below = _Graph(nodes, graph)
    return Inventory(
        nodes=tuple(node for backend in backends for node in below.of(backend)),
        devices=tuple(await _placed(qmp, plugged)),
        cpus=tuple(sorted(_slot(cpu) for cpu in cpus or () if cpu.qom_path)),
        memory=tuple(sorted(_dimm(device) for device in memory or ())),
    )


def _slot(cpu: CpuSlot) -> str:
    return " ".join(f"{printable(name, 100)} {number}" for name, number in sorted(cpu.props.items()))


def _dimm(device: MemoryDevice) -> str:
    return f"{device.type} {device.data.id or 'without an id'} of {device.data.size} bytes"


async def _placed(qmp: Qmp, devices: list[Device]) -> Iterable[PluggedDevice]:
    """Each with its bus, by the last part of its name: what is before that differs between versions of QEMU."""
    wanted = {device: _ADDRESSES.get(device.kind.partition("-")[0], ("addr",)) for device in devices}
    answers = iter(
        await qmp.ask_all(
            [
                (QOM_TEXT if name == "parent_bus" else QOM_NUMBER, {"path": device.path, "property": name})
                for device, names in wanted.items()
                for name in ("parent_bus", *names)
            ]
        )
    )
    placed = []
    for device, names in wanted.items():
        bus = (next(answers) or "").rpartition("/")[2]
        numbers = [(name, next(answers)) for name in names]
        address = " ".join(f"{name} {number}" for name, number in numbers if number is not None)
        name = device.path.removeprefix("/machine/")
        placed.append(PluggedDevice(name=name, kind=device.kind, bus=bus, address=address))
    return sorted(placed, key=lambda device: device.name)


class _Step(NamedTuple):
    node: int
    role: tuple[str, ...]


class _Graph:
    """Of all block nodes. QEMU may say anything of it: also that a node is below itself."""

    def __init__(self, nodes: list[replies.BlockNode], graph: BlockGraph) -> None:
        self._nodes = {node.node_name: node for node in nodes}
        self._names = {node.id: node.name for node in graph.nodes}
        self._ids = {name: number for number, name in self._names.items()}
        self._children: dict[int, list[tuple[str, int]]] = {}
        for edge in graph.edges:
            self._children.setdefault(edge.parent, []).append((edge.name, edge.child))

    def of(self, backend: BlockBackend) -> Iterator[BlockNode]:
        """The nodes of one disk, the topmost first. A drive that no device has the guest does not see."""
        if backend.inserted is None or not backend.qdev:
            return
        disk, top = disk_name(backend), self._ids.get(backend.inserted.node_name)
        steps = [_Step(top, ())] if top is not None else []
        found = 0
        while steps and found < MAX_NODES:
            at, role = steps.pop()
            found += 1
            node = self._nodes.get(self._names.get(at, ""), replies.BlockNode())
            yield BlockNode(
                disk=disk,
                role=".".join(role),
                node=node.node_name,
                driver=node.drv,
                filename=node.file,
                size_bytes=node.image.virtual_size,
                read_only=node.ro,
            )
            if len(role) < MAX_DEPTH:
                children = sorted(self._children.get(at, ()), reverse=True)
                steps += [_Step(child, (*role, name)) for name, child in children]


def disk_name(backend: BlockBackend) -> str:
    """The id of the device, or else the name of the drive: a device without an id, or a part of the board, has another
    place in each version of QEMU."""
    place = backend.qdev.removeprefix("/machine/").removesuffix("/virtio-backend")
    if place.startswith(("peripheral-anon/", "unattached/", "system.")):
        return backend.device or place
    return place.removeprefix("peripheral/")
