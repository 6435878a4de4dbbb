# SPDX-License-Identifier: GPL-2.0-or-later
"""What a live QEMU has, against what was recorded: a guest goes on with its own disks and devices, or is not saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.lab import Guest, Lab, QmpRefused, refused, until, without_capital

ROOT_PORT = ("-device", "pcie-root-port,id=rp0,chassis=1,slot=1")


def image(path: Path, kind: str = "qcow2") -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, "1M"], check=True)
    return path


def with_disk(lab: Lab, path: Path, kind: str = "qcow2", *more: str, drive: str = "") -> Guest:
    """A guest with one disk, ``d0``, at a controller that the tiny guest does not touch."""
    file = f"file={path},format={kind},if=none,id=d0{drive}"
    return lab.running("web1", "-drive", file, "-device", "ahci,id=a0", "-device", "ide-hd,drive=d0,bus=a0.0", *more)


def io(guest: Guest, command: str, disk: str = "d0") -> None:
    """Of the guest, as its QEMU does it; what goes wrong stands in the VM's log alone."""
    guest.admin("human-monitor-command", **{"command-line": f'qemu-io {disk} "{command}"'})


def blocks(guest: Guest) -> list[dict[str, Any]]:
    """The errors of its check."""
    return [found for found in guest.call("Check") if found["severity"] == "error"]


def peripherals(guest: Guest) -> list[str]:
    return [one["name"] for one in guest.admin("qom-list", path="/machine/peripheral")]


def assert_refused(guest: Guest, *words: str) -> None:
    """Check, save and refresh name the cause, and the guest goes on."""
    assert_told(guest, *words)
    guest.assert_unbroken()
    assert guest.state == "running"


def assert_told(guest: Guest, *words: str) -> None:
    found = blocks(guest)
    assert [one["code"] for one in found] == ["blocked"] * len(found), found
    assert found, "check found nothing"
    for member in ("CprSave", "Refresh"):
        refused(guest, "Blocked", *words, member=member)
    for word in words:
        assert any(word in without_capital(one["what"]) for one in found), found


def assert_goes_on(guest: Guest) -> None:
    """Saved and loaded, it is the same guest in another QEMU."""
    assert blocks(guest) == []
    before = guest.pid
    guest.save()
    guest.load()
    guest.assert_unbroken()
    assert guest.pid != before


def unplug(guest: Guest, device: str) -> None:
    """The tiny guest does not answer a request of PCI; a reset lets go of what was asked for."""
    guest.admin("device_del", id=device)
    if device in peripherals(guest):
        guest.admin("system_reset")
    until(lambda: device not in peripherals(guest), f"{device} is unplugged")


def plug(guest: Guest, **device: Any) -> None:
    """Its disk is free a moment after the device that had it has gone."""

    def plugged() -> bool:
        try:
            guest.admin("device_add", **device)
        except QmpRefused as error:
            assert "ermission" in str(error)
            return False
        return True

    until(plugged, f"{device['id']} is plugged in")


def test_what_nobody_changed_goes_on(each_lab: Lab) -> None:
    guest = with_disk(each_lab, image(each_lab.root / "disk.qcow2"), "qcow2", *ROOT_PORT)
    assert_goes_on(guest)
    assert_goes_on(guest)


def snapshot(guest: Guest, overlay: Path) -> None:
    guest.admin("blockdev-snapshot-sync", device="d0", **{"snapshot-file": str(overlay), "format": "qcow2"})


def assert_carried(guest: Guest, *contents: str) -> None:
    """Check warns of it, and the next QEMU has the same graph and the same contents, also after another round."""
    before = graph(guest)
    for _ in range(2):
        assert blocks(guest) == []
        guest.save()
        guest.load()
        guest.assert_unbroken()
        assert graph(guest) == before
        for content in contents:
            io(guest, f"read -P {content} 0 4096")
        assert "Pattern verification failed" not in guest_log(guest)


def guest_log(guest: Guest) -> str:
    """Of the QEMU that it has now."""
    return (guest.lab.root / f"var/log/cpr-agent/{guest.name}.log").read_text()


