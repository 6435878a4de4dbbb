# SPDX-License-Identifier: GPL-2.0-or-later
"""A checkpoint, and the facts that its manifest records."""

from __future__ import annotations

from typing import Literal

import msgspec

from cpr_agent.core.model.inventory import Inventory
from cpr_agent.core.model.memory import Ram
from cpr_agent.core.states import Survives
from cpr_agent.errors import Difference

MANIFEST_SCHEMA = 4
"""1 had one range of memory, and up to 3 no inventory: store/schema.py still reads them."""


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What a QEMU was, or is to be, started with. The ticket that ``cpr-vm@.service`` consumes.

    ``argv`` is complete; ``memory_fds`` and those of ``sockets`` are the descriptor numbers that it refers to. Each range
    of ``memory`` has its path in ``nodes`` and its descriptor in ``memory_fds``.
    """

    vm: str
    kind: Literal["start", "load"]
    argv: tuple[str, ...]
    base_argv: tuple[str, ...]
    memory: Ram
    nodes: tuple[str, ...]
    memory_fds: tuple[int, ...]
    sockets: dict[str, int]
    log: str
    user: str
    shutdown_timeout_s: float
    definition_digest: str
    checkpoint: str = ""
    opened: tuple[str, ...] = ()
    """Block devices that its images stand on, which the command line does not name."""
    created_at: float = 0.0
    boot_id: str = ""


class DiskIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """A block backend. Of one that is no local file (nbd, rbd, iscsi) its name and size are all that QEMU can tell."""

    node: str
    driver: str
    filename: str
    kind: Literal["file", "device", "missing", "remote"] = "remote"
    device_id: str = ""
    """Of a block device, what names it on any boot: its world wide id, that of the device mapper, its slot. "" from an
    agent that did not know it."""
    inode: int = 0
    size_bytes: int = 0
    mtime_ns: int = 0

    def differences(self, found: DiskIdentity) -> list[Difference]:
        """What says that somebody else wrote to it, or that it is another one; empty if nothing does."""
        if self.kind != found.kind:
            return [Difference(f"{self.filename}: kind", self.kind, found.kind)]
        return [
            Difference(f"{self.filename}: {name}", str(getattr(self, name)), str(getattr(found, name)))
            for name in ("device_id", "inode", "size_bytes", "mtime_ns")
            if getattr(self, name) != getattr(found, name) and not (name == "device_id" and not self.device_id)
        ]


class CpuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest's CPUs can do, after QEMU took off what its host can't; empty where QEMU has no CPUID."""

    count: int = 0
    words: dict[str, int] = msgspec.field(default_factory=dict)
    """Each register of CPUID by ``leaf.subleaf.register`` (hexadecimal, ``7.0.EBX``), to its bits."""
    features: tuple[str, ...] = ()
    """The same by name, as QEMU expands the VM's model, to say what a bit is."""


class FileDigest(msgspec.Struct, frozen=True, kw_only=True):
    """A firmware or NVRAM file. ``sha256`` is "" if it is not there."""

    path: str
    sha256: str
    size_bytes: int = 0
    """0 from an agent before schema 4."""


class Firmware(msgspec.Struct, frozen=True, kw_only=True):
    """What a QEMU reads as it starts, and is not written to: ``files`` by their whole paths, ``names`` that it looks for in
    its ``directories``, and the ROMs in there."""

    files: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()


class KeptFile(msgspec.Struct, frozen=True, kw_only=True):
    """A firmware file of which there is a ``copy``, as it was when its guest was started. ``rom``: QEMU looks for its name
    in directories."""

    path: str
    copy: str
    sha256: str
    size_bytes: int
    rom: bool
    st_dev: int
    inode: int
    mtime_ns: int


class QemuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a live QEMU says of itself."""

    version: str
    machine_type: str
    dialect: str
    cpu: CpuFacts = msgspec.field(default_factory=CpuFacts)
    tpm: tuple[str, ...] = ()
    disks: tuple[DiskIdentity, ...] = ()
    firmware: tuple[FileDigest, ...] = ()


class Witness(msgspec.Struct, frozen=True, kw_only=True):
    """Digest over ``pages`` pages (4 KiB) of guest RAM that ``seed`` chooses, of all NUMA nodes together; see
    memory/witness.py. Before manifest schema 3 Python's random module chose them."""

    kind: Literal["sampled", "full", "off"] = "off"
    seed: int = 0
    pages: int = 0
    digest: str = ""
    chosen_by: Literal["random", "shake-128"] = "random"


class Vmstate(msgspec.Struct, frozen=True, kw_only=True):
    """``machine`` and ``cpus`` are what it says of the VM it is the state of."""

    path: str
    size_bytes: int
    sha256: str
    machine: str = ""
    cpus: int = 0


class SaveTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds since the epoch (CLOCK_REALTIME)."""

    requested_at: float
    stopped_at: float
    written_at: float
    durable_at: float
    stopped_uptime_s: float = 0.0
    """``stopped_at`` on a clock that nobody steps: that of the boot (CLOCK_BOOTTIME)."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a load needs to know, and to prove. Stored beside the vmstate, schema-versioned."""

    id: str
    vm: str
    mode: str
    survives: Survives
    run_state: str
    launch: Launch
    qemu: QemuFacts
    qemu_path: str
    qemu_sha256: str
    memory: Ram
    witness: Witness
    vmstate: Vmstate
    boot_id: str
    kernel: str
    times: SaveTimes
    start_id: str = ""
    """Of the userspace in which it was saved (``Boot.start_id``); "" from an agent that knew no soft reboot."""
    upgrade: str = ""
    wakes: bool = False
    """The agent put the guest to sleep to save it, and wakes it after the load."""
    inventory: Inventory | None = None
    """What its QEMU had; None from an agent before schema 4, which did not record it."""
    schema: int = MANIFEST_SCHEMA

    @property
    def saved_in(self) -> str:
        """The start of userspace in which it was saved (``Boot.start_id``)."""
        return self.start_id or self.boot_id


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """Why a VM is kept untouched. ``error`` is the kind of the failed proof; ``at`` epoch seconds."""

    reason: str
    error: str = ""
    at: float = 0.0
    evidence: tuple[Difference, ...] = ()
