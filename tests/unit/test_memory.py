# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory: found by identity, never by name; proved before it is used."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict, replace

from cpr_agent.core.model import Bytes, DaxDevice, Located, MemoryIdentity, MemorySection, Survives, Witness
from cpr_agent.core.states import RunState
from cpr_agent.errors import DeviceMissing, MemoryChanged, MemoryUnusable
from cpr_agent.memory import devices, users
from cpr_agent.memory.backends import HostMemory, filesystem_of
from cpr_agent.memory.opening import open_memory
from cpr_agent.memory.witness import PAGE, chosen_pages, is_blank, new_witness, prepared_witness, take_witness
from cpr_agent.vm import shutdown
from tests.fakes import FakeDevices
from tests.processes import holding
from tests.samples import DEVDAX, FILE, in_file

DEVICE = DaxDevice(
    region=DEVDAX.region,
    provider=DEVDAX.provider,
    node="/dev/dax1.0",
    uuid=DEVDAX.uuid,
    size_bytes=1 << 30,
    align_bytes=2 << 20,
    resource=0x240000000,
    numa_node=0,
)


def section(device: str = f"uuid:{DEVDAX.uuid}", size: int = 64 << 20, offset: int = 0) -> MemorySection:
    return MemorySection(size=Bytes(size), device=device, offset=Bytes(offset))


def locate(what: MemorySection, *devices: DaxDevice) -> Located:
    (located,) = asyncio.run(HostMemory(FakeDevices(*devices)).locate(what, 0))
    return located


def relocate(identity: MemoryIdentity, *devices: DaxDevice) -> Located:
    (located,) = asyncio.run(HostMemory(FakeDevices(*devices)).relocate((identity,), 0))
    return located


def test_a_device_is_found_by_uuid_under_any_name() -> None:
    other = replace(DEVICE, uuid="other", node="/dev/dax0.0")
    assert locate(section(), other, DEVICE) == Located(identity=DEVDAX, node="/dev/dax1.0")
    assert relocate(DEVDAX, replace(DEVICE, node="/dev/dax7.3")).node == "/dev/dax7.3"


def test_a_missing_device_is_reported_with_those_that_are_there() -> None:
    with pytest.raises(DeviceMissing, match=r"/dev/dax1\.0 \(uuid other\)"):
        locate(section(), replace(DEVICE, uuid="other"))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (section(size=3 << 20), "memory.size 3145728 is not a multiple"),
        (section(offset=1 << 20), "memory.offset 1048576 is not a multiple"),
        (section(size=2 << 30), "but /dev/dax1.0 has 1073741824"),
        (section(offset=1 << 30), "but /dev/dax1.0 has 1073741824"),
    ],
)
def test_what_does_not_fit_the_device_is_refused(what: MemorySection, said: str) -> None:
    with pytest.raises(MemoryUnusable, match=said):
        locate(what, DEVICE)


def test_a_device_without_uuid_is_refused() -> None:
    with pytest.raises(MemoryUnusable, match="has no uuid"):
        asyncio.run(HostMemory(FakeDevices(replace(DEVICE, uuid=""))).locate(section("/dev/dax1.0"), 0))


def test_a_device_that_the_kernel_has_as_memory_is_refused() -> None:
    taken = replace(DEVICE, system_ram=True)
    with pytest.raises(MemoryUnusable, match="system-ram mode") as caught:
        locate(section(), taken)
    assert "daxctl reconfigure-device --mode=devdax dax1.0" in caught.value.remedy
    with pytest.raises(MemoryChanged, match="system-ram mode"):
        relocate(DEVDAX, taken)


class Sysfs:
    """A device as pyudev has it, below ``root``."""

    def __init__(self, root: Path, name: str, parent: Sysfs | None, **attributes: str) -> None:
        self.sys_name, self.sys_path, self.parent = name, str(root / name), parent
        self.subsystem, self.device_node = "nd", f"/dev/{name}"
        self.attributes = self
        self._attributes = attributes

    def asstring(self, name: str) -> str:
        return self._attributes[name]