def graph(guest: Guest) -> list[tuple[str, str]]:
    nodes = guest.admin("query-named-block-nodes", flat=True)
    return sorted((node["drv"], node["file"]) for node in nodes if node["drv"] == "file")


def warned(guest: Guest) -> list[str]:
    return [without_capital(found["what"]) for found in guest.call("Check") if found["code"] == "carried-over"]


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_an_external_snapshot_goes_along(each_lab: Lab, kind: str) -> None:
    path, overlays = image(each_lab.root / "disk", kind), [each_lab.root / "one.qcow2", each_lab.root / "two.qcow2"]
    guest = with_disk(each_lab, path, kind)
    io(guest, "write -P 0x11 0 4096")
    snapshot(guest, overlays[0])
    io(guest, "write -P 0x22 0 4096")
    assert [str(overlays[0]) in what and str(path) in what for what in warned(guest)] == [True]
    assert_carried(guest, "0x22")
    assert warned(guest) == []
    snapshot(guest, overlays[1])
    io(guest, "write -P 0x33 0 4096")
    assert_carried(guest, "0x33")
    guest.call("Refresh", "a{sv}", {})
    assert_carried(guest, "0x33")
    io(guest, "read -P 0x22 0 4096")
    assert "Pattern verification failed" in guest_log(guest), "a wrong content would not be seen"


def test_a_snapshot_of_a_disk_whose_argument_says_more_is_told(each_lab: Lab) -> None:
    guest = with_disk(each_lab, image(each_lab.root / "disk.qcow2"), drive=",copy-on-read=on")
    overlay = each_lab.root / "snap.qcow2"
    snapshot(guest, overlay)
    assert_refused(guest, "disk d0", str(overlay), "disk.qcow2")


def test_an_external_snapshot_that_was_committed_is_no_obstacle(each_lab: Lab) -> None:
    guest = with_disk(each_lab, image(each_lab.root / "disk.qcow2"))
    overlay = each_lab.root / "snap.qcow2"
    guest.admin("blockdev-snapshot-sync", device="d0", **{"snapshot-file": str(overlay), "format": "qcow2"})
    guest.admin("block-commit", device="d0", **{"job-id": "commit"})
    until(lambda: guest.admin("query-jobs")[0]["status"] == "ready", "the commit is ready")
    guest.admin("job-complete", id="commit")
    until(lambda: guest.admin("query-jobs") == [], "the commit has ended")
    assert_goes_on(guest)


def test_a_finished_mirror_goes_along(each_lab: Lab) -> None:
    guest = with_disk(each_lab, image(each_lab.root / "disk.raw", "raw"), "raw")
    copy = each_lab.root / "copy.raw"
    guest.admin("drive-mirror", device="d0", target=str(copy), sync="full", **{"job-id": "mirror", "format": "raw"})
    until(lambda: guest.admin("query-jobs")[0]["status"] == "ready", "the mirror is ready")
    guest.admin("job-complete", id="mirror")
    until(lambda: guest.admin("query-jobs") == [], "the mirror has ended")
    io(guest, "write -P 0x44 0 4096")
    assert [str(copy) in what for what in warned(guest)] == [True]
    assert_carried(guest, "0x44")


def with_offset(_guest: Guest, path: Path) -> dict[str, Any]:
    path.write_bytes(bytes(2 << 20))
    return {"driver": "raw", "offset": 1 << 20, "size": 1 << 20}


