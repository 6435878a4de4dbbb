# SPDX-License-Identifier: GPL-2.0-or-later
"""A load that must not be, or goes wrong: nothing is started, and guest and files stay as they were."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.lab import Guest, Lab, refused, script, until


def test_a_running_vm_is_not_loaded(lab: Lab) -> None:
    guest = lab.running()
    refused(guest, "AlreadyRunning", "was not touched")
    guest.assert_unbroken()


def test_nothing_saved_is_nothing_to_load(lab: Lab) -> None:
    refused(lab.guest(), "NoCheckpoint")


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (b"", "NotVmstate", "it is empty"),
        (b"#!/bin/sh\n", "NotVmstate", "it starts with"),
        (b"QEVM\x00\x00\x00\x02more", "NotVmstate", "version is 2"),
        (b"QEVM\x00\x00\x00\x03more", "ProofFailed", "not the state that was saved"),
    ],
)
def test_a_file_that_is_not_the_state(saved: Guest, content: bytes, kind: str, said: str) -> None:
    other = saved.lab.exports / "other"
    other.write_bytes(content)
    pid = saved.pid
    refused(saved, kind, said, filename=str(other))
    assert saved.state == "saved"
    assert saved.pid == pid
    saved.load()
    saved.assert_unbroken()


def test_a_truncated_state_is_refused(saved: Guest) -> None:
    whole = saved.checkpoint / "vmstate"
    content = whole.read_bytes()
    os.truncate(whole, len(content) - 1000)
    refused(saved, "ProofFailed", "not the state that was saved")
    whole.write_bytes(content)
    saved.load()
    saved.assert_unbroken()


def test_the_state_of_another_vm_is_refused_by_name(saved: Guest) -> None:
    other = saved.lab.running("web2")
    other.save()
    copy = saved.lab.exports / "copy"
    shutil.copy(other.checkpoint / "vmstate", copy)
    refused(saved, "ProofFailed", "the state of VM web2", filename=str(copy))
    for guest in (saved, other):
        guest.load()
        guest.assert_unbroken()


def test_changed_memory_is_never_loaded(saved: Guest) -> None:
    saved.call("Stop", "s", "hard")
    with saved.ram.open("r+b") as ram:
        ram.seek(8 << 20)
        ram.write(b"\xff" * 4096 * 64)
    refused(saved, "MemoryChanged", "its RAM is not what it was")
    assert saved.state == "held"
    assert "not what it was" in saved.properties["Problem"]
    assert saved.pid == 0
    assert (saved.checkpoint / "manifest.json").exists()
    refused(saved, "AlreadySaved", member="Start")


def test_replaced_memory_is_never_loaded(saved: Guest) -> None:
    saved.call("Stop", "s", "hard")
    aside = saved.ram.with_name("aside")
    saved.ram.rename(aside)
    shutil.copy(aside, saved.ram)
    refused(saved, "MemoryChanged", "inode was")
    saved.ram.unlink()
    aside.rename(saved.ram)
    saved.load()
    saved.assert_unbroken()


def test_lost_memory_is_not_created_anew(saved: Guest) -> None:
    saved.call("Stop", "s", "hard")
    saved.ram.unlink()
    refused(saved, "DeviceMissing", str(saved.ram))
    assert not saved.ram.exists()
    assert saved.state == "saved"


def test_a_qemu_that_dies_during_the_load_leaves_the_checkpoint(lab: Lab, tmp_path: Path) -> None:
    """The wrapper becomes QEMU for a start, and dies with a message for a load, as long as a file says so."""
    wrapper = script(
        tmp_path / "qemu",
        f'#!/bin/sh\ncase "$*" in *-incoming*) [ -e {tmp_path}/well ] || {{ echo "I do not feel well" >&2; exit 1; }};; '
        f'esac\nexec {lab.qemu} "$@"\n',
    )
    guest = lab.guest(qemu=wrapper)
    guest.start()
    guest.until_counts()
    guest.save()
    refused(guest, "LoadFailed", "I do not feel well", "can be repeated")
    assert guest.state == "saved"
    (tmp_path / "well").touch()
    guest.load()
    guest.assert_unbroken()


def test_a_state_that_qemu_refuses_leaves_the_checkpoint(lab: Lab, tmp_path: Path) -> None:
    """A device has another configuration space than when it was saved: QEMU exits, and says so on stderr alone."""
    wrapper = script(
        tmp_path / "qemu",
        f'#!/bin/sh\ncase "$*" in *-incoming*) [ -e {tmp_path}/well ] ||'
        f' set -- "$@" -global virtio-pci.disable-modern=on;; esac\nexec {lab.qemu} "$@" -device virtio-balloon-pci\n',
    )
    guest = lab.guest(qemu=wrapper)
    guest.start()
    guest.until_counts()
    guest.save()
    refused(guest, "LoadFailed", "can be repeated")
    assert guest.state == "saved"
    (tmp_path / "well").touch()
    guest.load()
    guest.assert_unbroken()


def test_a_damaged_manifest_is_never_guessed_at(saved: Guest) -> None:
    saved.call("Stop", "s", "hard")
    path = saved.checkpoint / "manifest.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"running"', b'"paused" '))
    refused(saved, "CheckpointUnreadable", "checksum", "cprctl discard web1")
    refused(saved, "CheckpointUnreadable", member="Start")
    assert path.exists()
    path.write_bytes(content)
    saved.load()
    saved.assert_unbroken()


def test_a_checkpoint_is_given_up_only_when_its_qemu_is_gone(saved: Guest) -> None:
    refused(saved, "WrongState", "cprctl resume web1", member="Discard")
    saved.call("Stop", "s", "hard")
    saved.call("Discard")
    assert saved.state == "stopped"
    refused(saved, "NoCheckpoint", member="Discard")
    saved.start()
    until(lambda: len(saved.report.boots) == 2, "a second boot")
