# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM over several ranges of memory, one for each NUMA node: whatever is proved of one is proved of each."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.checks import check_vm
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import (
    Bytes,
    DaxDevice,
    Definition,
    Located,
    MemoryNode,
    MemorySection,
    Survives,
    VmSection,
    VmState,
    Witness,
    survives,
)
from cpr_agent.core.vm import Vm
from cpr_agent.daemon import PROGRAMS
from cpr_agent.errors import InvalidArgument, InvalidDefinition, MemoryChanged, MemoryInUse, MemoryOverlap, MemoryUnusable
from cpr_agent.host.processes import ProcessPlace
from cpr_agent.host.runner import RunFiles
from cpr_agent.memory.backends import HostMemory
from cpr_agent.memory.witness import PAGE, chosen_pages, measure_witness, new_witness, take_witness
from cpr_agent.vm.blockers import memory_blockers
from cpr_agent.vm.cmdline import plan_load, plan_start
from cpr_agent.vm.definition import read_definition
from cpr_agent.vm.replies import MEMORY_BACKENDS
from tests.bench import RAM_BYTES, Bench
from tests.fakes import FakeDevices
from tests.processes import holding
from tests.samples import DEVDAX, FILE, in_file, launch, manifest
from tests.scripted_qmp import ScriptedQmp

OTHER = replace(DEVDAX, uuid="another", object_id="cpr-ram-1")
BOTH = (replace(DEVDAX, object_id="cpr-ram-0"), OTHER)

# -- definitions ------------------------------------------------------------------------------------------------------

NODES = """
[vm]
arguments = ["-machine", "q35", "-smp", "4"]
[[memory.node]]
size = "2G"
device = "uuid:one"
cpus = "0-1"
[[memory.node]]
size = "1G"
device = "uuid:two"
offset = "4G"
cpus = "2,3"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "web1.toml"
    path.write_text(text)
    return path


def test_a_definition_has_a_table_for_each_node(tmp_path: Path) -> None:
    memory = read_definition(write(tmp_path, NODES)).memory
    assert [(one.size, one.device, one.offset, one.cpus) for one in memory.ranges] == [
        (2 << 30, "uuid:one", 0, "0-1"),
        (1 << 30, "uuid:two", 4 << 30, "2,3"),
    ]
    assert memory.object_ids == ("cpr-ram-0", "cpr-ram-1")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("offset =", "ofset =", 'unknown key "memory.node.ofset". Did you mean "offset"?'),
        ('device = "uuid:two"', "", "missing required field `device`"),
        ('"2G"', '"4097"', "multiples of 4096"),
        ('"uuid:two"', '"two"', "memory.device 'two' is neither uuid:"),
        ('"2,3"', '"2;3"', "'2;3' is not a list of CPUs"),
        ('"2,3"', '"2,memdev=x"', "is not a list of CPUs"),
        ("[[memory.node]]", '[memory]\nsize = "1G"\n[[memory.node]]', "or has a [[memory.node]] for each NUMA node"),
        ('"-smp", "4"', '"-numa", "node,nodeid=2"', "-numa node,nodeid=2 (the NUMA nodes)"),
        ('"-smp", "4"', '"--numa", "type=node"', "(the NUMA nodes)"),
        ('"-smp", "4"', """"-numa", '{"type": "node"}'""", "(the NUMA nodes)"),
        ('"-smp", "4"', '"-object", "memory-backend-ram,id=cpr-ram-1,size=1G"', "names that begin with cpr-"),
    ],
)
def test_a_mistake_in_one_of_them_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(InvalidDefinition) as caught:
        read_definition(write(tmp_path, NODES.replace(old, new, 1)))
    assert said in str(caught.value)


def test_distances_are_the_admins(tmp_path: Path) -> None:
    path = write(tmp_path, NODES.replace('"-smp", "4"', '"-smp", "4", "-numa", "dist,src=0,dst=1,val=20"'))
    assert read_definition(path).memory.node


# -- the command line -------------------------------------------------------------------------------------------------


def plan(cpus: tuple[str, str] = ("0-1,4", "")) -> tuple[str, ...]:
    node = tuple(MemoryNode(size=Bytes(64 << 20), device=f"uuid:{n}", cpus=some) for n, some in enumerate(cpus))
    definition = Definition(name="web1", vm=VmSection(), memory=MemorySection(node=node))
    located = [Located(identity=one, node=f"/dev/dax{n}.0") for n, one in enumerate(BOTH)]
    found = plan_start(definition, located, Path("/run/x"), Path("/log"))
    assert found.memory == BOTH
    assert found.nodes == ("/dev/dax0.0", "/dev/dax1.0")
    assert found.memory_fds == (10, 14)
    assert sorted(found.sockets.values()) == [11, 12, 13]
    return found.argv


def test_each_node_has_a_backend_and_a_descriptor_of_its_own() -> None:
    argv = plan()
    assert "memory-backend-file,id=cpr-ram-0,size=67108864,mem-path=/proc/self/fd/10,share=on,align=2097152" in argv
    assert "memory-backend-file,id=cpr-ram-1,size=67108864,mem-path=/proc/self/fd/14,share=on,align=2097152" in argv
    assert "node,nodeid=0,memdev=cpr-ram-0,cpus=0-1,cpus=4" in argv
    assert "node,nodeid=1,memdev=cpr-ram-1" in argv
    assert argv[argv.index("-m") + 1] == f"{128 << 20}B"
    assert not any("memory-backend=" in word for word in argv)


def test_a_load_has_each_where_it_is_in_this_boot() -> None:
    saved = manifest(memory=BOTH, launch=launch(memory=BOTH, nodes=("/dev/dax0.0", "/dev/dax1.0"), memory_fds=(10, 14)))
    found = plan_load(saved, [Located(identity=one, node=node) for one, node in zip(BOTH, "ab", strict=True)], Path("/log"))
    assert found.nodes == ("a", "b")
    assert found.memory_fds == (10, 14)
    assert found.base_argv == saved.launch.base_argv


# -- what QEMU has ----------------------------------------------------------------------------------------------------


def reasons(*backends: dict[str, Any]) -> list[str]:
    """Of a QEMU with these, such as one of the agent's own making never has."""

    def answers(command: str, arguments: dict[str, object]) -> object:
        if command == "query-memdev":
            return backends
        return "memory-backend-file" if arguments["property"] == "type" else False

    async def asked() -> list[str]:
        qmp = ScriptedQmp(answers)
        return await memory_blockers(qmp, launch(memory=BOTH), await qmp.ask(MEMORY_BACKENDS))

    return asyncio.run(asked())


