# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's user is its own for good, and its unit may see and open what is its own: with real users, systemd's and AppArmor's
own readers."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cpr_agent.core.model import Launch
from cpr_agent.core.threads import Threads
from cpr_agent.errors import QemuFailed, StorageSilent
from cpr_agent.host.grants import DeviceGrants
from cpr_agent.host.isolation import Installer, drop_in_of, made_for, profile_of
from cpr_agent.host.runner import places_of
from cpr_agent.host.systemd import Setup
from cpr_agent.host.users import FIRST_UID, LAST_UID, Users, uid_of_user
from tests.samples import launch
from tests.silent_files import SilentFiles, silent_files

ROOT = Path(__file__).parents[2]
RUN = Path("/run/cpr-agent")
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users")
ONE, OTHER = 66_001, 66_002


def a_launch(*arguments: str, vm: str = "web1", user: str = "cpr-vm-1", **more: object) -> Launch:
    return launch(vm=vm, user=user, base_argv=("/usr/bin/qemu-system-x86_64", *arguments), **more)


def drop_in(*arguments: str, vm: str = "web1", user: str = "cpr-vm-1", opened: tuple[str, ...] = ()) -> list[str]:
    return drop_in_of(a_launch(*arguments, vm=vm, user=user, opened=opened), RUN, places_of(vm)).splitlines()


def profile(*arguments: str, nodes: tuple[str, ...], vm: str = "web1") -> str:
    return profile_of(a_launch(*arguments, vm=vm, nodes=nodes), RUN, places_of(vm))


# -- users ---------------------------------------------------------------------------------------------------------------


def test_each_vm_has_a_user_of_its_own_which_it_keeps(tmp_path: Path) -> None:
    names = [f"vm{number}" for number in range(20)]
    with ThreadPoolExecutor() as pool:
        assigned = dict(zip(names, pool.map(Users(tmp_path / "users").assign, names), strict=True))
    assert len(set(assigned.values())) == len(names)
    assert all(FIRST_UID < uid_of_user(user) <= LAST_UID for user in assigned.values())
    again = Users(tmp_path / "users")
    assert {name: again.assign(name) for name in names} == assigned
    assert again.assign("another") not in assigned.values()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "users").iterdir()} == {0o600}


def test_a_vm_that_has_the_shared_user_from_before_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "web1").write_text("cpr-vm\n")
    assert Users(tmp_path).assign("web1") == "cpr-vm"
    assert Users(tmp_path).assign("web2") == "cpr-vm-1"


def test_a_record_that_is_none_is_not_followed(tmp_path: Path) -> None:
    for wrong in ("root", "cpr-vm-0", "cpr-vm-999999", "cpr-vm-1 root", "", "\0"):
        (tmp_path / "web1").write_text(wrong)
        assert Users(tmp_path).recorded("web1") == "", wrong


def test_no_user_beyond_the_range_is_given(tmp_path: Path) -> None:
    (tmp_path / "last").write_text(f"cpr-vm-{LAST_UID - FIRST_UID}")
    with pytest.raises(QemuFailed, match="are taken"):
        Users(tmp_path).assign("web1")
    assert not (tmp_path / "web1").exists()


def test_a_user_that_the_host_has_already_is_not_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one whose record an admin has removed: files of it may be there."""
    known = [pwd.struct_passwd(("cpr-vm-7", "x", FIRST_UID + 7, 0, "", "/", ""))]
    monkeypatch.setattr(pwd, "getpwall", lambda: known)
    assert Users(tmp_path).assign("web1") == "cpr-vm-8"


@pytest.mark.parametrize("uid", [LAST_UID, FIRST_UID + 1])
def test_a_person_within_the_range_takes_one_number_of_it(
    uid: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    person = pwd.struct_passwd(("alice", "x", uid, uid, "", "/", ""))
    by_uid = pwd.getpwuid
    monkeypatch.setattr(pwd, "getpwall", lambda: [person])
    monkeypatch.setattr(pwd, "getpwuid", lambda asked: person if asked == uid else by_uid(asked))
    users = Users(tmp_path)
    assert uid not in {uid_of_user(users.assign("web1")), uid_of_user(users.assign("web2"))}


def test_a_group_s_number_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd would give the user another number."""
    group, by_gid = grp.struct_group(("staff", "x", FIRST_UID + 1, [])), grp.getgrgid
    monkeypatch.setattr(grp, "getgrgid", lambda asked: group if asked == group.gr_gid else by_gid(asked))
    assert Users(tmp_path).assign("web1") == "cpr-vm-2"


