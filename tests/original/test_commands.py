# SPDX-License-Identifier: GPL-2.0-or-later
"""cpr-save and cpr-load themselves, by QMP alone: what they promise, and what they do with bad input."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import PATIENCE_S, until
from tests.original.machine import SIZE, Desk, Machine, RefusedError, small_file_system

DISK = ("-blockdev", "file,node-name=disk,filename={0},locking=on", "-device", "virtio-blk-pci,drive=disk,id=vd")

FIRMWARE = Path("/usr/share/seabios/bios-256k.bin")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refused(machine: Machine, *words: str, load: Path | str = "", save: Path | str = "") -> None:
    with pytest.raises(RefusedError) as caught:
        machine.load(load) if load else machine.save(save)
    for word in words:
        assert word in str(caught.value), caught.value


def refused_save(desk: Desk, machine: Machine, *words: str, save: Path | str = "") -> None:
    """The guest ran, and runs on."""
    refused(machine, *words, save=save or desk.state)
    assert machine.status == "running"
    desk.assert_unbroken()


@pytest.fixture
def disk(desk: Desk) -> Path:
    """Which all machines of the desk have."""
    path = desk.root / "disk"
    path.write_bytes(bytes(1 << 20))
    desk.more += [word.format(path) for word in DISK]
    return path


# -- the run states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["-S"]], ids=["", "S"])
def test_a_guest_that_ran_runs_after_the_load(desk: Desk, more: list[str]) -> None:
    old = desk.running()
    old.save(desk.state)
    assert old.status == "save-vm"
    assert "STOP" in old.events
    last, ram = desk.last, digest(desk.ram)
    assert desk.state.stat().st_mode & 0o7777 == 0o600
    assert 10_000 < desk.state.stat().st_size < 200_000, "RAM is no part of it"
    old.quit()
    new = desk.incoming(*more)
    assert new.status == "inmigrate"
    assert digest(desk.ram) == ram, "QEMU's start has written to the guest's RAM"
    assert desk.last == last
    new.load(desk.state)
    assert new.status == "running"
    assert "RESUME" in new.events
    desk.assert_unbroken()


def test_a_paused_guest_is_paused_after_the_load(desk: Desk) -> None:
    old = desk.running()
    old.execute("stop")
    last = desk.last
    old.save(desk.state)
    assert old.status == "paused"
    old.quit()
    new = desk.incoming()
    new.load(desk.state)
    assert new.status == "paused"
    assert desk.last == last
    new.execute("cont")
    desk.assert_unbroken()


@pytest.fixture
def asleep(desk: Desk, linux: Path) -> Iterator[Machine]:
    """A Linux guest, which has put itself to sleep (S3)."""
    words = "console=ttyS0 quiet loglevel=1 panic=-1 cpr.suspend"
    desk.more = ["-kernel", str(linux / "vmlinuz"), "-initrd", str(linux / "initrd.img"), "-append", words]
    machine = desk.start(size="256M")
    machine.wait_for("SUSPEND")
    yield machine


def test_a_guest_that_slept_sleeps_after_the_load(desk: Desk, asleep: Machine) -> None:
    """QEMU 7.2 can't stop a guest that sleeps, and refuses it."""
    if desk.version < (9, 0):
        refused(asleep, "run state suspended", save=desk.state)
        assert asleep.status == "suspended"
        return
    last = desk.last
    asleep.save(desk.state)
    assert asleep.status == "save-vm"
    asleep.execute("cont")
    assert asleep.status == "suspended", "a save that is taken back does not wake it"
    asleep.save(desk.state)
    asleep.quit()
    new = desk.start("-incoming", "defer", size="256M")
    new.load(desk.state)
    assert new.status == "suspended"
    assert desk.last == last
    new.execute("system_wakeup")
    new.wait_for("WAKEUP")
    assert new.status == "running"
    desk.assert_unbroken()


def test_a_save_is_taken_back(desk: Desk, disk: Path) -> None:
    machine = desk.running()
    assert not desk.free(disk)
    machine.save(desk.state)
    assert desk.free(disk)
    machine.execute("cont")
    assert machine.status == "running"
    assert not desk.free(disk)
    desk.assert_unbroken()