def encrypted(guest: Guest, path: Path) -> dict[str, Any]:
    secret = ("--object", "secret,id=s0,data=abc")
    options = ("-o", "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *secret, *options, path, "1M"], check=True)
    guest.admin("object-add", id="s0", data="abc", **{"qom-type": "secret"})
    return {"driver": "qcow2", "encrypt": {"format": "luks", "key-secret": "s0"}}


@pytest.mark.parametrize("target", [with_offset, encrypted])
def test_a_mirror_to_an_image_that_needs_more_than_its_format_is_told(each_lab: Lab, target: Any) -> None:
    """An argument that named path and format alone would open other contents, or none."""
    guest = with_disk(each_lab, image(each_lab.root / "disk.raw", "raw"), "raw")
    copy = each_lab.root / "copy"
    options = target(guest, copy)
    guest.admin("blockdev-add", **options, **{"node-name": "copy", "file": {"driver": "file", "filename": str(copy)}})
    guest.admin("blockdev-mirror", device="d0", target="copy", sync="full", **{"job-id": "mirror"})
    until(lambda: guest.admin("query-jobs")[0]["status"] == "ready", "the mirror is ready")
    assert_refused(guest, "block or snapshot job mirror is ready: job-complete")
    guest.admin("job-complete", id="mirror")
    until(lambda: guest.admin("query-jobs") == [], "the mirror has ended")
    assert_refused(guest, "disk d0", str(copy))


def test_a_job_that_ended_and_was_not_dismissed_is_told(each_lab: Lab) -> None:
    guest = with_disk(each_lab, image(each_lab.root / "disk.qcow2"))
    copy = {"target": str(each_lab.root / "copy"), "sync": "full", "format": "qcow2"}
    guest.admin("drive-backup", device="d0", **copy, **{"job-id": "backup", "auto-dismiss": False})
    until(lambda: guest.admin("query-jobs")[0]["status"] == "concluded", "the backup has ended")
    assert_refused(guest, "block or snapshot job backup is concluded: job-dismiss")
    guest.admin("job-dismiss", id="backup")
    assert_goes_on(guest)


def test_another_part_of_the_same_image_is_told(each_lab: Lab) -> None:
    path = each_lab.root / "disk.raw"
    path.write_bytes(bytes(2 << 20))
    node = {"driver": "raw", "node-name": "q0", "size": 1 << 20, "file": {"driver": "file", "filename": str(path)}}
    guest = each_lab.running("web1", "-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=q0,id=disk0")
    guest.admin("blockdev-reopen", options=[{**node, "offset": 1 << 20}])
    assert_refused(guest, "disk disk0", str(path), '"offset": 1048576')


def replace(path: Path) -> None:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.rename(path)


def move(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))


def move_and_replace(path: Path) -> None:
    old = path.with_suffix(".old")
    path.rename(old)
    path.write_bytes(old.read_bytes())


@pytest.mark.parametrize("change", [replace, Path.unlink, move, move_and_replace])
def test_an_image_that_is_not_at_its_path_any_more_is_told(each_lab: Lab, change: Any) -> None:
    path = image(each_lab.root / "disk.raw", "raw")
    guest = with_disk(each_lab, path, "raw")
    change(path)
    assert_refused(guest, "disk d0", str(path))


@pytest.mark.parametrize("change", [Path.unlink, move, move_and_replace])
def test_memory_that_is_not_at_its_path_any_more_is_told(each_lab: Lab, change: Any) -> None:
    guest = each_lab.running("web1")
    path = Path(guest.properties["Memory"]["device"])
    kept = path.with_suffix(".kept")
    os.link(path, kept)
    change(path)
    assert_refused(guest, str(path), "bring back under this name what its QEMU has open")
    kept.replace(path)
    assert_goes_on(guest)


@pytest.mark.parametrize("size", [2 << 20, 512 << 10])
def test_a_raw_image_that_was_resized_from_outside_is_told(each_lab: Lab, size: int) -> None:
    """By truncate, qemu-img resize -U, lvextend: QEMU has the old size until block_resize, and the next one would not."""
    path = image(each_lab.root / "disk.raw", "raw")
    guest = with_disk(each_lab, path, "raw", drive=",throttling.iops-total=1000")
    os.truncate(path, size)
    assert_refused(guest, "disk d0", str(path), "block_resize")
    guest.admin("block_resize", device="d0", size=size)
    assert_goes_on(guest)
    os.truncate(path, 1 << 20)
    assert_refused(guest, "disk d0", str(path))
    os.truncate(path, size)
    assert_goes_on(guest)


def test_a_medium_that_was_written_anew_in_its_place_is_told(each_lab: Lab) -> None:
    path = image(each_lab.root / "one.iso", "raw")
    drive = f"file={path},format=raw,media=cdrom,if=none,id=cd,readonly=on"
    guest = each_lab.running("web1", "-drive", drive, "-device", "ide-cd,drive=cd,id=cd0,bus=ide.0")
    path.write_bytes(bytes(3 << 20))
    assert_refused(guest, "disk cd ", str(path), "blockdev-change-medium")
    guest.admin("blockdev-change-medium", id="cd0", filename=str(path), format="raw")
    assert_goes_on(guest)