def test_each_backend_must_be_there_shared_and_as_large_as_it_was() -> None:
    good = [{"id": f"cpr-ram-{n}", "share": True, "size": 64 << 20} for n in (0, 1)]
    assert reasons(*good) == []
    assert reasons(good[0]) == ["its RAM is not in the memory backend cpr-ram-1"]
    assert reasons(good[0], {**good[1], "share": False})[0].startswith("memory backend cpr-ram-1 is private")
    assert reasons(good[0], {**good[1], "size": 1}) == ["memory backend cpr-ram-1 has 1 bytes, not 67108864"]
    more = {"id": "cpr-ram-2", "share": True, "size": 1}
    assert reasons(*good, more) == ["memory backend cpr-ram-2 is not one that the agent put there and can prove"]


# -- identity ---------------------------------------------------------------------------------------------------------


def test_what_all_of_it_survives_is_what_the_least_of_it_does() -> None:
    assert survives((DEVDAX, OTHER)) is Survives.KEXEC
    assert survives((DEVDAX, FILE)) is Survives.QEMU_RESTART


def test_nodes_that_share_a_byte_are_found(tmp_path: Path) -> None:
    bench = numa(tmp_path, "ram", "ram")
    with pytest.raises(MemoryOverlap, match="its NUMA nodes 0 and 1 are on the same memory"):
        bench.vm(lambda vm: vm.start())
    assert bench.runner.started == []
    found = bench.run(lambda manager: manager.vm_findings("web1"))
    assert "its NUMA nodes 0 and 1 are on the same memory" in [one.what for one in found]


def test_a_file_is_known_by_its_file_system_where_that_has_a_uuid(tmp_path: Path) -> None:
    """The number of its device changes across a kexec as names do; what is on it does not."""
    path = tmp_path / "ram"
    path.write_bytes(bytes(PAGE))
    devices = FakeDevices()
    st_dev = path.stat().st_dev
    devices.volumes = {st_dev: "volume-1"}
    memory = HostMemory(devices)
    section = MemorySection(size=Bytes(PAGE), device=str(path))
    ((located),) = asyncio.run(memory.locate(section, 0))
    assert located.identity.volume == "volume-1"
    before = replace(located.identity, st_dev=st_dev + 1)
    assert asyncio.run(memory.relocate((before,), 0)) == [located]
    assert before.overlaps(located.identity)
    for volume in ("volume-2", ""):
        devices.volumes = {st_dev: volume}
        with pytest.raises(MemoryChanged, match="volume was volume-1"):
            asyncio.run(memory.relocate((before,), 0))
    older = replace(before, volume="")
    with pytest.raises(MemoryChanged, match="st_dev was"):
        asyncio.run(memory.relocate((older,), 0))
    assert not older.overlaps(located.identity)


