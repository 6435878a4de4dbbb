# SPDX-License-Identifier: GPL-2.0-or-later
"""Firmware is kept as it was when its guest was started, and read again from the copy if it changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cpr_agent.core.model import Firmware, KeptFile
from cpr_agent.host.firmware import ROM_BYTES, KeptFirmware
from cpr_agent.vm.cmdline import firmware_files, kept_firmware, read_at_start, with_firmware

LIBVIRT = (
    *("-blockdev", '{"driver":"file","filename":"/CODE","node-name":"code-storage","auto-read-only":true}'),
    *("-blockdev", '{"node-name":"code","read-only":true,"driver":"raw","file":"code-storage"}'),
    *("-blockdev", '{"driver":"file","filename":"/VARS","node-name":"vars-storage","read-only":false}'),
    *("-blockdev", '{"node-name":"vars","read-only":false,"driver":"raw","file":"vars-storage"}'),
    *("-machine", "q35,pflash0=code,pflash1=vars"),
)


@pytest.mark.parametrize(
    ("argv", "files", "names"),
    [
        ((), (), ()),
        (("-bios", "/b"), ("/b",), ()),
        (("-bios", "b.bin"), (), ("b.bin",)),
        (("-pflash", "/written"), (), ()),
        (("-device", "e1000,romfile=/r"), ("/r",), ()),
        (("-device", "e1000,romfile="), (), ()),
        (("-drive", "if=pflash,file=/CODE,readonly=on"), ("/CODE",), ()),
        (("-drive", "if=pflash,file=/VARS"), (), ()),
        (("-drive", "if=virtio,file=/disk,readonly=on"), (), ()),
        (LIBVIRT, ("/CODE",), ()),
        (("-kernel", "/vmlinuz", "-initrd", "initrd.img", "-dtb", "/tree"), ("/vmlinuz", "/tree"), ()),
        (("-fw_cfg", "name=opt/x,file=/f", "-fw_cfg", "name=opt/y,string=/g", "-smbios", "type=1,serial=/h"), ("/f",), ()),
        (("-acpitable", "file=/t", "-smbios", "file=/s", "-acpitable", "data=/a:/b"), ("/t", "/s"), ()),
        (("-device", "loader,file=/l,addr=0", "-device", "nvme,file=/m", "-initrd", "/a x,/b y"), ("/l",), ()),
    ],
)
def test_what_qemu_reads_and_does_not_write_is_firmware(
    argv: tuple[str, ...], files: tuple[str, ...], names: tuple[str, ...]
) -> None:
    found = kept_firmware(("/opt/qemu/bin/qemu", "-L", "/mine", *argv))
    assert (found.files, found.names) == (files, names)
    assert found.directories[:2] == ("/mine", "/opt/qemu/share/qemu")


def test_variables_are_among_the_files_that_are_proved() -> None:
    assert firmware_files(("qemu", *LIBVIRT)) == ["/CODE", "/VARS"]


def test_files_that_are_read_at_each_start_are_known() -> None:
    argv = (
        *("qemu", "-bios", "/b", "-device", "e1000,romfile=/r", "-kernel", "/k", "-initrd", "i"),
        *("-fw_cfg", "name=x,file=/f"),
        *("-object", "secret,id=s0,file=/s", "-object", '{"qom-type":"secret","id":"s1","file":"/t"}'),
        *(
            "-fsdev",
            "local,id=f0,path=/shared",
            "-chardev",
            "file,id=c0,path=/made",
            "-chardev",
            "serial,id=c1,path=/dev/ttyS9",
        ),
        *("-object", "memory-backend-file,id=m,mem-path=/m", "-object", "filter-dump,id=d,netdev=n,file=/made"),
        *("-drive", "if=pflash,file=/CODE,readonly=on"),
    )
    assert read_at_start(argv) == ["/b", "/r", "/k", "/f", "/s", "/t", "/shared", "/dev/ttyS9"]


def copy(path: str, to: str, *, rom: bool = False) -> KeptFile:
    return KeptFile(path=path, copy=to, sha256="", size_bytes=0, rom=rom, st_dev=0, inode=0, mtime_ns=0)


def test_a_copy_takes_the_place_of_its_file_alone() -> None:
    argv = ("qemu", "-bios", "/b", "-drive", "if=pflash,file=/a,,b,readonly=on", "-device", "e1000,romfile=/b", *LIBVIRT)
    now = with_firmware(argv, [copy("/b", "/kept/b"), copy("/a,b", "/kept/a,b"), copy("/CODE", "/kept/code")])
    assert now[:7] == ("qemu", "-bios", "/kept/b", "-drive", "if=pflash,file=/kept/a,,b,readonly=on", *argv[5:6], now[6])
    assert now[6] == "e1000,romfile=/kept/b"
    assert json.loads(now[8])["filename"] == "/kept/code"
    assert now[9:] == argv[9:]


def test_copies_of_roms_are_looked_at_first() -> None:
    assert with_firmware(("qemu", "-L", "/mine"), [copy("/x/r", "/kept/roms/r", rom=True)]) == (
        *("qemu", "-L", "/kept/roms", "-L", "/mine"),
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "CODE").write_bytes(b"code")
    (directory / "bios.bin").write_bytes(b"bios")
    (directory / "named").write_bytes(b"named")
    (directory / "large.bin").write_bytes(bytes(ROM_BYTES + 1))
    (directory / "README").write_bytes(b"read me")
    return directory


def test_files_and_roms_are_kept_as_they_were(tmp_path: Path, source: Path) -> None:
    kept = KeptFirmware(tmp_path / "cache/firmware")
    (tmp_path / "second").mkdir()
    (tmp_path / "second/bios.bin").write_bytes(b"not found by QEMU")
    wanted = Firmware(
        files=(str(source / "CODE"), str(source / "missing")),
        names=("named",),
        directories=(str(tmp_path / "none"), str(source), str(tmp_path / "second")),
    )
    kept.keep("web1", wanted)
    found = {Path(file.path).name: file for file in kept.kept("web1")}
    assert sorted(found) == ["CODE", "bios.bin", "named"]
    assert {name: Path(file.copy).read_bytes() for name, file in found.items()} == {
        "CODE": b"code",
        "bios.bin": b"bios",
        "named": b"named",
    }
    assert Path(found["bios.bin"].copy).name == "bios.bin"
    assert kept.changed("web1") == []
    assert kept.kept("web2") == []


def test_what_was_replaced_removed_or_touched_is_read_from_its_copy(tmp_path: Path, source: Path) -> None:
    kept = KeptFirmware(tmp_path / "firmware")
    kept.keep("web1", Firmware(files=(str(source / "CODE"),), directories=(str(source),)))
    (source / "bios.bin").unlink()
    os.utime(source / "CODE", ns=(1, 1))
    assert sorted(Path(file.path).name for file in kept.changed("web1")) == ["CODE", "bios.bin"]
    kept.keep("web1", Firmware(files=(str(source / "CODE"),)))
    assert kept.changed("web1") == []
    assert [Path(file.path).name for file in kept.kept("web1")] == ["CODE"]
    kept.forget("web1")
    assert kept.kept("web1") == []


def test_an_index_that_can_not_be_read_is_as_good_as_none(tmp_path: Path, source: Path) -> None:
    kept = KeptFirmware(tmp_path / "firmware")
    kept.keep("web1", Firmware(files=(str(source / "CODE"),)))
    (tmp_path / "firmware/web1/index.json").write_text("[{")
    assert kept.kept("web1") == []


def test_what_many_guests_have_is_there_once_until_the_last_is_gone(tmp_path: Path, source: Path) -> None:
    kept = KeptFirmware(tmp_path / "firmware")
    for vm in ("web1", "web2"):
        kept.keep(vm, Firmware(files=(str(source / "CODE"),), directories=(str(source),)))
    copies = [Path(file.copy) for vm in ("web1", "web2") for file in kept.kept(vm)]
    assert len({copy.stat().st_ino for copy in copies}) == 2
    kept.forget("web1")
    assert [Path(file.copy).read_bytes() for file in kept.kept("web2")] == [b"code", b"bios"]
    kept.forget("web2")
    assert list((tmp_path / "firmware/.contents").iterdir()) == []


def test_what_is_no_file_that_all_may_read_is_not_kept(tmp_path: Path, source: Path) -> None:
    (source / "secret").write_bytes(b"secret")
    (source / "secret").chmod(0o600)
    os.mkfifo(source / "fifo")
    others = tmp_path / "others"
    others.mkdir()
    others.chmod(0o777)
    (others / "link").symlink_to(source / "CODE")
    kept = KeptFirmware(tmp_path / "firmware")
    kept.keep("web1", Firmware(files=tuple(str(path) for path in (source / "secret", source / "fifo", others / "link"))))
    assert kept.kept("web1") == []
