# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that callers name: below the configured directories, and by no detour that somebody else could have laid."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab import Guest, Lab, refused

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="giving files to another user needs root")
NOBODY = 65534


def nothing_happened(guest: Guest, *places: Path) -> None:
    assert guest.checkpoint_files() == []
    for place in places:
        assert list(place.iterdir()) == []
    guest.assert_unbroken()


@pytest.fixture
def guest(lab: Lab) -> Guest:
    return lab.running()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    place = tmp_path / "elsewhere"
    place.mkdir()
    return place


def forged(exports: Path, elsewhere: Path) -> list[tuple[str, str]]:
    (exports / "link").symlink_to(elsewhere)
    (exports / "file").write_text("")
    (exports / "sub").mkdir()
    return [
        ("state", "is not an absolute path"),
        (f"{exports}/../../state", "is not an absolute path"),
        (f"{exports}/sub/../state", "is not an absolute path"),
        (f"{elsewhere}/state", "not below a directory that state files may be in"),
        (f"{exports}-evil/state", "not below a directory that state files may be in"),
        ("/proc/self/fd/3", "not below a directory that state files may be in"),
        ("/dev/stdout", "not below a directory that state files may be in"),
        ("/etc/cron.d/state", "not below a directory that state files may be in"),
        (f"/proc/self/root{exports}/state", "not below a directory that state files may be in"),
        (f"{exports}/link/state", f"{exports}/link is a symbolic link"),
        (f"{exports}/file/state", "file is not a directory"),
        (f"{exports}/none/state", "No such file or directory"),
        (f"{exports}/file", "exists"),
    ]


def test_forged_paths_of_a_save(lab: Lab, guest: Guest, elsewhere: Path) -> None:
    paths = forged(lab.exports, elsewhere)
    before = sorted(lab.exports.iterdir())
    for path, said in paths:
        refused(guest, "InvalidArgument", said, member="CprSave", filename=path)
    assert sorted(lab.exports.iterdir()) == before
    nothing_happened(guest, elsewhere)


def test_forged_paths_of_a_load(lab: Lab, guest: Guest, elsewhere: Path) -> None:
    guest.save(f"{lab.exports}/state")
    real = lab.exports / "state"
    os.link(real, elsewhere / "state")
    paths = forged(lab.exports, elsewhere)
    os.mkfifo(lab.exports / "fifo")
    (lab.exports / "to-state").symlink_to(real)
    for path, said in paths[:-1]:
        refused(guest, "InvalidArgument", said, filename=path)
    refused(guest, "NotVmstate", "it is empty", filename=f"{lab.exports}/file")
    refused(guest, "NotVmstate", "it is not a regular file", filename=f"{lab.exports}/fifo")
    refused(guest, "NotVmstate", "symbolic link", filename=f"{lab.exports}/to-state")
    guest.load(str(real))
    guest.assert_unbroken()


def test_a_link_under_the_name_of_a_save(lab: Lab, guest: Guest, elsewhere: Path) -> None:
    (lab.exports / "state").symlink_to(elsewhere / "new")
    refused(guest, "InvalidArgument", "exists", member="CprSave", filename=f"{lab.exports}/state")
    (lab.exports / "state").unlink()
    (lab.exports / ".state.saving").symlink_to(elsewhere / "new")
    guest.save(f"{lab.exports}/state")
    assert list(elsewhere.iterdir()) == []
    guest.load(f"{lab.exports}/state")
    guest.assert_unbroken()


def give_to_a_group(place: Path) -> None:
    os.chown(place, 0, NOBODY)
    place.chmod(0o770)


@AS_ROOT
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda place: place.chmod(0o777), "others may write to"),
        (lambda place: place.chmod(0o1777), "others may write to"),
        (lambda place: os.chown(place, NOBODY, NOBODY), f"belongs to user {NOBODY}"),
        (give_to_a_group, "others may write to"),
    ],
)
@pytest.mark.parametrize("below", [False, True])
def test_a_directory_that_others_may_change(
    lab: Lab, guest: Guest, change: Callable[[Path], object], said: str, *, below: bool
) -> None:
    place = lab.exports / "shared"
    target = place / "below" if below else place
    target.mkdir(parents=True)
    if below:
        (place / "below").chmod(0o700)
    change(place)
    if below and place.stat().st_mode & 0o1000:
        guest.save(f"{target}/state")  # what is root's in a directory with a sticky bit nobody else can move
        return
    refused(guest, "InvalidArgument", said, member="CprSave", filename=f"{target}/state")
    nothing_happened(guest, target)


@AS_ROOT
def test_a_race_by_renaming(lab: Lab, guest: Guest, elsewhere: Path) -> None:
    """Somebody who may write to a directory swaps what is in it for a link, all the time. It must not matter when."""
    shared = lab.exports / "shared"
    (shared / "real").mkdir(parents=True)
    os.chown(shared, NOBODY, NOBODY)
    (shared / "link").symlink_to(elsewhere)
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            (shared / "real").rename(shared / "aside")
            (shared / "link").rename(shared / "real")
            (shared / "real").rename(shared / "link")
            (shared / "aside").rename(shared / "real")

    attacker = threading.Thread(target=swap)
    attacker.start()
    try:
        for _ in range(50):
            refused(guest, "InvalidArgument", "can't be a state file", member="CprSave", filename=f"{shared}/real/state")
    finally:
        over.set()
        attacker.join()
    nothing_happened(guest, elsewhere, shared / "real")