def test_a_guest_survives_its_reset_after_a_load(desk: Desk) -> None:
    """Its firmware is in ROM, which is no part of the state, and no part of its RAM either."""
    desk.saved()
    new = desk.incoming()
    new.load(desk.state)
    desk.assert_unbroken()
    new.execute("system_reset")
    new.wait_for("RESET")
    before = desk.console.stat().st_size
    until(lambda: desk.console.read_bytes()[before:].count(b"cpr-guest boot=") > 3, "it boots again")
    boots = {line.split()[1] for line in desk.console.read_text(errors="replace").splitlines() if "cpr-guest boot=" in line}
    assert len(boots) == 2


def option_rom(machine: Machine, device: str, into: Path) -> bytes:
    """What a guest finds in the option ROM of a PCI device, once it has given it an address."""
    (slot,) = (one["slot"] for bus in machine.execute("query-pci") for one in bus["devices"] if one["qdev_id"] == device)
    machine.hmp(f"o/w 0xcf8 {0x80000000 | slot << 11 | 0x30:#x}")
    machine.hmp("o/w 0xcfc 0xd0000001")
    machine.execute("pmemsave", val=0xD0000000, size=4096, filename=str(into))
    return into.read_bytes()


def test_an_option_rom_is_the_same_after_a_load(desk: Desk) -> None:
    """It is no part of the state. Only a QEMU whose ROM's size is given starts without the file, since 10.0."""
    rom, away = desk.root / "rom", desk.root / "away"
    rom.write_bytes(b"a ROM " * 682 + b"end.")
    desk.more = ["-device", f"virtio-rng-pci,id=rng,romfile={rom},romsize=4096"]
    old = desk.running()
    assert option_rom(old, "rng", desk.root / "seen") == rom.read_bytes()
    old.save(desk.state)
    old.quit()
    if desk.version >= (10, 0):
        rom.rename(away)
    new = desk.incoming()
    if away.exists():
        refused(new, "failed to find romfile", load=desk.state)
        assert new.status == "inmigrate"
        away.rename(rom)
    new.load(desk.state)
    assert option_rom(new, "rng", desk.root / "seen") == rom.read_bytes()
    desk.assert_unbroken()


def test_a_reset_of_a_saved_guest_does_not_end_its_qemu(desk: Desk) -> None:
    machine = desk.running()
    machine.save(desk.state)
    machine.execute("system_reset")
    machine.wait_for("RESET")
    assert machine.status == "prelaunch"


# -- disks ------------------------------------------------------------------------------------------------------------


def test_disks_are_let_go_of_by_a_save_and_taken_by_a_load(desk: Desk, disk: Path) -> None:
    """Also beside the old QEMU, which stays: the new one's first write must not end it."""
    old = desk.running()
    old.save(desk.state)
    new = desk.incoming()
    new.load(desk.state)
    new.hmp('qemu-io -d /machine/peripheral/vd/virtio-backend "write -P 0x5a 4096 512"')
    assert disk.read_bytes()[4096:4608] == b"\x5a" * 512
    assert new.status == "running"
    assert not desk.free(disk)
    desk.assert_unbroken()
    assert old.status == "save-vm"


@pytest.mark.usefixtures("disk")
def test_a_disk_that_another_process_has(desk: Desk) -> None:
    """The guest has not run, its RAM is what it was: the load can be repeated."""
    desk.saved()
    ram = digest(desk.ram)
    with desk.other_guest():
        holder = desk.running()
    new = desk.incoming()
    refused(new, "lock", load=desk.state)
    assert new.status == "inmigrate"
    new.quit()
    assert digest(desk.ram) == ram
    holder.quit()
    desk.incoming().load(desk.state)
    desk.assert_unbroken()


