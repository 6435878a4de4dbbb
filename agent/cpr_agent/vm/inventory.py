# SPDX-License-Identifier: GPL-2.0-or-later
"""The disks and devices that a live QEMU's guest sees.

Questions are sent together, and few before a loaded guest runs, which waits for the answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    BlockGraph,
    CpuSlot,
    MemoryDevice,
    QomProperty,
)

Question = tuple[replies.Query[Any], dict[str, object]]

_ROOT = "/machine/"
MAX_DEPTH = 256
"""Of a block graph: QEMU itself takes backing chains of at most 200 images."""
_ADDRESSES = {"scsi": ("scsi-id", "lun")}
"""The properties that say where a device of this kind is on its bus; ``addr`` of all others, which those of PCI have."""


_BLOCKS: list[Question] = [(BLOCK_NODES, {"flat": True}), (BLOCK_GRAPH, {})]
_PLUGGED: list[Question] = [(QOM_LIST, {"path": parent}) for parent in PLUGGED]


async def brief(qmp: Qmp) -> Inventory:
    """Its disks, and the names and kinds of its devices: QEMU takes some 0.6 ms for each question, and a guest may wait.
    But for the files that it has open, which the kernel tells. Raises QemuFailed."""
    nodes, graph, *children = await qmp.ask_all([*_BLOCKS, *_PLUGGED])
    found = _plugged(children)
    return Inventory(
        nodes=_disks(qmp, nodes, graph),
        devices=_sorted(PluggedDevice(name=device.path.removeprefix(_ROOT), kind=device.kind) for device in found),
        placed=False,
    )


async def whole(qmp: Qmp) -> Inventory:
    """Likewise, with the place of each device, and CPUs and memory. Raises QemuFailed."""
    asked = [*_BLOCKS, (BLOCK_BACKENDS, {}), (CPU_SLOTS, {}), (MEMORY_DEVICES, {}), *_PLUGGED]
    nodes, graph, backends, cpus, memory, *children = await qmp.ask_all(asked)
    drives = {backend.qdev.removeprefix(_ROOT): backend.device for backend in backends or ()}
    return Inventory(
        nodes=_disks(qmp, nodes, graph),
        devices=_sorted(await _placed(qmp, _plugged(children), drives)),
        cpus=tuple(sorted(_slot(cpu) for cpu in cpus or () if cpu.qom_path)),
        memory=tuple(sorted(_dimm(device) for device in memory or ())),
    )


def _plugged(children: Iterable[list[QomProperty] | None]) -> list[Device]:
    return [
        Device(f"{parent}/{child.name}", child.type.removeprefix("child<").removesuffix(">"))
        for parent, listed in zip(PLUGGED, children, strict=True)
        for child in listed or ()
        if child.type.startswith("child<")
    ]


def _sorted(devices: Iterable[PluggedDevice]) -> tuple[PluggedDevice, ...]:
    return tuple(sorted(devices, key=lambda device: device.name))


def _slot(cpu: CpuSlot) -> str:
    return " ".join(f"{printable(name, 100)} {number}" for name, number in sorted(cpu.props.items()))


def _dimm(device: MemoryDevice) -> str:
    return f"{device.type} {device.data.id or 'without an id'} of {device.data.size} bytes"


async def _placed(qmp: Qmp, devices: list[Device], drives: Mapping[str, str]) -> list[PluggedDevice]:
    """Each with its bus, by the last part of its name: what is before that differs between versions of QEMU."""
    wanted = {device: _ADDRESSES.get(device.kind.partition("-")[0], ("addr",)) for device in devices}
    asked: list[Question] = [
        (QOM_TEXT if name == "parent_bus" else QOM_NUMBER, {"path": device.path, "property": name})
        for device, names in wanted.items()
        for name in ("parent_bus", *names)
    ]
    answers = iter(await qmp.ask_all(asked))
    placed = []
    for device, names in wanted.items():
        bus = (next(answers) or "").rpartition("/")[2]
        numbers = [(name, next(answers)) for name in names]
        address = " ".join(f"{name} {number}" for name, number in numbers if number is not None)
        name = device.path.removeprefix(_ROOT)
        drive = drives.get(name) or drives.get(device.name, "")
        placed.append(PluggedDevice(name=name, kind=device.kind, bus=bus, address=address, drive=drive))
    return placed


def _disks(qmp: Qmp, nodes: list[replies.BlockNode] | None, graph: BlockGraph | None) -> tuple[BlockNode, ...]:
    """Raises QemuFailed."""
    if nodes is None or graph is None:
        raise QemuFailed("QEMU does not tell what disks it has", vm=qmp.vm)
    return tuple(walk(nodes, graph))


def walk(nodes: Iterable[replies.BlockNode], graph: BlockGraph) -> Iterator[BlockNode]:
    """The nodes below each backend, the topmost first. QEMU may say anything of its graph: also that a node is below
    itself."""
    by_name = {node.node_name: node for node in nodes}
    names = {node.id: node.name for node in graph.nodes}
    children: dict[int, list[tuple[str, int]]] = {}
    for edge in graph.edges:
        children.setdefault(edge.parent, []).append((edge.name, edge.child))
    steps = [
        _Step(disk_name(backend.name), child, ())
        for backend in sorted(graph.nodes, key=lambda node: node.name, reverse=True)
        if backend.type == "block-backend" and backend.name
        for _, child in children.get(backend.id, ())
    ]
    found = 0
    while steps and found < MAX_NODES:
        disk, at, role = steps.pop()
        found += 1
        node = by_name.get(names.get(at, ""), replies.BlockNode())
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
            below = sorted(children.get(at, ()), reverse=True)
            steps += [_Step(disk, child, (*role, name)) for name, child in below]


class _Step(NamedTuple):
    disk: str
    node: int
    role: tuple[str, ...]


def disk_name(backend: str) -> str:
    """That of the drive, or the id of the device where a drive has no name."""
    return backend.removeprefix(_ROOT).removesuffix("/virtio-backend").removeprefix("peripheral/")
