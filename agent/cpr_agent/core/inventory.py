# SPDX-License-Identifier: GPL-2.0-or-later
"""What a live QEMU has, compared: with what it had when it was started, with what its command line would open now, and with
what the guest had when it was saved (invariant 8).

QEMU says by which name it has opened a file, and the kernel which files it has open. The two are matched as strings, and no
name of QEMU's is ever opened (invariant 10). A file that is not found so is told of, and never guessed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import posixpath
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from functools import partial

import msgspec
from msgspec.structs import replace

from cpr_agent.core.model import BlockNode, Difference, Inventory, Launch, Manifest, OpenFile, PluggedDevice, Survives
from cpr_agent.core.ports import Files, Ports, Qemu
from cpr_agent.errors import QemuRefused, StorageSilent

log = logging.getLogger(__name__)

FIRMWARE_S = 60.0
"""Its copies are made durable on a disk that others use too."""
_NOT_THERE = "not there"
_AFRESH = "shut the guest down and start it afresh"
_UNDO = f"undo that, or let the definition say so, {_AFRESH}"


async def take(ports: Ports, qemu: Qemu, launch: Launch) -> Inventory:
    """What this QEMU has now, which was started by ``launch``. Raises QemuFailed, StorageSilent."""
    return await _with_files(ports, qemu, launch, qemu.inventory())


async def take_brief(ports: Ports, qemu: Qemu, launch: Launch) -> Inventory:
    """Likewise while a guest waits: without the place of devices, CPUs and memory."""
    return await _with_files(ports, qemu, launch, qemu.brief_inventory())


async def _with_files(ports: Ports, qemu: Qemu, launch: Launch, asked: Awaitable[Inventory]) -> Inventory:
    """The kernel is asked while QEMU answers, if there is anything to ask it."""
    images = ports.definitions.images(launch.argv)
    looking = partial(ports.threads.run, launch.vm, partial(ports.files.open_files, qemu.pid))
    said, opened = await asyncio.gather(asked, looking()) if images else (await asked, [])
    if said.nodes and not images:
        opened = await looking()
    if said.nodes or images:
        said = await ports.threads.run(launch.vm, partial(match, ports.files, qemu.pid, said, opened, images))
    return replace(said, started_at=launch.created_at)


def match(files: Files, pid: int, said: Inventory, opened: Sequence[OpenFile], images: Iterable[str]) -> Inventory:
    """``said`` with the files of its nodes, and the paths that lead to them. Blocking."""
    keys = {file.key for file in opened}
    looked = {path: files.look_at(path) for path in images}
    named = {path: file for path, file in looked.items() if file and file.key in keys}
    nodes = said.nodes
    if any(node.is_local for node in nodes):
        real = {one: files.real_directory(one) for one in map(posixpath.dirname, named)}
        finder = _Finder(opened, named, files.working_directory(pid), real)
        nodes = tuple(replace(node, file=finder.find(node)) if node.is_local else node for node in nodes)
    by_kernel = {node.file.path for node in nodes if node.file and node.file.path} - named.keys()
    for path in by_kernel:
        file = files.look_at(path)
        if file and file.key in keys:
            named[path] = file
    return replace(said, nodes=nodes, named=tuple(replace(file, path=path) for path, file in sorted(named.items())))


class _Finder:
    """Finds the file that a block node is, among those that its process has open."""

    def __init__(
        self, opened: Sequence[OpenFile], named: Mapping[str, OpenFile], directory: str, real: Mapping[str, str]
    ) -> None:
        """``real``: the directories of ``named``, and where they are without links."""
        self._by_path: dict[str, dict[tuple[int, int], OpenFile]] = {}
        for file in opened:
            if file.path:
                self._by_path.setdefault(file.path, {})[file.key] = file
        self._by_key = {file.key: file for file in opened}
        self._named = named
        self._directory = directory
        self._real = real

    def find(self, node: BlockNode) -> OpenFile | None:
        """None also where two files have had the same name."""
        name = plain_name(node.filename)
        there = self._at(name)
        if len(there) == 1:
            return there[0]
        named = self._named.get(name)
        if named and not there:
            return self._by_key.get(named.key)
        linked = {} if there else self._by_links(name)
        return linked.popitem()[1] if len(linked) == 1 else None

    def _at(self, name: str) -> list[OpenFile]:
        path = posixpath.normpath(posixpath.join(self._directory, name))
        return list(self._by_path.get(path, {}).values())

    def _by_links(self, name: str) -> dict[tuple[int, int], OpenFile]:
        """QEMU finds an image below another one by the directory in which the arguments name that, which may be a link."""
        found = [
            file
            for directory, real in self._real.items()
            if name.startswith(f"{directory}/")
            for file in self._at(real + name.removeprefix(directory))
        ]
        return {file.key: file for file in found}


def plain_name(filename: str) -> str:
    """Of the file's node. QEMU writes one with options of its own as JSON."""
    if not filename.startswith("json:"):
        return filename
    try:
        return str(json.loads(filename.removeprefix("json:"))["filename"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return filename


# -- compared ------------------------------------------------------------------------------------------------------------


def differences(
    was: Inventory, now: Inventory, *, anew: bool = False, rebooted: bool = False
) -> tuple[list[Difference], list[Difference]]:
    """Of the disks, and of the devices. ``anew``: ``now`` is another QEMU's, for the same guest, and ``rebooted``: in
    another boot of the host."""
    disks = _disk_differences(was, now, anew=anew, rebooted=rebooted)
    if not (was.placed and now.placed):
        return disks, _device_differences(map(_unplaced, was.devices), map(_unplaced, now.devices))
    return disks, [
        *_device_differences(was.devices, now.devices),
        *_set_differences("CPU at", was.cpus, now.cpus),
        *_set_differences("memory device", was.memory, now.memory),
    ]


def _unplaced(device: PluggedDevice) -> PluggedDevice:
    return PluggedDevice(name=device.name, kind=device.kind)


def _disk_differences(was: Inventory, now: Inventory, *, anew: bool, rebooted: bool) -> list[Difference]:
    before, after = by_disk(was.nodes), by_disk(now.nodes)
    out = []
    for disk in sorted({*before, *after}):
        old, new = before.get(disk, []), after.get(disk, [])
        if not _same(old, new, anew=anew, rebooted=rebooted):
            out.append(_tell(disk, old, new))
    return out


def by_disk(nodes: Iterable[BlockNode]) -> dict[str, list[BlockNode]]:
    disks: dict[str, list[BlockNode]] = {}
    for node in nodes:
        disks.setdefault(node.disk, []).append(node)
    return disks


def _same(old: Sequence[BlockNode], new: Sequence[BlockNode], *, anew: bool, rebooted: bool) -> bool:
    return len(old) == len(new) and all(
        _same_node(one, other, anew=anew, rebooted=rebooted) for one, other in zip(old, new, strict=True)
    )


def _same_node(was: BlockNode, now: BlockNode, *, anew: bool, rebooted: bool) -> bool:
    """A disk may grow while its guest runs, but not between two QEMUs. What lies below the first image is read only or not
    as QEMU needs it."""
    if (was.role, was.driver) != (now.role, now.driver) or (not was.role and was.read_only != now.read_only):
        return False
    if anew and not was.role and was.size_bytes != now.size_bytes:
        return False
    if was.is_local:
        return bool(was.file and now.file and was.file.same_as(now.file, rebooted=rebooted))
    return anew or was.filename == now.filename


def _tell(disk: str, old: Sequence[BlockNode], new: Sequence[BlockNode]) -> Difference:
    """QEMU's name of the node is the one that it has now."""
    node = (new or old)[0].node
    expected, found = _chain(old), _chain(new)
    if expected == found:
        expected, found = _chain(old, exact=True), _chain(new, exact=True)
    return Difference(f"disk {disk} (node {node})", expected, found)


def _chain(nodes: Sequence[BlockNode], *, exact: bool = False) -> str:
    """``/srv/snap.qcow2 (qcow2) on /srv/disk.qcow2 (qcow2)``."""
    if not nodes:
        return _NOT_THERE
    layers: dict[int, list[BlockNode]] = {}
    for node in nodes:
        layers.setdefault(node.depth, []).append(node)
    return " on ".join(_layer(layer, exact=exact) for _, layer in sorted(layers.items()))


def _layer(nodes: Sequence[BlockNode], *, exact: bool) -> str:
    first, last = nodes[0], nodes[-1]
    details = [first.driver]
    if exact:
        details += ["read only" if first.read_only else "writable", f"{first.size_bytes} bytes"]
        details += [f"inode {last.file.inode} on {last.file.st_dev}"] if last.file else []
        details += [f"opened as {first.filename}"] if first.filename.startswith("json:") else []
    return f"{path_of(last)} ({', '.join(details)})"


def path_of(node: BlockNode) -> str:
    return node.file.path if node.file and node.file.path else plain_name(node.filename)


def _device_differences(was: Iterable[PluggedDevice], now: Iterable[PluggedDevice]) -> list[Difference]:
    before, after = ({device.name: device for device in some} for some in (was, now))
    return [
        _device_difference(name, before.get(name), after.get(name))
        for name in sorted({*before, *after})
        if not _same_device(before.get(name), after.get(name))
    ]


def _same_device(was: PluggedDevice | None, now: PluggedDevice | None) -> bool:
    if was and now and None in (was.own, now.own):
        was, now = replace(was, own=None), replace(now, own=None)
    if was and now and None in (was.traits, now.traits):
        was, now = replace(was, traits=None), replace(now, traits=None)
    return was == now


def _device_difference(name: str, was: PluggedDevice | None, now: PluggedDevice | None) -> Difference:
    before, after = ({**(one.traits or {}), "drive": one.drive} if one else {} for one in (was, now))
    common = sorted({*before, *after}) if was and now else []
    differing = [trait for trait in common if before.get(trait) != after.get(trait)]
    return Difference(f"device {name}", _described(was, before, differing), _described(now, after, differing))


def _described(device: PluggedDevice | None, traits: Mapping[str, str], differing: Iterable[str]) -> str:
    if device is None:
        return "not there"
    where = (device.kind, device.bus and f"on {device.bus}", device.address and f"at {device.address}", device.own)
    return " ".join(filter(None, (*where, *(f"{name} {traits.get(name) or 'none'}" for name in differing))))


def _set_differences(what: str, was: Collection[str], now: Collection[str]) -> list[Difference]:
    """Of things that have no more to them than their names."""
    gone = [Difference(f"{what} {name}", "there", "not there") for name in sorted({*was} - {*now})]
    return gone + [Difference(f"{what} {name}", "not there", "there") for name in sorted({*now} - {*was})]


def kept_paths(ports: Ports, vm: str) -> set[str]:
    """Firmware of which there are copies, and these: a QEMU may have either. One small file is read for it, as for a
    manifest: a thread costs more than that, and other guests wait."""
    return {path for file in ports.firmware.kept(vm) if not file.rom for path in (file.path, file.copy)}


def without(inventory: Inventory, paths: Collection[str]) -> Inventory:
    """But for disks that are one of these files, as flash memory is, and read only."""
    if not paths:
        return inventory
    first = [disk for disk, nodes in by_disk(inventory.nodes).items() if nodes[0].read_only and path_of(nodes[-1]) in paths]
    named = tuple(file for file in inventory.named if file.path not in paths)
    return replace(_without_disks(inventory, first), named=named)


def _without_disks(inventory: Inventory, disks: Collection[str]) -> Inventory:
    return replace(inventory, nodes=tuple(node for node in inventory.nodes if node.disk not in disks))


def unnamed_devices(inventory: Inventory) -> list[str]:
    """Block devices of which the next kernel could make others: two of them could change their names."""
    found = {node.disk: node for node in inventory.nodes if node.file and node.file.kind == "device"}
    return [
        f"disk {disk} is the block device {path_of(node)}, which has nothing to know it by after a kexec: no serial "
        "number, world wide id, uuid or slot"
        for disk, node in found.items()
        if node.file and not node.file.device_id
    ]


# -- what stands in the way of a save ------------------------------------------------------------------------------------


class Lookup(msgspec.Struct, frozen=True):
    """A QEMU as it is, as it was recorded, and what the host has at the recorded paths now."""

    live: Inventory
    recorded: Inventory | None
    now: Mapping[str, OpenFile | None]


async def reasons(
    ports: Ports, qemu: Qemu, launch: Launch, need: Survives = Survives.QEMU_RESTART
) -> tuple[Inventory, list[str]]:
    """What this QEMU has, and why one that is started by the recorded command line would not have it: one reason for each
    difference, with its remedy. A QEMU of which nothing was recorded is recorded now. Raises QemuFailed."""
    kept = kept_paths(ports, launch.vm)
    live = await take(ports, qemu, launch)
    recorded = recorded_of(ports, launch)
    images = [path for path in ports.definitions.images(launch.argv) if path not in kept]
    read = [path for path in ports.definitions.read_at_start(launch) if path not in kept]
    wanted = {*(file.path for file in (recorded or live).named), *images, *read}
    look = ports.files.look_at
    looked = await ports.threads.run(launch.vm, lambda: {path: look(path) for path in wanted}) if wanted else {}
    disks = without(live, kept)
    lost, found = _lost_files(disks, looked), Lookup(disks, recorded and without(recorded, kept), looked)
    goes_along = carried(ports, launch, recorded, live).disks
    known = {*lost, *goes_along}
    compared = [*lost.values(), *_unreadable(read, looked), *resized(disks, lost)]
    follows = ports.definitions.follows(launch)
    if recorded is None and not follows:
        below = ports.definitions.images_below(launch.argv)
        compared += _unlike_arguments(found, [path for path in images if path not in below])
    elif recorded and not follows:
        compared += _compared(found, known) + _with_state(recorded, live)
    if recorded is None and not compared:
        await record(ports, launch.vm, live)
        if not kept:
            await keep_firmware(ports, launch)
    return live, compared + ([] if need is Survives.QEMU_RESTART else unnamed_devices(live))


class Carried(msgspec.Struct, frozen=True):
    """A command line for disks that are other images now, by their names; ``disks`` says what they were and are."""

    launch: Launch
    disks: dict[str, Difference]


def carried(ports: Ports, launch: Launch, recorded: Inventory | None, live: Inventory) -> Carried:
    """Disks that can go along to the next QEMU as they are now (ADR 23)."""
    if recorded is None:
        return Carried(launch, {})
    disks: dict[str, Difference] = {}
    before, after = by_disk(recorded.nodes), by_disk(live.nodes)
    named = {file.path for file in live.named}
    for disk in sorted({*before} & {*after}):
        was, now = before[disk], after[disk]
        reachable = all(node.file is None or node.file.path in named for node in now)
        if not reachable or _same(was, now, anew=False, rebooted=False):
            continue
        if new := ports.definitions.carry(launch, was, now):
            launch, disks[disk] = new, _tell(disk, was, now)
    return Carried(launch, disks)


_STATELESS = ("iothread", "throttle-group", "secret", "thread-context", "tls-", "authz-", "rng-")
"""How kinds of objects begin of which nothing is in QEMU's state. QEMU refuses a state that has other parts than it has
itself (measured: the NAT of ``netdev_add type=user`` on 10.0 and 11.1; backends/dbus-vmstate.c)."""


_BITMAP = "dirty bitmap "
"""How the names of those begin that are in QEMU's memory alone."""


def _with_state(was: Inventory, now: Inventory) -> list[str]:
    return [
        f"{one}; it may have a part in QEMU's state, which a load would not take: {_UNDO}"
        for one in _part_changes(was, now)
        if not _is_stateless(one)
    ]


def _is_stateless(part: Difference) -> bool:
    kind = part.found if part.expected == _NOT_THERE else part.expected
    return kind.startswith(_STATELESS) if part.what.startswith("object ") else not part.what.startswith("network ")


async def lost(ports: Ports, qemu: Qemu, launch: Launch) -> list[Difference]:
    """What no device of the guest is, and was made or changed since its QEMU was started: a load has what the command line
    says. Raises QemuFailed."""
    recorded = recorded_of(ports, launch)
    if recorded is None:
        return []
    live = await qemu.inventory()
    if ports.definitions.follows(launch):
        return [one for one in _part_changes(recorded, live) if one.what.startswith(_BITMAP)]
    unlimited = [one for one in _changes(_throttled(recorded), _throttled(live)) if one.found == _NOT_THERE]
    return [one for one in _part_changes(recorded, live) if _is_stateless(one)] + unlimited


def _part_changes(was: Inventory, now: Inventory) -> list[Difference]:
    """None where an agent recorded nothing of them."""
    if was.parts is None or now.parts is None:
        return []
    before, after = ({part.name: part.kind for part in parts} for parts in (was.parts, now.parts))
    led, leads = ({part.name: part.leads_to for part in parts} for parts in (was.parts, now.parts))
    for name in {*led} & {*leads}:
        if None not in (led[name], leads[name]) and led[name] != leads[name]:
            before[name], after[name] = f"{before[name]} {led[name]}", f"{after[name]} {leads[name]}"
    return _changes(before, after)


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[Difference]:
    return [
        Difference(name, before.get(name, _NOT_THERE), after.get(name, _NOT_THERE))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def _throttled(inventory: Inventory) -> dict[str, str]:
    return {f"throttle of disk {one.disk}": str(one) for one in inventory.throttles}


async def throttle(qemu: Qemu, manifest: Manifest) -> None:
    """The limits of disks that the saved guest had, which a monitor may have set. Without them it runs all the same."""
    if manifest.inventory is None or not manifest.inventory.throttles:
        return
    try:
        await qemu.throttle(manifest.inventory.throttles)
    except QemuRefused as error:
        log.warning("VM %s: its disks have not the limits that they had: %s", manifest.vm, error.what)


async def carried_now(ports: Ports, qemu: Qemu, launch: Launch) -> Carried:
    """Likewise of a live QEMU, and with the throttles of disks. Raises QemuFailed."""
    recorded = recorded_of(ports, launch)
    live = await take(ports, qemu, launch)
    found = carried(ports, launch, recorded, live)
    changed = _changes(_throttled(recorded), _throttled(live)) if recorded else []
    return Carried(found.launch, found.disks | {one.what: one for one in changed if one.found != _NOT_THERE})


def recorded_of(ports: Ports, launch: Launch) -> Inventory | None:
    """Of just the QEMU that was started by ``launch``. One file in memory is read for it."""
    recorded = ports.runner.inventory(launch.vm)
    return recorded if recorded and recorded.started_at == launch.created_at else None


async def record(ports: Ports, vm: str, inventory: Inventory) -> None:
    """What the VM's QEMU has. A record that can't be written is made at the next look."""
    try:
        await asyncio.to_thread(ports.runner.record_inventory, vm, inventory)
    except OSError as error:
        log.warning("VM %s: what its QEMU has could not be recorded: %s", vm, error)


async def keep_firmware(ports: Ports, launch: Launch) -> None:
    """Before an update replaces it. A guest whose firmware can't be kept needs it to stay what it is."""
    try:
        keep = partial(ports.firmware.keep, launch.vm, ports.definitions.firmware(launch))
        await ports.threads.run(launch.vm, keep, patience_s=FIRMWARE_S)
    except StorageSilent as error:
        log.warning("%s", error)
    except OSError as error:
        log.warning("VM %s: its firmware could not be kept: %s", launch.vm, error)
        await asyncio.to_thread(ports.firmware.forget, launch.vm)


def _lost_files(live: Inventory, now: Mapping[str, OpenFile | None]) -> dict[str, str]:
    """By disk: files that QEMU has open, and no other QEMU could open."""
    out = {}
    for node in live.nodes:
        if not node.is_local:
            continue
        where = f"disk {node.disk} (node {node.node})"
        if node.file is None:
            out[node.disk] = (
                f"{where}: QEMU has no file open by the name {plain_name(node.filename)}, which was moved or replaced: "
                "bring the file that it has open back to this name"
            )
        elif node.file.nameless:
            there = "another file is there now" if now.get(path_of(node)) else "nothing is there now"
            out[node.disk] = (
                f"{where}: {path_of(node)} was deleted or replaced while QEMU has it open, and {there}: what the guest has "
                f"written would be lost. Copy the disk to a new file (drive-mirror), and have the definition name that one"
            )
    return out


_WHOLE = ("raw", "throttle", "copy-on-read", "file", "host_device")
"""Drivers of nodes that have the size of what is below them. The medium of a host_cdrom may change at any time, and QEMU
sees it at once."""
_SECTOR_BYTES = 512
"""The unit in which QEMU counts the size of an image, and rounds it up (bdrv_nb_sectors)."""


def resized(live: Inventory, lost: Collection[str]) -> list[str]:
    """Disks that are the whole of a file or device whose size was changed from outside: QEMU has the size at which it was
    opened, till ``block_resize``, and another QEMU would have the size of now. A load refuses that (``_same_node``)."""
    out = []
    for disk, nodes in by_disk(live.nodes).items():
        first, last = nodes[0], nodes[-1]
        if disk in lost or not all(map(_is_whole, nodes)):
            continue
        now = _opened_anew_bytes(last.file)
        if now is None or now == first.size_bytes:
            continue
        way = "open it anew (blockdev-change-medium)" if first.read_only else "block_resize it on the monitor"
        out.append(
            f"disk {disk} (node {first.node}): its image {path_of(last)} has {now} bytes, QEMU has {first.size_bytes}: "
            f"{way}, or give the image its size back"
        )
    return out


def _is_whole(node: BlockNode) -> bool:
    """Of a part, or with a size of its own, QEMU writes the name as JSON."""
    if node.driver not in _WHOLE:
        return False
    if node.driver != "raw" or not node.filename.startswith("json:"):
        return True
    try:
        return not {"offset", "size"} & json.loads(node.filename.removeprefix("json:")).keys()
    except (ValueError, AttributeError, RecursionError):
        return False


def _opened_anew_bytes(file: OpenFile | None) -> int | None:
    """The size that a QEMU would see which opens it now; None where the kernel does not tell."""
    if file is None or (file.kind == "device" and not file.size_bytes):
        return None
    return -(-file.size_bytes // _SECTOR_BYTES) * _SECTOR_BYTES


def _unreadable(paths: Iterable[str], now: Mapping[str, OpenFile | None]) -> list[str]:
    return [
        f"its command line names {path}, which is not there any more, and no QEMU could start without it: bring it back"
        for path in paths
        if not now[path]
    ]


def _compared(found: Lookup, lost: Collection[str]) -> list[str]:
    assert found.recorded is not None
    disks, devices = differences(_without_disks(found.recorded, lost), _without_disks(found.live, lost))
    return [
        *(f"{one}; a load would open what its QEMU was started with: {_UNDO}" for one in disks),
        *(f"{one}; a load would have what its QEMU was started with: {_UNDO}" for one in devices),
        *_elsewhere(found.recorded.named, found),
    ]


def _elsewhere(named: Iterable[OpenFile], found: Lookup) -> list[str]:
    """Paths that led to a file which QEMU has open, and lead to another one now."""
    open_now = {node.file.key: node for node in found.live.nodes if node.file and not node.file.nameless}
    out = []
    for was in named:
        node, now = open_now.get(was.key), found.now.get(was.path)
        if node is None or (now and now.key == was.key):
            continue
        there = f"inode {now.inode}" if now else "nothing"
        out.append(
            f"disk {node.disk} (node {node.node}): {was.path} led to inode {was.inode}, which QEMU has open, and leads to "
            f"{there} now: bring the file back to this name, or {_AFRESH}"
        )
    return out


def _unlike_arguments(found: Lookup, images: Iterable[str]) -> list[str]:
    """An agent that recorded nothing has started it: what its command line names must be the first image of a disk."""
    first = {node.file.key for node in found.live.nodes if node.file and not node.depth}
    paths = {path_of(node) for node in found.live.nodes if not node.depth}
    return [
        f"its command line names {path}, which is not what any of its disks has now: {_UNDO}"
        for path in images
        if path not in paths and ((there := found.now.get(path)) is None or there.key not in first)
    ]
