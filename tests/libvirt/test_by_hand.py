# SPDX-License-Identifier: GPL-2.0-or-later
"""Adopted domains in the hands of virsh; virt-manager and cockpit-machines do no more than that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cpr_agent.bus.client import CallError
from tests.lab import refused, until
from tests.libvirt.lab import SAVED, Domain, LibvirtLab

# ---- a domain that runs ----


def test_managed_save_and_start(each_lab: LibvirtLab) -> None:
    """They are libvirt's own; the image contains the RAM."""
    guest = each_lab.running_domain()
    guest.virsh("managedsave")
    guest.until_state("stopped")
    guest.ram.write_bytes(b"\xaa" * guest.ram.stat().st_size)
    guest.virsh("start")
    guest.assert_unbroken()
    guest.until_state("running")
    guest.save()
    guest.load()
    guest.assert_unbroken()


def test_save_and_restore(running: Domain) -> None:
    running.assert_whole_to_libvirt()
    running.save()
    running.load()
    running.assert_whole_to_libvirt()


def test_destroy(running: Domain) -> None:
    running.virsh("destroy")
    running.until_state("stopped")
    running.virsh("start")
    running.until_state("running")
    until(lambda: len(running.report.boots) == 2, "it boots anew")


def test_reset_and_reboot(running: Domain) -> None:
    """By the power button, which the tiny guest heeds; libvirt starts the same QEMU over."""
    pid = running.qemu_pid
    running.virsh("reset")
    until(lambda: len(running.report.boots) == 2, "it boots anew")
    running.virsh("reboot", "--mode", "acpi")
    until(lambda: len(running.report.boots) == 3, "and once more")
    running.until_state("running")
    assert running.qemu_pid == pid
    running.forget_console()
    running.save()
    running.load()
    running.assert_unbroken()


def test_suspend_and_resume(running: Domain) -> None:
    running.virsh("suspend")
    running.until_state("paused")
    running.virsh("resume")
    running.until_state("running")
    running.assert_unbroken()


def test_a_snapshot_with_memory_is_whole(running: Domain) -> None:
    """Before and after a save and a load of ours, external and internal."""
    for times in range(2):
        memory = running.lab.root / f"memory{times}"
        disk = ("--diskspec", "vda,snapshot=no")
        running.virsh(
            *("snapshot-create-as", f"s{times}", "--no-metadata"),
            *("--memspec", f"file={memory},snapshot=external", *disk),
        )
        assert memory.stat().st_size > 8 << 20, "the tiny guest's pattern, at least"
        running.until_state("running")
        running.save()
        running.load()
    running.virsh("snapshot-create-as", "inside")
    running.assert_unbroken()
    running.virsh("snapshot-revert", "inside")
    running.until_counts()
    running.until_state("running")
    assert len(running.report.boots) == 1


def test_migration_elsewhere_changes_nothing(running: Domain) -> None:
    running.refused("migrate", "test:///default")
    running.assert_unbroken()
    assert running.state == "running"


def test_undefined_while_it_runs(running: Domain) -> None:
    """It is a transient one from then on, and no other's memory."""
    running.virsh("undefine")
    running.until_counts()
    running.virsh("destroy")
    until(lambda: "web1" not in running.lab.cprctl("list").stdout, "it is gone")


# ---- one that is saved ----


def test_resume(saved: Domain) -> None:
    saved.virsh("resume")
    saved.until_state("running")
    saved.assert_unbroken()
    until(lambda: not saved.image().exists(), "its checkpoint is none any more")


def test_destroyed_and_started(saved: Domain) -> None:
    saved.virsh("destroy")
    assert saved.state == "saved"
    saved.virsh("start")
    saved.assert_unbroken()
    saved.assert_whole_to_libvirt()


