# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt and QEMU upgraded, from Debian 13 to its backports, in each phase of a domain's life; and QEMU downgraded."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import refused, until
from tests.libvirt.conftest import a_lab, root_of
from tests.libvirt.lab import Domain, LibvirtLab
from tests.libvirt.test_daemons import meanwhile


@pytest.fixture
def lab(tmp_path: Path, tiny: Path) -> Iterator[LibvirtLab]:
    root_of("backports")
    yield from a_lab("13", tmp_path, tiny)


def upgrade(lab: LibvirtLab, *, qemu: bool = True) -> None:
    """As apt does it: the files, then a restart of the daemon."""
    lab.upgrade_libvirt()
    if qemu:
        lab.upgrade_qemu()
    lab.bed.restart_libvirtd()
    assert "12." in lab.bed.run("virsh", "version", "--daemon").stdout


def goes_through_more(guest: Domain) -> None:
    guest.assert_unbroken()
    guest.save()
    guest.load()
    guest.assert_unbroken()
    guest.assert_whole_to_libvirt()


@pytest.mark.parametrize("qemu", [False, True])
def test_while_the_guest_runs(running: Domain, qemu: bool) -> None:  # noqa: FBT001 - a parameter of the test
    pid = running.qemu_pid
    upgrade(running.lab, qemu=qemu)
    running.until_state("running")
    assert running.qemu_pid == pid
    goes_through_more(running)
    assert ("11." in running.admin("query-version")["package"]) is qemu


def test_while_the_guest_is_saved_in_its_qemu(saved: Domain) -> None:
    with saved.untouched():
        upgrade(saved.lab)
        saved.until_state("saved")
    saved.load()
    goes_through_more(saved)


def test_while_the_guest_is_saved_and_taken_back(saved: Domain) -> None:
    upgrade(saved.lab)
    saved.until_state("saved")
    saved.virsh("resume")
    saved.until_state("running")
    goes_through_more(saved)


@pytest.mark.parametrize("by_hand", [False, True])
def test_once_the_saved_guest_has_no_qemu(saved: Domain, by_hand: bool) -> None:  # noqa: FBT001 - likewise
    """As across a kexec."""
    saved.virsh("destroy")
    with saved.untouched():
        upgrade(saved.lab)
        saved.until_state("saved")
    if by_hand:
        saved.virsh("start")
    else:
        saved.load()
    goes_through_more(saved)


@pytest.mark.parametrize("after_ms", [0, 20, 100])
def test_in_a_save(running: Domain, after_ms: int) -> None:
    with meanwhile(running.save):
        threading.Event().wait(after_ms / 1000)
        upgrade(running.lab)
    until(lambda: running.state in ("running", "saved"), f"it is one or the other, not {running.state}")
    if running.state == "saved":
        running.load()
    goes_through_more(running)


@pytest.mark.parametrize("after_ms", [0, 150, 450])
def test_in_a_load(saved: Domain, after_ms: int) -> None:
    """Its files alone, too: what libvirtd starts then is the QEMU that is installed."""
    with meanwhile(saved.load):
        threading.Event().wait(after_ms / 1000)
        upgrade(saved.lab)
    until(lambda: saved.state in ("running", "saved"), f"it is one or the other, not {saved.state}")
    if saved.state == "saved":
        saved.load()
    goes_through_more(saved)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_with_the_agent_away(saved: Domain, number: int) -> None:
    saved.virsh("destroy")
    saved.lab.end_agent(number)
    with saved.untouched():
        upgrade(saved.lab)
        saved.refused("start")
    saved.lab.start_agent()
    saved.until_state("saved")
    saved.load()
    goes_through_more(saved)


def test_a_qemu_that_libvirt_does_not_know_yet_loads_or_leaves_the_guest_saved(saved: Domain) -> None:
    """libvirtd 11.3 can't restore an image with QEMU 11.1; 12.9 can."""
    saved.virsh("destroy")
    saved.lab.upgrade_qemu()
    with saved.untouched():
        refused(saved, "LoadFailed")
        saved.until_state("saved")
    upgrade(saved.lab)
    saved.load()
    goes_through_more(saved)


def test_an_older_qemu_takes_no_guest(saved: Domain) -> None:
    """Told before the save of an upgrade, and refused by the load: its machine is one that both know."""
    lab = saved.lab
    saved.load()
    upgrade(lab)
    saved.save()
    saved.load()
    assert "11." in saved.admin("query-version")["package"]
    lab.bed.install_from("13", "qemu-*", "seabios")
    assert "version of QEMU" in lab.cprctl("check", saved.name).stdout
    saved.save()
    saved.virsh("destroy")
    with saved.untouched():
        refused(saved, "LoadFailed", "version of QEMU")
        saved.refused("start")
    lab.upgrade_qemu()
    saved.load()
    goes_through_more(saved)
