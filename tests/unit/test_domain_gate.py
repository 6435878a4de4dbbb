# SPDX-License-Identifier: GPL-2.0-or-later
"""The gate to a domain's memory, with real files, links, users and access control lists."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpr_agent.domains.gate import LIMIT_S, MODE, Gate, qemus_of
from cpr_agent.errors import MemoryUnusable
from cpr_agent.host import acl
from cpr_agent.host.grants import DeviceGrants
from tests.unit.test_isolation import AS_ROOT, ONE, OTHER, may_open

pytestmark = AS_ROOT


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can pass: pytest's own are root's alone."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def ram(place: Path) -> Iterator[tuple[Path, int]]:
    path = place / "ram"
    path.write_bytes(b"RAM")
    path.chmod(0o600)
    fd = os.open(path, os.O_RDWR)
    yield path, fd
    os.close(fd)


class Timer:
    """In the place of the loop's own."""

    def __init__(self) -> None:
        self.due: list[Callable[[], None]] = []

    def later(self, seconds: float, work: Callable[[], None]) -> asyncio.TimerHandle:
        assert seconds == LIMIT_S
        self.due.append(work)
        return self  # type: ignore[return-value] # of a handle's methods only cancel() is called

    def cancel(self) -> None:
        self.due.pop()


def made(place: Path, grants: DeviceGrants | None = None) -> Gate:
    gate = Gate(place / "gate", grants or DeviceGrants(), later=Timer().later)
    gate.close_all()
    return gate


@pytest.fixture
def gate(place: Path) -> Gate:
    return made(place)


def test_the_memory_can_be_opened_by_its_path_while_the_gate_is_open(gate: Gate, ram: tuple[Path, int]) -> None:
    path, fd = ram
    assert not may_open(path, ONE)
    gate.open("web1", str(path), fd, ONE)
    assert gate.is_open("web1")
    assert may_open(gate.path("web1"), ONE)
    assert not may_open(gate.path("web1"), OTHER)
    gate.close("web1")
    assert not gate.is_open("web1")
    assert not may_open(path, ONE)
    assert path.read_bytes() == b"RAM"
    with pytest.raises(FileNotFoundError):
        os.open(gate.path("web1"), os.O_RDWR)
    gate.close("web1")


def test_a_domain_that_is_started_anew_has_its_gate_opened_anew(gate: Gate, ram: tuple[Path, int]) -> None:
    path, fd = ram
    gate.open("web1", str(path), fd, ONE)
    gate.open("web1", str(path), fd, OTHER)
    assert may_open(gate.path("web1"), OTHER)
    assert not may_open(gate.path("web1"), ONE)


def test_one_gate_closes_and_the_other_on_the_same_memory_stays_open(gate: Gate, ram: tuple[Path, int]) -> None:
    path, fd = ram
    gate.open("web1", str(path), fd, ONE)
    gate.open("web2", str(path), fd, ONE)
    gate.close("web1")
    assert may_open(gate.path("web2"), ONE)
    gate.close("web2")
    assert not may_open(path, ONE)


def test_no_gate_is_open_for_longer_than_its_limit(place: Path, ram: tuple[Path, int]) -> None:
    """A QEMU that does not see the device behind the link would try for ever."""
    path, fd = ram
    timer = Timer()
    gate = Gate(place / "gate", DeviceGrants(), later=timer.later)
    gate.close_all()
    gate.open("web1", str(path), fd, ONE)
    timer.due[0]()
    assert not gate.is_open("web1")
    assert not may_open(path, ONE)
    gate.open("web1", str(path), fd, ONE)
    gate.close("web1")
    assert timer.due == [], "a gate that is opened later has a limit of its own"


def test_the_loop_closes_a_gate(place: Path, ram: tuple[Path, int]) -> None:
    async def story() -> float:
        gate = Gate(place / "gate", DeviceGrants())
        gate.close_all()
        gate.open("web1", str(ram[0]), ram[1], ONE)
        (limit,) = gate._limits.values()
        return limit.when() - asyncio.get_running_loop().time()

    assert 0 < asyncio.run(story()) <= LIMIT_S