# -- the drop-in ---------------------------------------------------------------------------------------------------------


def test_a_unit_sees_the_sockets_of_its_vm_and_the_devices_that_its_command_line_names() -> None:
    lines = drop_in(
        *("-drive", "if=virtio,file=/dev/vg/web1", "-blockdev", '{"driver":"host_device","filename":"/dev/vg/a b"}'),
        *("-drive", "file=/srv/web1.qcow2", "-chardev", "pty,id=p,path=/dev/pts/3", "-object", "rng,file=/dev/urandom"),
    )
    assert [line for line in lines if line.startswith(("User", "Bind", "DeviceAllow"))] == [
        "User=cpr-vm-1",
        'BindPaths="-/run/cpr-agent/vm/web1"',
        'BindPaths="-/run/cpr-agent/vm/web1:b"',
        'BindPaths="-/dev/vg/web1"',
        'BindPaths="-/dev/vg/a b"',
        'DeviceAllow="/dev/vg/web1" rw',
        'DeviceAllow="/dev/vg/a b" rw',
    ]


@pytest.mark.parametrize("word", ["file=/dev/../etc/x", "file=/dev//dax0.0", "file=/run/cpr-agent/vm/web2/x", "-/dev/sda"])
def test_no_word_gives_what_is_no_device_of_its_own(word: str) -> None:
    assert not [line for line in drop_in("-drive", word) if line.startswith("DeviceAllow")]
    assert "web2" not in "".join(drop_in("-drive", word))


def test_a_directory_of_devices_is_not_shown_as_a_whole() -> None:
    assert not [line for line in drop_in("-drive", "file=/dev/") if line.startswith("DeviceAllow")]


def test_a_device_below_an_image_and_vfio_are_shown() -> None:
    lines = drop_in("-device", "vfio-pci,host=0000:01:00.0", opened=("/dev/vg/base",))
    assert {'BindPaths="-/dev/vfio"', "DeviceAllow=char-vfio rw", 'DeviceAllow="/dev/vg/base" rw'} <= set(lines)
    assert not any("vfio" in line for line in drop_in())


def test_a_user_whom_an_admin_has_named_keeps_the_group_of_its_disks() -> None:
    assert "SupplementaryGroups=kvm cpr-vm" in drop_in(user="alice")
    assert "SupplementaryGroups=kvm" in drop_in(user="cpr-vm-1")


@pytest.mark.parametrize("vm", ["web1", "web.1_x-"])
def test_systemd_reads_it_as_it_is_meant(vm: str, tmp_path: Path) -> None:
    text = "\n".join(drop_in("-drive", 'file=/dev/a:b "c%n\\d,format=raw', "-chardev", "socket,path=/dev/shm/x", vm=vm))
    unit = (ROOT / "units/cpr-vm@.service").read_text()
    (tmp_path / "cpr-vm@.service").write_text(unit.replace("/usr/bin/python3", "/bin/true"))
    directory = tmp_path / f"cpr-vm@{vm}.service.d"
    directory.mkdir()
    (directory / "50-cpr-agent.conf").write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"cpr-vm@{vm}.service"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    assert directory.name not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


# -- the profile ---------------------------------------------------------------------------------------------------------


def test_a_profile_has_the_vm_s_own_places_and_no_others() -> None:
    text = profile("-drive", "file=/tank/web1.qcow2,if=virtio", "-kernel", "/boot/vmlinuz", nodes=("/dev/shm/web1",))
    assert '"/tank/web1.qcow2" rwk,' in text
    assert '"/tank/web1.qcow2{.,-}*" rwk,' in text
    assert '"/tank/**" r,' in text
    assert '"/dev/shm/web1" rwk,' in text
    assert "/dev/dax" not in text
    assert "vmlinuz" not in text
    assert "/dev/dax* rw," in profile(nodes=("/dev/dax0.0",))


