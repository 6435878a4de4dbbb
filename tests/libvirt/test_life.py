# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain's life under the agent, with each pair of libvirt and QEMU."""

from __future__ import annotations

import signal

import pytest

from tests.lab import refused, until
from tests.libvirt.lab import LibvirtLab


def test_adopted_saved_and_loaded(each_lab: LibvirtLab) -> None:
    guest = each_lab.running_domain()
    assert guest.libvirt_state == "running"
    for _ in range(3):
        guest.save()
        assert guest.state == "saved"
        guest.load()
        guest.assert_unbroken()
        assert guest.libvirt_state == "running"
    assert "web1" in guest.lab.bed.virsh("list", "--name")


def test_loaded_by_virsh(each_lab: LibvirtLab) -> None:
    """The saved guest's QEMU is gone, as it is after a kexec."""
    guest = each_lab.running_domain()
    guest.save()
    guest.call("Stop", "s", "hard")
    assert guest.state == "saved"
    guest.until_libvirt("shut off")
    guest.virsh("start")
    guest.assert_unbroken()
    guest.until_state("running")
    assert guest.checkpoint_files() == ["manifest.json.loaded", "vmstate.loaded"]


def test_released_as_it_was(each_lab: LibvirtLab) -> None:
    guest = each_lab.domain()
    guest.define_xml(guest.virsh("dumpxml", "--inactive"))  # 9.0 puts some devices in another order then
    before = guest.virsh("dumpxml", "--inactive")
    guest.adopt()
    assert "cpr-ram" in guest.virsh("dumpxml", "--inactive")
    done = each_lab.cprctl("release", guest.name, "--yes")
    assert done.returncode == 0, done.stderr
    assert guest.virsh("dumpxml", "--inactive") == before
    guest.virsh("start")
    guest.until_counts()


def test_a_guest_that_is_paused_stays_so(each_lab: LibvirtLab) -> None:
    guest = each_lab.running_domain()
    guest.virsh("suspend")
    guest.until_state("paused")
    guest.save()
    guest.load()
    guest.until_state("paused")
    assert guest.libvirt_state == "paused"
    guest.virsh("resume")
    guest.assert_unbroken()


def test_what_is_not_adopted_is_nobodys_business(lab: LibvirtLab) -> None:
    plain = lab.domain("plain")
    plain.virsh("start")
    plain.until_counts()
    assert "plain" not in lab.cprctl("list").stdout
    plain.virsh("managedsave")
    plain.virsh("start")
    plain.assert_unbroken()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_agent_comes_and_goes_while_the_guest_runs(each_lab: LibvirtLab, number: int) -> None:
    guest = each_lab.running_domain()
    pid = guest.qemu_pid
    each_lab.end_agent(number)
    guest.until_counts()
    each_lab.start_agent()
    guest.until_state("running")
    assert guest.qemu_pid == pid
    guest.save()
    each_lab.end_agent(number)
    each_lab.start_agent()
    guest.until_state("saved")
    guest.load()
    guest.assert_unbroken()


def test_own_vms_beside_domains(lab: LibvirtLab) -> None:
    own, guest = lab.running("own1"), lab.running_domain()
    listed = lab.cprctl("list").stdout
    assert "libvirt" in next(line for line in listed.splitlines() if "web1" in line)
    assert "agent" in next(line for line in listed.splitlines() if "own1" in line)
    assert lab.job("SaveAll", survives="qemu-restart") == "done"
    assert {own.state, guest.state} == {"saved"}
    assert lab.job("LoadAll") == "done"
    own.assert_unbroken()
    guest.assert_unbroken()


def test_one_that_can_not_be_saved_keeps_all_running(lab: LibvirtLab) -> None:
    guest = lab.running_domain()
    lab.running("private", "-object", "memory-backend-ram,id=extra,size=16M")
    assert "VM private" in lab.job("SaveAll", survives="qemu-restart")
    guest.until_state("running")
    assert guest.libvirt_state == "running"
    guest.assert_unbroken()
    assert not (guest.checkpoint / "manifest.json").exists()
    assert not guest.image().exists()


def test_ranges_that_overlap_are_refused_across_both(lab: LibvirtLab) -> None:
    first, second = lab.running_domain("web1"), lab.domain("web2")
    first.virsh("destroy")
    first.until_state("stopped")
    done = lab.cprctl("adopt", second.name, "--yes", f"--device={first.ram}")
    assert done.returncode, done.stdout
    assert "web1" in done.stderr
    own = lab.guest("own1", device=str(first.ram))
    refused(own, "MemoryOverlap", "web1", member="Start")


def test_a_save_taken_back_by_virsh(each_lab: LibvirtLab) -> None:
    """`virsh resume` of the saved guest, whose QEMU still stands: it runs on, and its checkpoint is none any more."""
    guest = each_lab.running_domain()
    guest.save()
    guest.virsh("resume")
    guest.until_state("running")
    until(lambda: guest.checkpoint_files() == ["manifest.json.discarded", "vmstate.discarded"], "checkpoint retired")
    assert not guest.image().exists()
    guest.assert_unbroken()
    guest.assert_whole_to_libvirt()
