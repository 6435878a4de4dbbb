# SPDX-License-Identifier: GPL-2.0-or-later
"""What is proved before a load, beyond the state file and the RAM: disks, and that nobody else has the memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpr_agent.bus.client import CallError
from tests.lab import Guest, Lab, until


@pytest.fixture
def disk(each_lab: Lab) -> Path:
    path = each_lab.root / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "8M"], check=True)
    return path


@pytest.fixture
def saved(each_lab: Lab, disk: Path) -> Guest:
    """Saved with a disk, and its QEMU gone."""
    guest = each_lab.running("web1", "-drive", f"file={disk},if=virtio,format=qcow2")
    guest.save()
    guest.call("Stop", "s", "hard")
    return guest


def touch(path: Path) -> None:
    os.utime(path)


def grow(path: Path) -> None:
    keep = path.stat()
    with path.open("ab") as file:
        file.write(bytes(512))
    os.utime(path, ns=(keep.st_atime_ns, keep.st_mtime_ns))


def replace(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").rename(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [(touch, "mtime_ns was"), (grow, "size_bytes was"), (replace, "inode was"), (Path.unlink, "kind was file, is missing")],
)
def test_a_disk_that_changed_holds_the_guest(saved: Guest, disk: Path, change: Callable[[Path], None], said: str) -> None:
    change(disk)
    with pytest.raises(CallError, match=said) as caught:
        saved.load()
    assert caught.value.kind == "DiskChanged"
    assert str(disk) in str(caught.value)
    assert saved.state == "held"
    assert saved.pid == 0
    assert "manifest.json" in saved.checkpoint_files()


def test_a_disk_that_nobody_touched_is_no_obstacle(saved: Guest) -> None:
    saved.load()
    saved.assert_unbroken()


OPEN = "import sys, time; f = open(sys.argv[1], 'r+b'); print('open', flush=True); sys.stdin.read()"
MAPPED = (
    "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 4096); f.close(); "
    "print('mapped', flush=True); sys.stdin.read()"
)


@pytest.fixture(params=[OPEN, MAPPED], ids=["open", "mapped"])
def intruder(saved: Guest, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", request.param, saved.ram], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdin
        process.stdout.readline()
        yield process
        process.stdin.close()


def test_a_process_that_has_the_memory_is_named(saved: Guest, intruder: subprocess.Popen[str]) -> None:
    with pytest.raises(CallError, match=rf"python\S* \({intruder.pid}\)") as caught:
        saved.load()
    assert caught.value.kind == "MemoryInUse"
    assert intruder.stdin
    intruder.stdin.close()
    intruder.wait()
    saved.load()
    saved.assert_unbroken()


def test_a_held_guest_shows_what_was_expected_and_found(lab: Lab) -> None:
    guest = lab.running()
    guest.save()
    guest.call("Stop", "s", "hard")
    with guest.ram.open("r+b") as ram:
        ram.write(b"\xff" * 4096)
    with pytest.raises(CallError):
        guest.load()
    held = guest.properties["Held"]
    assert held["error"] == "MemoryChanged"
    ((what, expected, found),) = held["evidence"]
    shown = lab.cprctl("status", guest.name).stdout
    for words in ("Held since", "PROOF", "EXPECTED", "FOUND", what, expected, found):
        assert words in shown


def test_lost_memory_is_started_afresh_where_that_is_wanted(lab: Lab) -> None:
    guest = lab.running()
    guest.definition["load"] = {"on-lost-memory": "cold-start"}
    lab.define(guest)
    guest.save()
    guest.call("Stop", "s", "hard")
    size = guest.ram.stat().st_size
    with guest.ram.open("r+b") as ram:
        ram.write(bytes(size))
    assert lab.job("LoadAll") == "done"
    until(lambda: len(guest.report.boots) == 2, "it boots again")
    assert guest.state == "running"
    assert guest.checkpoint_files() == ["manifest.json.lost", "vmstate.lost"]


def test_a_check_measures_the_witness(lab: Lab) -> None:
    guest = lab.running()
    (found,) = [finding for finding in guest.call("Check") if finding["code"] == "witness"]
    assert 0 < found["seconds"] < 60
    assert "sampled, 4096 pages" in found["what"]
    guest.assert_unbroken()