def test_a_directory_that_a_guest_shares_is_its_own_as_a_whole() -> None:
    text = profile("-virtfs", f"local,path={ROOT}/,mount_tag=share,security_model=mapped", nodes=())
    assert f'"{ROOT}/**" rwk,' in text
    assert f'"{ROOT.parent}/**"' not in text


def test_an_image_behind_a_symbolic_link_is_written_to_where_it_is(tmp_path: Path) -> None:
    """AppArmor asks for the file's own place."""
    (tmp_path / "pool").symlink_to("/tank")
    (tmp_path / "secret").symlink_to("/etc/shadow")
    text = profile("-drive", f"file={tmp_path}/pool/web1.img", "-drive", f"file={tmp_path}/secret", nodes=())
    assert '"/tank/web1.img" rwk,' in text
    assert '"/etc' not in text


@pytest.mark.parametrize("path", ["/tank/a,b", "/tank/a,,b", "/tank/\u00e9"])
def test_a_path_in_json_is_what_qemu_reads(path: str) -> None:
    word = json.dumps({"driver": "raw", "file": {"driver": "file", "filename": path}})
    assert f'"{path}" rwk,' in profile("-blockdev", word, nodes=())


def test_words_that_only_look_like_a_path_are_no_matter() -> None:
    words = "console=ttyS0 init=/sbin/init " + "an.option=1 " * 50
    assert '"/dev/shm/web1" rwk,' in profile("-append", words, nodes=("/dev/shm/web1",))