def test_an_image_whose_size_is_no_whole_number_of_sectors_is_no_obstacle(each_lab: Lab) -> None:
    path = image(each_lab.root / "disk.raw", "raw")
    os.truncate(path, (1 << 20) - 100)
    assert_goes_on(with_disk(each_lab, path, "raw"))


def test_an_image_that_came_back_to_its_path_is_no_obstacle(each_lab: Lab) -> None:
    path = image(each_lab.root / "disk.raw", "raw")
    guest = with_disk(each_lab, path, "raw")
    move(path)
    assert_refused(guest, "disk d0")
    path.with_suffix(".moved").rename(path)
    assert_goes_on(guest)


def test_a_link_that_leads_to_another_image_is_told(each_lab: Lab) -> None:
    one, other = image(each_lab.root / "one.raw", "raw"), image(each_lab.root / "other.raw", "raw")
    link = each_lab.root / "current.raw"
    link.symlink_to(one)
    guest = with_disk(each_lab, link, "raw")
    assert_goes_on(guest)
    link.unlink()
    link.symlink_to(other)
    assert_refused(guest, "disk d0", str(link))


def test_a_backing_image_that_was_replaced_is_told(each_lab: Lab) -> None:
    base = image(each_lab.root / "base.raw", "raw")
    top = each_lab.root / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top], check=True)
    guest = with_disk(each_lab, top)
    assert_goes_on(guest)
    replace(base)
    assert_refused(guest, "disk d0", str(base))


def test_a_chain_in_a_directory_that_is_a_link_is_no_obstacle(each_lab: Lab) -> None:
    """QEMU finds the image below by the name of the one above, and the kernel tells of it without the link."""
    pool, link = each_lab.root / "pool", each_lab.root / "images"
    pool.mkdir()
    link.symlink_to(pool)
    base = image(pool / "base.raw", "raw")
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", pool / "top.qcow2"], check=True
    )
    guest = with_disk(each_lab, link / "top.qcow2")
    assert_goes_on(guest)
    assert_goes_on(guest)
    replace(base)
    assert_refused(guest, "disk d0", "base.raw")


def test_a_disk_whose_locks_stay_with_the_old_qemu_goes_on_at_once(each_lab: Lab) -> None:
    """QEMU keeps the locks below a quorum when its guest has been saved."""
    children = [
        f"children.{number}.driver=raw,children.{number}.file.driver=file,children.{number}.file.filename={path}"
        for number, path in enumerate(image(each_lab.root / f"{one}.raw", "raw") for one in "abc")
    ]
    disk = f"driver=quorum,node-name=q0,vote-threshold=2,{','.join(children)}"
    guest = each_lab.running("web1", "-blockdev", disk, "-device", "virtio-blk-pci,drive=q0")
    before = guest.pid
    guest.call("Refresh", "a{sv}", {})
    assert guest.state == "running"
    assert guest.pid != before
    guest.assert_unbroken()


def test_writes_to_a_temporary_file_are_told(each_lab: Lab) -> None:
    guest = with_disk(each_lab, image(each_lab.root / "disk.qcow2"), drive=",snapshot=on")
    assert_refused(guest, "disk d0", "/vl.")


def test_a_medium_that_was_changed_goes_along(each_lab: Lab) -> None:
    one, other = image(each_lab.root / "one.iso", "raw"), image(each_lab.root / "other.iso", "raw")
    drive = f"file={one},format=raw,media=cdrom,if=none,id=cd,readonly=on"
    guest = each_lab.running("web1", "-drive", drive, "-device", "ide-cd,drive=cd,id=cd0,bus=ide.0")
    assert_goes_on(guest)
    guest.admin("blockdev-change-medium", id="cd0", filename=str(other), format="raw")
    assert [str(other) in what for what in warned(guest)] == [True]
    assert_carried(guest)
    assert [file for _, file in graph(guest)] == [str(other)]
    guest.admin("eject", id="cd0", force=True)
    assert_refused(guest, "disk cd ", str(other), "not there")


