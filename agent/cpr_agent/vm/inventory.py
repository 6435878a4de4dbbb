# SPDX-License-Identifier: GPL-2.0-or-later
"""The disks and devices that a live QEMU's guest sees.

Questions are sent together, and few before a loaded guest runs, which waits for the answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from cpr_agent.core.model import BlockNode, Inventory, Part, PluggedDevice, Throttle
from cpr_agent.errors import QemuFailed
from cpr_agent.text import printable
from cpr_agent.vm import replies
from cpr_agent.vm.devices import PLUGGED, Device
from cpr_agent.vm.qmp import Qmp
from cpr_agent.vm.replies import (
    BLOCK_BACKENDS,
    BLOCK_EXPORTS,
    BLOCK_GRAPH,
    BLOCK_NODES,
    CHARDEVS,
    CPU_SLOTS,
    HUMAN_MONITOR,
    MAX_LISTED,
    MEMORY_DEVICES,
    QOM_LIMITS,
    QOM_LIST,
    QOM_SCALAR,
    BlockBackend,
    BlockGraph,
    Chardev,
    CpuSlot,
    Limits,
    MemoryDevice,
    QomProperty,
    UnreadableReplyError,
)

Question = tuple[replies.Query[Any], dict[str, object]]

_ROOT = "/machine/"
MAX_DEPTH = 256
"""Of a block graph: QEMU itself takes backing chains of at most 200 images."""
MAX_TOLD = 4 << 20
"""Characters of all nodes, each with its way from the disk: a node that is below itself has many ways, and long ones."""
MAX_DEVICES = 2048
"""Each is asked for several properties; and the most of what ``-object`` makes."""
_ADDRESSES = {"scsi": ("scsi-id", "lun"), "usb": ("port",), "virtserialport": ("nr",), "virtconsole": ("nr",)}
"""The properties that say where a device of this kind is on its bus; ``addr`` of all others, which those of PCI have."""
_BUS = "parent_bus"
_OWN = ("mac", "serial", "netdev", "chardev")
"""Properties by which a guest knows a device, and the parts of QEMU behind it. Not every device has them in its state, and
none after a reset."""
_DISK = (
    *("logical_block_size", "physical_block_size", "wwn", "product", "vendor", "ver", "device_id"),
    *("removable", "rotation_rate"),
)
_VIRTIO = (
    *("vectors", "mq", "num-queues", "num_queues", "queue-size", "rx_queue_size", "tx_queue_size", "host_mtu"),
    *("iommu_platform", "packed"),
)
"""What a device has that was plugged in again under its name, and has other queues: no state fits both."""
_TRAITS = {"scsi": _DISK, "ide": _DISK, "nvme": _DISK, "usb": _DISK, "virtio": (*_DISK[:2], *_VIRTIO), "vhost": _VIRTIO}
MAX_TRAITS = 1 << 20
"""Characters of all devices' properties."""
_AT_ONCE = 64
"""Of so many devices the answers are there at a time."""
_SHORT = 100
"""Characters of a property's value that are kept as they are."""
_BRIDGES = ("pcie-root-port", "pcie-pci-bridge", "pci-bridge")
"""How kinds begin that have neither: libvirt gives a domain a dozen."""


_BLOCKS: list[Question] = [(BLOCK_NODES, {"flat": True}), (BLOCK_GRAPH, {})]
_PARTS: list[Question] = [
    (QOM_LIST, {"path": "/objects"}),
    (CHARDEVS, {}),
    (BLOCK_EXPORTS, {}),
    (HUMAN_MONITOR, {"command-line": "info network"}),
]
"""No command of QMP tells of networks."""
_NETWORK = re.compile(r"(?:^|\\n| )([^\s\\]+): index=\d+,type=([\w-]+)([^\s\\]*)")
"""A backend's line in the answer to ``info network``, in which line feeds show as their escapes."""
_LEADS_TO = re.compile(r",((?:net|restrict|ifname|br)=[^,]*)")
"""Of such a line; who is connected, and by which descriptor, changes by itself."""
_FORWARDS = re.compile(r"Hub -?\d+ \(([^)\\]+)\):|(\w+)\[HOST_FORWARD\] +\S+ +(\S+) +(\d+) +(\S+) +(\d+)")
"""In the answer to ``info usernet``: a network, or a port of the host that leads to its guest (libslirp, src/misc.c)."""
_NEEDED_LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
_PLUGGED: list[Question] = [(QOM_LIST, {"path": parent}) for parent in PLUGGED]