def test_a_disk_that_can_not_be_let_go_of(desk: Desk, disk: Path) -> None:
    """Another of its images is exported: a client may write to it."""
    image = desk.root / "exported"
    image.write_bytes(bytes(disk.stat().st_size))
    more = ["-blockdev", f"file,node-name=exported,filename={image}"]
    machine = desk.running(*more)
    machine.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(desk.root / "nbd")}})
    machine.execute("block-export-add", type="nbd", id="export", node_name="exported", writable=True)
    refused_save(desk, machine, "let go of")
    assert desk.state.stat().st_size == 0
    assert not desk.free(disk)
    machine.execute("block-export-del", id="export")
    machine.wait_for("BLOCK_EXPORT_DELETED")
    machine.save(desk.state)
    machine.quit()
    desk.incoming(*more).load(desk.state)
    desk.assert_unbroken()


def test_flash_that_the_old_qemu_has_written_since_the_new_one_started(desk: Desk) -> None:
    """Its drive has its contents: the new QEMU must neither lose them nor keep from its guest what it has read before."""
    flash, at = desk.root / "flash", 0x100
    flash.write_bytes(FIRMWARE.read_bytes())
    assert not any(flash.read_bytes()[at : at + 16]), "a place that the firmware does without"
    desk.more = ["-drive", f"if=pflash,format=raw,file={flash}"]
    old = desk.running()
    new = desk.incoming()
    with flash.open("r+b") as file:
        os.pwrite(file.fileno(), b"since the start", at)
    old.save(desk.state)
    new.load(desk.state)
    desk.assert_unbroken()
    assert flash.read_bytes()[at : at + 15] == b"since the start"
    seen = desk.root / "seen"
    new.execute("pmemsave", val=(1 << 32) - flash.stat().st_size, size=4096, filename=str(seen))
    assert seen.read_bytes() == flash.read_bytes()[:4096]


@pytest.mark.parametrize("more", [["-snapshot"], []], ids=["all", "one"])
def test_a_temporary_snapshot(desk: Desk, disk: Path, more: list[str]) -> None:
    """Its contents would end with the old QEMU."""
    drive = f"file={disk},format=raw,if=none,id=temporary"
    desk.more = [*more, "-drive", drive if more else f"{drive},snapshot=on", "-device", "virtio-blk-pci,drive=temporary"]
    machine = desk.running()
    refused_save(desk, machine, "Drive temporary", "snapshot=on")
    assert not desk.state.exists()
    machine.quit()
    desk.more = ["-drive", drive, "-device", "virtio-blk-pci,drive=temporary"]
    with desk.other_guest():
        desk.running().save(desk.state)


@pytest.mark.parametrize("command", ["blockdev-mirror", "block-stream"])
def test_a_block_job(desk: Desk, command: str) -> None:
    """Its writes would go on, to disks that another QEMU has, or would be lost."""
    base, top = desk.root / "base", desk.root / "top"
    base.write_bytes(b"base" * (1 << 20))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top], check=True)
    desk.more = [
        *("-blockdev", f"file,node-name=base,filename={base},read-only=on"),
        *("-blockdev", f"qcow2,node-name=disk,backing=base,file.driver=file,file.filename={top}"),
        *("-device", "virtio-blk-pci,drive=disk,id=vd"),
    ]
    machine = desk.running()
    more: dict[str, Any] = {}
    if command == "blockdev-mirror":
        copy = desk.root / "copy"
        copy.write_bytes(bytes(base.stat().st_size))
        machine.execute("blockdev-add", driver="file", node_name="copy", filename=str(copy))
        more = {"target": "copy", "sync": "full"}
    machine.execute(command, job_id="copying", device="disk", speed=1, **more)
    refused_save(desk, machine, "'copying'", "block-job-cancel")
    assert not desk.state.exists()
    machine.execute("block-job-cancel", device="copying", force=True)
    machine.wait_for("BLOCK_JOB_CANCELLED")
    machine.save(desk.state)
    machine.quit()
    desk.incoming().load(desk.state)
    desk.assert_unbroken()


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_that_can_not_be_made(desk: Desk) -> None:
    machine = desk.running()
    refused_save(desk, machine, "No such file", save=desk.root / "missing" / "state")
    refused_save(desk, machine, "directory", save=desk.root)
    fifo = desk.root / "fifo"
    os.mkfifo(fifo)
    refused_save(desk, machine, save=fifo)
    refused_save(desk, machine, "not an ordinary file", save="/dev/null")


