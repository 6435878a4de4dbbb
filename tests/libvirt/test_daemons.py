# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirtd and the agent, each stopped, killed, hung or away, in each phase of a domain's life."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cpr_agent.bus.client import CallError
from tests.lab import PATIENCE_S, until
from tests.libvirt.bed import HOOK
from tests.libvirt.conftest import a_lab
from tests.libvirt.lab import Domain, LibvirtLab

STOPS = [signal.SIGTERM, signal.SIGKILL]


@pytest.fixture(params=["13", "backports"])
def lab(request: pytest.FixtureRequest, tmp_path: Path, tiny: Path) -> Iterator[LibvirtLab]:
    """libvirt 12.9 restores in another way than those before."""
    yield from a_lab(request.param, tmp_path, tiny)


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[list[BaseException]]:
    """It goes on in a thread; what it failed with is in the list, at the end."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield failures
    thread.join(PATIENCE_S * 3)
    assert not thread.is_alive(), "it never returned"


# ---- libvirtd ----


@pytest.mark.parametrize("number", STOPS)
def test_libvirtd_is_restarted_while_the_guest_runs(each_lab: LibvirtLab, number: int) -> None:
    guest = each_lab.running_domain()
    pid = guest.qemu_pid
    each_lab.bed.end_libvirtd(number)
    guest.until_counts()
    each_lab.bed.start_libvirtd()
    guest.until_state("running")
    assert guest.qemu_pid == pid
    guest.save()
    guest.load()
    guest.assert_unbroken()


@pytest.mark.parametrize("number", STOPS)
def test_libvirtd_is_restarted_while_the_guest_is_saved(each_lab: LibvirtLab, number: int) -> None:
    """Its QEMU stands in postmigrate all the time."""
    guest = each_lab.running_domain()
    guest.save()
    with guest.untouched():
        each_lab.bed.restart_libvirtd(number)
        guest.until_state("saved")
    guest.load()
    guest.assert_unbroken()


@pytest.mark.parametrize("number", STOPS)
def test_libvirtd_is_restarted_once_qemu_is_gone(lab: LibvirtLab, number: int) -> None:
    """Then it lists the image as a managed save."""
    guest = lab.running_domain()
    guest.save()
    guest.virsh("destroy")
    with guest.untouched():
        lab.bed.restart_libvirtd(number)
        assert "Managed save:   yes" in guest.virsh("dominfo")
        guest.until_state("saved")
    guest.virsh("start")
    guest.assert_unbroken()


def test_the_save_is_taken_back_where_libvirtd_is_away(running: Domain) -> None:
    """Nothing is known of a domain then; the guest runs on, and so do the agent's own VMs."""
    own = running.lab.running("own1")
    running.bed.end_libvirtd()
    with pytest.raises(CallError, match="VM web1"):
        running.save()
    running.until_counts()
    own.save()
    own.load()
    own.assert_unbroken()
    running.bed.start_libvirtd()
    running.until_state("running")
    running.save()
    running.load()
    running.assert_unbroken()


def test_a_load_where_libvirtd_is_away(saved: Domain) -> None:
    saved.virsh("destroy")
    saved.bed.end_libvirtd()
    with saved.untouched(), pytest.raises(CallError, match="VM web1"):
        saved.load()
    saved.bed.start_libvirtd()
    saved.until_state("saved")
    saved.load()
    saved.assert_unbroken()


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("after_ms", [0, 5, 20, 50, 100, 200])
def test_libvirtd_ends_in_a_save(lab: LibvirtLab, number: int, after_ms: int) -> None:
    """Whatever the save was at: the guest is saved, or runs on, once libvirtd is back."""
    guest = lab.running_domain()
    with meanwhile(guest.save):
        threading.Event().wait(after_ms / 1000)
        lab.bed.end_libvirtd(number)
        lab.bed.start_libvirtd()
    until(lambda: guest.state in ("running", "saved"), f"{guest.name} is one or the other, not {guest.state}")
    if guest.state == "saved":
        guest.load()
    guest.assert_unbroken()
    guest.save()
    guest.load()
    guest.assert_unbroken()


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("after_ms", [0, 50, 150, 300, 450, 600])
def test_libvirtd_ends_in_a_load(lab: LibvirtLab, number: int, after_ms: int) -> None:
    """Whatever the load was at: the guest runs, or is saved still; it is never booted, and never loaded twice."""
    guest = lab.running_domain()
    guest.save()
    with meanwhile(guest.load):
        threading.Event().wait(after_ms / 1000)
        lab.bed.end_libvirtd(number)
        lab.bed.start_libvirtd()
    until(lambda: guest.state in ("running", "saved"), f"{guest.name} is one or the other, not {guest.state}")
    if guest.state == "saved":
        guest.load()
    guest.assert_unbroken()
    guest.assert_whole_to_libvirt()