# -- firmware -------------------------------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    path.unlink()


def larger(path: Path) -> None:
    """As a package's upgrade does it, which renames a new file into place."""
    new = path.with_suffix(".new")
    new.write_bytes(bytes(2 * path.stat().st_size))
    new.rename(path)


def of_same_size(path: Path) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(b"\xf4" * path.stat().st_size)
    new.rename(path)


UPGRADES = pytest.mark.parametrize("upgrade", [remove, larger, of_same_size])


@UPGRADES
def test_flash_that_was_upgraded_under_its_guest_is_no_obstacle(each_lab: Lab, upgrade: Any) -> None:
    """A guest without a kernel of its own: it runs what is in the flash, which jumps to itself."""
    code, variables = each_lab.root / "CODE.fd", each_lab.root / "VARS.fd"
    code.write_bytes(b"\xeb\xfe" * (1 << 16))
    variables.write_bytes(bytes(1 << 16))
    guest = each_lab.guest("web1")
    flash = [f"if=pflash,unit=0,format=raw,readonly=on,file={code}", f"if=pflash,unit=1,format=raw,file={variables}"]
    guest.definition["vm"]["arguments"] = [
        *("-machine", "q35,accel=tcg", "-nodefaults"),
        *(word for drive in flash for word in ("-drive", drive)),
    ]
    each_lab.define(guest)
    guest.start()
    was = code.read_bytes()
    upgrade(code)
    for _ in range(2):
        assert blocks(guest) == []
        guest.save()
        guest.load()
        assert guest.state == "running"
    assert_flash(guest, was)


def assert_flash(guest: Guest, content: bytes) -> None:
    """The file that its QEMU has open as flash."""
    opened = [path for path in Path(f"/proc/{guest.pid}/fd").iterdir() if path.is_file()]
    found = [path.read_bytes() for path in opened if path.stat().st_size == len(content)]
    assert content in found


@UPGRADES
def test_roms_that_were_upgraded_under_their_guest_are_no_obstacle(each_lab: Lab, upgrade: Any) -> None:
    """QEMU finds the BIOS and the ROM that starts the guest by their names."""
    roms = each_lab.root / "roms"
    roms.mkdir()
    for place in ("seabios", "qemu"):
        for rom in Path("/usr/share", place).glob("*.bin"):
            shutil.copy(rom, roms)
    guest = each_lab.running("web1", "-L", str(roms))
    for name in ("bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin"):
        upgrade(roms / name)
    assert_goes_on(guest)
    assert_goes_on(guest)


@UPGRADES
def test_a_kernel_that_was_upgraded_under_its_guest_is_no_obstacle(each_lab: Lab, upgrade: Any) -> None:
    """Of a guest that boots one of the host's, with data for its firmware from a file."""
    kernel, data = each_lab.root / "vmlinuz", each_lab.root / "data"
    shutil.copy(each_lab.tiny, kernel)
    data.write_text("data")
    guest = each_lab.guest("web1", "-fw_cfg", f"name=opt/org.example/data,file={data}")
    arguments = guest.definition["vm"]["arguments"]
    arguments[arguments.index("-kernel") + 1] = str(kernel)
    each_lab.define(guest)
    guest.start()
    guest.until_counts()
    upgrade(kernel)
    upgrade(data)
    assert_goes_on(guest)
    assert_goes_on(guest)


def test_a_file_without_which_no_qemu_starts_is_told(each_lab: Lab) -> None:
    """No copy is made of a secret."""
    secret = each_lab.root / "secret"
    secret.write_text("abc")
    guest = each_lab.running("web1", "-object", f"secret,id=s0,file={secret}")
    assert_goes_on(guest)
    secret.unlink()
    assert_refused(guest, str(secret), "bring it back")


def test_firmware_whose_copy_was_lost_too_holds_the_guest(each_lab: Lab) -> None:
    bios = each_lab.root / "bios.bin"
    shutil.copy("/usr/share/seabios/bios-256k.bin", bios)
    guest = each_lab.running("web1", "-bios", str(bios))
    guest.save()
    guest.call("Stop", "s", "hard")
    shutil.rmtree(each_lab.root / "var/cache/cpr-agent/firmware")
    of_same_size(bios)
    refused(guest, "MachineChanged", str(bios), "SHA-256")
    assert guest.state == "held"