@pytest.mark.parametrize("mode", [0o644, 0o4600], ids=oct)
def test_a_file_that_others_could_read(desk: Desk, mode: int) -> None:
    desk.state.write_bytes(b"old" * 100_000)
    desk.state.chmod(mode)
    machine = desk.running()
    machine.save(desk.state)
    assert desk.state.stat().st_mode & 0o7777 == 0o600
    machine.quit()
    desk.incoming().load(desk.state)
    desk.assert_unbroken()


def test_a_file_that_is_the_guests_ram_or_disk(desk: Desk, disk: Path) -> None:
    """A disk by its name, by another, and by its lock alone, as that of another QEMU."""
    backing, free = desk.root / "backing", desk.root / "free"
    for path in (backing, free):
        path.write_bytes(b"data" * (1 << 18))
    machine = desk.running("-blockdev", f"file,node-name=free,filename={free},locking=off,read-only=on")
    machine.execute("blockdev-add", driver="file", node_name="backing", filename=str(backing))
    link = desk.root / "link"
    link.hardlink_to(disk)
    for path, node in ((disk, "disk"), (link, "disk"), (backing, "backing"), (free, "free")):
        before, mode = digest(path), path.stat().st_mode
        refused_save(desk, machine, f"'{path}' is the file of block node {node}", save=path)
        assert (digest(path), path.stat().st_mode) == (before, mode)
    size, mode = desk.ram.stat().st_size, desk.ram.stat().st_mode
    refused_save(desk, machine, "is the file of memory region ram", save=desk.ram)
    assert (desk.ram.stat().st_size, desk.ram.stat().st_mode) == (size, mode)
    disk.unlink()
    refused_save(desk, machine, "is locked", save=link)
    assert link.stat().st_size == 1 << 20


@pytest.mark.parametrize("size", ["4k", "16k"], ids=["nothing-fits", "half-fits"])
def test_a_full_disk(desk: Desk, size: str) -> None:
    machine = desk.running()
    with small_file_system(desk.root / "small", size) as full:
        (full / "ballast").write_bytes(bytes(4096)) if size == "4k" else None
        refused_save(desk, machine, "No space left on device", save=full / "state")
        assert not (full / "state").exists() or not (full / "state").stat().st_size, "what is there could be loaded"
    machine.save(desk.state)
    machine.quit()
    desk.incoming().load(desk.state)
    desk.assert_unbroken()


FAULTY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int wanted(int fd, const char *act)
{
    char link[64], path[4096] = "";
    const char *only = getenv("FAULTY_ACT");

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return only && !strcmp(only, act) && readlink(link, path, sizeof path - 1) > 0 && strstr(path, "/state");
}

int close(int fd)
{
    int (*real)(int) = dlsym(RTLD_NEXT, "close"), bad = wanted(fd, "close"), result = real(fd);

    return bad ? (errno = EDQUOT, -1) : result;
}

