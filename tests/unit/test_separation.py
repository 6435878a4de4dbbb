# SPDX-License-Identifier: GPL-2.0-or-later
"""What `check` says of VMs that are not apart, or of one whose user can't open its image: with real users and files."""

from __future__ import annotations

import json
import os
import pwd
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from cpr_agent.core.manager import Manager
from cpr_agent.core.model import BlockNode, Finding, Inventory, MemoryIdentity, OpenFile, Survives
from cpr_agent.core.separation import sharing_findings
from cpr_agent.errors import QemuFailed
from cpr_agent.host.access import closed_place
from cpr_agent.host.acl import GROUP, USER
from cpr_agent.host.this_host import ThisHost
from tests.bench import Bench

ROOT = Path(__file__).parents[2]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")
NOBODY = pwd.getpwnam("nobody")
OTHER = pwd.getpwnam("daemon")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def define(bench: Bench, name: str, user: str, *arguments: str) -> None:
    bench.define(name)
    path = bench.definitions / f"{name}.toml"
    path.write_text(path.read_text().replace('user = "root"', f'user = "{user}"\narguments = {json.dumps(arguments)}'))


def devdax(uuid: str) -> MemoryIdentity:
    return MemoryIdentity(kind="devdax", size_bytes=1, offset_bytes=0, survives=Survives.KEXEC, uuid=uuid)


def codes(found: list[Finding]) -> list[tuple[str, str]]:
    return [(one.severity, one.code) for one in found]


# -- what is shared ------------------------------------------------------------------------------------------------------


def test_vms_that_share_a_user_or_a_device_are_told() -> None:
    users = {"web2": "cpr-vm", "web3": "cpr-vm-1", "web4": "cpr-vm"}
    claims = [("web3", devdax("one")), ("web4", devdax("other"))]
    user, device = sharing_findings("web1", "cpr-vm", users, (devdax("one"),), claims)
    assert codes([user, device]) == [("info", "shared-user"), ("info", "shared-device")]
    assert user.what == "it shares its user cpr-vm with web2, web4"
    assert device.what == "it shares its dax device with web3"
    assert not sharing_findings("web1", "cpr-vm-2", users, (devdax("third"),), claims)
    assert not sharing_findings("web1", "", {"web2": ""}, (), [])


def test_a_vm_without_a_named_user_is_given_one_by_a_reload_and_keeps_it(bench: Bench) -> None:
    define(bench, "web1", "")
    define(bench, "web2", "root")

    async def story(manager: Manager) -> None:
        assert manager.vms["web1"].user == ""
        await manager.reload()
        assert [manager.vms[name].user for name in ("web1", "web2")] == ["nobody", "root"]
        await manager.vms["web1"].start()
        launched = manager.vms["web1"].launched()
        assert launched
        assert launched.user == "nobody"

    bench.run(story)


# -- images --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disks/web1.img"
    path.parent.mkdir(mode=0o711)
    path.touch(mode=0o600)
    for parent in path.parents:
        if parent.stat().st_uid == os.geteuid():
            parent.chmod(parent.stat().st_mode | 0o011)
    return path


def opens(path: Path, uid: int, gid: int) -> bool:
    become = f"import os, sys; os.setgroups([]); os.setgid({gid}); os.setuid({uid}); os.open(sys.argv[1], os.O_RDONLY)"
    return subprocess.run([sys.executable, "-c", become, str(path)], stderr=subprocess.DEVNULL, check=False).returncode == 0


def write_acl(path: Path, *named: tuple[int, int, int], mask: int = 7) -> None:
    """``named``: tag, bits, ID; in the order that the kernel wants."""
    entries = [(0x01, 6, 0), *((0x02, *one[1:]) for one in named if one[0] == 0x02), (0x04, 0, 0)]
    entries += [*((0x08, *one[1:]) for one in named if one[0] == 0x08), (0x10, mask, 0), (0x20, 0, 0)]
    raw = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_access", raw)


@AS_ROOT
@pytest.mark.parametrize("owner", [0, NOBODY.pw_uid])
@pytest.mark.parametrize("mode", [0o000, 0o400, 0o040, 0o004, 0o640, 0o604, 0o200])
@pytest.mark.parametrize("directory", [0o711, 0o700, 0o710])
def test_who_can_open_an_image_is_what_the_kernel_says(image: Path, owner: int, mode: int, directory: int) -> None:
    os.chown(image, owner, NOBODY.pw_gid)
    image.chmod(mode)
    image.parent.chmod(directory)
    for account in (NOBODY, OTHER):
        closed = closed_place(str(image), account.pw_uid, {account.pw_gid})
        assert (closed == "") == opens(image, account.pw_uid, account.pw_gid)
        assert closed in ("", str(image), str(image.parent))


@AS_ROOT
@pytest.mark.parametrize("mask", [7, 4, 0])
@pytest.mark.parametrize(
    "named",
    [
        (USER, 6, NOBODY.pw_uid),
        (USER, 0, NOBODY.pw_uid),
        (USER, 2, NOBODY.pw_uid),
        (GROUP, 4, NOBODY.pw_gid),
        (GROUP, 2, NOBODY.pw_gid),
    ],
)
def test_an_access_control_list_counts_as_it_does_for_the_kernel(
    image: Path, named: tuple[int, int, int], mask: int
) -> None:
    write_acl(image, named, mask=mask)
    for account in (NOBODY, OTHER):
        can = not closed_place(str(image), account.pw_uid, {account.pw_gid})
        assert can == opens(image, account.pw_uid, account.pw_gid)