class _At(NamedTuple):
    bus: str
    address: str
    own: str
    traits: dict[str, str]


class Places:
    """Where the devices of one QEMU are, as it has said before: nothing of that changes after a device was realized
    (qdev_prop_set_after_realize, hw/core/qdev-properties.c). Another one may have its name once a device has gone."""

    def __init__(self) -> None:
        self._known: dict[Device, _At] = {}
        self._unplugged: int | None = None

    def known(self, unplugged: int | None) -> dict[Device, _At]:
        """``unplugged`` is ``Qmp.unplugged`` before QEMU is asked what devices it has."""
        if unplugged is None or unplugged != self._unplugged:
            self._known, self._unplugged = {}, unplugged
        return self._known


async def brief(qmp: Qmp) -> Inventory:
    """Its disks, and the names and kinds of its devices: QEMU takes some 0.6 ms for each question, and a guest may wait.
    But for the files that it has open, which the kernel tells. Raises QemuFailed."""
    nodes, graph, *children = await qmp.ask_all([*_BLOCKS, *_PLUGGED])
    found = _plugged(qmp, children)
    return Inventory(
        nodes=_disks(qmp, nodes, graph),
        devices=_sorted(PluggedDevice(name=device.path.removeprefix(_ROOT), kind=device.kind) for device in found),
        placed=False,
    )


async def whole(qmp: Qmp, places: Places) -> Inventory:
    """Likewise, with the place of each device, and CPUs and memory. Raises QemuFailed."""
    known = places.known(qmp.unplugged)
    asked = [*_BLOCKS, (BLOCK_BACKENDS, {}), (CPU_SLOTS, {}), (MEMORY_DEVICES, {}), *_PARTS, *_PLUGGED]
    nodes, graph, backends, cpus, memory, *more = await qmp.ask_all(asked)
    others, children = more[: len(_PARTS)], more[len(_PARTS) :]
    drives = {backend.qdev.removeprefix(_ROOT): backend.device for backend in backends or ()}
    return Inventory(
        nodes=_disks(qmp, nodes, graph),
        devices=_sorted(await _placed(qmp, _plugged(qmp, children), drives, known)),
        cpus=tuple(sorted(_slot(cpu) for cpu in cpus or () if cpu.qom_path)),
        memory=tuple(sorted(_dimm(device) for device in memory or ())),
        parts=await _parts(qmp, nodes, others),
        throttles=tuple(throttles(backends or ())),
    )


async def parts(qmp: Qmp) -> Inventory:
    """Its parts and throttles alone. Raises QemuFailed."""
    nodes, backends, *others = await qmp.ask_all([_BLOCKS[0], (BLOCK_BACKENDS, {}), *_PARTS])
    return Inventory(parts=await _parts(qmp, nodes, others), throttles=tuple(throttles(backends or ())))


async def _parts(qmp: Qmp, nodes: list[replies.BlockNode] | None, others: Sequence[Any]) -> tuple[Part, ...]:
    """``others`` answers _PARTS."""
    objects, chardevs, exports, hmp = others
    nets = list(networks(hmp or ""))
    found = (
        *await _objects(qmp, objects or ()),
        *_chardevs(chardevs or ()),
        *nets,
        *(await _host_forwards(qmp) if any(net.kind == "user" for net in nets) else ()),
        *(_part(f"export {one.id}", f"{one.type} of {one.node_name}") for one in exports or ()),
        *_bitmaps(nodes or ()),
    )
    return tuple(sorted(found, key=lambda part: part.name))


def networks(said: str) -> Iterator[Part]:
    """``said`` answers ``info network``, and has line feeds as their escapes. A network card is a device."""
    for id_, kind, rest in _NETWORK.findall(said):
        if kind != "nic":
            yield Part(name=f"network {id_}", kind=kind, leads_to=" ".join(_LEADS_TO.findall(rest)))