int fsync(int fd)
{
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");

    return wanted(fd, "fsync") ? (errno = EIO, -1) : real(fd);
}
"""


@pytest.mark.parametrize("act", ["close", "fsync"])
def test_an_error_at_the_end_of_the_file(desk: Desk, act: str) -> None:
    """As a network file system may tell of a full disk."""
    source, library = desk.root / "faulty.c", desk.root / "faulty.so"
    source.write_text(FAULTY)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    desk.environment = {"LD_PRELOAD": str(library), "FAULTY_ACT": act}
    machine = desk.running()
    refused_save(desk, machine, {"close": "Could not close", "fsync": "Input/output error"}[act])
    assert desk.state.stat().st_size == 0, "what is there could be loaded"


def test_a_descriptor_in_the_place_of_a_path(desk: Desk) -> None:
    """Also for two saves, the second of which must not be appended to the first."""
    machine = desk.running()
    fd = os.open(desk.state, os.O_WRONLY | os.O_CREAT, 0o600)
    number = machine.execute("add-fd", fd=fd)["fdset-id"]
    machine.save(f"/dev/fdset/{number}")
    machine.execute("cont")
    desk.assert_unbroken()
    machine.save(f"/dev/fdset/{number}")
    os.close(fd)
    machine.quit()
    new = desk.incoming()
    fd = os.open(desk.state, os.O_RDONLY)
    number = new.execute("add-fd", fd=fd)["fdset-id"]
    os.close(fd)
    new.load(f"/dev/fdset/{number}")
    desk.assert_unbroken()


# -- loads that are refused -------------------------------------------------------------------------------------------


def not_loaded(desk: Desk, machine: Machine, path: Path, *words: str, touched: bool = True) -> None:
    """The guest has not run, and its RAM is what it was; a good state is loaded by a new QEMU, or by this one."""
    ram, last = digest(desk.ram), desk.last
    refused(machine, *words, load=path)
    assert machine.status == "inmigrate"
    assert digest(desk.ram) == ram
    assert desk.last == last
    if touched:
        machine.execute("cont")
        assert machine.status == "inmigrate", "half of its devices are another guest's"
        refused(machine, "new one", load=desk.state)
        machine.quit()
        machine = desk.incoming()
    machine.load(desk.state)
    desk.assert_unbroken()


@pytest.mark.parametrize("part", [0.001, 0.2, 0.5, 0.8, 1.0], ids=str)
def test_a_truncated_file(desk: Desk, part: float) -> None:
    data = desk.saved().read_bytes()
    short = desk.root / "short"
    short.write_bytes(data[: max(9, min(int(len(data) * part), len(data) - 1))])
    not_loaded(desk, desk.incoming(), short, "truncated")


@pytest.mark.parametrize("content", [b"", b"QEVM", b"QEVM\0\0\0\2" + bytes(100), b"#!/bin/sh\nexit\n"])
def test_a_file_that_is_no_vmstate(desk: Desk, content: bytes) -> None:
    desk.saved()
    wrong = desk.root / "wrong"
    wrong.write_bytes(content)
    not_loaded(desk, desk.incoming(), wrong, "is not a vmstate file", touched=False)


def test_no_file_and_a_directory(desk: Desk) -> None:
    desk.saved()
    machine = desk.incoming()
    refused(machine, "No such file", load=desk.root / "missing")
    not_loaded(desk, machine, desk.root, "not an ordinary file", touched=False)


@pytest.mark.parametrize("other", ["pc", "older"])
def test_the_state_of_another_machine(desk: Desk, other: str) -> None:
    """The other machine's guest has RAM of its own."""
    desk.saved()
    theirs = desk.root / "theirs"
    with desk.other_guest():
        one = desk.running(machine={"pc": "pc", "older": "pc-q35-7.1"}[other])
    one.save(theirs)
    one.quit()
    not_loaded(desk, desk.incoming(), theirs, "does not fit this VM")
    assert "Machine type received is" in (desk.root / "qemu.log").read_text()


def test_the_state_of_fewer_devices(desk: Desk) -> None:
    desk.saved("-device", "virtio-rng-pci")
    machine = desk.incoming()
    refused(machine, "does not fit this VM", load=desk.state)
    machine.quit()
    desk.incoming("-device", "virtio-rng-pci").load(desk.state)
    desk.assert_unbroken()


def test_the_state_of_a_guest_with_more_ram(desk: Desk) -> None:
    """It would go on, and miss a half of its memory once it looks there."""
    old = desk.running(size="32M")
    old.save(desk.state)
    old.quit()
    last = desk.last
    small = desk.start("-incoming", "defer", size="16M")
    refused(small, "memory region ram of 33554432 bytes", "another size", load=desk.state)
    assert small.status == "inmigrate"
    assert desk.last == last
    small.quit()
    desk.start("-incoming", "defer", size="32M").load(desk.state)
    desk.assert_unbroken()


def test_the_state_of_a_guest_with_another_memory(desk: Desk) -> None:
    more = ["-object", f"memory-backend-file,id=more,share=on,mem-path={desk.ram}-more,size=16M"]
    more += ["-m", "16M,slots=1,maxmem=1G", "-device", "pc-dimm,memdev=more"]
    desk.saved(*more)
    lacking = desk.incoming("-m", "16M,slots=1,maxmem=1G")
    refused(lacking, "memory region more of 16777216 bytes", "none of that name", load=desk.state)
    lacking.quit()
    desk.incoming(*more).load(desk.state)
    desk.assert_unbroken()