@AS_ROOT
def test_the_remedy_opens_the_image(image: Path, bench: Bench) -> None:
    define(bench, "web1", "daemon", "-drive", f"file={image},if=virtio")
    image.parent.chmod(0o700)

    def findings() -> list[Finding]:
        found: list[Finding] = []

        async def look(manager: Manager) -> None:
            found.extend(await manager.findings())

        bench.run(look)
        return [one for one in found if one.code in ("closed-image", "open-image")]

    for place in (image.parent, image):
        (found,) = findings()
        assert found.code == "closed-image"
        assert f"{place} does not let it in" in found.what
        subprocess.run(found.remedy.partition(";")[0].split(), check=True)
    assert not findings()
    assert opens(image, OTHER.pw_uid, OTHER.pw_gid)


@AS_ROOT
def test_an_image_that_everybody_can_read_is_told_if_it_is_the_vm_s_own(image: Path) -> None:
    host = ThisHost()
    image.chmod(0o644)
    assert not host.access(str(image), "daemon").loose, "such as firmware"
    os.chown(image, OTHER.pw_uid, -1)
    assert host.access(str(image), "daemon").loose
    image.parent.chmod(0o700)
    os.chown(image.parent, OTHER.pw_uid, -1)
    assert not host.access(str(image), "daemon").loose


def test_what_can_t_be_told_is_no_finding(tmp_path: Path) -> None:
    assert ThisHost().access(str(tmp_path / "missing"), "root") == ("", False, False)
    assert ThisHost().access(str(tmp_path), "no such user") == ("", False, False)


@AS_ROOT
def test_a_start_that_fails_for_an_image_says_how_to_give_it(image: Path, bench: Bench) -> None:
    define(bench, "web1", "nobody", "-drive", f"file={image},if=virtio")
    bench.runner.faults["web1", "start"] = QemuFailed("Permission denied", vm="web1")

    async def story(manager: Manager) -> None:
        with pytest.raises(QemuFailed) as failed:
            await manager.vms["web1"].start()
        assert failed.value.remedy == f"chown nobody {image}; or setfacl -m u:nobody:rw {image}"

    bench.run(story)


# -- VMs from before -----------------------------------------------------------------------------------------------------


def keep_users(root: Path) -> dict[str, str]:
    subprocess.run([ROOT / "units/keep-users", root], check=True)
    return {path.name: path.read_text() for path in (root / "var/lib/cpr-agent/users").iterdir()}


@AS_ROOT
def test_an_upgrade_keeps_the_user_of_the_vms_that_were_defined(tmp_path: Path) -> None:
    definitions = tmp_path / "etc/cpr-agent/vms"
    definitions.mkdir(parents=True)
    (tmp_path / "dev").mkdir()
    node = tmp_path / "dev/dax0.0"
    node.touch(mode=0o660)
    os.chown(node, 0, NOBODY.pw_gid)
    for name in ("web1", "web.2"):
        (definitions / f"{name}.toml").touch()
    assert keep_users(tmp_path) == {"web1": "cpr-vm\n", "web.2": "cpr-vm\n"}
    assert (node.stat().st_gid, node.stat().st_mode & 0o777) == (0, 0o600)
    (definitions / "later.toml").touch()
    assert "later" not in keep_users(tmp_path)


@AS_ROOT
def test_an_upgrade_that_finds_no_room_for_the_users_keeps_them_the_next_time(tmp_path: Path) -> None:
    definitions = tmp_path / "etc/cpr-agent/vms"
    definitions.mkdir(parents=True)
    for name in ("web1", "web2"):
        (definitions / f"{name}.toml").touch()
    state = tmp_path / "var/lib/cpr-agent"
    state.mkdir(parents=True)
    run = f"{ROOT}/units/keep-users {tmp_path}"
    small, larger = f"mount -t tmpfs -o nr_inodes=3 none {state}", f"mount -o remount,nr_inodes=9 {state}"
    program = f"{small}; {run}; {larger}; {run} && cat {state}/users/*"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", program], capture_output=True, text=True, check=True)
    assert "No space left" in done.stderr
    assert done.stdout == "cpr-vm\ncpr-vm\n"


# -- what the next QEMU needs --------------------------------------------------------------------------------------------


def test_what_the_next_qemu_needs_is_installed_once_a_guest_runs_and_when_an_agent_finds_one(bench: Bench) -> None:
    """So that a load after an upgrade of the package does not wait for it."""
    define(bench, "web1", "root")

    async def start(manager: Manager) -> None:
        await manager.vms["web1"].start()
        await manager.vms["web1"].settled()

    bench.run(start)
    assert [launch.vm for launch in bench.runner.prepared] == ["web1"]

    async def nothing(manager: Manager) -> None:
        await manager.vms["web1"].settled()

    bench.run(nothing)
    assert [launch.vm for launch in bench.runner.prepared] == ["web1", "web1"]


def test_a_device_that_an_image_stands_on_is_shown_to_the_next_qemu_if_it_is_the_one(bench: Bench) -> None:
    """By the kernel's word on what is open, and not by the name alone that QEMU gives."""
    there = OpenFile(path="/dev/dm-3", kind="device", device_id="disk-3", size_bytes=512)
    now = {"/dev/vg/base": there, "/dev/vg/other": replace(there, device_id="disk-4")}
    bench.host.look_at = lambda path: now.get(path)  # type: ignore[method-assign]  # no devices here
    define(bench, "web1", "root")

    async def story(manager: Manager) -> None:
        vm = manager.vms["web1"]
        await vm.start()
        node = BlockNode(disk="d0", role="backing.file", node="n", driver="host_device", filename="", file=there)
        bench.runner.inventories["web1"] = Inventory(nodes=tuple(replace(node, filename=name) for name in now))
        await vm.machine.prepare_next()
        assert bench.runner.prepared[-1].opened == ("/dev/vg/base",)

    bench.run(story)