async def _host_forwards(qmp: Qmp) -> list[Part]:
    """Those of ``hostfwd_add``, too. Raises QemuFailed."""
    found = sorted({*host_forwards(await qmp.ask(HUMAN_MONITOR, {"command-line": "info usernet"}))})
    if len(found) > MAX_DEVICES:
        raise QemuFailed(f"QEMU says that it forwards {len(found)} ports, and {MAX_DEVICES} is the most", vm=qmp.vm)
    return [_part(name, kind) for name, kind in found]


def host_forwards(said: str) -> Iterator[tuple[str, str]]:
    """The name and the kind of each part. ``said`` answers ``info usernet``. One port may lead to several places."""
    net = ""
    for hub, protocol, address, port, to, to_port in _FORWARDS.findall(said):
        net = hub or net
        if not hub:
            yield f"host forward {protocol.lower()} {address}:{port} of {net} to {to}:{to_port}", "a forwarded port"


def _part(name: str, kind: str) -> Part:
    return Part(name=name, kind=kind)


async def _objects(qmp: Qmp, listed: Iterable[QomProperty]) -> list[Part]:
    """Those of ``-object`` and ``object-add``; of a group of throttles with its limits, which qom-set changes. Raises
    QemuFailed."""
    found = [
        Device(f"/objects/{one.name}", one.type.removeprefix("child<").removesuffix(">"))
        for one in listed
        if one.type.startswith("child<")
    ]
    if len(found) > MAX_DEVICES:
        raise QemuFailed(f"QEMU says that it has {len(found)} objects, and {MAX_DEVICES} is the most", vm=qmp.vm)
    groups = [device for device in found if device.kind == "throttle-group"]
    asked: list[Question] = [(QOM_LIMITS, {"path": group.path, "property": "limits"}) for group in groups]
    limits = dict(zip(groups, await qmp.ask_all(asked), strict=True)) if groups else {}
    return [_part(f"object {device.name}", " ".join((device.kind, *_limits(limits.get(device) or {})))) for device in found]


def _limits(limits: Mapping[str, int]) -> Iterator[str]:
    """A length is 1 where there is no burst."""
    for name, value in sorted(limits.items()):
        if value and not name.endswith("-length"):
            yield f"{printable(name, 100)}={value}"


def _chardevs(listed: Iterable[Chardev]) -> Iterator[Part]:
    """By their kinds: whether one is connected, and to what, changes by itself."""
    for one in listed:
        if not one.label.startswith("cpr-"):
            yield _part(f"character device {one.label}", one.filename.removeprefix("disconnected:").partition(":")[0])


def _bitmaps(nodes: Iterable[replies.BlockNode]) -> Iterator[Part]:
    """QEMU writes those that are persistent into their images."""
    for node in nodes:
        for bitmap in node.dirty_bitmaps:
            if bitmap.name and not bitmap.persistent:
                yield _part(f"dirty bitmap {bitmap.name} of {node.node_name}", "in QEMU's memory alone")


def throttles(backends: Iterable[BlockBackend]) -> Iterator[Throttle]:
    for backend in backends:
        limits = backend.inserted and {
            name: value
            for name in Limits.__struct_fields__
            if name != "group" and (value := getattr(backend.inserted, name))
        }
        if backend.inserted and limits:
            by: Literal["device", "id"] = "device" if backend.device else "id"
            yield Throttle(disk=backend.device or backend.qdev, by=by, group=backend.inserted.group, limits=limits)


async def throttle(qmp: Qmp, some: Iterable[Throttle]) -> None:
    """Raises QemuRefused, QemuFailed."""
    for one in some:
        place = {one.by: one.disk, "group": one.group}
        await qmp.execute("block_set_io_throttle", {**dict.fromkeys(_NEEDED_LIMITS, 0), **one.limits, **place})


def _plugged(qmp: Qmp, children: Iterable[list[QomProperty] | None]) -> list[Device]:
    """Raises QemuFailed."""
    found = [
        Device(f"{parent}/{child.name}", child.type.removeprefix("child<").removesuffix(">"))
        for parent, listed in zip(PLUGGED, children, strict=True)
        for child in listed or ()
        if child.type.startswith("child<")
    ]
    if len(found) > MAX_DEVICES:
        raise QemuFailed(f"QEMU says that it has {len(found)} devices, and {MAX_DEVICES} is the most", vm=qmp.vm)
    return found


def _sorted(devices: Iterable[PluggedDevice]) -> tuple[PluggedDevice, ...]:
    return tuple(sorted(devices, key=lambda device: device.name))


