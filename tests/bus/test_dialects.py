# SPDX-License-Identifier: GPL-2.0-or-later
"""What every dialect has to do, whichever QEMU speaks it: the tests in tests/guests run them with more of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpr_agent.bus.client import CallError
from tests.lab import Lab, refused, script


def test_a_guest_goes_on_in_a_new_qemu(each_lab: Lab) -> None:
    guest = each_lab.running()
    old = guest.pid
    guest.save()
    assert guest.state == "saved"
    assert guest.properties["Checkpoint"]["survives"] == "qemu-restart"
    guest.load()
    assert guest.state == "running"
    assert guest.pid != old
    guest.assert_unbroken()
    assert guest.checkpoint_files() == ["manifest.json.loaded", "vmstate.loaded"]


def test_a_guest_is_saved_and_loaded_many_times(each_lab: Lab) -> None:
    guest = each_lab.running()
    for _ in range(3):
        guest.save()
        guest.load()
        guest.until_counts()
    guest.assert_unbroken()


def test_a_save_is_taken_back_in_place(each_lab: Lab) -> None:
    guest = each_lab.running()
    old = guest.pid
    guest.save()
    guest.call("Resume")
    assert guest.pid == old
    guest.assert_unbroken()
    guest.save()
    guest.load()
    guest.assert_unbroken()


def test_a_paused_guest_stays_paused(each_lab: Lab) -> None:
    guest = each_lab.running()
    guest.admin("stop")
    guest.until_state("paused")
    last = guest.report.last
    guest.save()
    assert guest.properties["Checkpoint"]["run-state"] == "paused"
    guest.load()
    assert guest.state == "paused"
    assert guest.report.last == last
    guest.call("Resume")
    guest.assert_unbroken()


def test_taking_back_the_save_of_a_paused_guest_leaves_it_paused(each_lab: Lab) -> None:
    guest = each_lab.running()
    guest.admin("stop")
    guest.until_state("paused")
    guest.save()
    guest.call("Resume")
    assert guest.state == "paused"
    guest.admin("cont")
    guest.assert_unbroken()


def test_unnamed_ram_is_refused(each_lab: Lab) -> None:
    guest = each_lab.running("web1", "-object", "memory-backend-memfd,id=extra,size=16M,share=on")
    refused(guest, "Blocked", "extra", "no name outside QEMU", member="CprSave")
    guest.assert_unbroken()


@contextlib.contextmanager
def small_disk(lab: Lab, size: str) -> Iterator[Callable[[str], None]]:
    """For checkpoints; the value gives it another size."""
    checkpoints = lab.state / "checkpoints"
    checkpoints.mkdir(mode=0o700)
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")

    def mount(option: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", checkpoints], check=True)

    mount(f"size={size},mode=700")
    try:
        yield lambda size: mount(f"remount,size={size}")
    finally:
        lab.close()
        subprocess.run(["umount", "--lazy", checkpoints], check=True)


def test_a_full_disk_leaves_the_guest_running(each_lab: Lab) -> None:
    guest = each_lab.running()
    with small_disk(each_lab, "16k") as resize:
        refused(guest, "SaveFailed", "No space left", "as before", member="CprSave")
        guest.assert_unbroken()
        assert guest.checkpoint_files() == []
        resize("8m")
        guest.save()
        guest.load()
        guest.assert_unbroken()


def test_a_disk_that_is_full_at_any_byte_leaves_a_paused_guest_whole(each_lab: Lab) -> None:
    """QEMU 7.2 says postmigrate after a write that failed late. An admin can let the guest go on then."""
    guest = each_lab.running()
    guest.admin("stop")
    guest.until_state("paused")
    failed = 0
    with small_disk(each_lab, "16k") as resize:
        for size_kb in range(16, 2048, 48):
            resize(f"{size_kb}k")
            try:
                guest.save()
                break
            except CallError as error:
                failed += 1
                assert error.kind == "SaveFailed", error
                assert guest.state == "paused", error
                assert guest.checkpoint_files() == []
            if guest.admin("query-status")["status"] == "postmigrate":
                guest.call("Resume")
                guest.admin("stop")
                guest.until_state("paused")
        assert failed > 3
        guest.load()
        guest.call("Resume")
        guest.assert_unbroken()


def test_a_state_that_may_not_be_written_whole_leaves_the_guest_running(each_lab: Lab, tmp_path: Path) -> None:
    small = script(tmp_path / "qemu", f'#!/bin/bash\nulimit -c 0 -f 16\nexec {each_lab.qemu} "$@"\n')
    guest = each_lab.guest(qemu=small)
    guest.start()
    guest.until_counts()
    refused(guest, "SaveFailed", "File too large", "as before", member="CprSave")
    assert guest.checkpoint_files() == []
    guest.assert_unbroken()


def test_a_guest_that_is_set_up_for_colo_is_refused(each_lab: Lab) -> None:
    guest = each_lab.running()
    wanted = [
        {"capability": name, "state": True} for name in ("return-path", "x-colo")
    ]  # 11.1 has the one only with the other
    guest.admin("migrate-set-capabilities", capabilities=wanted)
    refused(guest, "Blocked", "x-colo", member="CprSave")
    guest.assert_unbroken()