# -- devices --------------------------------------------------------------------------------------------------------------


def test_a_hotplugged_disk_is_told_until_it_is_unplugged(each_lab: Lab) -> None:
    extra = image(each_lab.root / "extra.raw", "raw")
    guest = each_lab.running("web1", *ROOT_PORT)
    guest.admin("blockdev-add", driver="raw", **{"node-name": "extra", "file": {"driver": "file", "filename": str(extra)}})
    guest.admin("device_add", driver="virtio-blk-pci", drive="extra", id="extra0", bus="rp0")
    assert_refused(guest, "disk extra0", str(extra), "device peripheral/extra0")


def test_an_unplugged_device_is_told(each_lab: Lab) -> None:
    guest = each_lab.running("web1", "-device", "usb-ehci,id=usb", "-device", "usb-tablet,id=tablet,bus=usb.0")
    guest.admin("device_del", id="tablet")
    until(lambda: "tablet" not in peripherals(guest), "it is unplugged")
    assert_refused(guest, "device peripheral/tablet", "usb-tablet")


def test_a_device_that_came_back_as_another_one_is_told(each_lab: Lab) -> None:
    """Its guest would have the disk with the serial number of the command line again."""
    path = image(each_lab.root / "disk.raw", "raw")
    node = ("-blockdev", f"driver=raw,node-name=q0,file.driver=file,file.filename={path}")
    disk = {"driver": "scsi-hd", "id": "disk0", "drive": "q0", "bus": "s0.0"}
    words = ",".join(f"{key}={word}" for key, word in disk.items()).removeprefix("driver=")
    guest = each_lab.running("web1", *node, "-device", "virtio-scsi-pci,id=s0", "-device", f"{words},serial=one")
    for serial in ("one", "two"):
        assert_goes_on(guest)
        guest.admin("device_del", id="disk0")
        until(lambda: guest.admin("query-block") == [], "it is unplugged, and has let go of its disk")
        guest.admin("device_add", **disk, serial=serial)
    assert_refused(guest, "device peripheral/disk0", "serial one", "serial two")


def test_a_port_that_came_back_at_another_place_is_told(each_lab: Lab) -> None:
    """As a network card that came back at another network: its guest would be at the first one again."""
    places = ("-chardev", "null,id=c0", "-chardev", "null,id=c1", "-device", "virtio-serial-pci,id=vs0")
    port = {"driver": "virtserialport", "id": "port0", "bus": "vs0.0", "name": "org.example.port"}
    words = ",".join(f"{key}={word}" for key, word in port.items()).removeprefix("driver=")
    guest = each_lab.running("web1", *places, "-device", f"{words},nr=1,chardev=c0")
    assert_goes_on(guest)
    guest.admin("device_del", id="port0")
    until(lambda: "port0" not in peripherals(guest), "it is unplugged")
    guest.admin("device_add", **port, nr=1, chardev="c1")
    until(lambda: blocks(guest), "QEMU has told that the first one is gone, which it does some 50 ms late")
    assert_refused(guest, "device peripheral/port0", "chardev c0", "chardev c1")


def test_a_hotplugged_cpu_is_told(each_lab: Lab) -> None:
    guest = each_lab.running("web1", "-smp", "1,maxcpus=2")
    slot = next(cpu for cpu in guest.admin("query-hotpluggable-cpus") if "qom-path" not in cpu)
    guest.admin("device_add", driver=slot["type"], id="cpu1", **slot["props"])
    assert_refused(guest, "CPU at", "device peripheral/cpu1")


def test_another_disk_in_the_new_qemu_holds_the_guest(each_lab: Lab) -> None:
    """The link is moved after the save: what the command line names is not what the guest had."""
    one, other = image(each_lab.root / "one.raw", "raw"), image(each_lab.root / "other.raw", "raw")
    link = each_lab.root / "current.raw"
    link.symlink_to(one)
    guest = with_disk(each_lab, link, "raw")
    guest.save()
    guest.call("Stop", "s", "hard")
    link.unlink()
    link.symlink_to(other)
    refused(guest, "DiskChanged", "disk d0", str(one), str(other))
    assert guest.state == "held"
    assert guest.pid == 0