def test_a_migration_that_is_given_the_file(desk: Desk) -> None:
    """It would run the guest without its ROMs, and that would be dead at its next reset."""
    desk.saved()
    other = desk.incoming()
    with contextlib.suppress(ConnectionResetError):  # that is how QEMU ends if it can't be loaded
        other.execute("migrate-incoming", uri=f"exec:cat {desk.state}")
    assert other.process.wait(PATIENCE_S) == 1
    assert re.search(r"Unknown (savevm )?section or instance 'cpr-save'", other.log.read_text())  # 10.2 says less
    desk.incoming().load(desk.state)
    desk.assert_unbroken()


def test_a_migration_stream_with_ram(desk: Desk) -> None:
    """Its RAM is another guest's: none of it may be written."""
    with desk.other_guest():
        other = desk.running()
    stream = desk.root / "stream"
    other.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    other.execute("migrate", uri=f"exec:cat >{stream}")
    until(lambda: other.execute("query-migrate").get("status") == "completed", "it has migrated")
    other.quit()
    until(lambda: stream.stat().st_size > 1 << 20, "the stream is whole")
    desk.saved()
    not_loaded(desk, desk.incoming(), stream, "of a migration")


# -- twice, and at the wrong time -------------------------------------------------------------------------------------


def test_two_saves(desk: Desk, disk: Path) -> None:
    """The second, of a guest that stands saved, keeps what the guest was before the first."""
    old = desk.running()
    old.save(desk.root / "first")
    old.save(desk.state)
    assert old.status == "save-vm"
    refused(old, "directory", save=desk.root)
    assert old.status == "save-vm"
    assert desk.free(disk)
    old.quit()
    new = desk.incoming()
    new.load(desk.state)
    assert new.status == "running"
    desk.assert_unbroken()


def test_two_saves_of_a_paused_guest(desk: Desk, disk: Path) -> None:
    old = desk.running()
    old.execute("stop")
    old.save(desk.root / "first")
    old.save(desk.state)
    assert desk.free(disk)
    old.quit()
    new = desk.incoming()
    new.load(desk.state)
    assert new.status == "paused"
    new.execute("cont")
    desk.assert_unbroken()


def test_two_loads(desk: Desk) -> None:
    desk.saved()
    new = desk.incoming()
    new.load(desk.state)
    refused(new, "running VM", load=desk.state)
    desk.assert_unbroken()
    new.execute("stop")
    refused(new, "needs a new QEMU", load=desk.state)
    new.execute("cont")
    desk.assert_unbroken()


def test_a_load_of_a_running_vm(desk: Desk) -> None:
    other = desk.running()
    other.save(desk.state)
    other.execute("cont")
    refused(other, "cpr-load called for a running VM", load=desk.state)
    desk.assert_unbroken()


def test_a_save_while_a_migration_runs(desk: Desk) -> None:
    machine = desk.running()
    machine.execute("migrate-set-parameters", max_bandwidth=4096)
    machine.execute("migrate", uri="exec:cat >/dev/null")
    until(lambda: machine.execute("query-migrate").get("status") == "active", "it migrates")
    refused_save(desk, machine, "migration process in progress")
    machine.execute("migrate_cancel")
    until(lambda: machine.execute("query-migrate").get("status") == "cancelled", "it does not any more")
    machine.save(desk.state)
    refusal = "while its state is saved"
    with pytest.raises(RefusedError, match=refusal):
        machine.execute("migrate", uri="exec:cat >/dev/null")
    machine.quit()
    desk.incoming().load(desk.state)
    desk.assert_unbroken()


def test_a_save_before_the_load(desk: Desk) -> None:
    desk.saved()
    machine = desk.incoming()
    refused(machine, "waiting for an incoming migration", save=desk.root / "other")
    machine.load(desk.state)
    desk.assert_unbroken()


