# SPDX-License-Identifier: GPL-2.0-or-later
"""Why a domain, as its XML describes it, can't be adopted: its RAM would not be the memory that the agent chose, or a part
of it can't be saved with its RAM in place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from cpr_agent.core.model import RAM_ID, VM_NAME
from cpr_agent.domains.names import MONITOR_ID
from cpr_agent.domains.tree import Element
from cpr_agent.text import printable


class Refusal(NamedTuple):
    """A cause, as what follows the domain's name, and what its admin can do about it; "" if nothing."""

    cause: str
    remedy: str = ""


_MACHINES = {
    "x86_64": re.compile(r"pc|q35|pc-(i440fx|q35)-[\w.-]+", re.ASCII),
    "aarch64": re.compile(r"virt(-[\w.-]+)?", re.ASCII),
}
"""Machines of which it is known that they take their RAM from ``memory-backend``, and all of it."""

_LIBVIRTS_RAM = "the agent gives the guest shared RAM of its own, and libvirt's is not used: remove it from <memoryBacking>"
_OTHERS_MAP_RAM = "its RAM would be mapped by another process, which can't be saved: remove it"
_HOST_DEVICE = "a device of the host can't be saved: detach it"
_REFUSED: tuple[tuple[str, str, str], ...] = (
    ("cpu/numa/cell", "has NUMA cells, each with RAM of libvirt's making", "remove <numa> from <cpu>"),
    ("memoryBacking/hugepages", "has its RAM in huge pages of libvirt's making", _LIBVIRTS_RAM),
    ("memoryBacking/source", "has <source> in <memoryBacking>", _LIBVIRTS_RAM),
    ("memoryBacking/access[@mode='shared']", "has shared RAM of libvirt's making", _LIBVIRTS_RAM),
    ("memoryBacking/locked", "has locked RAM", "libvirt's own RAM would be locked beside the agent's: remove <locked/>"),
    ("memoryBacking/allocation[@mode='immediate']", "has its RAM allocated at once", _LIBVIRTS_RAM),
    ("maxMemory", "can get more RAM while it runs (<maxMemory>)", "remove <maxMemory>"),
    ("devices/memory", "has memory devices (DIMM, NVDIMM, pmem or virtio-mem)", "remove <memory> from <devices>"),
    ("launchSecurity", "has encrypted RAM (<launchSecurity>), which is gone with its QEMU", ""),
    ("devices/hostdev", "has a device of the host (<hostdev>)", _HOST_DEVICE),
    ("devices/interface[@type='hostdev']", "has a network device of the host (VFIO)", _HOST_DEVICE),
    ("devices/interface[@type='vdpa']", "has a vDPA device of the host", _HOST_DEVICE),
    ("devices/disk[@type='nvme']", "has an NVMe disk of the host (VFIO)", _HOST_DEVICE),
    ("devices/disk[@type='vhostvdpa']", "has a vDPA disk of the host", _HOST_DEVICE),
    ("devices/interface[@type='vhostuser']", "has a vhost-user network device", _OTHERS_MAP_RAM),
    ("devices/disk[@type='vhostuser']", "has a vhost-user disk", _OTHERS_MAP_RAM),
    ("devices/video/driver[@name='vhostuser']", "has a vhost-user video device", _OTHERS_MAP_RAM),
    ("devices/filesystem/driver[@type='virtiofs']", "has a directory of the host by virtiofs", _OTHERS_MAP_RAM),
    (
        "devices/filesystem",
        "has a directory of the host (<filesystem>)",
        "mounted, it can't be saved: detach it",
    ),
    ("devices/shmem", "has RAM that it shares with others (<shmem>, ivshmem)", _OTHERS_MAP_RAM),
    ("devices/crypto", "has a virtio-crypto device, which QEMU can't save", "detach it"),
    ("devices/input[@type='passthrough']", "has an input device of the host, which QEMU can't save", _HOST_DEVICE),
    ("devices/smartcard[@mode='host']", "has a smart card of the host", _HOST_DEVICE),
    ("devices/smartcard[@mode='host-certificates']", "has a smart card of the host", _HOST_DEVICE),
    ("devices/tpm/backend[@type='passthrough']", "has the host's TPM", "what is in it can't be saved: use an emulated one"),
    ("devices/video/model[@blob='on']", "has a video device with blobs, which QEMU can't save", "set blob='off'"),
    (
        "devices/video/model/acceleration[@accel3d='yes']",
        "has a video device with 3D acceleration, which QEMU can't save",
        "set accel3d='no'",
    ),
    ("devices/disk/transient", "has a transient disk, which is new at each start", "remove <transient/>"),
    ("devices/iommu[@model='amd']", "has AMD's IOMMU, which QEMU can't save", "use another model"),
)