def test_a_file_needs_the_drivers_of_what_it_is_on() -> None:
    device = DaxDevice(
        node="/dev/dax0.0",
        uuid=DEVDAX.uuid,
        size_bytes=1 << 30,
        align_bytes=2 << 20,
        resource=None,
        numa_node=0,
        drivers=("device_dax", "nfit"),
    )
    devices = FakeDevices(device)
    devices.below = {FILE.st_dev: ("nd_pmem", "virtio_pmem"), 8: ("nvme",)}
    on_dax = replace(FILE, survives=Survives.KEXEC, filesystem="ext4")
    drivers = HostMemory(devices).drivers
    assert drivers((DEVDAX, FILE, on_dax)) == {"device_dax", "nfit", "ext4", "nd_pmem", "virtio_pmem"}
    assert drivers((FILE, replace(on_dax, st_dev=9), replace(DEVDAX, uuid="away"))) == set()


# -- the witness ------------------------------------------------------------------------------------------------------


def ranges(directory: Path, *contents: bytes) -> list[Located]:
    out = []
    for number, content in enumerate(contents):
        path = directory / f"ram{number}"
        path.write_bytes(content)
        out.append(in_file(path, object_id=f"cpr-ram-{number}"))
    return out


def test_the_witness_of_one_range_is_what_it_always_was(tmp_path: Path) -> None:
    """Digests by earlier agents, the first two by one of before there were nodes: what they saved must load."""
    ram = ranges(tmp_path, b"".join(number.to_bytes(4, "big") * 1024 for number in range(300)))
    for like, digest in (
        (Witness(kind="sampled", seed=7, pages=64), "bcd212fbac024c165940fc9d814225c9"),
        (Witness(kind="sampled", seed=7, pages=4096), "8ba57369f776395feeae415b6a79ee23"),
        (Witness(kind="full"), "2a45230876dac162041dbc128e78386c"),
        (Witness(kind="sampled", seed=7, pages=64, chosen_by="shake-128"), "ad0dffcf5cbd06d99c6d655ae803f911"),
        (Witness(kind="sampled", seed=7, pages=4096, chosen_by="shake-128"), "06cc87657f9d00a01c06edde65eed4f0"),
    ):
        assert take_witness(ram, like).digest == digest


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(0, 1 << 64), st.integers(2, 100))
def test_the_ends_of_each_range_are_always_among_the_pages(sizes: list[int], seed: int, pages: int) -> None:
    chosen = chosen_pages([size * PAGE for size in sizes], seed, pages)
    assert chosen == sorted(set(chosen))
    begin = 0
    for size in sizes:
        assert {begin, begin + size - 1} <= set(chosen)
        begin += size
    assert chosen[-1] == begin - 1
    assert len(chosen) >= min(begin, pages)


@pytest.mark.parametrize("kind", ["sampled", "full"])
@pytest.mark.parametrize("pages", [3, 2000])
def test_damage_to_either_range_is_seen(tmp_path: Path, kind: str, pages: int) -> None:
    contents = [os.urandom(pages * PAGE), os.urandom(pages * PAGE)]
    ram = ranges(tmp_path, *contents)
    like = new_witness(kind)
    before = take_witness(ram, like)
    for number in (0, 1):
        for page in (0, pages - 1):
            path = Path(ram[number].node)
            with path.open("r+b") as file:
                file.seek(page * PAGE + 5)
                file.write(bytes([contents[number][page * PAGE + 5] ^ 1]))
            assert take_witness(ram, like) != before
            path.write_bytes(contents[number])
    assert take_witness(ram, like) == before
    assert take_witness(list(reversed(ram)), like) != before


def test_the_cost_is_that_of_all_ranges(tmp_path: Path) -> None:
    ram = ranges(tmp_path, os.urandom(PAGE), os.urandom(PAGE * 3))
    for kind in ("sampled", "full"):
        told, seconds = measure_witness(ram, new_witness(kind))
        assert told.startswith(kind)
        assert 0 < seconds < 10


# -- acts -------------------------------------------------------------------------------------------------------------


