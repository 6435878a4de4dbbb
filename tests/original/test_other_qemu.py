# SPDX-License-Identifier: GPL-2.0-or-later
"""A host whose QEMU gets cpr-save and cpr-load while guests are there."""

from __future__ import annotations

import pytest

from tests.bus.conftest import qemu_of
from tests.lab import Guest, Lab
from tests.original.machine import original_qemu


def install(lab: Lab, qemu: str) -> None:
    (lab.root / "qemu.new").symlink_to(qemu)
    (lab.root / "qemu.new").rename(lab.root / "qemu")


@pytest.fixture(params=[("7.2", "12"), ("10.0", "13")], ids=["7.2", "10.0"])
def qemus(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Without the commands and with them."""
    return qemu_of(request.param[0]), original_qemu(request.param[1])


@pytest.fixture
def guest(lab: Lab, qemus: tuple[str, str]) -> Guest:
    """In a QEMU without the commands."""
    install(lab, qemus[0])
    guest = lab.guest("web1", "-machine", "vmport=off", qemu=str(lab.root / "qemu"))  # the minimal QEMU has no vmmouse
    guest.start()
    guest.until_counts()
    return guest


@pytest.mark.parametrize("act", ["load", "refresh"])
def test_a_guest_of_a_qemu_without_cpr_save(lab: Lab, qemus: tuple[str, str], guest: Guest, act: str) -> None:
    """Its state is a migration's, which cpr-load refuses."""
    if act == "load":
        guest.save()
        assert lab.cprctl("stop", "web1").returncode == 0
    install(lab, qemus[1])
    done = lab.cprctl(act, "web1")
    assert done.returncode == 0, done.stderr
    assert guest.state == "running"
    guest.assert_unbroken()
    guest.save()
    assert lab.cprctl("stop", "web1").returncode == 0
    guest.load()
    guest.assert_unbroken()


def test_another_agent_saves_what_came_from_a_qemu_without_cpr_save(lab: Lab, qemus: tuple[str, str], guest: Guest) -> None:
    """QEMU has the capability still that the load of a migration's state took; cpr-save must not ask for it."""
    guest.save()
    assert lab.cprctl("stop", "web1").returncode == 0
    install(lab, qemus[1])
    guest.load()
    lab.end_agent()
    lab.start_agent()
    guest.save()
    assert guest.properties["Checkpoint"]["dialect"] == "cpr-save"
    guest.load()
    guest.assert_unbroken()


@pytest.mark.parametrize("member", ["Resume", "CprLoad"])
def test_another_agent_goes_on_with_what_a_migration_saved(
    lab: Lab, qemus: tuple[str, str], guest: Guest, member: str
) -> None:
    """The agent that loads a migration's state saves by one, too; the next finds a QEMU with cpr-save, in postmigrate."""
    guest.save()
    assert lab.cprctl("stop", "web1").returncode == 0
    install(lab, qemus[1])
    guest.load()
    guest.save()
    lab.end_agent()
    lab.start_agent()
    assert guest.state == "saved"
    if member == "Resume":
        guest.call(member)
    else:
        guest.load()
    guest.assert_unbroken()
    guest.save()
    guest.load()
    guest.assert_unbroken()


@pytest.mark.parametrize("act", ["load", "refresh"])
def test_a_guest_of_a_qemu_with_cpr_save(lab: Lab, qemus: tuple[str, str], act: str) -> None:
    """A QEMU without the commands would load it without its ROMs, and it would be dead at its next reset."""
    stock, patched = qemus
    install(lab, patched)
    guest = lab.guest("web1", "-machine", "vmport=off", qemu=str(lab.root / "qemu"))
    guest.start()
    guest.until_counts()
    if act == "load":
        guest.save()
        assert lab.cprctl("stop", "web1").returncode == 0
    install(lab, stock)
    done = lab.cprctl(act, "web1")
    assert done.returncode != 0, done.stdout
    print(act, done.stderr)
    if act == "load":
        assert guest.state == "saved"
        install(lab, patched)
        guest.load()
    guest.assert_unbroken()