def test_managed_save_of_a_saved_one(saved: Domain) -> None:
    """Its QEMU stands; libvirt ends it, whether it can save it once more or not. What was saved stays what it was."""
    with saved.untouched():
        saved.virsh("managedsave", check=False)
    assert saved.state == "saved"
    saved.virsh("destroy", check=False)
    saved.load()
    saved.assert_unbroken()


def test_started_paused(saved: Domain) -> None:
    """That is a load; the guest can't be loaded a second time."""
    saved.virsh("destroy")
    saved.virsh("start", "--paused")
    saved.until_state("paused")
    assert saved.libvirt_state == "paused"
    saved.virsh("resume")
    saved.assert_unbroken()
    saved.until_state("running")
    saved.virsh("destroy")
    saved.until_state("stopped")
    refused(saved, "NoCheckpoint")


def test_started_paused_and_never_resumed(saved: Domain) -> None:
    """It waits for whoever wanted that, in its QEMU, and can be saved again as it is."""
    saved.virsh("destroy")
    with saved.untouched():
        saved.virsh("start", "--paused")
        saved.until_state("paused")
    saved.save()
    saved.load()
    saved.until_state("paused")
    saved.virsh("resume")
    saved.assert_unbroken()


def test_force_boot(saved: Domain) -> None:
    """libvirt unlinks the image before it asks anybody."""
    saved.virsh("destroy")
    with saved.untouched():
        assert "saved" in saved.refused("start", "--force-boot")
    assert saved.state == "saved"
    saved.load()
    saved.assert_unbroken()


def test_undefined_with_its_managed_save(saved: Domain) -> None:
    """Defined again, it is what it was: the agent has its own copy of the image. A libvirtd that was not restarted since
    refuses: it does not know of the image, and sees it."""
    xml = saved.virsh("dumpxml", "--inactive", "--security-info")
    saved.virsh("destroy")
    with saved.untouched():
        saved.refused("undefine", "--managed-save")
        saved.bed.restart_libvirtd()
        saved.virsh("undefine", "--managed-save")
        until(lambda: not saved.image().exists(), "libvirt has deleted it")
        saved.define_xml(xml)
        saved.until_state("saved")
    saved.load()
    saved.assert_unbroken()


def test_its_managed_save_is_removed(saved: Domain) -> None:
    saved.virsh("destroy")
    with saved.untouched():
        saved.virsh("managedsave-remove", check=False)
        saved.image().unlink(missing_ok=True)
        saved.refused("start")
    saved.load()
    saved.assert_unbroken()


def _truncated(image: Path, _: bytes) -> None:
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size // 2)


def _empty(image: Path, _: bytes) -> None:
    image.write_bytes(b"")


def _without_header(image: Path, _: bytes) -> None:
    with image.open("r+b") as file:
        file.write(bytes(64))


