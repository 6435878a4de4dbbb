# SPDX-License-Identifier: GPL-2.0-or-later
"""What a QEMU says of its disks, and what the kernel says of its files: matched without opening any of QEMU's names."""

from __future__ import annotations

import asyncio
import contextlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from cpr_agent.core import inventory
from cpr_agent.core.inventory import differences, plain_name
from cpr_agent.core.model import BlockNode, Inventory, OpenFile, PluggedDevice
from cpr_agent.core.proof import refuse_other_devices
from cpr_agent.errors import DiskChanged, QemuFailed
from cpr_agent.host import this_host
from cpr_agent.host.this_host import ThisHost
from cpr_agent.vm import replies
from cpr_agent.vm.inventory import MAX_DEPTH, MAX_DEVICES, Places, brief, disk_name, parts, walk, whole
from cpr_agent.vm.replies import BlockGraph, GraphEdge, GraphNode, UnreadableReplyError
from tests.bench import Bench
from tests.samples import manifest
from tests.scripted_qmp import ScriptedQmp


class Watched(ThisHost):
    """Tells which paths were looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.looked: list[str] = []

    def look_at(self, path: str) -> OpenFile | None:
        self.looked.append(path)
        return super().look_at(path)


def local(filename: str | Path) -> BlockNode:
    return BlockNode(disk="d0", role="", node="n", driver="file", filename=str(filename))


def match(host: Watched, filename: str | Path, *images: str) -> BlockNode:
    said = Inventory(nodes=(local(filename),))
    return inventory.match(host, os.getpid(), said, host.open_files(os.getpid()), images).nodes[0]


def test_a_file_is_found_by_the_kernel_s_name(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x")
    with path.open("rb"):
        node = match(Watched(), path)
    assert node.file
    assert (node.file.path, node.file.inode) == (str(path), path.stat().st_ino)


def test_a_name_of_qemu_s_is_never_looked_at(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    host = Watched()
    assert match(host, secret).file is None
    assert host.looked == []


def test_a_deleted_file_has_no_name(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x")
    with path.open("rb"):
        path.unlink()
        node = match(Watched(), path)
    assert node.file
    assert node.file.nameless
    assert node.file.path == str(path)


def test_two_files_of_one_name_are_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x")
    with path.open("rb"):
        path.unlink()
        path.write_bytes(b"y")
        with path.open("rb"):
            assert match(Watched(), path).file is None


def test_a_link_of_the_command_line_is_followed(tmp_path: Path) -> None:
    path, link = tmp_path / "disk", tmp_path / "link"
    path.write_bytes(b"x")
    link.symlink_to(path)
    with path.open("rb"):
        node = match(Watched(), link, str(link))
        assert match(Watched(), link).file is None
    assert node.file
    assert node.file.inode == path.stat().st_ino


def test_a_relative_name_is_of_qemu_s_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").write_bytes(b"x")
    with (tmp_path / "disk").open("rb"):
        node = match(Watched(), "disk")
    assert node.file
    assert node.file.path == str(tmp_path / "disk")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("/x", "/x"),
        ('json:{"driver":"file","filename":"/x","locking":"off"}', "/x"),
        ("json:{", "json:{"),
        ("json:[]", "json:[]"),
        ('json:{"filename":5}', "5"),
    ],
)
def test_a_node_with_options_has_a_plain_name(said: str, name: str) -> None:
    assert plain_name(said) == name


def nodes_of(*edges: tuple[int, int, str]) -> list[BlockNode]:
    """Below drive d0, which is 0."""
    numbers = sorted({number for edge in edges for number in edge[:2]})
    said = BlockGraph(
        nodes=[
            GraphNode(id=number, name=f"n{number}" if number else "d0", type="block-driver" if number else "block-backend")
            for number in numbers
        ],
        edges=[GraphEdge(parent=parent, child=child, name=name) for parent, child, name in edges],
    )
    return list(walk([replies.BlockNode(node_name=f"n{number}", drv="raw") for number in numbers if number], said))


def test_roles_and_depth_are_told_from_the_top() -> None:
    found = nodes_of((0, 1, "root"), (1, 2, "file"), (1, 3, "backing"), (3, 4, "file"))
    assert [(node.disk, node.node, node.role, node.depth) for node in found] == [
        ("d0", "n1", "", 0),
        ("d0", "n3", "backing", 1),
        ("d0", "n4", "backing.file", 1),
        ("d0", "n2", "file", 0),
    ]


def test_a_graph_that_leads_back_to_itself_comes_to_an_end() -> None:
    assert len(nodes_of((0, 1, "root"), (1, 2, "file"), (2, 1, "file"))) == MAX_DEPTH + 1
    everywhere = [(one, other, f"{other}") for one in range(20) for other in range(1, 20)]
    assert len(nodes_of(*everywhere)) == replies.MAX_LISTED


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("d0", "d0"),
        ("/machine/peripheral/disk0/virtio-backend", "disk0"),
        ("/machine/peripheral-anon/device[0]/virtio-backend", "peripheral-anon/device[0]"),
        ("pflash0", "pflash0"),
    ],
)
def test_a_disk_has_the_same_name_in_each_qemu(backend: str, name: str) -> None:
    assert disk_name(backend) == name


FILE = OpenFile(path="/x", st_dev=1, inode=2)
NODE = BlockNode(disk="d0", role="", node="n", driver="file", filename="/x", size_bytes=512, file=FILE)
DEVICE = PluggedDevice(name="peripheral/n0", kind="virtio-net-pci", bus="rp0", address="addr 0")


def changed(what: Any, **changes: Any) -> Any:
    return type(what)(**{**{name: getattr(what, name) for name in what.__struct_fields__}, **changes})


@pytest.mark.parametrize(
    ("node", "live", "anew", "rebooted"),
    [
        (NODE, False, False, False),
        (changed(NODE, node="other"), False, False, False),
        (changed(NODE, size_bytes=1024), False, True, True),
        (changed(NODE, read_only=True), True, True, True),
        (changed(NODE, driver="host_device"), True, True, True),
        (changed(NODE, file=None), True, True, True),
        (changed(NODE, file=changed(FILE, inode=3)), True, True, True),
        (changed(NODE, file=changed(FILE, st_dev=3)), True, True, False),
        (changed(NODE, file=changed(FILE, path="/y", mtime_ns=5, size_bytes=9)), False, False, False),
    ],
)
def test_a_disk_is_the_same_or_is_told(node: BlockNode, live: bool, anew: bool, rebooted: bool) -> None:  # noqa: FBT001
    was, now = Inventory(nodes=(NODE,)), Inventory(nodes=(node,))
    assert bool(differences(was, now)[0]) == live
    assert bool(differences(was, now, anew=True)[0]) == anew
    assert bool(differences(was, now, anew=True, rebooted=True)[0]) == rebooted


def test_each_thing_that_came_or_went_is_told() -> None:
    was = Inventory(nodes=(NODE,), devices=(DEVICE,), cpus=("core-id 0",), memory=("dimm",))
    for disks, devices in (differences(was, Inventory()), differences(Inventory(), was)):
        assert [one.what for one in disks] == ["disk d0 (node n)"]
        assert [one.what for one in devices] == ["device peripheral/n0", "CPU at core-id 0", "memory device dimm"]
    moved = Inventory(nodes=(NODE,), devices=(changed(DEVICE, address="addr 8"),))
    assert [str(one) for one in differences(Inventory(nodes=(NODE,), devices=(DEVICE,)), moved)[1]] == [
        "device peripheral/n0 was virtio-net-pci on rp0 at addr 0, is virtio-net-pci on rp0 at addr 8"
    ]


def test_of_a_brief_inventory_names_and_kinds_are_compared() -> None:
    was = Inventory(devices=(DEVICE,), cpus=("core-id 0",))
    same = Inventory(devices=(changed(DEVICE, bus="", address=""),), placed=False)
    assert differences(was, same, anew=True) == ([], [])
    other = Inventory(devices=(PluggedDevice(name=DEVICE.name, kind="e1000"),), placed=False)
    assert [str(one) for one in differences(was, other, anew=True)[1]] == [
        "device peripheral/n0 was virtio-net-pci, is e1000"
    ]


def whole_of(size_bytes: int, *drivers: str, **first: Any) -> list[BlockNode]:
    """A disk of one file that has so many bytes now; QEMU has 1024."""
    file = changed(FILE, size_bytes=size_bytes)
    nodes = [
        changed(NODE, driver=driver, size_bytes=1024, role=".".join(["file"] * depth), file=None)
        for depth, driver in enumerate(drivers)
    ]
    nodes[0] = changed(nodes[0], **first)
    return [*nodes[:-1], changed(nodes[-1], file=file)]


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        (whole_of(1024, "raw", "file"), False),
        (whole_of(1023, "raw", "file"), False),
        (whole_of(513, "raw", "file"), False),
        (whole_of(512, "raw", "file"), True),
        (whole_of(1025, "raw", "file"), True),
        (whole_of(0, "raw", "file"), True),
        (whole_of(2048, "file"), True),
        (whole_of(2048, "raw", "host_device"), True),
        (whole_of(2048, "throttle", "raw", "file"), True),
        (whole_of(2048, "copy-on-read", "raw", "file"), True),
        (whole_of(1024, "throttle", "raw", "file"), False),
        (whole_of(2048, "qcow2", "file"), False),
        (whole_of(2048, "raw", "preallocate", "file"), False),
        (whole_of(2048, "raw", "host_cdrom"), False),
        (whole_of(2048, "raw", "file", filename='json:{"driver":"raw","size":1024,"file":{}}'), False),
        (whole_of(2048, "raw", "file", filename='json:{"driver":"raw","offset":512,"file":{}}'), False),
        (whole_of(2048, "raw", "file", filename="json:{"), False),
        (whole_of(2048, "raw", "file", filename='json:{"driver":"raw","file":{"locking":"off"}}'), True),
        ([*whole_of(2048, "raw")[:-1], changed(NODE, driver="nbd")], False),
    ],
)
def test_an_image_that_was_resized_from_outside_is_told(nodes: list[BlockNode], told: bool) -> None:  # noqa: FBT001
    """A load refuses that: the QEMU that opens the image anew has another size."""
    found = inventory.resized(Inventory(nodes=tuple(nodes)), ())
    assert bool(found) == told
    assert inventory.resized(Inventory(nodes=tuple(nodes)), ("d0",)) == []


def test_what_leads_back_from_a_resize_is_told() -> None:
    said, of_a_medium = (
        inventory.resized(Inventory(nodes=tuple(whole_of(2048, "raw", "file", read_only=read_only))), ())
        for read_only in (False, True)
    )
    assert said == [
        "disk d0 (node n): its image /x has 2048 bytes, QEMU has 1024: block_resize it on the monitor, "
        "or give the image its size back"
    ]
    assert "(blockdev-change-medium), or give the image its size back" in of_a_medium[0]


def test_a_device_of_which_the_kernel_tells_no_size_is_not_compared() -> None:
    device = OpenFile(path="/dev/vdb", kind="device", st_dev=5)
    node = changed(NODE, driver="host_device", file=device)
    assert inventory.resized(Inventory(nodes=(node,)), ()) == []
    assert inventory.resized(Inventory(nodes=(changed(node, file=changed(device, size_bytes=1024)),)), ())


# -- block devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "attributes", "name"),
    [
        ("pci0000:00/0000:00:05.0/virtio2/block/vdb", {}, "path:pci0000:00/0000:00:05.0"),
        ("pci0000:00/0000:00:05.0/virtio7/block/vda", {}, "path:pci0000:00/0000:00:05.0"),
        ("pci0000:00/0000:00:06.0/virtio2/block/vdb", {}, "path:pci0000:00/0000:00:06.0"),
        ("pci0000:00/0000:00:05.0/virtio2/block/vdb", {"serial": "disk7"}, "disk7"),
        (
            "pci0000:00/0000:00:05.0/virtio2/host3/target3:0:1/3:0:1:2/block/sdb",
            {},
            "path:pci0000:00/0000:00:05.0/:0:1/:0:1:2",
        ),
        ("virtual/block/dm-3", {"dm/uuid": "LVM-x"}, "LVM-x"),
        ("virtual/block/zram0", {}, ""),
        ("platform/host5/session2/target5:0:0/5:0:0:1/block/sdb", {}, ""),
        ("platform/host5/session2/target5:0:0/5:0:0:1/block/sdb", {"device/wwid": "naa.5"}, "naa.5"),
        ("pci0000:00/0000:00:04.0/host2/rport-2:0-1/target2:0:0/2:0:0:1/block/sdb", {}, ""),
        ("LNXSYSTM:00/LNXSYBUS:00/ACPI0012:00/ndbus0/region1/namespace1.0/block/pmem1", {}, ""),
        ("LNXSYSTM:00/LNXSYBUS:00/ACPI0012:00/ndbus0/region1/pfn1.0/block/pmem1", {"device/uuid": "21df"}, "21df"),
        ("rbd/0/block/rbd0", {}, ""),
        ("rbd/0/block/rbd0", {"device/image_id": "9a", "device/pool_id": "3"}, "rbd - 3 - 9a -"),
        (
            "virtual/block/loop0",
            {"loop/backing_file": "/nowhere/disk.raw", "loop/offset": "512"},
            "/nowhere/disk.raw from 512",
        ),
    ],
)
def test_a_block_device_is_known_by_what_a_kexec_does_not_change(
    tmp_path: Path, way: str, attributes: dict[str, str], name: str
) -> None:
    device = tmp_path / "sys/devices" / way
    for attribute, value in attributes.items():
        (device / attribute).parent.mkdir(parents=True, exist_ok=True)
        (device / attribute).write_text(value)
    part = device / "part1"
    part.mkdir(parents=True)
    (part / "partition").write_text("1")
    assert this_host._device_id(device) == name
    assert this_host._device_id(part) == (f"{name}-part1" if name else "")


def test_a_loop_device_is_the_file_that_it_has(tmp_path: Path) -> None:
    """One that was put in the place of a file has its path."""
    path, device = tmp_path / "disk.raw", tmp_path / "sys/devices/virtual/block/loop0"
    (device / "loop").mkdir(parents=True)
    (device / "loop/backing_file").write_text(str(path))
    names = set()
    for new in ("a", "b"):
        (tmp_path / new).write_text(new)
        (tmp_path / new).rename(path)
        names.add(this_host._device_id(device))
    assert len(names) == 2


def test_a_device_without_a_name_is_told_and_never_taken_for_the_same_after_a_kexec() -> None:
    nameless = OpenFile(path="/dev/zram0", kind="device", st_dev=5, size_bytes=512)
    inventory_of = Inventory(nodes=(changed(NODE, file=nameless),))
    assert "disk d0 is the block device /dev/zram0" in inventory.unnamed_devices(inventory_of)[0]
    assert nameless.same_as(nameless)
    assert not nameless.same_as(nameless, rebooted=True)
    named = changed(nameless, device_id="disk7")
    assert inventory.unnamed_devices(Inventory(nodes=(changed(NODE, file=named),))) == []
    assert named.same_as(changed(named, st_dev=9), rebooted=True)
    assert not named.same_as(changed(named, device_id="disk8"), rebooted=True)


def test_an_image_below_a_linked_directory_is_found_where_that_leads(tmp_path: Path) -> None:
    """Also by a way up, which the kernel takes from where the link leads."""
    pool, other, link = tmp_path / "a/pool", tmp_path / "a/other", tmp_path / "link"
    for directory in (pool, other):
        directory.mkdir(parents=True)
    link.symlink_to(pool)
    top, base = pool / "top", other / "base"
    for path in (top, base):
        path.write_bytes(b"x")
    with top.open("rb"), base.open("rb"):
        host = Watched()
        node = match(host, f"{link}/../other/base", str(link / "top"))
        assert match(Watched(), f"{link}/../other/base").file is None
    assert node.file
    assert node.file.path == str(base)
    assert f"{link}/../other/base" not in host.looked


def test_what_an_earlier_agent_did_not_ask_for_makes_no_difference() -> None:
    nic = PluggedDevice(name="peripheral/nic0", kind="e1000", bus="rp0", address="addr 0")
    first, other = (Inventory(devices=(replace(nic, own=own),)) for own in ("mac 1", "mac 2"))
    assert differences(Inventory(devices=(nic,)), first) == ([], [])
    assert [one.what for one in differences(first, other)[1]] == ["device peripheral/nic0"]


def test_of_traits_those_are_told_that_differ_and_an_earlier_agent_asked_for_none() -> None:
    nic = PluggedDevice(name="peripheral/n0", kind="e1000", own="mac 1", drive="d0")
    first, other = (Inventory(devices=(replace(nic, traits={"mq": mq, "wwn": "0"}),)) for mq in ("False", "True"))
    assert differences(Inventory(devices=(nic,)), first) == ([], [])
    (found,) = differences(first, other)[1]
    assert (found.expected, found.found) == ("e1000 mac 1 mq False", "e1000 mac 1 mq True")
    (found,) = differences(first, Inventory(devices=(replace(nic, traits={}, drive=""),)))[1]
    assert (found.expected, found.found) == (
        "e1000 mac 1 drive d0 mq False wwn 0",
        "e1000 mac 1 drive none mq none wwn none",
    )


def one_device(**properties: object) -> PluggedDevice:
    """As QEMU tells it with these properties."""

    def answers(command: str, arguments: dict[str, object]) -> object:
        if command == "qom-get":
            return properties[str(arguments["property"])]
        listed = [{"name": "d0", "type": "child<scsi-hd>"}] if arguments.get("path") == "/machine/peripheral" else []
        return {"x-debug-query-block-graph": {}, "human-monitor-command": ""}.get(command, listed)

    (found,) = asyncio.run(whole(ScriptedQmp(answers), Places())).devices
    return found


def test_a_device_has_the_properties_that_its_guest_sees() -> None:
    told = {"logical_block_size": 4096, "removable": False, "wwn": 0, "product": "DISK", "serial": "s", "lun": 0}
    found = one_device(parent_bus="/machine/peripheral/s0/s0.0", **told)
    assert (found.bus, found.address, found.own) == ("s0.0", "lun 0", "serial s")
    assert found.traits == {"logical_block_size": "4096", "removable": "False", "wwn": "0", "product": "DISK"}


def test_two_long_texts_that_begin_alike_are_two() -> None:
    first, other = (one_device(serial="x" * 900 + end).own for end in "ab")
    assert first != other
    assert first is not None
    assert len(first) < 200


def test_a_property_without_end_is_none() -> None:
    """A QEMU with thousands of devices would have the agent keep megabytes of each."""
    with pytest.raises(QemuFailed, match="qom-get"):
        one_device(serial="x" * 1001)


def test_a_way_that_gets_long_in_a_circle_is_not_followed() -> None:
    """A few KB of an answer could else become gigabytes: thousands of nodes, each with the names of all above it."""
    with pytest.raises(UnreadableReplyError, match="characters"):
        nodes_of((0, 1, "root"), (1, 1, "x" * 4096), (1, 1, "y" * 4096))


def test_more_devices_than_a_machine_has_are_not_asked_about() -> None:
    def answers(command: str, arguments: dict[str, object]) -> object:
        if command == "qom-list" and arguments["path"] == "/machine/peripheral":
            return [{"name": f"d{number}", "type": "child<x>"} for number in range(MAX_DEVICES + 1)]
        return {"x-debug-query-block-graph": {}, "human-monitor-command": ""}.get(command, [])

    for ask in (brief, partial(whole, places=Places())):
        qmp = ScriptedQmp(answers)
        with pytest.raises(QemuFailed, match="devices"):
            asyncio.run(ask(qmp))
        assert len(qmp.asked) < 20


def test_more_objects_than_a_machine_has_are_not_asked_about() -> None:
    def answers(command: str, _: dict[str, object]) -> object:
        groups = [{"name": f"g{number}", "type": "child<throttle-group>"} for number in range(MAX_DEVICES + 1)]
        return {"qom-list": groups, "human-monitor-command": ""}.get(command, [])

    qmp = ScriptedQmp(answers)
    with pytest.raises(QemuFailed, match="objects"):
        asyncio.run(parts(qmp))
    assert "qom-get" not in qmp.asked


def test_limits_by_names_that_no_qemu_has_are_not_kept() -> None:
    said: dict[str, object] = {"x" * 5000: 1}
    groups = [{"name": "g0", "type": "child<throttle-group>"}]
    answers = {"qom-list": groups, "human-monitor-command": "", "qom-get": said}
    qmp = ScriptedQmp(lambda command, _: answers.get(command, []))
    with pytest.raises(QemuFailed, match="makes no sense"):
        asyncio.run(parts(qmp))
    said.clear()
    said["iops-write-max-length"] = said["iops-total"] = 7
    assert [part.kind for part in asyncio.run(parts(qmp)).parts or ()] == ["throttle-group iops-total=7"]


def test_a_bus_has_its_name_however_long_the_path_to_it() -> None:
    """libvirt's own names, made of UUIDs, make paths of more than 100 characters."""
    alias = "ua-21dfda89-0355-4462-b7ed-7d7a01837540"

    def answers(command: str, arguments: dict[str, object]) -> object:
        if command == "qom-get":
            return {"parent_bus": f"/machine/peripheral/{alias}/{alias}.0"}[str(arguments["property"])]
        listed = [{"name": "d0", "type": "child<scsi-hd>"}] if arguments.get("path") == "/machine/peripheral" else []
        return {"x-debug-query-block-graph": {}, "human-monitor-command": ""}.get(command, listed)

    (found,) = asyncio.run(whole(ScriptedQmp(answers), Places())).devices
    assert found.bus == f"{alias}.0"