def numa(tmp_path: Path, *files: str, name: str = "web1", bench: Bench | None = None) -> Bench:
    bench = bench or Bench(tmp_path)
    nodes = (f'[[memory.node]]\nsize = "{RAM_BYTES}"\ndevice = "{tmp_path / file}"\n' for file in files)
    (bench.definitions / f"{name}.toml").write_text(f'[vm]\nuser = "root"\n{"".join(nodes)}')
    return bench


async def save(vm: Vm) -> None:
    await vm.save(SaveRequest())


async def load(vm: Vm) -> None:
    await vm.load(LoadRequest())


@pytest.fixture
def saved(tmp_path: Path) -> Bench:
    """With something of its own in each page, and its QEMU gone."""
    bench = numa(tmp_path, "a.ram", "b.ram")
    bench.vm(lambda vm: vm.start())
    for file in ("a.ram", "b.ram"):
        with (tmp_path / file).open("r+b") as ram:
            ram.seek(8)
            ram.write(os.urandom(RAM_BYTES - 8))
    bench.vm(save)
    bench.reboot()
    return bench


def test_a_guest_on_two_ranges_goes_on_where_it_was(saved: Bench) -> None:
    count = saved.runner.counts["web1"]
    saved.vm(load)
    assert saved.qemu().count == count + 1
    assert saved.runner.violations == []


@pytest.mark.parametrize("file", ["a.ram", "b.ram"])
@pytest.mark.parametrize("at", [0, RAM_BYTES - 1])
def test_a_byte_of_either_holds_the_guest(saved: Bench, file: str, at: int) -> None:
    content = (saved.root / file).read_bytes()
    with (saved.root / file).open("r+b") as ram:
        ram.seek(at)
        ram.write(bytes([content[at] ^ 1]))
    with pytest.raises(MemoryChanged, match="its RAM is not what it was"):
        saved.vm(load)
    assert saved.run(state) is VmState.HELD
    with (saved.root / file).open("r+b") as ram:
        ram.write(content)
    saved.vm(load)
    assert saved.runner.violations == []


async def state(manager: Manager) -> VmState:
    return manager.vm("web1").state


def swap(one: Path, other: Path) -> None:
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_swapped_files_are_not_the_memory_that_was_saved(saved: Bench) -> None:
    paths = saved.root / "a.ram", saved.root / "b.ram"
    swap(*paths)
    with pytest.raises(MemoryChanged, match="inode was"):
        saved.vm(load)
    swap(*paths)
    saved.vm(load)


def test_swapped_contents_are_not_either(saved: Bench) -> None:
    paths = saved.root / "a.ram", saved.root / "b.ram"
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        with path.open("r+b") as ram:
            ram.write(content)
    with pytest.raises(MemoryChanged, match="its RAM is not what it was"):
        saved.vm(load)


def test_one_that_is_gone_is_missed(saved: Bench) -> None:
    (saved.root / "b.ram").rename(saved.root / "elsewhere")
    with pytest.raises(MemoryUnusable, match=r"b\.ram cannot be found"):
        saved.vm(load)


def test_either_may_be_nobody_elses(saved: Bench) -> None:
    saved.define("web2", str(saved.root / "b.ram"))
    with pytest.raises(MemoryOverlap, match="overlaps that of VM web1"):
        saved.vm(lambda vm: vm.start(), "web2")


def test_either_may_be_in_no_other_process(saved: Bench) -> None:
    with (
        holding(saved.root / "b.ram") as holder,
        pytest.raises(MemoryInUse, match=rf"b\.ram is in use by .*\({holder.pid}\)"),
    ):
        saved.vm(load)
    saved.vm(load)