@pytest.mark.parametrize(("driver", "module"), [("kmem", "kmem"), ("kmem", ""), ("device_dax", "device_dax"), ("", "")])
def test_the_driver_tells_whether_the_kernel_has_a_device_as_memory(tmp_path: Path, driver: str, module: str) -> None:
    device = Sysfs(tmp_path, "dax0.0", Sysfs(tmp_path, "region0", None, uuid="u"), size="4096", align="4096")
    (tmp_path / "dax0.0").mkdir()
    if driver:
        (tmp_path / "drivers" / driver).mkdir(parents=True)
        (tmp_path / "dax0.0/driver").symlink_to(tmp_path / "drivers" / driver)
    if module:
        (tmp_path / "module" / module).mkdir(parents=True)
        (tmp_path / "drivers" / driver / "module").symlink_to(tmp_path / "module" / module)
    found = devices._read(device)
    assert found
    assert found.system_ram == (driver == "kmem")


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (replace(DEVICE, size_bytes=512 << 20), "device_size_bytes was 1073741824, is 536870912"),
        (replace(DEVICE, size_bytes=32 << 20), "but /dev/dax1.0 has 33554432"),
        (replace(DEVICE, align_bytes=4096), "align_bytes was 2097152, is 4096"),
        (replace(DEVICE, resource=0x340000000), "resource was 0x240000000, is 0x340000000"),
    ],
)
def test_a_device_that_changed_is_refused(now: DaxDevice, said: str) -> None:
    with pytest.raises(MemoryChanged, match=said):
        relocate(DEVDAX, now)


def test_a_resource_that_can_not_be_read_is_no_difference() -> None:
    assert relocate(DEVDAX, replace(DEVICE, resource=None))


@pytest.mark.parametrize("name", ["resource", "region", "provider", "page_bytes", "volume"])
def test_what_was_not_known_at_the_save_is_no_difference(name: str) -> None:
    """A guest that an older agent started; one with the uuid, or the inode, of another is refused all the same."""
    older = replace(DEVDAX, **{name: None if name == "resource" else "" if name != "page_bytes" else 0})
    assert not older.differences(replace(DEVDAX, page_bytes=2 << 20))
    assert older.differences(replace(DEVDAX, uuid="another"))


@pytest.mark.parametrize("name", [f for f in asdict(DEVDAX) if f not in ("resource", "page_bytes", "volume")])
def test_every_field_of_an_identity_counts(name: str) -> None:
    value = getattr(DEVDAX, name)
    changed: Any = value + 4096 if isinstance(value, int) else f"other-{value}"
    if name == "survives":
        changed = Survives.QEMU_RESTART
    assert DEVDAX.differences(replace(DEVDAX, **{name: changed}))
    assert not DEVDAX.differences(replace(DEVDAX))


@given(st.integers(0, 8), st.integers(1, 8), st.integers(0, 8), st.integers(1, 8))
def test_overlap_is_a_shared_byte(a: int, a_size: int, b: int, b_size: int) -> None:
    first = replace(FILE, offset_bytes=a, size_bytes=a_size)
    second = replace(FILE, offset_bytes=b, size_bytes=b_size)
    shared = set(range(a, a + a_size)) & set(range(b, b + b_size))
    assert first.overlaps(second) == second.overlaps(first) == bool(shared)
    assert not first.overlaps(replace(second, inode=8))
    assert not first.overlaps(replace(DEVDAX, offset_bytes=b, size_bytes=b_size))


def test_a_false_node_is_refused_before_anything_waits(tmp_path: Path) -> None:
    from cpr_agent.memory.backends import _refuse_false_node

    _refuse_false_node(str(tmp_path / "missing"))
    _refuse_false_node("/dev/null")
    file, link = tmp_path / "dax0.0", tmp_path / "dax1.0"
    file.touch()
    link.symlink_to("/dev/null")
    for node, what in ((file, "an ordinary file"), (link, "a symbolic link")):
        with pytest.raises(MemoryUnusable, match=what):
            _refuse_false_node(str(node))