_NOT_BY_HAND = {
    **dict.fromkeys(("-m", "-numa", "-mem-path", "-mem-prealloc"), "the RAM is the agent's"),
    **dict.fromkeys(("-incoming", "-loadvm", "-S", "-preconfig"), "loads are the agent's"),
    **dict.fromkeys(("-daemonize", "-pidfile", "-runas", "-chroot"), "QEMU's process is libvirt's"),
    "-snapshot": "writes would be lost with the QEMU process",
    "-readconfig": "its contents can't be checked",
    "-set": "it could change the RAM",
}
"""Options of ``<qemu:commandline>``, and why they can't be."""
_UNSAVEABLE = re.compile(
    "-device (vfio-|vhost-user-|vhost-vdpa|ivshmem|pc-dimm|nvdimm|virtio-mem|virtio-pmem|sgx-epc)|-netdev vhost-(user|vdpa)"
)
_WRITES_RAM = "QEMU writes its data to the guest's RAM at every load"


def why_not(domain: Element) -> list[Refusal]:
    """Each reason, in the order of the documents' table. ``domain`` is the root of XML without the agent's part."""
    name = domain.findtext("name", "")
    found = []
    if not VM_NAME.fullmatch(name):
        remedy = "use letters, digits, '-', '_' and '.', at most 63: virsh domrename"
        found.append(Refusal(f"has a name that no VM can have: {printable(name, 100)}", remedy))
    if (kind := domain.get("type", "")) not in ("kvm", "qemu"):
        found.append(Refusal(f"is of type {printable(kind, 100)!r}, not of QEMU's (kvm, qemu)"))
    emulator = domain.findtext("devices/emulator", "")
    if not emulator.startswith("/") or not emulator.isprintable():
        found.append(Refusal(f"has an emulator that is no path: {printable(emulator, 100)!r}", "name QEMU's program there"))
    found += _unknown_machine(domain)
    for path, cause, remedy in _REFUSED:
        if domain.find(path) is not None:
            found.append(Refusal(cause, remedy))
    return found


def _unknown_machine(domain: Element) -> list[Refusal]:
    kind = domain.find("os/type")
    arch, machine = (kind.get("arch", ""), kind.get("machine", "")) if kind is not None else ("", "")
    known = _MACHINES.get("x86_64" if arch == "i686" else arch)
    if known and known.fullmatch(machine):
        return []
    what = f"is a machine {printable(machine, 100)!r} of architecture {printable(arch, 100)!r}"
    return [Refusal(what, "known are pc and q35 of x86_64, and virt of aarch64")]


def why_not_by_hand(arguments: Sequence[str]) -> list[Refusal]:
    """The arguments of ``<qemu:commandline>`` that collide with the agent's, or have a guest that can't be saved."""
    return [Refusal(f"has {what} in <qemu:commandline>: {why}", "virsh edit") for what, why in _collisions(arguments)]


def _collisions(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    words = [f"-{word.lstrip('-')}" if word.startswith("-") else word for word in arguments]
    for option, value in pairwise((*words, "")):
        if option in _NOT_BY_HAND:
            yield option, _NOT_BY_HAND[option]
        elif option.startswith("-") and (why := _why_not_with(option, value)):
            yield f"{option} {printable(value, 100)}", why


def _why_not_with(option: str, value: str) -> str:
    """Why the option can't have this value, "" if it can."""
    of_a_driver = f"{option} {_driver(value)}"
    checks = (
        (option in ("-machine", "-M") and "memory-backend" in value, "the RAM is the agent's"),
        (option == "-object" and "memory-backend-" in value, "it is RAM that can't stay in place"),
        (option == "-global" and re.match(r"migration\.|driver=migration", value), "saves are the agent's"),
        (_UNSAVEABLE.match(of_a_driver), "a guest with that can't be saved"),
        (of_a_driver == "-device loader" and re.search(r"\bdata(-len)?\b", value), _WRITES_RAM),
        (re.search(rf"\b({RAM_ID}|{MONITOR_ID})\b", value), "that name is the agent's"),
    )
    return next((why for found, why in checks if found), "")


def _driver(value: str) -> str:
    """The first word of a device or network, however it is written."""
    match = re.search(r"""["']?\b(?:driver|type)["']?\s*[:=]\s*["']?([\w.-]+)""", value)
    return match[1] if match else value.split(",")[0]