def _flipped(image: Path, _: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(-4096, 2)
        there = file.read(16)
        file.seek(-4096, 2)
        file.write(bytes(byte ^ 0xFF for byte in there))


def _stale(image: Path, older: bytes) -> None:
    image.write_bytes(older)


@pytest.mark.parametrize("damage", [_truncated, _empty, _without_header, _flipped, _stale])
def test_a_damaged_image_is_refused(lab: LibvirtLab, damage: Callable[[Path, bytes], None]) -> None:
    guest = lab.running_domain()
    guest.save()
    older = guest.image().read_bytes()
    guest.load()
    guest.until_counts()
    guest.save()
    guest.virsh("destroy")
    damage(guest.image(), older)
    with guest.untouched():
        guest.refused("start")
    assert guest.state == "saved"
    guest.load()
    guest.assert_unbroken()


def test_an_image_is_not_loaded_a_second_time(saved: Domain) -> None:
    copy = saved.image().read_bytes()
    saved.virsh("destroy")
    saved.load()
    saved.until_counts()
    saved.virsh("destroy")
    saved.until_state("stopped")
    saved.image().write_bytes(copy)
    with saved.untouched():
        saved.refused("start")
        assert not saved.qemu_pid


def test_an_image_copied_to_another_domain(lab: LibvirtLab) -> None:
    first, second = lab.running_domain("web1"), lab.running_domain("web2")
    first.save()
    second.save()
    first.virsh("destroy")
    second.virsh("destroy")
    second.image().write_bytes(first.image().read_bytes())
    with first.untouched(), second.untouched():
        second.virsh("start", check=False)  # 11.3 sees the other's UUID, says nothing, and starts nothing
        assert second.libvirt_state == "shut off"
    for guest in (first, second):
        guest.load()
        guest.assert_unbroken()


@pytest.mark.parametrize("noatime", [False, True])
def test_restored_from_a_copy_of_the_image(each_lab: LibvirtLab, noatime: bool) -> None:  # noqa: FBT001 - a parameter
    """It is not the image that the agent has proved, neither before the guest has run on nor after. Nor where no time tells
    that an image was read."""
    if noatime:
        each_lab.bed.run("mount", "--bind", SAVED, SAVED)
        each_lab.bed.run("mount", "-o", "remount,bind,noatime", SAVED)
    guest = each_lab.running_domain()
    guest.save()
    copy = each_lab.root / "copy"
    copy.write_bytes(guest.image().read_bytes())
    guest.virsh("destroy")
    with guest.untouched():
        assert guest.bed.run("virsh", "restore", str(copy), check=False).returncode
    guest.load()
    guest.assert_unbroken()
    guest.save()
    guest.virsh("destroy")
    guest.virsh("start")
    guest.assert_unbroken()
    guest.virsh("destroy")
    guest.until_state("stopped")
    with guest.untouched():
        assert guest.bed.run("virsh", "restore", str(copy), check=False).returncode


# ---- the adopted part ----


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("share=on", "share=off"),
        ("/run/cpr-agent/gate/", "/dev/shm/"),
        ("memory-backend=cpr-ram", "memory-backend=pc.ram"),
        ("<memory unit='KiB'>65536", "<memory unit='KiB'>131072"),
    ],
)
def test_edited(lab: LibvirtLab, old: str, new: str) -> None:
    """A guest that is saved goes on as it was saved; none is started with what was edited, until it is put back."""
    guest = lab.running_domain()
    xml = guest.virsh("dumpxml", "--inactive", "--security-info")
    assert old in xml
    guest.save()
    guest.virsh("destroy")
    guest.define_xml(xml.replace(old, new))
    with guest.untouched():
        guest.refused("start", "--force-boot")
    guest.load()
    guest.assert_unbroken()
    guest.virsh("destroy")
    with guest.untouched():
        guest.refused("start")
        with pytest.raises(CallError, match="VM web1"):
            guest.start()
    guest.define_xml(xml)
    guest.until_state("stopped")
    guest.start()
    guest.until_counts()


def test_released_by_hand(lab: LibvirtLab) -> None:
    """What the agent put in is taken out with `virsh edit`: it is none of its VMs any more, and starts as any other."""
    guest = lab.domain()
    before = guest.virsh("dumpxml", "--inactive")
    guest.adopt()
    guest.define_xml(before)
    until(lambda: "web1" not in lab.cprctl("list").stdout, "it is gone")
    guest.virsh("start")
    guest.until_counts()


def test_adopt_wants_the_guest_to_be_off(lab: LibvirtLab) -> None:
    guest = lab.domain()
    guest.virsh("start")
    guest.until_counts()
    done = lab.cprctl("adopt", guest.name, "--yes")
    assert done.returncode
    assert "it is running" in done.stderr
    guest.assert_unbroken()


# ---- autostart ----


def test_autostart_is_a_load(saved: Domain) -> None:
    saved.virsh("autostart")
    saved.virsh("destroy")
    saved.bed.restart_libvirtd(boot=True)
    saved.assert_unbroken()
    saved.until_state("running")
