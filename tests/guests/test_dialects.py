# SPDX-License-Identifier: GPL-2.0-or-later
"""The conformance suite of tests/bus/test_dialects.py, with every QEMU of Debian that there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bus.conftest import qemu_of
from tests.bus.test_dialects import *  # noqa: F403 - the suite
from tests.guests.scenarios import in_host_vm
from tests.guests.tally import note
from tests.lab import Lab, refused

REAL = ["7.2", "10.0", "11.1"]
pytestmark = pytest.mark.counted


@pytest.fixture(params=REAL)
def each_qemu(request: pytest.FixtureRequest) -> str:
    note("dialect", request.param)
    return qemu_of(request.param)


@pytest.mark.parametrize(("old", "new"), [("7.2", "10.0"), ("7.2", "11.1"), ("10.0", "11.1")])
def test_saved_by_an_old_one_and_loaded_by_a_new_one(lab: Lab, old: str, new: str) -> None:
    """Its machine type is q35, which is another one in each of them: it is pinned. The way back is refused."""
    path = lab.root / "qemu"

    def installed(version: str) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(qemu_of(version))

    installed(old)
    guest = lab.guest(qemu=str(path))
    guest.start()
    guest.until_counts()
    guest.save()
    installed(new)
    guest.load()
    guest.assert_unbroken()
    assert guest.admin("query-version")["qemu"]["major"] == int(new.partition(".")[0])
    guest.save()
    installed(old)
    refused(guest, "MachineChanged", f"version of QEMU was {new}", f"is {old}")
    installed(new)
    guest.load()
    guest.assert_unbroken()


def test_qemu_is_upgraded_with_the_host(tmp_path: Path) -> None:
    """In the host VM, with a real kexec between the two."""
    in_host_vm("upgrade", tmp_path)
