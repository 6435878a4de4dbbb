# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that stand, and QEMUs that say no: the guest is where the agent says, and comes on again."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from cpr_agent.bus.client import CallError
from tests.lab import Guest, Lab, refused, until


def with_failing_flush(lab: Lab, name: str = "web1") -> Guest:
    """A guest whose disk has something to flush, and can't: till ``mend_storage``."""
    image = lab.root / f"{name}.raw"
    image.write_bytes(bytes(1 << 20))
    rules = {
        "inject-error.0": "event=flush_to_disk errno=5 state=2",
        "inject-error.1": "event=write_aio iotype=discard state=2",
        "set-state.0": "event=write_aio state=1 new_state=2",
        "set-state.1": "event=write_aio state=2 new_state=3",
    }
    words = [f"file.{rule}.{word}" for rule, said in rules.items() for word in said.split()]
    drive = f"driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename={image},if=none,id=d0"
    disk = ("-drive", ",".join((drive, *words)), "-device", "ahci,id=a0", "-device", "ide-hd,drive=d0,bus=a0.0")
    guest = lab.running(name, *disk)
    io(guest, "write -P 0x22 0 4096")
    return guest


def io(guest: Guest, command: str) -> None:
    guest.admin("human-monitor-command", **{"command-line": f'qemu-io d0 "{command}"'})


def mend_storage(guest: Guest) -> None:
    """blkdebug's first rule holds from the first write on; then another takes its place, which means nothing."""
    io(guest, "write -P 0x33 4096 4096")


def run_state(guest: Guest) -> str:
    return str(guest.admin("query-status")["status"])


def goes_on_by_itself(guest: Guest) -> bool:
    """QEMU 7.2 lets its guest go on when a flush fails; later ones leave it in finish-migrate."""
    return int(guest.admin("query-version")["qemu"]["major"]) < 8


def says_where_it_is(guest: Guest, said: str) -> None:
    """Nobody is told to end a QEMU that has a whole guest."""
    if goes_on_by_itself(guest):
        guest.assert_unbroken()
        return
    where = f"stands, whole, in its QEMU (PID {guest.pid})"
    for words in (where, "can't flush its disks", "Input/output error", "resume web1"):
        assert words in said, said
    assert "lost" not in said
    assert run_state(guest) == "finish-migrate"


@pytest.mark.parametrize("act", [("save", "--survives", "qemu-restart"), ("refresh",), ("refresh", "--in-turn")])
def test_a_guest_whose_disk_fails_at_its_stop_goes_on_when_that_is_well(each_lab: Lab, act: tuple[str, ...]) -> None:
    guest = with_failing_flush(each_lab)
    ran = each_lab.cprctl(*act, "web1")
    assert ran.returncode == 1, ran
    says_where_it_is(guest, ran.stderr)
    mend_storage(guest)
    until(lambda: guest.state == "running", "the guest goes on by itself")
    guest.assert_unbroken()
    if not goes_on_by_itself(guest):
        assert "Problem" not in each_lab.cprctl("status", "web1").stdout
    guest.save()
    guest.load()
    guest.assert_unbroken()


def test_resume_does_what_the_agent_does(each_lab: Lab) -> None:
    guest = with_failing_flush(each_lab)
    with pytest.raises(CallError):
        guest.save()
    if goes_on_by_itself(guest):
        guest.assert_unbroken()
        return
    says_where_it_is(guest, refused(guest, "QemuRefused", member="Resume"))
    mend_storage(guest)
    each_lab.cprctl("resume", "web1")  # the agent may have been quicker, and there is nothing to resume then
    assert guest.state == "running"
    guest.assert_unbroken()


def test_the_way_on_is_told_for_a_paused_guest_whose_disk_fails_at_its_save(each_lab: Lab) -> None:
    guest = with_failing_flush(each_lab)
    guest.admin("stop")
    said = refused(guest, "SaveFailed", member="CprSave")
    assert run_state(guest) == "paused" or "`cprctl resume web1` lets it run" in said, said
    mend_storage(guest)
    assert each_lab.cprctl("resume", "web1").returncode == 0
    guest.assert_unbroken()
    guest.save()
    guest.load()
    guest.assert_unbroken()


def test_an_agent_that_is_started_anew_brings_it_on(each_lab: Lab) -> None:
    guest = with_failing_flush(each_lab)
    with pytest.raises(CallError):
        guest.save()
    each_lab.end_agent()
    mend_storage(guest)
    each_lab.start_agent()
    assert guest.state == "running"
    guest.assert_unbroken()


def test_one_that_is_killed_meanwhile_is_said_to_have_ended(each_lab: Lab) -> None:
    """A refusal, a connection that is lost and an end are told apart."""
    guest = with_failing_flush(each_lab)
    with pytest.raises(CallError):
        guest.save()
    os.kill(guest.pid, signal.SIGKILL)
    until(lambda: guest.state == "stopped", "the agent sees its end")
    refused(guest, "WrongState", "is stopped", member="Resume")


def test_in_a_save_of_all_the_others_go_on(each_lab: Lab) -> None:
    guest, other = with_failing_flush(each_lab), each_lab.running("web2")
    assert each_lab.job("SaveAll", survives="qemu-restart").startswith("VM web1: could not be saved: ")
    says_where_it_is(guest, each_lab.cprctl("status", "web1").stdout)
    other.assert_unbroken()
    mend_storage(guest)
    until(lambda: guest.state == "running", "the guest goes on by itself")
    guest.assert_unbroken()


def test_a_guest_whose_storage_hung_during_its_save_goes_on_by_itself(each_lab: Lab) -> None:
    """A server of NFS, iSCSI or NBD, or swtpm, that is silent for longer than a save waits for QEMU, and well again."""
    image, socket = each_lab.root / "disk.raw", each_lab.root / "nbd.sock"
    image.write_bytes(bytes(1 << 20))
    with subprocess.Popen(["qemu-nbd", "-f", "raw", "-t", "-k", str(socket), str(image)]) as server:
        try:
            until(socket.exists, "the server listens")
            drive = f"driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={socket},if=none,id=d0"
            guest = each_lab.running(
                "web1", "-drive", drive, "-device", "ahci,id=a0", "-device", "ide-hd,drive=d0,bus=a0.0"
            )
            io(guest, "write -P 0x11 0 4096")
            server.send_signal(signal.SIGSTOP)
            with each_lab.cprctl_started("save", "web1", "--survives", "qemu-restart") as saving:
                assert saving.wait(180) == 1
            assert guest.state == "unreachable"
            assert "`cprctl resume web1` looks at it again" in each_lab.cprctl("check", "web1").stdout
            server.send_signal(signal.SIGCONT)
            until(lambda: guest.state == "running", "the agent brings it on", 180)
            guest.assert_unbroken()
            guest.save()
            guest.load()
            guest.assert_unbroken()
        finally:
            server.kill()
