# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel command lines: the words on which the guests' memory depends, and those that another line would lose.

A ``memmap=4G!8G`` that the new kernel's line lacks makes guest RAM free RAM. Quoting is the kernel's (``next_arg`` in
lib/cmdline.c): double quotes protect spaces and can't be escaped. ``-`` and ``_`` are the same in a parameter's name
(``parameq`` in kernel/params.c), and what follows a lone ``--`` is for init (``parse_args``, same file).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

MEMORY_PARAMETERS: dict[str, Callable[[str], bool]] = {
    # where RAM and persistent memory begin and end
    "memmap": bool,  # nn!ss makes persistent memory; nn$ss, nn#ss, nn%..., exactmap take memory from the kernel
    "mem": bool,
    "efi_fake_mem": bool,  # up to 6.10
    "add_efi_memmap": lambda _: True,
    "efi": lambda value: not {"nosoftreserve", "noruntime", "runtime"}.isdisjoint(value.split(",")),  # dax_hmem, and noefi
    "noefi": lambda _: True,  # no EFI state for the next kernel, so older ones don't find the ACPI tables
    "reserve_mem": bool,
    "mem_encrypt": bool,  # the same bytes read differently with SME on and off
    # reservations and zones
    "crashkernel": bool,
    "cma": bool,
    "cma_pernuma": bool,
    "numa_cma": bool,
    "hugetlb_cma": bool,
    "hugetlb_free_vmemmap": bool,
    "hugepages": bool,
    "hugepagesz": bool,
    "default_hugepagesz": bool,
    "kernelcore": bool,
    "movablecore": bool,
    "movable_node": lambda _: True,
    "numa": bool,
    # memory that one kernel hands to the next
    "kho": bool,
    "kho_scratch": bool,
    "pkram": bool,  # patches that never landed
    # the firmware's tables: without ACPI there is no NFIT, no NVDIMM and no CXL
    "acpi": lambda value: value in {"off", "on", "force", "ht", "rsdt"},  # not those about interrupts and consoles
    "acpi_rsdp": bool,
}
"""Parameters that shape physical memory, and which of their values do.

Source: Documentation/admin-guide/kernel-parameters.txt (6.12); efi_fake_mem from 6.1's, kho and kho_scratch from 6.16's.
"""

MODULE_OPTION = re.compile(
    r"(libnvdimm|nfit|nd_\w+|virtio_pmem|of_pmem|papr_scm|ramdax|dax|dax_\w+|device_dax|device_hmem|cxl_\w+)\.(?!dyndbg)"
)
"""Options (``nfit.force_enable_dimms=1``) of modules that decide whether and how persistent memory appears."""

BLACKLISTS = frozenset({"module_blacklist", "modprobe.blacklist", "rd.driver.blacklist"})
"""Of the kernel, of kmod (modprobe(8)) and of dracut (dracut.cmdline(7)); all take names separated by commas."""

WORD = re.compile(r'(?:"[^"]*"?|[^\s"])+', re.ASCII)


def memory_arguments(command_line: str) -> list[str]:
    """The words that shape physical memory, or that keep persistent memory as it is; as written and in order."""
    return [word for word in _kernel_words(command_line) if _shapes_memory(*_parsed(word))]


def lost_and_added(old: str, new: str) -> tuple[list[str], list[str]]:
    """The memory arguments that the new line lacks, and those that it has in addition; each as often as it does."""
    before, after = memory_arguments(old), memory_arguments(new)
    return _lacking(before, after), _lacking(after, before)


def blacklisted(command_line: str) -> set[str]:
    """Modules that the line forbids to load, as /sys/module names them."""
    return {
        module.strip().replace("-", "_")
        for name, value in map(_parsed, _kernel_words(command_line))
        if name in BLACKLISTS
        for module in value.split(",")
        if module.strip()
    }


def without_boot_loader(command_line: str) -> str:
    """The line without BOOT_IMAGE= and initrd=: they tell where a boot loader found files, and are its to add."""
    return " ".join(word for word in WORD.findall(command_line) if _parsed(word)[0] not in {"BOOT_IMAGE", "initrd"})


def _kernel_words(command_line: str) -> Iterator[str]:
    for word in WORD.findall(command_line):
        if word == "--":
            return
        yield word


def _parsed(word: str) -> tuple[str, str]:
    """Name and value, without quotes; the value is "" where there is none."""
    if word.startswith('"'):
        word = word[1:].removesuffix('"')
    name, _, value = word.partition("=")
    if value.startswith('"'):
        value = value[1:].removesuffix('"')
    return name.replace("-", "_"), value


def _shapes_memory(name: str, value: str) -> bool:
    return bool(MODULE_OPTION.match(name)) or (name in MEMORY_PARAMETERS and MEMORY_PARAMETERS[name](value))


def _lacking(words: list[str], others: list[str]) -> list[str]:
    there = Counter(map(_parsed, others))
    out = []
    for word in words:
        if there[_parsed(word)]:
            there[_parsed(word)] -= 1
        else:
            out.append(word)
    return out
