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


@pytest.fixture
def guest(lab: Lab) -> Guest:
    """In a QEMU without the commands."""
    install(lab, qemu_of("7.2"))
    guest = lab.guest("web1", "-machine", "vmport=off", qemu=str(lab.root / "qemu"))  # the minimal QEMU has no vmmouse
    guest.start()
    guest.until_counts()
    return guest


@pytest.mark.parametrize("act", ["load", "refresh"])
def test_a_guest_of_a_qemu_without_cpr_save(lab: Lab, guest: Guest, act: str) -> None:
    """Its state is a migration's, which cpr-load refuses."""
    if act == "load":
        guest.save()
        assert lab.cprctl("stop", "web1").returncode == 0
    install(lab, original_qemu("12"))
    done = lab.cprctl(act, "web1")
    assert done.returncode == 0, done.stderr
    assert guest.state == "running"
    guest.assert_unbroken()
    guest.save()
    assert lab.cprctl("stop", "web1").returncode == 0
    guest.load()
    guest.assert_unbroken()