@pytest.mark.skipif(shutil.which("apparmor_parser") is None, reason="no AppArmor")
def test_apparmor_reads_both_profiles(tmp_path: Path) -> None:
    for name in ("cpr-vm", "abstractions/cpr-vm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / "policies/apparmor" / name).read_text())
    words = ('file=/srv/a"b*{c}[d]^@{HOME} e.img', 'json:{"filename":"/srv/x,,y"}')
    (tmp_path / "one").write_text(profile(*words, vm="web.1_x-", nodes=("/dev/dax0.0",)))
    for name in ("cpr-vm", "one"):
        command = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", "-I", str(tmp_path), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


# -- what is installed ---------------------------------------------------------------------------------------------------


def stage(installer: Installer, plan: Launch) -> bool:
    places = places_of(plan.vm)
    return installer.stage(plan, made_for(plan, RUN, places), places)


def test_what_is_installed_is_staged_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    installer = Installer(tmp_path / "setup", tmp_path / "units", tmp_path / "profiles")
    plan, places = a_launch(user="root"), places_of("web1")
    assert stage(installer, plan)
    staged = tmp_path / "setup/web1"
    for path, name in (
        *((tmp_path / f"units/cpr-vm@{place}.service.d/50-cpr-agent.conf", "unit.conf") for place in places),
        (tmp_path / "profiles/cpr-vm.web1.vm", "profile"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((staged / name).read_text())
    assert stage(installer, plan), "it may not have been installed to the end"
    shutil.rmtree(staged)
    assert not stage(installer, plan)
    assert stage(installer, a_launch("-drive", "file=/dev/vg/more", user="root"))
    shutil.rmtree(staged)
    (tmp_path / "profiles/cpr-vm.web1.vm").write_bytes(b"\xff")
    assert stage(installer, plan), "it is damaged"
    assert stage(installer, a_launch(user="cpr-vm-20000")), "its user is not there yet"
    assert (staged / "sysusers.conf").read_text() == 'u cpr-vm-20000 86000 "Virtual machine web1 of cpr-agent" / -\n'


@AS_ROOT
def test_systemd_makes_the_user_that_is_staged(tmp_path: Path) -> None:
    stage(Installer(tmp_path / "setup", tmp_path / "u", tmp_path / "p"), a_launch())
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    subprocess.run(["systemd-sysusers", f"--root={root}", tmp_path / "setup/web1/sysusers.conf"], check=True)
    line = (root / "etc/passwd").read_text()
    assert line.startswith(f"cpr-vm-1:x:{ONE}:{ONE}:")
    assert line.strip().endswith("nologin")


@AS_ROOT
@pytest.mark.parametrize("failing", ["systemd-sysusers", "apparmor_parser", "systemctl"])
def test_what_could_not_be_installed_is_not_taken_for_installed(failing: str, tmp_path: Path) -> None:
    """The unit would run without its profile, or as the user of before."""
    etc, run, module, tools = (tmp_path / name for name in ("etc", "run", "module", "tools"))
    for made in (etc, run, module / "apparmor/parameters", tools):
        made.mkdir(parents=True)
    (module / "apparmor/parameters/enabled").write_text("Y\n")
    for tool in ("systemd-sysusers", "apparmor_parser", "systemctl"):
        (tools / tool).write_text(f"#!/bin/sh\n[ {tool} != {failing} ] || [ ! -e {tmp_path}/fails ]\n")
        (tools / tool).chmod(0o755)
    mounts = f"mount --bind {etc} /etc; mount --bind {run} /run; mount --bind {module} /sys/module"
    program = f"set -e; {mounts}; PATH={tools}:$PATH exec {ROOT}/units/set-up-vm web1"
    installer = Installer(run / "cpr-agent/setup", etc / "systemd/system", etc / "apparmor.d")
    plan = a_launch(user="root")
    (tmp_path / "fails").touch()
    for _ in range(2):
        assert stage(installer, plan)
        assert subprocess.run(["unshare", "--mount", "sh", "-c", program], check=False).returncode
    (tmp_path / "fails").unlink()
    assert stage(installer, plan)
    subprocess.run(["unshare", "--mount", "sh", "-c", program], check=True)
    assert not stage(installer, plan)


class Pid1:
    """systemd as Setup uses it."""

    async def start_unit(self, name: str) -> str:
        assert name.startswith("cpr-vm-setup@")
        return "done"


@AS_ROOT
def test_a_vm_is_set_up_beside_one_whose_disk_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()

    async def story(server: SilentFiles) -> None:
        installer = Installer(tmp_path / "setup", tmp_path / "units", tmp_path / "profiles")
        setup = Setup(Pid1(), installer, Threads())  # type: ignore[arg-type]  # no systemd here
        bad = a_launch("-drive", f"file={server.disk}", vm="bad", user="root")
        waiting = asyncio.create_task(setup.vm(bad, RUN, places_of("bad")))
        await asyncio.sleep(0)  # its turn comes first
        await setup.vm(a_launch(user="root"), RUN, places_of("web1"))
        assert (tmp_path / "setup/web1/unit.conf").exists()
        assert not waiting.done()
        with pytest.raises(StorageSilent, match="VM bad"):
            await waiting

    with silent_files(tmp_path / "mount") as server:
        server.fall_silent()
        try:
            asyncio.run(story(server))
        finally:
            server.speak()


# -- dax devices ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """Stands for the node of a device: an access control list is the same on any inode."""
    path = tmp_path / "dax0.0"
    path.touch(mode=0o600)
    for parent in path.parents:
        parent.chmod(parent.stat().st_mode | 0o011)
    fd = os.open(path, os.O_RDWR)
    yield path, fd
    os.close(fd)


def may_open(path: Path, uid: int) -> bool:
    become = f"import os, sys; os.setgroups([]); os.setgid({uid}); os.setuid({uid}); os.open(sys.argv[1], os.O_RDWR)"
    done = subprocess.run([sys.executable, "-c", become, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "PermissionError" in done.stderr
    return done.returncode == 0


@AS_ROOT
def test_a_device_is_open_to_a_vm_s_user_while_its_qemu_starts_and_to_nobody_else(node: tuple[Path, int]) -> None:
    path, fd = node
    grants = DeviceGrants()
    assert not may_open(path, ONE)
    grants.give("web1", [fd], ONE)
    assert may_open(path, ONE)
    assert not may_open(path, OTHER)
    grants.take_back("web1")
    assert not may_open(path, ONE)
    assert path.stat().st_mode & 0o777 == 0o600


@AS_ROOT
def test_two_that_share_a_device_may_start_at_once(node: tuple[Path, int]) -> None:
    path, fd = node
    grants = DeviceGrants()
    grants.give("web1", [fd], ONE)
    grants.give("web2", [fd], OTHER)
    assert may_open(path, ONE)
    assert may_open(path, OTHER)
    grants.take_back("web1")
    assert not may_open(path, ONE)
    assert may_open(path, OTHER)
    grants.take_back("web2")
    assert not may_open(path, OTHER)
