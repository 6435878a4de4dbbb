"""The nouns that all layers share: definitions, identities, manifests. Plain frozen data.

As structs of msgspec: Python takes a hundred times as long to make a dataclass, and there are so many that guests would
wait for it at each boot.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from typing import Literal, NamedTuple, Self, get_args

import msgspec

MANIFEST_SCHEMA = 3
"""1 had one range of memory: store/schema.py still reads it."""
RAM_ID = "cpr-ram"
"""Id of the memory backend, and by that the name of the RAM block in every vmstate; with ``-0``, ``-1``, … those of a VM
with NUMA nodes. Never change it."""

Policy = Literal["all-or-nothing", "skip-unsaveable", "force"]
"""What an upgrade does with a guest that cannot be saved: refuse; shut it down in order; shut it down in any case."""
POLICIES: tuple[Policy, ...] = get_args(Policy)

VM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class Difference(NamedTuple):
    """One thing that a proof compared, and that is not what it was."""

    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.what} was {self.expected}, is {self.found}"


class Bytes(int):
    """A number of bytes, written in TOML as ``"4G"`` (powers of 1024) or a plain integer."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError."""
        match = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
        if not match:
            raise ValueError(f"{text!r} is not a size such as 512M or 4G")
        return cls(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2].upper()])


class Seconds(float):
    """A duration in seconds, written in TOML as ``"60s"``, ``"2min"``, ``"500ms"`` or a plain number."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min|h|)", text.strip())
        if not match:
            raise ValueError(f"{text!r} is not a duration such as 60s or 2min")
        return cls(float(match[1]) * {"ms": 0.001, "s": 1, "": 1, "min": 60, "h": 3600}[match[2]])


class Survives(enum.StrEnum):
    """What a VM's RAM outlives (DESIGN.md, "What counts as persistent")."""

    QEMU_RESTART = "qemu-restart"
    KEXEC = "kexec"

    def covers(self, need: Survives) -> bool:
        return self is Survives.KEXEC or need is Survives.QEMU_RESTART


class VmState(enum.StrEnum):
    """What the agent says of a VM. Run states of QEMU are another vocabulary: see ``run-state`` in QAPI."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    SAVING = "saving"
    SAVED = "saved"
    LOADING = "loading"
    HELD = "held"
    SHUT_DOWN = "shut-down"
    UNREACHABLE = "unreachable"


class VmSection(msgspec.Struct, frozen=True, kw_only=True):
    description: str = ""
    qemu: str = "/usr/bin/qemu-system-x86_64"
    arguments: tuple[str, ...] = ()
    autostart: bool = False
    user: str = "cpr-vm"
    shutdown_timeout: Seconds = Seconds(60)


class MemoryNode(msgspec.Struct, frozen=True, kw_only=True):
    """A range of memory; ``cpus`` are those of the guest that are near it, as ``0-3,8``."""

    size: Bytes
    device: str
    offset: Bytes = Bytes(0)
    cpus: str = ""


class MemorySection(msgspec.Struct, frozen=True, kw_only=True):
    """One range, or a ``node`` for each NUMA node of the guest."""

    size: Bytes = Bytes(0)
    device: str = ""
    offset: Bytes = Bytes(0)
    node: tuple[MemoryNode, ...] = ()

    @property
    def ranges(self) -> tuple[MemoryNode, ...]:
        return self.node or (MemoryNode(size=self.size, device=self.device, offset=self.offset),)

    @property
    def object_ids(self) -> tuple[str, ...]:
        """Of the memory backends, in the order of the ranges."""
        return tuple(f"{RAM_ID}-{number}" for number in range(len(self.node))) or (RAM_ID,)


class SaveSection(msgspec.Struct, frozen=True, kw_only=True):
    suspend: Literal["auto", "always", "never"] = "auto"
    """Whether the guest is put to sleep first: auto if it has VFIO devices."""
    suspend_timeout: Seconds = Seconds(60)
    timeout: Seconds = Seconds(60)
    order: int = 100
    when_blocked: tuple[Literal["wait", "shut-down", "refuse"], ...] = ("refuse",)
    """What to do, one after the other, when CPR is blocked and the host is to be upgraded."""
    blocked_wait: Seconds = Seconds(60)


class LoadSection(msgspec.Struct, frozen=True, kw_only=True):
    on_lost_memory: Literal["hold", "cold-start"] = "hold"
    resync_clock: Literal["auto", "never"] = "auto"


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """A VM as its admin wrote it. ``digest`` is the SHA-256 of the file."""

    name: str
    vm: VmSection
    memory: MemorySection
    save: SaveSection = msgspec.field(default_factory=SaveSection)
    load: LoadSection = msgspec.field(default_factory=LoadSection)
    digest: str = ""


class Note(NamedTuple):
    """What became of an ``argument`` of a foreign command line: "left out", "changed", or "look" if it may not do."""

    outcome: str
    argument: str
    why: str


class Imported(msgspec.Struct, frozen=True):
    """A foreign command line as the ``text`` of a definition, which the notes head as comments."""

    name: str
    text: str
    notes: tuple[Note, ...]


class MemoryIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which memory a VM's RAM is, or one NUMA node of it, in terms that stay true across a kexec. Sizes in bytes.

    A device is known by the uuid of its parent nd device, cross-checked with where and how big it is, in which region, and
    who provides that; its node's name changes from boot to boot (measured, FACTS.md) and plays no part. A file is known by
    file system, inode and size, one in hugetlbfs by the size of its pages too. A file system that has a UUID is known by
    that: the number of the device that it is on changes as names do.
    """

    kind: Literal["devdax", "file"]
    size_bytes: int
    offset_bytes: int
    survives: Survives
    object_id: str = RAM_ID
    uuid: str = ""
    resource: int | None = None
    device_size_bytes: int = 0
    align_bytes: int = 0
    region: str = ""
    """Where it begins and how long it is, as ``"0x100000000+4294967296"``; its name moves."""
    provider: str = ""
    """Of its bus, as ``ndctl list -B`` shows it: ``ACPI.NFIT``, ``e820``, ``virtio_pmem``."""
    path: str = ""
    filesystem: str = ""
    st_dev: int = 0
    inode: int = 0
    page_bytes: int = 0
    """Of hugetlbfs."""
    volume: str = ""
    """The UUID of the file system."""

    @property
    def place(self) -> str:
        """As a definition names it."""
        return f"uuid:{self.uuid}" if self.kind == "devdax" else self.path

    def differences(self, found: MemoryIdentity) -> list[Difference]:
        """Each field that is not what it was; empty if this is the same memory."""
        out = []
        for name in self.__struct_fields__:
            was, now = getattr(self, name), getattr(found, name)
            if name in _MAY_BE_UNKNOWN and (not was or now is None):
                continue
            if name == "st_dev" and self.volume and found.volume:
                continue
            if was != now:
                out.append(Difference(name, _show(name, was), _show(name, now)))
        return out

    def overlaps(self, other: MemoryIdentity) -> bool:
        """True if the two share a byte of the same device or file."""
        return (
            self.kind == other.kind
            and self._object(other) == other._object(self)
            and self.offset_bytes < other.offset_bytes + other.size_bytes
            and other.offset_bytes < self.offset_bytes + self.size_bytes
        )

    def _object(self, other: MemoryIdentity) -> tuple[object, ...]:
        """The device or file, by what both of them have."""
        if self.kind == "devdax":
            return (self.uuid,)
        return (self.volume if self.volume and other.volume else self.st_dev, self.inode)


