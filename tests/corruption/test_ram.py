# SPDX-License-Identifier: GPL-2.0-or-later
"""RAM that is not what it was: by its contents, or because it is another memory."""

from __future__ import annotations

import math
import mmap
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from cpr_agent.core.model import Located, MemoryIdentity, Survives
from cpr_agent.memory.witness import PAGE, new_witness, take_witness
from tests.corruption.tally import caught, loads
from tests.lab import Guest, Lab

SIZE = 64 << 20
"""More pages than the witness samples."""


@pytest.fixture
def kept(lab: Lab) -> Guest:
    """Saved, its QEMU gone, with a RAM that the sampled witness does not see the whole of."""
    return stopped(lab.running("web1", size=str(SIZE)))


def stopped(guest: Guest) -> Guest:
    guest.save()
    guest.call("Stop", "s", "hard")
    return guest


def poke(path: Path, offset: int, data: bytes) -> None:
    """In place: the file stays the one that it was."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def damage(path: Path, pages: list[int]) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as ram:
        for page in pages:
            ram[page * PAGE] ^= 0xFF


def test_ram_that_is_zeroed(kept: Guest) -> None:
    content = kept.ram.read_bytes()
    poke(kept.ram, 0, bytes(SIZE))
    caught(kept, "MemoryChanged", "its RAM is not what it was")
    poke(kept.ram, 0, content)
    loads(kept)


def test_ram_that_is_shifted_by_a_page(kept: Guest) -> None:
    content = kept.ram.read_bytes()
    for shifted in (content[PAGE:] + content[:PAGE], content[-PAGE:] + content[:-PAGE]):
        poke(kept.ram, 0, shifted)
        caught(kept, "MemoryChanged", "its RAM is not what it was")
    poke(kept.ram, 0, content)
    loads(kept)


def test_one_byte_under_a_full_witness(lab: Lab) -> None:
    lab.end_agent()
    lab.settings(witness={"kind": "full"})
    lab.start_agent()
    guest = stopped(lab.running("web1", size=str(SIZE)))
    for seed in range(10):
        offset = random.Random(seed).randrange(SIZE)
        with guest.ram.open("rb") as file:
            byte = os.pread(file.fileno(), 1, offset)[0]
        poke(guest.ram, offset, bytes([byte ^ 1 << seed % 8]))
        caught(guest, "MemoryChanged", "its RAM is not what it was")
        poke(guest.ram, offset, bytes([byte]))
    loads(guest)


def test_one_page_in_a_hundred_under_a_sampled_witness(kept: Guest) -> None:
    for seed in range(10):
        pages = random.Random(seed).sample(range(SIZE // PAGE), SIZE // PAGE // 100)
        damage(kept.ram, pages)
        caught(kept, "MemoryChanged", "sampled")
        damage(kept.ram, pages)
    loads(kept)


@pytest.mark.parametrize("pages", [16, 64, 256])
def test_sampling_notices_as_often_as_its_formula_says(kept: Guest, pages: int) -> None:
    """Measured with so few pages that it misses some; four standard deviations are what chance may add."""
    fraction, seeds = 0.01, 1000
    file = kept.ram.stat()
    identity = MemoryIdentity(
        kind="file",
        size_bytes=SIZE,
        offset_bytes=0,
        survives=Survives.QEMU_RESTART,
        st_dev=file.st_dev,
        inode=file.st_ino,
    )
    located = Located(identity=identity, node=str(kept.ram))
    noticed = 0
    for seed in range(seeds):
        like = replace(new_witness("sampled"), seed=seed, pages=pages)
        before = take_witness([located], like)
        hit = random.Random(-1 - seed).sample(range(SIZE // PAGE), int(SIZE // PAGE * fraction))
        damage(kept.ram, hit)
        noticed += take_witness([located], like) != before
        damage(kept.ram, hit)
    expected = 1 - (1 - fraction) ** pages
    measured = noticed / seeds
    print(f"sampled, {pages} pages, 1 % damaged: noticed {measured:.3f} of {seeds} seeds, formula {expected:.3f}")
    assert abs(measured - expected) < 4 * math.sqrt(expected * (1 - expected) / seeds) + 1 / seeds
    loads(kept)


def test_the_ram_of_two_guests_is_swapped(lab: Lab) -> None:
    one, two = (stopped(lab.running(name)) for name in ("web1", "web2"))
    first, second = one.ram.read_bytes(), two.ram.read_bytes()
    for swapped in ((second, first), (first, second)):
        for guest, content in zip((one, two), swapped, strict=True):
            poke(guest.ram, 0, content)
        if swapped[0] == second:
            for guest in (one, two):
                caught(guest, "MemoryChanged", "its RAM is not what it was")
    aside = one.ram.with_name("aside")
    for old, new in ((one.ram, aside), (two.ram, one.ram), (aside, two.ram)):
        old.rename(new)
    for guest in (one, two):
        caught(guest, "MemoryChanged", "inode was")
    for old, new in ((one.ram, aside), (two.ram, one.ram), (aside, two.ram)):
        old.rename(new)
    for guest in (one, two):
        loads(guest)


def test_another_object_under_the_name_of_the_memory(kept: Guest) -> None:
    aside = kept.ram.with_name("aside")
    kept.ram.rename(aside)
    caught(kept, "DeviceMissing", str(kept.ram))
    shutil.copy(aside, kept.ram)
    caught(kept, "MemoryChanged", "inode was")
    kept.ram.unlink()
    kept.ram.symlink_to(aside)
    caught(kept, "MemoryChanged", "not a regular file")
    kept.ram.unlink()
    kept.ram.mkdir()
    caught(kept, "MemoryChanged", "a directory")
    kept.ram.rmdir()
    os.mkfifo(kept.ram)
    caught(kept, "MemoryChanged", "not a regular file")
    kept.ram.unlink()
    aside.rename(kept.ram)
    loads(kept)


@pytest.mark.parametrize("by", [-PAGE, PAGE])
def test_memory_that_is_smaller_or_larger(kept: Guest, by: int) -> None:
    content = kept.ram.read_bytes()
    os.truncate(kept.ram, SIZE + by)
    caught(kept, "MemoryChanged", "bytes" if by < 0 else "device_size_bytes was")
    os.truncate(kept.ram, SIZE)
    poke(kept.ram, 0, content)
    loads(kept)


def test_a_touch_is_harmless(kept: Guest) -> None:
    os.utime(kept.ram)
    kept.ram.chmod(0o640)
    loads(kept)


INTRUDER = "import sys; f = open(sys.argv[1], 'r+b'); print('open', flush=True); sys.stdin.read()"


def test_memory_that_another_process_holds_open(kept: Guest) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", INTRUDER, kept.ram], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdin
        process.stdout.readline()
        caught(kept, "MemoryInUse", f"({process.pid})")
        process.stdin.close()
    loads(kept)


@pytest.fixture
def huge(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two hugetlbfs, of 2 MiB and of 1 GiB pages, with room for 1 GiB each."""
    sizes = {"2048kB": 512, "1048576kB": 1}
    pools = {Path(f"/sys/kernel/mm/hugepages/hugepages-{size}/nr_hugepages"): count for size, count in sizes.items()}
    had = {pool: pool.read_text() for pool in pools if pool.exists()}
    mounts = []
    try:
        for pool, count in pools.items():
            if pool.exists():
                pool.write_text(str(count + int(had[pool])))
            if not pool.exists() or int(pool.read_text()) < count + int(had[pool]):
                pytest.skip(f"this machine gives no {count} pages in {pool.parent.name}")
        for name, size in (("small", "2M"), ("large", "1G")):
            directory = tmp_path / name
            directory.mkdir()
            subprocess.run(["mount", "-t", "hugetlbfs", "-o", f"pagesize={size}", "none", directory], check=True)
            mounts.append(directory)
        yield mounts[0], mounts[1]
    finally:
        for directory in mounts:
            subprocess.run(["umount", "--lazy", directory], check=True)
        for pool, before in had.items():
            pool.write_text(before)


def test_hugepages_of_another_size(lab: Lab, huge: tuple[Path, Path]) -> None:
    """The file system under the memory's path has pages of 1 GiB now, and the same contents."""
    small, large = huge
    guest = lab.running("web1", device=str(small / "web1"), size="1G")
    stopped(guest)
    with (small / "web1").open("rb") as source, (large / "web1").open("w+b") as target:
        os.truncate(target.fileno(), 1 << 30)
        with (
            mmap.mmap(source.fileno(), 1 << 30, prot=mmap.PROT_READ) as was,
            mmap.mmap(target.fileno(), 1 << 30) as now,
        ):
            now[:] = was[:]
    subprocess.run(["mount", "--bind", large, small], check=True)
    try:
        text = caught(guest, "MemoryChanged", "page_bytes was 2097152, is 1073741824")
        assert "witness" not in text
    finally:
        subprocess.run(["umount", small], check=True)
    loads(guest)
    guest.call("Stop", "s", "hard")
