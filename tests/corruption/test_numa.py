# SPDX-License-Identifier: GPL-2.0-or-later
"""RAM in two pieces: whatever happens to either, or to which is which, must be noticed. QEMU itself takes swapped ones of
equal size (measured)."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cpr_agent.memory.witness import PAGE
from tests.corruption.tally import caught, loads
from tests.corruption.test_ram import damage, poke, stopped
from tests.lab import Guest, Lab

MIB = 1 << 20


def saved(lab: Lab, *sizes: int) -> Guest:
    guest = lab.numa_guest("web1", *sizes)
    guest.start()
    guest.until_counts()
    return stopped(guest)


@pytest.fixture
def kept(lab: Lab) -> Guest:
    """Together more pages than the witness samples; half of what the tiny guest looks after is in the second one."""
    return saved(lab, 8 * MIB, 56 * MIB)


@pytest.fixture
def alike(lab: Lab) -> Guest:
    return saved(lab, 8 * MIB, 8 * MIB)


@pytest.mark.parametrize("number", [0, 1])
def test_either_is_zeroed_shifted_or_damaged(kept: Guest, number: int) -> None:
    ram = kept.rams[number]
    content = ram.read_bytes()
    for other in (bytes(len(content)), content[PAGE:] + content[:PAGE], content[-PAGE:] + content[:-PAGE]):
        poke(ram, 0, other)
        caught(kept, "MemoryChanged", "its RAM is not what it was")
    poke(ram, 0, content)
    last = len(content) // PAGE - 1
    for pages in ([0], [last], random.Random(number).sample(range(1, last), last // 100)):
        damage(ram, pages)
        caught(kept, "MemoryChanged", "sampled")
        damage(ram, pages)
    loads(kept)


@pytest.mark.parametrize("number", [0, 1])
def test_one_byte_of_either_under_a_full_witness(lab: Lab, number: int) -> None:
    lab.end_agent()
    lab.settings(witness={"kind": "full"})
    lab.start_agent()
    kept = saved(lab, 8 * MIB, 56 * MIB)
    page = random.Random(number).randrange(kept.rams[number].stat().st_size // PAGE)
    damage(kept.rams[number], [page])
    caught(kept, "MemoryChanged", "full")
    damage(kept.rams[number], [page])
    loads(kept)


def swap_files(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def swap_contents(one: Path, other: Path) -> None:
    contents = one.read_bytes(), other.read_bytes()
    poke(one, 0, contents[1])
    poke(other, 0, contents[0])


@pytest.mark.parametrize(
    ("swap", "said"), [(swap_files, "inode was"), (swap_contents, "its RAM is not what it was")], ids=["files", "contents"]
)
def test_the_two_are_swapped(alike: Guest, swap: Callable[[Path, Path], None], said: str) -> None:
    swap(*alike.rams)
    caught(alike, "MemoryChanged", said)
    swap(*alike.rams)
    loads(alike)


def test_both_are_the_first(alike: Guest) -> None:
    first, second = alike.rams
    aside = second.with_name("aside")
    second.rename(aside)
    os.link(first, second)
    caught(alike, "MemoryChanged", "inode was")
    second.unlink()
    aside.rename(second)
    loads(alike)


@pytest.mark.parametrize("number", [0, 1])
def test_either_is_another_file_or_none(alike: Guest, number: int) -> None:
    ram = alike.rams[number]
    aside = ram.with_name("aside")
    ram.rename(aside)
    caught(alike, "DeviceMissing", f"{ram} cannot be found")
    shutil.copy(aside, ram)
    caught(alike, "MemoryChanged", f"{ram} is not the memory that its guest is in", "inode was")
    aside.rename(ram)
    loads(alike)


def test_the_ram_of_another_guest_in_the_second(lab: Lab, alike: Guest) -> None:
    other = lab.numa_guest("web2")
    other.start()
    other.until_counts()
    content = alike.rams[1].read_bytes()
    poke(alike.rams[1], 0, other.rams[1].read_bytes())
    caught(alike, "MemoryChanged", "its RAM is not what it was")
    poke(alike.rams[1], 0, content)
    loads(alike)
    other.assert_unbroken()