def test_the_file_system_of_shm_is_known() -> None:
    assert filesystem_of(Path("/dev/shm").stat().st_dev)[0] == "tmpfs"


# -- the witness ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ram(tmp_path: Path) -> Located:
    path = tmp_path / "ram"
    path.write_bytes(os.urandom(PAGE * 512))
    return in_file(path)


def damage(ram: Located, offset: int) -> None:
    with Path(ram.node).open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 1]))


@pytest.mark.parametrize("kind", ["sampled", "full"])
def test_a_witness_is_the_same_for_the_same_memory(ram: Located, kind: str) -> None:
    first = take_witness([ram], new_witness(kind))
    assert first.digest
    assert take_witness([ram], replace(first, digest="")) == first


@given(offset=st.integers(0, PAGE * 512 - 1))
def test_a_full_witness_catches_one_flipped_bit(tmp_path_factory: pytest.TempPathFactory, offset: int) -> None:
    path = tmp_path_factory.mktemp("ram") / "ram"
    path.write_bytes(bytes(PAGE * 512))
    ram = in_file(path, size_bytes=PAGE * 512)
    before = take_witness([ram], Witness(kind="full"))
    damage(ram, offset)
    assert take_witness([ram], Witness(kind="full")) != before


def test_a_sampled_witness_catches_damage_exactly_in_its_pages(ram: Located) -> None:
    like = Witness(kind="sampled", seed=7, pages=64, chosen_by="shake-128")
    chosen = set(chosen_pages([ram.identity.size_bytes], 7, 64))
    assert {0, 511} <= chosen
    assert 64 <= len(chosen) <= 66
    before = take_witness([ram], like)
    for page in range(0, 512, 7):
        damage(ram, page * PAGE + 100)
        assert (take_witness([ram], like) != before) == (page in chosen)
        damage(ram, page * PAGE + 100)