class Steady(ScriptedQmp):
    """One that tells of no device that has gone."""

    unplugged = 0


def test_the_places_of_devices_that_are_named_no_more_are_forgotten() -> None:
    """A lying QEMU may name others each time."""
    looks = 0

    def answers(command: str, _: dict[str, object]) -> object:
        if command == "qom-get":
            raise LookupError
        listed = [{"name": f"d{looks}", "type": "child<x>"}] if command == "qom-list" else []
        return {"x-debug-query-block-graph": {}, "human-monitor-command": ""}.get(command, listed)

    places, qmp = Places(), Steady(answers)
    for looks in range(3):  # noqa: B007 - for the answers
        found = asyncio.run(whole(qmp, places))
    assert len(places.known(0)) == len(found.devices) == 2


@pytest.mark.parametrize(("start", "same"), [("boot-1", False), ("boot-1.1", True), ("boot-1.2", True)])
def test_a_disk_may_have_another_number_once_userspace_has_started_anew(start: str, same: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """A soft reboot mounts file systems again; the kernel, and its boot id, stay."""
    bench = Bench(tmp_path)
    bench.host.boot, bench.host.soft = 1, int(start.partition(".")[2] or 0)
    had, found = (Inventory(nodes=(changed(NODE, file=changed(FILE, st_dev=number)),)) for number in (5, 6))
    saved = manifest(boot_id="boot-1", start_id="boot-1", inventory=had)
    with contextlib.nullcontext() if same else pytest.raises(DiskChanged):
        asyncio.run(refuse_other_devices(bench.ports(), saved, found))