def test_a_load_by_a_qemu_that_was_started_without_incoming(desk: Desk) -> None:
    """Its start has written to the guest's RAM: a kernel that belongs there, as this guest's."""
    desk.saved()
    ram = digest(desk.ram)
    machine = desk.start("-S")
    assert digest(desk.ram) != ram
    refused(machine, "-incoming defer", load=desk.state)
    assert machine.status == "prelaunch"


# -- what can't be saved ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "word"),
    [
        (f"memory-backend-file,id=ram,share=off,mem-path={{ram}},size={SIZE}", "private"),
        (f"memory-backend-ram,id=ram,share=on,size={SIZE}", "no name outside QEMU"),
        (f"memory-backend-memfd,id=ram,share=on,size={SIZE}", "no name outside QEMU"),
        (f"memory-backend-file,id=ram,share=on,mem-path={{shm}},size={SIZE}", "unlinked"),
        (f"memory-backend-file,id=ram,share=on,mem-path=/dev/zero,size={SIZE}", "neither an ordinary file"),
        (f"memory-backend-file,id=ram,share=on,mem-path={{ram}},size={SIZE},discard-data=on", "discard-data"),
    ],
)
def test_volatile_ram(desk: Desk, backend: str, word: str) -> None:
    machine = desk.running(backend=backend.format(ram=desk.ram, shm=desk.ram.parent))
    refused_save(desk, machine, "is volatile", word)
    assert not desk.state.exists()


def test_a_file_that_is_unlinked_later(desk: Desk) -> None:
    machine = desk.running()
    desk.ram.unlink()
    refused_save(desk, machine, "is volatile", "unlinked")


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (["-object", "memory-backend-memfd,id=extra,size=1M,share=on"], "extra"),
        (["-vga", "std"], "vga.vram"),
    ],
    ids=["extra", "vga"],
)
def test_volatile_memory_beside_its_ram(desk: Desk, more: list[str], name: str) -> None:
    refused_save(desk, desk.running(*more), f"{name} is volatile")


def test_a_load_into_volatile_ram(desk: Desk) -> None:
    desk.saved()
    machine = desk.start("-incoming", "defer", backend=f"memory-backend-file,id=ram,mem-path={desk.ram},size={SIZE}")
    refused(machine, "is volatile", load=desk.state)
    machine.quit()
    desk.incoming().load(desk.state)
    desk.assert_unbroken()


def test_colo(desk: Desk) -> None:
    machine = desk.running()
    wanted = [{"capability": name, "state": True} for name in ("return-path", "x-colo")]
    machine.execute("migrate-set-capabilities", capabilities=wanted)
    refused_save(desk, machine, "x-colo")


def test_record_and_replay(desk: Desk) -> None:
    machine = desk.running("-icount", f"shift=auto,rr=record,rrfile={desk.root}/replay")
    refused(machine, "replay", save=desk.state)
    assert machine.status == "running"


def test_a_migration_blocker(desk: Desk) -> None:
    shared = f"memory-backend-file,id=shared,share=on,mem-path={desk.ram}-shared,size=1M"
    machine = desk.running("-object", shared, "-device", "ivshmem-plain,memdev=shared")
    refused_save(desk, machine, "peer mode")


def test_an_unknown_mode(desk: Desk) -> None:
    machine = desk.running()
    with pytest.raises(RefusedError, match="restart"):
        machine.save(desk.state, "restart")
    assert machine.status == "running"


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_the_whole_sequence_on_the_human_monitor(desk: Desk) -> None:
    """As docs/dialects.md has it, but for the kexec, which is in the host VM."""
    machine = desk.running()
    assert machine.hmp(f"cpr-save {desk.state} reboot") == ""
    assert "save-vm" in machine.hmp("info status")
    machine.quit()
    machine = desk.incoming()
    assert "No such file" in machine.hmp(f"cpr-load {desk.root}/missing")
    assert machine.hmp(f"cpr-load {desk.state}") == ""
    desk.assert_unbroken()
    assert "restart" in machine.hmp(f"cpr-save {desk.state} restart")
    desk.assert_unbroken()
