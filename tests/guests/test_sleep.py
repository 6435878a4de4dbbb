# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that are put to sleep (S3) for a save, by a real qemu-ga in a real Linux, on QEMU 10: up to 8.2 a save wakes them.

Of VFIO devices there are none here; that they are found is tested on recorded replies (tests/unit/test_qemu_devices.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bus.conftest import qemu_of
from tests.guests.tally import case
from tests.lab import Guest, Lab, refused


def sleepy(lab: Lab, linux: Path, append: str = "", *more: str, machine: str = "pc", timeout_s: int = 120) -> Guest:
    """A guest that is to sleep for each save."""
    guest = lab.linux_guest("sleepy", linux, append, *lab.agent_port(), *more)
    arguments = guest.definition["vm"]["arguments"]
    arguments[arguments.index("-machine") + 1] = f"{machine},accel=tcg"
    guest.definition["save"] = {"suspend": "always", "suspend-timeout": timeout_s}
    guest.definition["vm"]["qemu"] = qemu_of("10.0")
    lab.define(guest)
    guest.start()
    guest.until_counts()
    return guest


def test_a_guest_sleeps_while_it_is_saved_and_is_awake_after(lab: Lab, linux_with_agent: Path) -> None:
    guest = sleepy(lab, linux_with_agent)
    with case("put to sleep, saved, loaded, woken"):
        guest.save()
        assert guest.properties["Checkpoint"]["run-state"] == "suspended"
        guest.load()
        assert guest.state == "running"
        guest.assert_unbroken()
    with case("put to sleep, saved, taken back, woken"):
        guest.save()
        guest.call("Resume")
        assert guest.state == "running"
        guest.assert_unbroken()


def test_a_guest_agent_that_lets_nobody_do_that(lab: Lab, linux_with_agent: Path) -> None:
    guest = sleepy(lab, linux_with_agent, "cpr.awake")
    with case("its qemu-ga refuses sleep"):
        refused(guest, "Blocked", "does not let guest-suspend-ram be used", member="CprSave")
        assert "does not let guest-suspend-ram be used" in lab.cprctl("check", guest.name).stdout
        guest.assert_unbroken()


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_a_machine_without_s3(lab: Lab, linux_with_agent: Path, machine: str) -> None:
    """As libvirt makes them."""
    disabled = ("-global", "PIIX4_PM.disable_s3=1", "-global", "ICH9-LPC.disable_s3=1")
    guest = sleepy(lab, linux_with_agent, "", *disabled, machine=machine)
    with case(f"a {machine} without S3"):
        refused(guest, "Blocked", "its machine has no S3", member="CprSave")
        guest.assert_unbroken()


def test_a_kernel_that_sleeps_in_its_own_way(lab: Lab, linux_with_agent: Path) -> None:
    """For QEMU it runs: to wake it is another matter."""
    guest = sleepy(lab, linux_with_agent, "mem_sleep_default=s2idle", timeout_s=10)
    with case("s2idle"):
        refused(guest, "SaveFailed", "was asked to sleep, and did not within 10 s", member="CprSave")
        guest.assert_unbroken()


def test_a_sleep_that_never_comes(lab: Lab, linux_with_agent: Path) -> None:
    """A q35 with SeaBIOS sleeps once, and never again (docs/sleep.md); its qemu-ga says nothing of that."""
    guest = sleepy(lab, linux_with_agent, machine="q35", timeout_s=10)
    guest.save()
    guest.load()
    with case("asked to sleep in vain"):
        refused(guest, "SaveFailed", "was asked to sleep, and did not within 10 s", member="CprSave")
        assert guest.checkpoint_files() == ["manifest.json.loaded", "vmstate.loaded"]
        guest.assert_unbroken()


@pytest.mark.parametrize("port", [True, False])
def test_no_guest_agent_answers(lab: Lab, *, port: bool) -> None:
    """The tiny guest has none, with a port for it or without."""
    guest = lab.guest("web1", *(lab.agent_port() if port else ()))
    guest.definition["save"] = {"suspend": "always"}
    guest.definition["vm"]["qemu"] = qemu_of("10.0")
    lab.define(guest)
    guest.start()
    guest.until_counts()
    with case(f"nobody to put it to sleep, {'a' if port else 'no'} port"):
        why = "did not answer guest-sync-delimited" if port else "it has no guest agent"
        refused(guest, "Blocked", why, member="CprSave")
        guest.assert_unbroken()
