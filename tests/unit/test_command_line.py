# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel command lines: the words that guest RAM hangs on."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpr_agent.core.upgrade.command_line import blacklisted, lost_and_added, memory_arguments, without_boot_loader

LINE = "BOOT_IMAGE=/boot/vmlinuz-6.12 root=UUID=a ro quiet memmap=4G!8G hugepagesz=1G hugepages=4 nfit.force_enable_dimms=1"
PLAIN = ("quiet", "ro", "root=/dev/sda1", "numa_balancing=0", "acpi=noirq", "memtest=1", "console=ttyS0,115200")
MEMORY = ("memmap=4G!8G", "memmap=4G!16G", "mem=8G", "hugepages=4", "movable_node", "nd_pmem.x=1", "acpi=off")


def test_memory_arguments_are_found_in_order() -> None:
    assert memory_arguments(LINE) == ["memmap=4G!8G", "hugepagesz=1G", "hugepages=4", "nfit.force_enable_dimms=1"]


@pytest.mark.parametrize(
    "word",
    [
        *MEMORY,
        "memmap=exactmap",
        "kho=on",
        "kho_scratch=512M,512M",
        "crashkernel=512M,high",
        "default_hugepagesz=1G",
        "reserve_mem=12M:4096:trace",
        "numa=off",
        "efi=debug,nosoftreserve",
        "noefi",
        "acpi_rsdp=0x7fe",
        "mem_encrypt=on",
        "dax_hmem.region_idle=1",
        "device-hmem.disable=1",
    ],
)
def test_this_word_shapes_memory(word: str) -> None:
    assert memory_arguments(f"quiet {word} ro") == [word]


@pytest.mark.parametrize("word", [*PLAIN, "efi=debug", "nfit.dyndbg=+p", "memmap", "i915.mem=1", "module_blacklist=nfit"])
def test_this_word_does_not(word: str) -> None:
    assert memory_arguments(word) == []


def test_quotes_protect_spaces() -> None:
    assert memory_arguments('dyndbg="file memmap=1G!1G +p" memmap=4G!8G') == ["memmap=4G!8G"]
    assert memory_arguments('"memmap=4G!8G" x="never closed memmap=1G!1G') == ['"memmap=4G!8G"']


def test_dashes_and_underscores_are_the_same_in_names_only() -> None:
    assert lost_and_added("movable_node nd_pmem.a=b_c", "movable-node nd-pmem.a=b_c") == ([], [])
    assert lost_and_added("nd_pmem.a=b_c", "nd_pmem.a=b-c") == (["nd_pmem.a=b_c"], ["nd_pmem.a=b-c"])


def test_quotes_make_no_difference() -> None:
    assert lost_and_added("memmap=4G!8G", '"memmap=4G!8G"') == ([], [])
    assert lost_and_added("memmap=4G!8G", 'memmap="4G!8G"') == ([], [])


def test_what_follows_two_dashes_is_for_init() -> None:
    assert memory_arguments("memmap=4G!8G -- memmap=4G!16G") == ["memmap=4G!8G"]
    assert lost_and_added("memmap=4G!8G", "-- memmap=4G!8G") == (["memmap=4G!8G"], [])
    assert blacklisted("-- module_blacklist=nfit") == set()


def test_a_second_memmap_that_is_gone_is_missed() -> None:
    assert lost_and_added("memmap=4G!8G memmap=4G!8G", "memmap=4G!8G memmap=1G!8G") == (["memmap=4G!8G"], ["memmap=1G!8G"])


words = st.lists(st.sampled_from(PLAIN + MEMORY))


@given(words, words)
def test_lost_and_added_are_the_difference(old: list[str], new: list[str]) -> None:
    lost, added = lost_and_added(" ".join(old), " ".join(new))
    assert Counter(lost) == Counter(w for w in old if w in MEMORY) - Counter(w for w in new if w in MEMORY)
    assert (added, lost) == lost_and_added(" ".join(new), " ".join(old))


@given(words, words)
def test_a_line_that_keeps_all_words_loses_none(old: list[str], more: list[str]) -> None:
    lost, added = lost_and_added(" ".join(old), " ".join(old + more))
    assert (lost, added) == ([], [word for word in more if word in MEMORY])


def test_blacklisted_modules_are_named_as_the_kernel_names_them() -> None:
    line = 'module_blacklist=nfit,nd-pmem modprobe.blacklist="floppy" rd.driver.blacklist=device_dax, quiet blacklist=x'
    assert blacklisted(line) == {"nfit", "nd_pmem", "floppy", "device_dax"}


def test_what_the_boot_loader_added_is_dropped() -> None:
    assert without_boot_loader(f"{LINE}  initrd=/initrd.img\n") == LINE.split(maxsplit=1)[1]
    assert without_boot_loader('a="b  BOOT_IMAGE=c" -- d') == 'a="b  BOOT_IMAGE=c" -- d'