def test_a_loop_device_with_another_file_of_its_name_holds_the_guest(each_lab: Lab, request: pytest.FixtureRequest) -> None:
    """A restore has put a file in the place of the one that the guest had."""
    path = image(each_lab.root / "disk.raw", "raw")
    attached = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True, check=False)
    if attached.returncode:
        pytest.skip(f"no loop devices: {attached.stderr}")
    device = attached.stdout.strip()
    request.addfinalizer(lambda: subprocess.run(["losetup", "--detach", device], check=False))
    guest = with_disk(each_lab, Path(device), "raw")
    assert_goes_on(guest)
    guest.save()
    guest.call("Stop", "s", "hard")
    subprocess.run(["losetup", "--detach", device], check=True)
    replace(path)
    subprocess.run(["losetup", device, path], check=True)
    refused(guest, "DiskChanged", device, str(path))
    assert guest.state == "held"


def test_a_guest_of_an_agent_that_recorded_nothing_is_compared_with_its_command_line(each_lab: Lab) -> None:
    guest = with_disk(each_lab, image(each_lab.root / "disk.qcow2"))
    record = each_lab.run / "launched/web1.inventory"
    overlay = each_lab.root / "snap.qcow2"
    guest.admin("blockdev-snapshot-sync", device="d0", **{"snapshot-file": str(overlay), "format": "qcow2"})
    record.unlink()
    assert_refused(guest, "disk.qcow2", "its command line names")
    assert not record.exists()


def test_a_guest_of_an_agent_that_recorded_nothing_goes_on_as_it_is(each_lab: Lab) -> None:
    guest = with_disk(each_lab, image(each_lab.root / "disk.qcow2"))
    record = each_lab.run / "launched/web1.inventory"
    record.unlink()
    assert_goes_on(guest)
    assert record.exists()


def test_a_chain_of_the_command_line_is_no_obstacle_to_an_agent_that_recorded_nothing(each_lab: Lab) -> None:
    """As libvirt writes it: each image by an argument of its own."""
    base, top = image(each_lab.root / "base.raw", "raw"), each_lab.root / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top], check=True)
    nodes = [
        f"driver=file,node-name=f0,filename={base},read-only=on",
        "driver=raw,node-name=base,file=f0,read-only=on",
        f"driver=file,node-name=f1,filename={top}",
        "driver=qcow2,node-name=top,file=f1,backing=base",
    ]
    blockdevs = (word for node in nodes for word in ("-blockdev", node))
    guest = each_lab.running("web1", *blockdevs, "-device", "virtio-blk-pci,drive=top")
    record = each_lab.run / "launched/web1.inventory"
    record.unlink()
    assert_goes_on(guest)
    record.unlink()
    overlay = str(each_lab.root / "snap.qcow2")
    arguments = {"node-name": "top", "snapshot-file": overlay, "snapshot-node-name": "snap", "format": "qcow2"}
    guest.admin("blockdev-snapshot-sync", **arguments)
    assert_refused(guest, "top.qcow2", "its command line names")


@pytest.mark.parametrize(
    "other", [{"logical_block_size": 4096, "physical_block_size": 4096}, {"wwn": 1234}, {"product": "OTHER"}], ids=str
)
def test_a_disk_that_came_back_with_other_properties_is_told(each_lab: Lab, other: dict[str, Any]) -> None:
    """The loaded guest would have those of the command line: 512 bytes a sector where it had 4096."""
    path = image(each_lab.root / "disk.raw", "raw")
    node = f"driver=raw,node-name=q0,file.driver=file,file.filename={path}"
    disk = ("-device", "virtio-scsi-pci,id=s0", "-device", "scsi-hd,id=disk0,drive=q0,bus=s0.0")
    guest = each_lab.running("web1", "-blockdev", node, *disk)
    unplug(guest, "disk0")
    plug(guest, driver="scsi-hd", id="disk0", drive="q0", bus="s0.0", **other)
    assert_refused(guest, "device peripheral/disk0", *other)


