# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's life with a real QEMU: start, save, load, resume, stop, and an agent that comes and goes."""

from __future__ import annotations

import os
import signal
import stat

import pytest

from cpr_agent.bus.client import CallError
from tests.lab import Lab, until


def test_a_saved_guest_can_be_loaded_after_its_qemu_was_stopped(lab: Lab) -> None:
    guest = lab.running()
    guest.save()
    guest.call("Stop", "s", "hard")
    assert guest.state == "saved"
    assert guest.pid == 0
    guest.load()
    guest.assert_unbroken()


def test_the_state_file_is_private(lab: Lab) -> None:
    guest = lab.running()
    guest.save()
    assert stat.S_IMODE((guest.checkpoint / "vmstate").stat().st_mode) == 0o600
    assert stat.S_IMODE((guest.checkpoint / "manifest.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(guest.checkpoint.stat().st_mode) == 0o700
    assert (guest.checkpoint / "vmstate").read_bytes()[:8] == b"QEVM\x00\x00\x00\x03"


def test_a_guest_is_saved_to_a_file_of_the_callers_choice(lab: Lab) -> None:
    guest = lab.running()
    chosen = lab.exports / "web1.state"
    guest.save(str(chosen))
    assert stat.S_IMODE(chosen.stat().st_mode) == 0o600
    guest.load(str(chosen))
    guest.assert_unbroken()
    assert [path.name for path in lab.exports.iterdir()] == ["web1.state.loaded"]


def test_the_admins_socket_stays_free(lab: Lab) -> None:
    guest = lab.running()
    assert guest.admin("query-status")["status"] == "running"
    guest.save()
    assert guest.admin("query-status")["status"] in ("postmigrate", "save-vm"), "the latter is cpr-save's"


def test_stopping_presses_the_power_button(lab: Lab) -> None:
    guest = lab.running()
    guest.call("Stop", "s", "acpi")
    assert guest.state == "stopped"
    assert b"poweroff\n" in guest.console.read_bytes()


def test_a_guest_that_does_not_heed_its_power_button_is_ended(lab: Lab) -> None:
    guest = lab.guest("deaf")
    arguments = guest.definition["vm"]["arguments"]
    arguments[arguments.index("-kernel") : arguments.index("-kernel") + 2] = []
    guest.definition["vm"]["shutdown-timeout"] = "500ms"
    lab.define(guest)
    guest.start()
    guest.call("Stop", "s", "acpi")
    assert guest.state == "stopped"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_agent_comes_and_goes_while_the_guest_runs(lab: Lab, number: int) -> None:
    guest = lab.running()
    pid = guest.pid
    lab.end_agent(number)
    guest.until_counts()
    lab.start_agent()
    guest.until_state("running")
    assert guest.pid == pid
    guest.save()
    guest.load()
    guest.assert_unbroken()


def test_the_agent_dies_while_the_guest_is_saved(lab: Lab) -> None:
    guest = lab.running()
    guest.save()
    lab.end_agent(signal.SIGKILL)
    lab.start_agent()
    guest.until_state("saved")
    guest.load()
    guest.assert_unbroken()


def test_a_guest_resumed_by_hand_can_not_be_loaded_again(lab: Lab) -> None:
    guest = lab.running()
    guest.save()
    guest.admin("cont")
    guest.until_state("running")
    with pytest.raises(CallError, match="can't be loaded into a live VM"):
        guest.load()
    until(lambda: guest.checkpoint_files() == ["manifest.json.discarded", "vmstate.discarded"], "checkpoint retired")
    guest.assert_unbroken()


def test_a_guest_resumed_by_hand_while_no_agent_runs_can_not_be_loaded_again(lab: Lab) -> None:
    guest = lab.running()
    guest.save()
    lab.end_agent(signal.SIGKILL)
    guest.admin("cont")
    guest.until_counts()
    lab.start_agent()
    guest.until_state("running")
    os.kill(guest.pid, signal.SIGKILL)
    guest.until_state("stopped")
    with pytest.raises(CallError, match="no checkpoint") as caught:
        guest.load()
    assert caught.value.kind == "NoCheckpoint"


def test_all_guests_are_saved_and_loaded(lab: Lab) -> None:
    guests = [lab.running(f"vm{number}") for number in range(3)]
    assert lab.job("SaveAll", survives="qemu-restart") == "done"
    assert {guest.state for guest in guests} == {"saved"}
    assert lab.job("LoadAll") == "done"
    for guest in guests:
        guest.assert_unbroken()
    history = lab.client(lambda client: client.manager("ListHistory", "a{sv}", {}))
    assert sorted(entry["vm"] for entry in history) == ["vm0", "vm1", "vm2"]
    assert all(abs(sum(length for _, length in entry["phases"]) - entry["pause"]) < 1e-3 for entry in history)


def test_one_guest_that_can_not_be_saved_keeps_all_running(lab: Lab) -> None:
    guests = [lab.running(f"vm{number}") for number in range(2)]
    lab.running("private", "-object", "memory-backend-ram,id=extra,size=16M")
    result = lab.job("SaveAll", survives="qemu-restart")
    assert "VM private" in result
    assert "extra" in result
    for guest in guests:
        assert guest.state == "running"
        guest.assert_unbroken()
        assert not (guest.checkpoint / "manifest.json").exists()


def test_ram_that_a_kexec_erases_is_refused_by_name(lab: Lab) -> None:
    guest = lab.running()
    result = lab.job("SaveAll")
    assert str(guest.ram) in result
    assert "does not survive a kexec" in result
    guest.assert_unbroken()


def test_autostart_starts_what_has_no_checkpoint(lab: Lab) -> None:
    saved, fresh = lab.running("saved"), lab.guest("fresh")
    fresh.definition["vm"]["autostart"] = True
    saved.definition["vm"]["autostart"] = True
    lab.define(saved)
    lab.define(fresh)
    saved.save()
    assert lab.job("LoadAll", autostart=True) == "done"
    saved.assert_unbroken()
    fresh.assert_unbroken()


def test_a_running_vm_stays_known_when_its_definition_goes_bad(lab: Lab) -> None:
    guest = lab.running()
    path = lab.definitions / "web1.toml"
    path.write_text(path.read_text().replace("size", "sise"))
    problems = lab.client(lambda client: client.manager("Reload"))
    assert 'unknown key "memory.sise". Did you mean "size"?' in problems[0][1]
    assert guest.state == "running"
    guest.save()
    guest.load()
    guest.assert_unbroken()