_MAY_BE_UNKNOWN = ("resource", "region", "provider", "page_bytes", "volume")
"""Only root may read where memory is; the others were not noted for guests that an older agent started. The uuid, or
the inode, has always been compared."""

Ram = tuple[MemoryIdentity, ...]
"""All of a VM's memory: one range, or one for each NUMA node, in the order of these. Of a VM without any it is empty."""


def survives(ram: Ram) -> Survives:
    """What all of it outlives."""
    return Survives.KEXEC if all(one.survives is Survives.KEXEC for one in ram) else Survives.QEMU_RESTART


def overlapping(ram: Ram) -> tuple[int, int] | None:
    """Two NUMA nodes of one VM that share a byte, if there are any."""
    pairs = ((a, b) for b in range(len(ram)) for a in range(b) if ram[a].overlaps(ram[b]))
    return next(pairs, None)


def _show(name: str, value: object) -> str:
    return f"{value:#x}" if name == "resource" and isinstance(value, int) else str(value)


class DaxDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device-DAX instance as sysfs shows it now. ``uuid`` is that of the parent nd device."""

    node: str
    uuid: str
    size_bytes: int
    align_bytes: int
    resource: int | None
    numa_node: int
    region: str = ""
    provider: str = ""
    drivers: tuple[str, ...] = ()
    """Kernel modules (or built-in drivers) that the device and its parents are bound to, as /sys/module names them."""


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel that can be started. ``initrd`` and ``config`` are "" where there is none."""

    version: str
    image: str
    initrd: str = ""
    config: str = ""


class Located(msgspec.Struct, frozen=True, kw_only=True):
    """Memory found on this host: what it is, and by which path it can be opened now."""

    identity: MemoryIdentity
    node: str


def ram_of(located: Iterable[Located]) -> Ram:
    return tuple(one.identity for one in located)


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
    created_at: float = 0.0
    boot_id: str = ""


class DiskIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """A block backend. Of one that is no local file (nbd, rbd, iscsi) its name and size are all that QEMU can tell."""

    node: str
    driver: str
    filename: str
    kind: Literal["file", "device", "missing", "remote"] = "remote"
    device_id: str = ""
    """Of a block device, what names it on any boot: its world wide id, or that of the device mapper."""
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
            if getattr(self, name) != getattr(found, name)
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
    upgrade: str = ""
    wakes: bool = False
    """The agent put the guest to sleep to save it, and wakes it after the load."""
    schema: int = MANIFEST_SCHEMA


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """Why a VM is kept untouched. ``error`` is the kind of the failed proof; ``at`` epoch seconds."""

    reason: str
    error: str = ""
    at: float = 0.0
    evidence: tuple[Difference, ...] = ()


HookPhase = Literal["check", "pre-save", "post-load"]


class HookFailure(NamedTuple):
    hook: str
    why: str


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One result of a check: what is so, why it matters, how to mend it."""

    severity: Literal["error", "warning", "info"]
    code: str
    what: str
    why: str = ""
    remedy: str = ""
    vm: str = ""
    seconds: float | None = None