CARD = {"id": "net0", "netdev": "n0", "mac": "52:54:00:00:00:09", "bus": "rp0"}


def with_card(lab: Lab) -> Guest:
    card = ",".join(["virtio-net-pci", *(f"{name}={value}" for name, value in CARD.items())])
    return lab.running("web1", "-netdev", "user,id=n0", *ROOT_PORT, "-device", card)


def test_a_network_card_that_came_back_with_more_queues_is_told(each_lab: Lab) -> None:
    """No QEMU could read its state, and the one that has the guest would have ended by then."""
    guest = with_card(each_lab)
    unplug(guest, "net0")
    guest.admin("device_add", driver="virtio-net-pci", **CARD, mq=True, vectors=7, rx_queue_size=512)
    assert_told(guest, "device peripheral/net0", "rx_queue_size 256")


def test_a_network_that_came_back_as_another_one_is_told(each_lab: Lab) -> None:
    """The loaded guest would be in the first network again, out of which it was taken."""
    guest = with_card(each_lab)
    unplug(guest, "net0")
    guest.admin("netdev_del", id="n0")
    guest.admin("netdev_add", type="user", id="n0", net="10.99.0.0/24", restrict=True)
    guest.admin("device_add", driver="virtio-net-pci", **CARD)
    assert_told(guest, "network n0", "net=10.99.0.0 restrict=on")


def test_a_usb_disk_that_came_back_at_another_port_is_told(each_lab: Lab) -> None:
    path = image(each_lab.root / "disk.raw", "raw")
    node = f"driver=raw,node-name=q0,file.driver=file,file.filename={path}"
    disk = ("-device", "qemu-xhci,id=x", "-device", "usb-storage,id=u0,drive=q0,bus=x.0,port=1")
    guest = each_lab.running("web1", "-blockdev", node, *disk)
    unplug(guest, "u0")
    plug(guest, driver="usb-storage", id="u0", drive="q0", bus="x.0", port="2")
    assert_refused(guest, "device peripheral/u0", "port 1")


def test_a_load_goes_on_with_the_logs_of_its_guest(each_lab: Lab) -> None:
    """QEMU empties a file that it does not append to."""
    log, console, other = (each_lab.root / name for name in ("serial.log", "console.log", "other.log"))
    devices = ("-chardev", f"file,id=x,path={log}", "-chardev", f"null,id=y,logfile={console}")
    ports = (
        "-device",
        "isa-serial,chardev=x,index=1",
        "-device",
        "isa-serial,chardev=y,index=2",
        "-serial",
        f"file:{other}",
    )
    guest = each_lab.running("web1", *devices, *ports)
    assert [one["what"] for one in guest.call("Check") if one["code"] == "emptied-log"] == [
        f"A load empties the file of -serial file:{other}."
    ]
    for path in (log, console):
        path.write_text("history\n" * 100)
    assert_goes_on(guest)
    assert_goes_on(guest)
    assert [path.read_text().count("history") for path in (log, console)] == [100, 100]
    guest.call("Refresh", "a{sv}", {})
    guest.assert_unbroken()
    assert [path.read_text().count("history") for path in (log, console)] == [100, 100]


# -- saved ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["image", "base", "memory", "state"])
def test_the_check_of_a_saved_guest_tells_what_a_load_would_refuse(each_lab: Lab, what: str) -> None:
    base, path = image(each_lab.root / "base.raw", "raw"), each_lab.root / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path], check=True)
    guest = with_disk(each_lab, path)
    guest.save()
    assert each_lab.cprctl("check", "web1").returncode == 0
    guest.call("Stop", "s", "hard")
    assert each_lab.cprctl("check", "web1").returncode == 0
    gone = {"image": path, "base": base, "memory": guest.ram, "state": guest.checkpoint / "vmstate"}[what]
    gone.rename(gone.with_name("moved"))
    found = each_lab.cprctl("check", "web1")
    assert (found.returncode, "A load would be refused" in found.stdout) == (4, True), found
    gone.with_name("moved").rename(gone)
    assert each_lab.cprctl("check", "web1").returncode == 0
    guest.load()
    guest.assert_unbroken()