def _slot(cpu: CpuSlot) -> str:
    return " ".join(f"{printable(name, 100)} {number}" for name, number in sorted(cpu.props.items()))


def _dimm(device: MemoryDevice) -> str:
    return f"{device.type} {device.data.id or 'without an id'} of {device.data.size} bytes"


async def _placed(
    qmp: Qmp, devices: list[Device], drives: Mapping[str, str], known: dict[Device, _At]
) -> list[PluggedDevice]:
    """Each with its bus, by the last part of its name: what is before that differs between versions of QEMU."""
    known |= await _ask_places(qmp, [device for device in devices if device not in known])
    for gone in known.keys() - devices:  # a lying QEMU could name others each time
        del known[gone]
    placed = []
    for device in devices:
        at, name = known[device], device.path.removeprefix(_ROOT)
        drive = drives.get(name) or drives.get(device.name, "")
        found = PluggedDevice(
            name=name, kind=device.kind, bus=at.bus, address=at.address, drive=drive, own=at.own, traits=at.traits
        )
        placed.append(found)
    return placed


async def _ask_places(qmp: Qmp, devices: list[Device]) -> dict[Device, _At]:
    """Raises QemuFailed."""
    found: dict[Device, _At] = {}
    told = 0
    for start in range(0, len(devices), _AT_ONCE):
        some = devices[start : start + _AT_ONCE]
        names = {device: _properties(device) for device in some}
        asked: list[Question] = [
            (QOM_SCALAR, {"path": device.path, "property": name}) for device in some for name in names[device]
        ]
        answers = iter(await qmp.ask_all(asked))
        for device in some:
            said = {name: _shown(name, answer) for name in names[device] if (answer := next(answers)) not in (None, "")}
            told += sum(map(len, said.values()))
            found[device] = _at(device, said)
        if told > MAX_TRAITS:
            raise QemuFailed(f"QEMU tells more than {MAX_TRAITS} characters of its devices", vm=qmp.vm)
    return found


def _properties(device: Device) -> tuple[str, ...]:
    own = () if device.kind.startswith(_BRIDGES) else _OWN
    return (_BUS, *own, *_address_of(device), *_traits_of(device))


def _address_of(device: Device) -> tuple[str, ...]:
    return _ADDRESSES.get(device.kind.partition("-")[0], ("addr",))


def _traits_of(device: Device) -> tuple[str, ...]:
    return _TRAITS.get(device.kind.partition("-")[0], ())


def _at(device: Device, said: Mapping[str, str]) -> _At:
    return _At(
        bus=said.get(_BUS, ""),
        address=" ".join(f"{name} {said[name]}" for name in _address_of(device) if name in said),
        own=" ".join(f"{name} {said[name]}" for name in _OWN if name in said),
        traits={name: said[name] for name in _traits_of(device) if name in said},
    )


def _shown(name: str, value: object) -> str:
    """Two long texts that begin alike stay two. Of the path of a bus the name alone counts, which stands at its end."""
    text = str(value).rpartition("/")[2] if name == _BUS else str(value)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]} (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]}…)"


def _disks(qmp: Qmp, nodes: list[replies.BlockNode] | None, graph: BlockGraph | None) -> tuple[BlockNode, ...]:
    """Raises QemuFailed."""
    if nodes is None or graph is None:
        raise QemuFailed("QEMU does not tell what disks it has", vm=qmp.vm)
    try:
        return tuple(walk(nodes, graph))
    except UnreadableReplyError as error:
        raise QemuFailed(f"QEMU tells of disks in a way that makes no sense: {error}", vm=qmp.vm) from error


def walk(nodes: Iterable[replies.BlockNode], graph: BlockGraph) -> Iterator[BlockNode]:
    """The nodes below each backend, the topmost first. QEMU may say anything of its graph: also that a node is below
    itself. Raises UnreadableReplyError."""
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
    found, told = 0, 0
    while steps and found < MAX_LISTED:
        disk, at, role = steps.pop()
        found += 1
        node = by_name.get(names.get(at, ""), replies.BlockNode())
        told += sum(map(len, (disk, *role, node.node_name, node.drv, node.file)))
        if told > MAX_TOLD:
            raise UnreadableReplyError(f"its block nodes have more than {MAX_TOLD} characters")
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
