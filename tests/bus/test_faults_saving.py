# SPDX-License-Identifier: GPL-2.0-or-later
"""A save that can't be, or goes wrong: the guest runs on, and no file is left."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from cpr_agent.bus.client import CallError
from tests.lab import Guest, Lab, refused


def test_private_ram_is_refused(lab: Lab) -> None:
    guest = lab.running("web1", "-object", "memory-backend-ram,id=extra,size=16M")
    refused(guest, "Blocked", "extra", "private", member="CprSave")
    guest.assert_unbroken()
    assert guest.checkpoint_files() == []


def test_a_guest_under_record_and_replay_is_refused(lab: Lab) -> None:
    guest = lab.running("web1", "-icount", f"shift=auto,rr=record,rrfile={lab.root}/replay")
    refused(guest, "Blocked", "replay", member="CprSave")
    assert guest.state == "running"


def test_another_mode_is_refused(lab: Lab) -> None:
    guest = lab.running()
    with pytest.raises(CallError, match='Use mode "reboot"') as caught:
        guest.save(mode="restart")
    assert caught.value.kind == "InvalidArgument"
    guest.assert_unbroken()


def test_a_second_save_is_refused(saved: Guest) -> None:
    before = (saved.checkpoint / "vmstate").stat()
    refused(saved, "AlreadySaved", member="CprSave")
    assert (saved.checkpoint / "vmstate").stat() == before
    saved.load()
    saved.assert_unbroken()


def test_a_stopped_vm_can_not_be_saved(lab: Lab) -> None:
    refused(lab.guest(), "WrongState", "stopped", member="CprSave")


@pytest.mark.parametrize("filename", ["relative", "/etc/web1.state", "{exports}/../web1", "{exports}/no/web1", "{link}/x"])
def test_a_file_that_the_agent_could_not_justify_is_refused(lab: Lab, filename: str) -> None:
    guest = lab.running()
    (lab.exports / "link").symlink_to("/etc")
    refused(
        guest,
        "InvalidArgument",
        member="CprSave",
        filename=filename.format(exports=lab.exports, link=lab.exports / "link"),
    )
    assert guest.checkpoint_files() == []
    guest.assert_unbroken()


def test_a_file_that_exists_is_not_overwritten(lab: Lab) -> None:
    guest = lab.running()
    precious = lab.exports / "precious"
    precious.write_text("precious")
    refused(guest, "InvalidArgument", "exists", member="CprSave", filename=str(precious))
    assert precious.read_text() == "precious"
    guest.assert_unbroken()


def test_a_qemu_that_dies_during_the_save(lab: Lab) -> None:
    """Stopped dead while it is asked to save, and then killed: the moment can't be missed."""
    guest = lab.running()
    pid = guest.pid
    other = lab.running("other")
    os.kill(pid, signal.SIGSTOP)
    killer = threading.Timer(1.0, os.kill, (pid, signal.SIGKILL))
    killer.start()
    try:
        with pytest.raises(CallError) as caught:
            guest.save()
    finally:
        killer.join()
    assert "VM web1" in str(caught.value)
    assert caught.value.kind in ("QemuFailed", "SaveFailed", "WrongState")
    guest.until_state("stopped")
    assert guest.checkpoint_files() == []
    other.assert_unbroken()