# ---- the agent ----


def test_without_the_agent_a_saved_guest_is_not_started(each_lab: LibvirtLab) -> None:
    guest, plain = each_lab.running_domain(), each_lab.domain("plain")
    guest.save()
    guest.virsh("destroy")
    each_lab.end_agent()
    with guest.untouched():
        for how in ((), ("--force-boot",), ("--paused",), ("--bypass-cache",)):
            guest.refused("start", *how)
            assert guest.libvirt_state == "shut off"
    plain.virsh("start")
    plain.until_counts()
    each_lab.start_agent()
    guest.until_state("saved")
    guest.load()
    guest.assert_unbroken()


def test_an_agent_that_hangs_lets_no_adopted_guest_start(lab: LibvirtLab) -> None:
    """And any other at once; nobody waits for ever."""
    guest, plain = lab.running_domain(), lab.domain("plain")
    guest.save()
    guest.virsh("destroy")
    lab.agent_process.send_signal(signal.SIGSTOP)
    try:
        with guest.untouched():
            plain.virsh("start")
            plain.until_counts()
            guest.refused("start")
    finally:
        lab.agent_process.send_signal(signal.SIGCONT)
    guest.load()
    guest.assert_unbroken()


@pytest.mark.parametrize("after_ms", [0, 50, 150, 300, 450, 600])
def test_the_agent_is_killed_while_virsh_starts_a_saved_guest(lab: LibvirtLab, after_ms: int) -> None:
    guest = lab.running_domain()
    guest.save()
    guest.virsh("destroy")
    with meanwhile(lambda: guest.virsh("start", check=False)):
        threading.Event().wait(after_ms / 1000)
        lab.end_agent(signal.SIGKILL)
        lab.start_agent()
    until(lambda: guest.state in ("running", "saved"), f"{guest.name} is one or the other, not {guest.state}")
    if guest.state == "saved":
        guest.load()
    guest.assert_unbroken()
    guest.assert_whole_to_libvirt()


@pytest.mark.parametrize("number", STOPS)
def test_agent_and_libvirtd_end_together(lab: LibvirtLab, number: int) -> None:
    guest, other = lab.running_domain(), lab.running_domain("web2")
    guest.save()
    lab.end_agent(number)
    lab.bed.end_libvirtd(number)
    other.until_counts()
    lab.start_agent()
    lab.bed.start_libvirtd()
    guest.until_state("saved")
    other.until_state("running")
    guest.load()
    guest.assert_unbroken()
    other.assert_unbroken()


def test_the_machine_dies_and_starts_without_a_kexec(saved: Domain) -> None:
    """All processes are gone at once; a file in /dev/shm stands for memory that outlives them."""
    lab, bed = saved.lab, saved.bed
    lab.end_agent(signal.SIGKILL)
    bed.end_libvirtd(signal.SIGKILL)
    bed.kill(saved.qemu_pid)
    with saved.untouched():
        lab.start_agent()
        bed.path("/run/libvirt/qemu/autostarted").unlink(missing_ok=True)
        bed.start_libvirtd()
        saved.until_state("saved")
    saved.load()
    saved.assert_unbroken()


# ---- the hook ----


def test_without_the_hook_nothing_starts_and_the_memory_stays(lab: LibvirtLab) -> None:
    """The gate is not opened then."""
    guest = lab.running_domain()
    guest.save()
    guest.virsh("destroy")
    hook = lab.bed.path(HOOK)
    hook.unlink()
    lab.bed.restart_libvirtd()
    with guest.untouched():
        guest.refused("start")
        guest.refused("start", "--force-boot")
    lab.bed.install_hook()
    lab.bed.restart_libvirtd()
    guest.load()
    guest.assert_unbroken()


def test_the_package_is_half_removed(lab: LibvirtLab) -> None:
    """The hook is left behind without the agent's files: other domains start, adopted ones do not."""
    guest, plain = lab.running_domain(), lab.domain("plain")
    guest.save()
    guest.virsh("destroy")
    lab.end_agent()
    lab.bed.run("umount", "/usr/lib/cpr-agent/cpr_agent")
    plain.virsh("start")
    plain.until_counts()
    with guest.untouched():
        assert "not installed" in guest.refused("start")
