# SPDX-License-Identifier: GPL-2.0-or-later
"""Storage that does not answer, as that of a server that is gone: it is the trouble of whose guest has it, alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpr_agent.bus.client import CallError
from tests.hostile.conftest import assert_contained
from tests.lab import Guest, Lab, until
from tests.silent_files import SilentFiles, silent_files

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
SOON_S = 8.0
"""Less than the agent's patience with a VM's storage."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SilentFiles]:
    (tmp_path / "mount").mkdir()
    with silent_files(tmp_path / "mount") as files:
        yield files


def on_server(lab: Lab, server: SilentFiles, name: str = "web1") -> Guest:
    drive = f"file={server.disk},format=raw,if=none,id=d1"
    return lab.running(name, "-drive", drive, "-device", "virtio-blk-pci,drive=d1,serial=d1")


def until_looked_at(guest: Guest, state: str) -> None:
    """No event tells that storage answers again."""

    def is_so() -> bool:
        guest.lab.client(lambda client: client.manager("Reload"))
        return guest.state == state

    until(is_so, f"{guest.name} {state}")


def test_a_program_that_waits_for_a_server_is_no_matter(lab: Lab, good: Guest, server: SilentFiles) -> None:
    """The walk for users of the RAM looks at the files of all processes."""
    with server.disk.open("rb"):
        server.fall_silent()
        began = time.monotonic()
        good.save()
        good.load()
        assert time.monotonic() - began < SOON_S
        server.speak()
    assert_contained(lab, good)


def test_others_are_saved_and_loaded_beside_one_without_its_disk(lab: Lab, good: Guest, server: SilentFiles) -> None:
    bad = on_server(lab, server)
    server.fall_silent()
    began = time.monotonic()
    good.save()
    good.load()
    assert time.monotonic() - began < SOON_S
    with pytest.raises(CallError, match=r"VM web1: the storage of its disks or firmware has not answered.*findmnt"):
        bad.save()
    found = lab.client(lambda client: client.manager("Check", "a{sv}", {}))
    errors = {finding["vm"] for finding in found if finding["severity"] == "error"}
    assert errors == {"web1"}, "its QEMU hangs too, once it was asked about its disk"
    for _ in range(2):
        with pytest.raises(CallError, match="VM web1"):
            bad.save()
    began = time.monotonic()
    good.save()
    good.load()
    assert time.monotonic() - began < SOON_S
    server.speak()
    until_looked_at(bad, "running")  # its QEMU answers again
    bad.save()
    bad.load()
    assert_contained(lab, good, bad)


def test_a_saved_guest_waits_for_its_disk_and_the_others_go_on(lab: Lab, good: Guest, server: SilentFiles) -> None:
    lab.settings(agent={"load-timeout": "15s"})
    lab.end_agent()
    lab.start_agent()
    bad = on_server(lab, server)
    assert lab.job("SaveAll", survives="qemu-restart") == "done"
    for guest in (good, bad):
        guest.call("Stop", "s", "hard")
    assert (good.state, bad.state) == ("saved", "saved")
    server.fall_silent()
    assert "web1" in lab.job("LoadAll")
    assert good.state == "running"
    assert bad.properties["Held"] == {}
    assert bad.state in ("saved", "unreachable"), "its next QEMU may wait in open(2), where nothing ends it"
    server.speak()
    until_looked_at(bad, "saved")  # the QEMU that was ended is gone
    bad.load()
    assert_contained(lab, good, bad)


def test_the_agent_ends_beside_a_disk_that_hangs_and_the_next_one_goes_on(
    lab: Lab, good: Guest, server: SilentFiles
) -> None:
    """A shutdown waits for its end, with all guests saved."""
    bad = on_server(lab, server)
    server.stop()
    with pytest.raises(CallError, match="has not answered"):
        bad.save()
    assert lab.end_agent() == 0
    lab.start_agent()
    good.save()
    good.load()
    server.go_on()
    assert_contained(lab, good)