def test_sampling_catches_as_much_as_the_formula_says() -> None:
    """1 - (1 - f)^n, with f = 2 % of 8,192 pages and n = 64: 0.726. 400 seeds: six standard deviations are 0.13."""
    total, pages = 8192, 64
    formula = 1 - (1 - 164 / total) ** pages
    scattered = set(random.Random(1).sample(range(1, total - 1), 164))
    hits = sum(bool(scattered & set(chosen_pages([total * PAGE], seed, pages))) for seed in range(400))
    assert hits / 400 == pytest.approx(formula, abs=0.13)
    in_one_piece = set(range(4000, 4164))  # of which a page of each part cannot miss as much
    hits = sum(bool(in_one_piece & set(chosen_pages([total * PAGE], seed, pages))) for seed in range(400))
    assert hits / 400 > formula - 0.13
    two_parts = set(range(4000, 4000 + 2 * total // pages - 1))
    assert all(two_parts & set(chosen_pages([total * PAGE], seed, pages)) for seed in range(400))


@pytest.mark.parametrize("kind", ["sampled", "full", "off"])
@pytest.mark.parametrize("pages", [64, 4096])
def test_a_witness_that_was_prepared_is_the_same(ram: Located, kind: str, pages: int) -> None:
    like = replace(new_witness(kind), pages=pages)
    for filesystem in ("tmpfs", "ext4"):
        one = replace(ram, identity=replace(ram.identity, filesystem=filesystem))
        with prepared_witness([one], like) as take:
            damage(ram, 0)  # whatever the guest did last
            assert take() == take_witness([one], like)


@pytest.mark.parametrize("filesystem", ["tmpfs", "hugetlbfs", "ext4"])
def test_a_file_that_is_too_short_is_known_while_the_guest_runs(ram: Located, filesystem: str) -> None:
    one = replace(ram, identity=replace(ram.identity, filesystem=filesystem))
    os.truncate(ram.node, PAGE)
    with pytest.raises(OSError, match="shorter than it was"), prepared_witness([one], new_witness("sampled")):
        pass


def test_preparing_takes_no_memory_that_the_guest_has_not_touched() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(64 << 20)
        for page in range(0, 8192, 16):
            os.pwrite(file.fileno(), os.urandom(PAGE), page * PAGE)
        before = os.fstat(file.fileno()).st_blocks
        ram = in_file(Path(file.name))
        like = new_witness("sampled")
        with prepared_witness([ram], like) as take:
            assert take() == take_witness([ram], like)
        assert os.fstat(file.fileno()).st_blocks == before


@pytest.mark.parametrize("kind", ["sampled", "full"])
def test_a_file_that_its_owner_cuts_off_is_an_error_and_no_signal(ram: Located, kind: str) -> None:
    """A mapping of it would end the agent (SIGBUS)."""
    like = new_witness(kind)
    with prepared_witness([ram], like) as take:
        os.truncate(ram.node, PAGE)
        with pytest.raises(OSError, match="shorter than it was"):
            take()
    with pytest.raises(OSError, match="shorter than it was"):
        is_blank([ram])


def test_nothing_else_is_read_in_the_place_of_the_memory(ram: Located) -> None:
    """A FIFO would be waited for."""
    node = Path(ram.node)
    node.rename(node.with_name("kept"))
    for put in (os.mkfifo, Path.touch, Path.mkdir):
        put(node)
        with pytest.raises(OSError, match="has its name now"):
            take_witness([ram], new_witness("full"))
        node.rename(node.with_name(f"was-{put.__name__}"))


def test_small_memory_is_hashed_whole() -> None:
    assert chosen_pages([PAGE * 8], 1, 4096) == list(range(8))


# -- what QEMU gets -----------------------------------------------------------------------------------------------------


def wanted(path: Path, **changes: Any) -> MemoryIdentity:
    info = path.stat()
    return replace(FILE, **{"size_bytes": PAGE, "st_dev": info.st_dev, "inode": info.st_ino, **changes})


def test_qemu_gets_the_very_file(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(PAGE))
    os.close(open_memory(str(path), wanted(path)))
    for changes in ({"inode": 1}, {"st_dev": 1}, {"size_bytes": PAGE + 1}, {"kind": "devdax"}):
        with pytest.raises(MemoryUnusable, match="is not the memory that was proved"):
            open_memory(str(path), wanted(path, **changes))


def test_opening_never_creates_nor_follows(tmp_path: Path) -> None:
    path, link = tmp_path / "ram", tmp_path / "link"
    path.write_bytes(bytes(PAGE))
    link.symlink_to(path)
    with pytest.raises(MemoryUnusable, match="symbolic links"):
        open_memory(str(link), wanted(path))
    missing = tmp_path / "missing"
    with pytest.raises(MemoryUnusable, match="No such file"):
        open_memory(str(missing), wanted(path))
    assert not missing.exists()


def test_a_device_that_is_no_dax_device_is_refused() -> None:
    with pytest.raises(MemoryUnusable, match="is not the memory that was proved"):
        open_memory("/dev/zero", DEVDAX)


def test_the_launcher_needs_the_standard_library_alone() -> None:
    """Each VM's pause waits for its start, and the unit runs it without site-packages."""
    for module in ("launch", "shutdown"):
        path = Path(__file__).parents[2] / f"agent/cpr_agent/vm/{module}.py"
        ended = subprocess.run([sys.executable, "-I", "-S", path, "/nonexistent/x", "1"], capture_output=True, check=False)
        assert b"ImportError" not in ended.stderr
        assert b"ModuleNotFoundError" not in ended.stderr


def test_the_program_that_stops_a_unit_knows_qemus_run_states() -> None:
    """It can't import them."""
    assert {*shutdown.SAVED, *shutdown.QUIT_AT_ONCE, shutdown.SUSPENDED} <= set(RunState)


def test_a_census_answers_all_who_ask_by_few_walks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One walk for who came first, one for all who came while it was under way; each sees what was there when it asked."""
    walks: list[int] = []

    def counted(wanted: Collection[users.Wanted], own: Collection[int]) -> dict[users.Wanted, users.Users]:
        walks.append(len(wanted))
        return find_users(wanted, own)

    find_users = users.find_users
    monkeypatch.setattr(users, "find_users", counted)
    paths = [tmp_path / str(number) for number in range(20)]
    for path in paths:
        path.write_bytes(bytes(4096))

    async def ask() -> list[users.Users]:
        census = users.Census()
        first = asyncio.ensure_future(census.users(paths[0]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        answers = await asyncio.gather(*(census.users(path) for path in paths))
        await first
        return answers

    with holding(paths[7]) as holder:
        answers = asyncio.run(ask())
    assert walks == [1, 20]
    assert [len(answer) for answer in answers] == [int(number == 7) for number in range(20)]
    assert answers[7][0][1] == holder.pid


def test_a_census_leaves_out_only_whom_all_who_ask_know(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(4096))

    async def ask(*own: Collection[int]) -> list[list[int]]:
        census = users.Census()
        answers = await asyncio.gather(*(census.users(ram, pids) for pids in own))
        return [[pid for _, pid in answer] for answer in answers]

    with holding(ram) as holder, holding(ram) as stranger:
        assert asyncio.run(ask({holder.pid}, {holder.pid, 1})) == [[stranger.pid]] * 2
        both = sorted((holder.pid, stranger.pid))
        assert [sorted(found) for found in asyncio.run(ask({holder.pid}, {stranger.pid}))] == [both] * 2
        assert sorted(asyncio.run(ask(()))[0]) == both


HEADLESS = """
import ctypes, platform, sys, threading
f = open(sys.argv[1])
def wait():
    with open("/proc/self/stat") as stat:
        while stat.read().rpartition(")")[2].split()[0] != "Z":
            stat.seek(0)
    print(flush=True)
    sys.stdin.read()
threading.Thread(target=wait, daemon=True).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)
"""
"""It ends its first thread alone, by exit(2)."""


def test_a_census_sees_a_process_whose_first_thread_has_ended(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(4096))
    with holding(ram, HEADLESS) as holder:
        assert [pid for _, pid in asyncio.run(users.Census().users(ram))] == [holder.pid]
        holder.kill()


def test_a_node_that_is_gone_is_no_matter_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"")

    async def ask() -> list[users.Users | BaseException]:
        census = users.Census()
        asked = (census.users(tmp_path / name) for name in ("gone", "here"))
        return await asyncio.gather(*asked, return_exceptions=True)

    gone, here = asyncio.run(ask())
    assert isinstance(gone, FileNotFoundError)
    assert here == []


def test_a_node_counts_once_its_driver_is_there(tmp_path: Path) -> None:
    """A socket can't be opened either, with the same error."""
    node = tmp_path / "dax0.0"
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(str(node))
        assert not devices.has_driver(str(node))
    node.unlink()
    node.touch()
    assert devices.has_driver(str(node))


# -- a soft reboot --------------------------------------------------------------------------------------------------------


def at(path: str, filesystem: str) -> MemoryIdentity:
    return replace(FILE, path=path, filesystem=filesystem, survives=Survives.QEMU_RESTART)


@pytest.mark.parametrize(
    ("memory", "outlives"),
    [
        (DEVDAX, True),
        (at("/dev/shm/web1", "tmpfs"), True),
        (at("/dev/hugepages/web1", "hugetlbfs"), True),
        (at("/mnt/ram/web1", "tmpfs"), False),
        (at("/hugepages/web1", "hugetlbfs"), False),
        (at("/dev/../mnt/ram/web1", "tmpfs"), False),
        (at("/srv/web1", "ext4"), False),
    ],
)
def test_a_soft_reboot_leaves_devices_and_what_is_in_ram_below_dev(memory: MemoryIdentity, *, outlives: bool) -> None:
    """systemd unmounts all other file systems. A file on a disk is written back, and counts as lost."""
    assert memory.outlives(Survives.SOFT_REBOOT) is outlives
    assert memory.outlives(Survives.QEMU_RESTART)