def test_nobody_makes_a_file_in_the_place_of_a_gate_that_is_closed(gate: Gate, ram: tuple[Path, int]) -> None:
    """QEMU creates a missing ``mem-path``, and root may do so in any directory that is there."""
    path, fd = ram
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            gate.path("web1").touch()
        gate.open("web1", str(path), fd, ONE)
        with pytest.raises(FileExistsError):
            os.open(gate.path("web1"), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        gate.close("web1")


def test_a_file_that_is_in_the_place_of_a_gate_is_removed(place: Path, gate: Gate, ram: tuple[Path, int]) -> None:
    path, fd = ram
    (place / "gate/web1").mkdir()
    gate.path("web1").write_text("a QEMU's")
    gate.close("web1")
    assert not gate.is_open("web1")
    (place / "gate/web1").write_text("a QEMU's")
    gate.open("web1", str(path), fd, ONE)
    assert may_open(gate.path("web1"), ONE)


def test_who_tries_without_end_never_makes_a_file_there(place: Path, gate: Gate, ram: tuple[Path, int]) -> None:
    """As a QEMU does that does not see the device behind the link."""
    path, fd = ram
    attempt = (
        "import os, sys\n"
        "while True:\n"
        "    try: os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_EXCL); print('made', flush=True)\n"
        "    except (FileNotFoundError, FileExistsError): pass\n"
    )
    command = [sys.executable, "-c", attempt, str(gate.path("web1"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trying:
        for _ in range(2000):
            gate.open("web1", str(path), fd, ONE)
            gate.close("web1")
        trying.kill()
        assert trying.communicate()[0] == ""
    assert {one.name for one in (place / "gate").iterdir()} == {".web1.gone"}


def test_an_own_vm_on_the_same_device_keeps_its_grant(place: Path, ram: tuple[Path, int]) -> None:
    path, fd = ram
    grants = DeviceGrants()
    gate = made(place, grants)
    grants.give("web1", [fd], OTHER)
    gate.open("web1", str(path), fd, ONE)
    gate.close("web1")
    assert may_open(path, OTHER)


def test_an_agent_that_was_killed_leaves_no_gate_open(place: Path, gate: Gate, ram: tuple[Path, int]) -> None:
    path, fd = ram
    gate.open("web1", str(path), fd, ONE)
    for name, node in (("web2", place / "a device that is gone"), (".web3.new", path), (".web4.gone", path)):
        (place / "gate" / name).mkdir()
        (place / "gate" / name / "ram").symlink_to(node)
    (place / "gate/web5").symlink_to(path)
    (place / "gate/.web1.gone").mkdir()
    made(place)
    assert [one.name for one in (place / "gate").iterdir() if not one.name.startswith(".")] == []
    assert not may_open(path, ONE)
    assert path.read_bytes() == b"RAM"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../ram", "a/b", "/etc/shadow", "a\nb", "a\0b", "ü", "a" * 64, "-x", "a:b"]
)
def test_a_name_that_no_vm_can_have_opens_and_closes_nothing(gate: Gate, ram: tuple[Path, int], name: str) -> None:
    path, fd = ram
    for attempt in (lambda: gate.open(name, str(path), fd, ONE), lambda: gate.close(name), lambda: gate.is_open(name)):
        with pytest.raises(MemoryUnusable, match="is not a name that a VM can have"):
            attempt()
    assert path.read_bytes() == b"RAM"
    assert not may_open(path, ONE)


def refused(gate: Gate, path: Path, fd: int, why: str) -> None:
    with pytest.raises(MemoryUnusable, match=why) as error:
        gate.open("web1", str(path), fd, ONE)
    assert error.value.left == "the gate to its memory is closed, and nothing was started"
    assert not gate.is_open("web1")
    assert not may_open(path, ONE) or path.stat().st_uid == ONE


def test_memory_that_a_guest_s_qemu_could_replace_is_refused(place: Path, gate: Gate, ram: tuple[Path, int]) -> None:
    path, fd = ram
    os.chown(path, ONE, -1)
    refused(gate, path, fd, f"it belongs to user {ONE}")
    os.chown(path, 0, -1)
    os.chown(place, ONE, -1)
    refused(gate, path, fd, f"{place} belongs to user {ONE}")
    os.chown(place, 0, -1)
    place.chmod(0o777)
    refused(gate, path, fd, "others may write to")
    place.chmod(0o755)
    (place / "way").symlink_to(place)
    refused(gate, place / "way/ram", fd, "is a symbolic link")
    gate.open("web1", str(path), fd, ONE)


def test_memory_that_was_swapped_after_its_proof_is_refused(place: Path, gate: Gate, ram: tuple[Path, int]) -> None:
    path, fd = ram
    path.rename(place / "proved")
    path.write_bytes(b"another")
    refused(gate, path, fd, "it is not the memory that was proved")
    assert not may_open(place / "proved", ONE)


def test_a_gate_that_others_could_write_to_stays_closed(place: Path, gate: Gate, ram: tuple[Path, int]) -> None:
    path, fd = ram
    directory = place / "gate"
    for mode, owner in ((0o777, 0), (0o711, ONE)):
        directory.chmod(mode)
        os.chown(directory, owner, -1)
        refused(gate, path, fd, "others than root may write to it")
        with pytest.raises(OSError, match="others than root"):
            gate.close_all()
        directory.chmod(MODE)
        os.chown(directory, 0, -1)
    shutil.rmtree(directory)
    refused(gate, path, fd, "No such file")


def test_a_directory_in_the_gate_s_place_is_never_followed(place: Path, ram: tuple[Path, int]) -> None:
    """A link that a guest's QEMU may put there leads nowhere."""
    path, fd = ram
    theirs = place / "theirs"
    theirs.mkdir()
    os.chown(theirs, ONE, -1)
    (place / "real").mkdir()
    (theirs / "gate").symlink_to(place / "real")
    refused(Gate(theirs / "gate", DeviceGrants()), path, fd, "is a symbolic link that others may change")
    assert list((place / "real").iterdir()) == []


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A node that maps like a device's, and is not on a file system that is mounted nodev."""
    directory = tmp_path / "dev"
    directory.mkdir()
    for parent in (directory, *directory.parents):
        parent.chmod(parent.stat().st_mode | 0o011)
    path = directory / "dax0.0"
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    return path


@contextlib.contextmanager
def own_dev(node: Path) -> Iterator[int]:
    """A process with a /dev of its own, in which the node is a copy with its access control list, as libvirt makes it."""
    copy = (
        "import os, subprocess, sys\n"
        "node, name = sys.argv[1], 'system.posix_acl_access'\n"
        "was, entries = os.stat(node), os.getxattr(node, name)\n"
        "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'mode=755', 'dev', os.path.dirname(node)], check=True)\n"
        "os.mknod(node, was.st_mode, was.st_rdev)\n"
        "os.setxattr(node, name, entries)\n"
        "print('up', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = ["unshare", "--mount", sys.executable, "-c", copy, str(node)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        yield process.pid
        process.communicate("")


def test_a_gate_that_closes_takes_the_right_back_from_the_dev_of_each_qemu(place: Path, device: Path) -> None:
    """Of its own and of those that libvirt has started meanwhile, but for one whose own gate is open."""
    running: dict[str, int] = {}
    gate = Gate(place / "gate", DeviceGrants(), running.items, Timer().later)
    gate.close_all()
    fd = os.open(device, os.O_RDWR)
    gate.open("web1", str(device), fd, ONE)
    gate.open("web2", str(device), fd, ONE)
    with own_dev(device) as web1, own_dev(device) as plain, own_dev(device) as web2, own_dev(device) as late:
        running |= {"web1": web1, "a name that no VM has": plain, "web2": web2, "gone": 1 << 30}
        seen = {pid: acl.read(Path(f"/proc/{pid}/root{device}")) for pid in (web1, plain, web2, late)}
        assert all((acl.USER, 6, ONE) in entries for entries in seen.values())
        gate.close("web1")
        seen = {pid: acl.read(Path(f"/proc/{pid}/root{device}")) for pid in (web1, plain, web2, late)}
        assert [(acl.USER, 6, ONE) in seen[pid] for pid in (web1, plain, web2, late)] == [False, False, True, True]
        running["late"] = late
        gate.sweep()
        assert (acl.USER, 6, ONE) not in acl.read(Path(f"/proc/{late}/root{device}"))
        Gate(place / "gate", DeviceGrants(), running.items, Timer().later).close_all()
        assert (acl.USER, 6, ONE) not in acl.read(Path(f"/proc/{web2}/root{device}"))
    os.close(fd)


def test_qemus_are_found_by_libvirt_s_files(tmp_path: Path) -> None:
    (tmp_path / "web1.pid").write_text("12")
    (tmp_path / "web2.pid").write_text("")
    (tmp_path / "web1.xml").write_text("34")
    assert list(qemus_of(tmp_path)) == [("web1", 12)]
    assert list(qemus_of(tmp_path / "nothing")) == []
