# SPDX-License-Identifier: GPL-2.0-or-later
"""Checkpoints that are damaged, cut off, of another VM, or of another day."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.corruption.tally import caught, loads
from tests.lab import Guest, Lab

FLIPS, CUTS, MANIFEST_FLIPS = 200, 50, 50


@pytest.fixture
def kept(saved: Guest) -> Guest:
    saved.call("Stop", "s", "hard")
    return saved


@pytest.fixture
def state(kept: Guest) -> Iterator[Path]:
    """The state file; whatever a test does to it is put right, and then the guest must load."""
    path = kept.checkpoint / "vmstate"
    content = path.read_bytes()
    yield path
    path.write_bytes(content)
    loads(kept)


def test_bits_of_the_state_flip(kept: Guest, state: Path) -> None:
    content = state.read_bytes()
    for seed in range(FLIPS):
        chance = random.Random(seed)
        offset, bit = chance.randrange(len(content)), chance.randrange(8)
        flipped = bytearray(content)
        flipped[offset] ^= 1 << bit
        state.write_bytes(flipped)
        caught(kept, "NotVmstate" if offset < 8 else "ProofFailed", str(state))


def test_the_state_is_cut_off(kept: Guest, state: Path) -> None:
    content = state.read_bytes()
    for seed in range(CUTS):
        length = random.Random(seed).randrange(len(content))
        state.write_bytes(content[:length])
        caught(kept, "NotVmstate" if length < 8 else "ProofFailed", str(state))
    state.write_bytes(content + b"\0")
    caught(kept, "ProofFailed", str(state))


def test_the_state_is_gone_or_something_else(kept: Guest, state: Path) -> None:
    aside = state.with_name("aside")
    state.rename(aside)
    caught(kept, "NotVmstate", "cannot be opened")
    state.symlink_to(aside)
    caught(kept, "NotVmstate", "cannot be opened")
    state.unlink()
    state.mkdir()
    caught(kept, "NotVmstate", "not a regular file")
    state.rmdir()
    aside.rename(state)


def test_a_copy_of_the_state_is_as_good(kept: Guest) -> None:
    path = kept.checkpoint / "vmstate"
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").rename(path)
    loads(kept)


def test_the_state_of_another_vm(kept: Guest, state: Path) -> None:
    other = kept.lab.running("web2")
    other.save()
    shutil.copy(other.checkpoint / "vmstate", state)
    caught(kept, "ProofFailed", "is the state of VM web2")


@pytest.mark.usefixtures("state")
def test_the_whole_checkpoint_of_another_vm(kept: Guest) -> None:
    other = kept.lab.running("web2")
    other.save()
    manifest = kept.checkpoint / "manifest.json"
    content = manifest.read_bytes()
    shutil.copy(other.checkpoint / "manifest.json", manifest)
    caught(kept, "CheckpointUnreadable", "belongs to VM web2")
    manifest.write_bytes(content)


def test_an_older_state(lab: Lab) -> None:
    guest = lab.running()
    guest.save()
    older = (guest.checkpoint / "vmstate").read_bytes()
    guest.load()
    guest.until_counts()
    guest.save()
    guest.call("Stop", "s", "hard")
    newer = (guest.checkpoint / "vmstate").read_bytes()
    (guest.checkpoint / "vmstate").write_bytes(older)
    caught(guest, "ProofFailed", "not the state that was saved")
    (guest.checkpoint / "vmstate").write_bytes(newer)
    loads(guest)


@pytest.mark.parametrize("how", ["Load", "Resume"])
def test_an_older_checkpoint_from_a_backup(lab: Lab, how: str) -> None:
    """Manifest and state fit each other, but the guest has run since, so that its RAM fits neither. It is known by its
    id: a witness that samples could miss the few pages that a short run changes."""
    lab.end_agent()
    lab.settings(witness={"kind": "off"})
    lab.start_agent()
    guest = lab.running()
    guest.save()
    backup = {name: (guest.checkpoint / name).read_bytes() for name in ("manifest.json", "vmstate")}
    guest.load() if how == "Load" else guest.call("Resume")
    guest.until_counts()
    guest.call("Stop", "s", "hard")
    for name, content in backup.items():
        (guest.checkpoint / name).write_bytes(content)
    caught(guest, "ProofFailed", "has run since")


def test_bits_of_the_manifest_flip(kept: Guest) -> None:
    """Among them those of its argument list."""
    path = kept.checkpoint / "manifest.json"
    content = path.read_bytes()
    for seed in range(MANIFEST_FLIPS):
        chance = random.Random(seed)
        flipped = bytearray(content)
        flipped[chance.randrange(len(content) - 1)] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        caught(kept, "CheckpointUnreadable", "cannot be read")
    path.write_bytes(content.replace(b'"-nodefaults"', b'"-no-reboot" '))
    caught(kept, "CheckpointUnreadable", "checksum")
    path.write_bytes(content)
    loads(kept)