def test_a_qemu_that_ends_while_it_is_looked_for_is_no_stranger(saved: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a VM beside it on the same device, which is just being loaded: it was seen, and then had no owner any more."""
    walks: list[list[tuple[str, int]]] = []

    async def users(_: HostMemory, __: Located, ___: Collection[int]) -> list[tuple[str, int]]:
        return walks.pop(0)

    monkeypatch.setattr(HostMemory, "users", users)
    walks += [[("qemu", 4711)], [], [("qemu", 4712)], []]
    saved.vm(load)
    saved.vm(save)
    saved.runner.end("web1")
    walks += [[("thief", 4711)], [], [("thief", 4711)], []]
    with pytest.raises(MemoryInUse, match=r"a\.ram is in use by thief \(4711\)"):
        saved.vm(load)
    assert not walks


def test_memory_that_is_zero_is_lost_only_if_all_of_it_is(tmp_path: Path) -> None:
    """A node that the guest has never touched is zero, too."""
    bench = numa(tmp_path, "a.ram", "b.ram")
    definition = bench.definitions / "web1.toml"
    definition.write_text('[load]\non-lost-memory = "cold-start"\n' + definition.read_text())
    bench.vm(lambda vm: vm.start())
    bench.vm(save)
    bench.runner.end("web1")
    count = bench.runner.counts["web1"]

    def fill(file: str, byte: int) -> None:
        with (tmp_path / file).open("r+b") as ram:
            ram.write(bytes([byte]) * RAM_BYTES)

    fill("a.ram", 0)
    fill("b.ram", 1)
    with pytest.raises(MemoryChanged):
        bench.vm(load)
    fill("b.ram", 0)
    bench.vm(load)
    assert bench.runner.counts["web1"] > count + 100  # booted


def test_each_range_is_proved_on_the_descriptor_that_qemu_gets(tmp_path: Path) -> None:
    """QEMU itself takes swapped files of equal size (measured)."""
    ram = ranges(tmp_path, os.urandom(PAGE), os.urandom(PAGE))
    infos = [Path(one.node).stat() for one in ram]
    memory = tuple(
        replace(one.identity, st_dev=info.st_dev, inode=info.st_ino) for one, info in zip(ram, infos, strict=True)
    )
    seen, program = tmp_path / "seen", tmp_path / "qemu"
    program.write_text(f"#!/bin/sh\nreadlink /proc/self/fd/10 /proc/self/fd/14 >{seen}\n")
    program.chmod(0o755)

    def start(*nodes: str) -> None:
        async def started() -> None:
            place = ProcessPlace("web1", "web1", RunFiles(tmp_path / "run", tmp_path / "log", PROGRAMS))
            plan = launch(argv=(str(program),), memory=memory, memory_fds=(10, 14), nodes=nodes, log=str(tmp_path / "log"))
            await place.start(replace(plan, sockets={}, user="root"))
            assert await place.wait_exit(60)

        asyncio.run(started())

    nodes = [one.node for one in ram]
    with pytest.raises(MemoryUnusable, match=f"{nodes[1]} is not the memory that was proved"):
        start(*reversed(nodes))
    assert not seen.exists()
    start(*nodes)
    assert seen.read_text().split() == nodes


# -- check, devices, allocate -----------------------------------------------------------------------------------------


def test_what_of_it_is_on_this_host_is_its_own(tmp_path: Path) -> None:
    """Also while another node's device is not there."""
    bench = Bench(tmp_path)
    there = bench.define_device("web1")
    bench.definitions.joinpath("web1.toml").write_text(
        f'[vm]\n[[memory.node]]\nsize = "{RAM_BYTES}"\ndevice = "uuid:away"\n'
        f'[[memory.node]]\nsize = "{RAM_BYTES}"\ndevice = "{there}"\n'
    )

    async def ask(manager: Manager) -> None:
        assert [(vm, one.place) for vm, one in await manager.claims()] == [("web1", there)]
        with pytest.raises(MemoryUnusable, match="the largest piece has 0"):
            await manager.allocate("new", str(RAM_BYTES), "")
        with pytest.raises(InvalidArgument, match="has 2 NUMA nodes"):
            await manager.allocate("web1", "", "")

    bench.run(ask)


def test_a_check_says_of_each_range_what_it_survives_and_why(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    devices = [bench.define_device("web1"), bench.define_device("dram", "e820")]
    places = [*devices, str(tmp_path / "ram")]
    nodes = "".join(f'[[memory.node]]\nsize = "{RAM_BYTES}"\ndevice = "{place}"\n' for place in places)
    (bench.definitions / "web1.toml").write_text(f'[vm]\nuser = "root"\n{nodes}')
    bench.vm(lambda vm: vm.start())

    async def found(manager: Manager) -> Sequence[tuple[str, str, str]]:
        vm = manager.vm("web1")
        return [(one.severity, one.what, one.why) for one in await check_vm(vm, manager.ports, [], {})]

    first, second, third, *_ = bench.run(found)
    assert first == (
        "info",
        f"its RAM in {devices[0]} survives a kexec",
        "it is persistent memory (ACPI.NFIT), which no kernel uses as its own",
    )
    assert second[2].startswith("memmap= keeps it from the kernel")
    assert third[0] == "warning"
    assert "which a kexec erases" in third[1]
