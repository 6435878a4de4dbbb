# SPDX-License-Identifier: GPL-2.0-or-later
"""What core needs of the layers below, as Protocols. The adapters live in vm/, memory/, store/ and host/."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol

import msgspec

from cpr_agent.core.domains import Domains, NoDomains
from cpr_agent.core.model import (
    BlockNode,
    BootTimes,
    Companion,
    DaxDevice,
    Definition,
    Difference,
    DiskIdentity,
    Finding,
    Firmware,
    Held,
    HookFailure,
    HookPhase,
    Imported,
    Inventory,
    KeptFile,
    Kernel,
    Launch,
    Located,
    Manifest,
    MemorySection,
    OpenFile,
    Owner,
    PluggedDevice,
    QemuFacts,
    Ram,
    Survives,
    Throttle,
    Unit,
    UnitStop,
    Vmstate,
    Witness,
)
from cpr_agent.core.past import Past, Record
from cpr_agent.core.threads import Threads
from cpr_agent.core.timeline import GuestTimeline


class Qemu(Protocol):
    """One live QEMU, over its QMP socket. Every call raises QemuRefused when QEMU says no, QemuUnreachable when it does not
    answer in time or the connection is lost, QemuFailed when it makes no sense."""

    @property
    def pid(self) -> int:
        """Of its process."""

    def on_change(self, callback: Callable[[str], None]) -> None:
        """Call back with the name of each QMP event, and ``"GONE"`` once when the connection ends."""

    async def run_state(self) -> str: ...

    async def version(self) -> str: ...

    async def blocked_reasons(self, launch: Launch) -> list[str]:
        """Why a save would be refused or unsafe now, each fit for an admin. Touches nothing that the guest sees."""

    async def until_saveable(self, launch: Launch, timeout_s: float) -> list[str]:
        """Wait for ``blocked_reasons`` to become empty; returns the last ones."""

    async def facts(self, launch: Launch) -> QemuFacts:
        """What it is, but for its disks; of firmware files the paths alone."""

    async def differences(self, was: QemuFacts, launch: Launch) -> list[Difference]:
        """What a guest that was saved in ``was`` would miss here; empty if it can go on. Before a load."""

    async def lacks(self, was: QemuFacts) -> list[Difference]:
        """The same of a QEMU that was started by ``Definitions.plan_probe``, which knows no more than its program."""

    async def inventory(self) -> Inventory:
        """The disks and devices that its guest sees; the files that it has open are the host's to say."""

    async def brief_inventory(self) -> Inventory:
        """Likewise, without the place of devices, CPUs and memory: while a guest waits."""

    async def parts(self) -> Inventory:
        """An inventory with its parts and throttles alone."""

    async def throttle(self, some: Iterable[Throttle]) -> None:
        """Give its disks these limits."""

    async def listening(self) -> list[str]:
        """The paths of the Unix sockets at which its character devices listen, but for the agent's own."""

    async def disks(self) -> list[DiskIdentity]:
        """Its block backends by name; what those of this host are is the host's to say."""

    async def save(self, vmstate_fd: int, timeout_s: float, checkpoint: str) -> float:
        """Write device state to a fresh descriptor, for the checkpoint of this id; the guest is stopped after. Returns when
        it stopped (epoch s)."""

    async def has_saved(self) -> bool:
        """Whether its last save came to its end: what it wrote is whole only then, whatever its run state is."""

    async def load_runs_guest(self, saved_as: str = "") -> bool:
        """Whether ``load`` lets a guest that did not stand still go on by itself: its checkpoint must be spent before.
        ``saved_as`` is the dialect of the QEMU that saved it, by default this one's."""

    async def load(self, vmstate_fd: int, timeout_s: float, saved_as: str = "") -> float:
        """Read device state; needs a QEMU started with ``-incoming defer -S``. Returns when the guest ran (epoch s), 0
        where it does not. Raises LoadFailed if it has certainly not run; after QemuFailed the run state tells, if any."""

    async def transfer_problem(self) -> str:
        """Why it can't hand its guest over to another QEMU, "" if it can. Touches nothing that the guest sees."""

    def handing_over(
        self, directory: str, taker_lives: Callable[[], Awaitable[bool]], timeout_s: float
    ) -> AbstractAsyncContextManager[Callable[[], Awaitable[float]]]:
        """Offer the guest to the QEMU that waits in ``directory`` (``Definitions.plan_transfer``), which has a monitor from
        then on. The value waits until the guest has stopped and all is handed over, and returns when it stopped (epoch s).
        Raises SaveFailed; an offer that was not taken is withdrawn, but the guest may stand: ask ``run_state``."""

    async def withdraw(self) -> None:
        """Take an offer back that an earlier agent made; the guest runs or stands in postmigrate after."""

    async def take_over(self, directory: str, timeout_s: float) -> None:
        """Take the guest that is offered; it does not run after. Raises LoadFailed, QemuFailed."""

    async def cont(self) -> float:
        """Let the guest run; returns when it did (epoch s). Raises QemuRefused also for a guest whose disks could not be
        flushed when it stopped, and still can't be; LoadFailed if QEMU has ended after a load, and the guest has certainly
        not run."""

    async def set_guest_clock(self, now: Callable[[], float]) -> float | None:
        """Set it to ``now()`` (epoch s) by the guest agent; returns by how much it was behind (s), None where the VM has no
        port for a guest agent. Raises GuestAgentFailed."""

    async def vfio_devices(self, some: Sequence[PluggedDevice]) -> list[str]:
        """Those of these that are devices of the host, each fit for an admin. They are saved in a sleeping guest only."""

    async def sleep_problem(self) -> str:
        """Why the agent could not put the guest to sleep and wake it again, "" if it could. Asks the guest agent."""

    async def suspend(self, timeout_s: float) -> float:
        """Have the guest put itself to sleep (S3); returns when it slept (epoch s). Raises GuestAgentFailed."""

    async def wake(self) -> float:
        """Wake a guest that sleeps; returns when it woke (epoch s), 0 if it did not sleep."""

    async def powerdown(self) -> None: ...

    async def quit(self) -> None: ...

    async def close(self) -> None: ...


class Place(Protocol):
    """Where one QEMU process of a VM lives, or may live: a unit of systemd, or a process of its own."""

    @property
    def delegated(self) -> bool:
        """Whether another service of the host runs its QEMU, which has one at a time: that service stops a guest before it
        saves it, gives a new QEMU the state of the live checkpoint as it starts it, with no time for a proof in between,
        and may end QEMU in a way of its own as the host goes down."""

    @property
    def directory(self) -> str:
        """Where its QEMU may make sockets."""

    async def start(self, launch: Launch) -> None:
        """Start QEMU. Returns when its sockets accept connections; raises QemuFailed with what it said."""

    async def connect(self, timeout_s: float) -> Qemu:
        """Raises QemuFailed."""

    async def settle(self) -> None:
        """Its QEMU has its guest, and stays: whoever waits for the end of the act that has started it need not wait any
        more. Raises LoadFailed if QEMU has ended all the same, and the guest has certainly not run."""

    async def pid(self) -> int:
        """PID of its QEMU; 0 if there is none."""

    async def lacks(self, launch: Launch, was: QemuFacts) -> list[Difference]:
        """The same as ``Qemu.lacks``, where no QEMU can be started just to be asked (``delegated``). Raises QemuFailed."""

    async def wait_exit(self, timeout_s: float) -> bool:
        """Wait until its QEMU has exited; False on timeout."""

    async def kill(self) -> None:
        """End its QEMU the hard way, and wait until it is gone."""

    async def ended_by(self, timeout_s: float) -> int:
        """The number of the signal that has ended its QEMU: 0 if none has within so long, ``kill`` has, or it is not
        known."""

    def log_tail(self) -> str:
        """The last lines that QEMU wrote to stderr."""


class Runner(Protocol):
    """Each VM has two places for a QEMU: its own, and a spare one for a QEMU that is to take its guest over."""

    def own(self, name: str) -> Place: ...

    def spare(self, name: str) -> Place: ...

    def adopt(self, name: str) -> None:
        """Make the VM's spare place its own, and its own the spare one. Atomic, until the host starts anew."""

    def launched(self, name: str) -> Launch | None:
        """The command line that the QEMU in the VM's own place was started with, and its memory."""

    def launched_all(self) -> list[str]:
        """Names of all VMs started since the host booted."""

    def trim_logs(self) -> None:
        """Cut off what QEMUs have written to their logs beyond any use. Blocking."""

    def inventory(self, name: str) -> Inventory | None:
        """What the QEMU in the VM's own place had when it was last recorded; it may be an earlier QEMU's. Blocking."""

    def record_inventory(self, name: str, inventory: Inventory) -> None:
        """Until the host starts anew. Blocking. Raises OSError."""

    def user(self, name: str) -> str:
        """The user of a VM whose definition names none; "" if it has none yet."""

    async def assign_user(self, name: str) -> str:
        """Likewise; it has one from now on, which is a user of the host. Raises QemuFailed, OSError."""

    async def prepare(self, launch: Launch) -> None:
        """Install what a QEMU that is started so needs of the host, so that no guest has to wait for that. Raises
        QemuFailed, OSError."""

    def unit(self, name: str) -> str:
        """The systemd unit, or "" where systemd does not run it."""


class Definitions(Protocol):
    @property
    def directory(self) -> str:
        """Where the definitions are, as NAME.toml."""

    def parse(self, name: str, text: str) -> Definition:
        """What a file of that name with this text would define. Raises InvalidDefinition."""

    def import_command_line(self, text: str, *, name: str, device: str, offset: str, user: str) -> Imported:
        """A definition from another QEMU's command line. Raises InvalidArgument."""

    def owner(self, name: str) -> Owner:
        """Who has the definition of this name, also one that can't be used."""

    def load_all(self) -> tuple[dict[str, Definition], dict[str, Exception]]:
        """All definitions by name, and what is wrong with those that can't be used."""

    def plan_start(self, definition: Definition, located: Sequence[Located]) -> Launch: ...

    def plan_load(self, manifest: Manifest, located: Sequence[Located]) -> Launch: ...

    def unshareable(self, launch: Launch) -> list[str]:
        """What of the host a second QEMU with the same arguments must not even open while the first one has it."""

    def companions(self, launch: Launch) -> list[Companion]:
        """The programs beside its QEMU that its command line needs."""

    async def missing_companions(self, launch: Launch, timeout_s: float) -> list[Companion]:
        """Those whose socket on this host nobody has made, also after so long. QEMU may be able to start all the same."""

    def cpus(self, arguments: Sequence[str]) -> int:
        """How many CPUs a command line gives a guest; 0 if it does not tell."""

    def passwords(self, launch: Launch) -> list[str]:
        """Displays whose password somebody sets on the monitor."""

    def emptied_logs(self, launch: Launch) -> list[str]:
        """Ports of its QEMU whose files a load empties."""

    def images(self, arguments: Sequence[str]) -> list[str]:
        """The paths by which a command line names disks and firmware of the host."""

    def images_below(self, arguments: Sequence[str]) -> list[str]:
        """Those of them that it puts below the first image of a disk."""

    def read_at_start(self, launch: Launch) -> list[str]:
        """The files that its QEMU reads as it starts, also for a load, and does not keep open."""

    def plan_transfer(self, draft: Manifest, located: Sequence[Located], directory: str) -> Launch: ...

    def follows(self, launch: Launch) -> bool:
        """Whether the VM's next QEMU gets what is plugged and changed while this one runs: who makes its command line keeps
        account of that."""

    def carry(self, launch: Launch, was: Sequence[BlockNode], now: Sequence[BlockNode]) -> Launch | None:
        """``launch`` for a disk that had the nodes ``was``, and has ``now``; None where that can't be known for sure."""

    def firmware(self, launch: Launch) -> Firmware:
        """What its QEMU reads as firmware."""

    def with_firmware(self, launch: Launch, copies: Sequence[KeptFile]) -> Launch:
        """``launch`` with these copies in the place of their files."""

    def plan_probe(self, launch: Launch) -> Launch:
        """A QEMU of the program that is installed now, without a machine, to be asked what it has."""


class Memory(Protocol):
    """``located`` is all of one VM's memory, in the order of its NUMA nodes."""

    async def locate(self, section: MemorySection, timeout_s: float) -> list[Located]:
        """Find the memory a definition names, waiting for its devices. Raises DeviceMissing, MemoryUnusable."""

    async def relocate(self, ram: Ram, timeout_s: float) -> list[Located]:
        """Find memory again that a checkpoint left behind. Raises DeviceMissing, MemoryChanged."""

    def creatable(self, section: MemorySection) -> bool:
        """True if some of the memory is a file that is not there yet, and ``prepare`` would create it."""

    async def prepare(self, section: MemorySection, user: str) -> None:
        """For a fresh start: create a memory file that is not there yet. Devices are never created."""

    def new_witness(self, kind: str) -> Witness:
        """What to hash, with a fresh seed; no digest yet."""

    async def witness(self, located: Sequence[Located], like: Witness) -> Witness:
        """Hash the pages that ``like`` chooses (kind, seed, pages). Raises MemoryUnusable."""

    def prepared_witness(
        self, located: Sequence[Located], like: Witness
    ) -> AbstractAsyncContextManager[Callable[[], Awaitable[Witness]]]:
        """Everything of that which can be done before the guest stops; call what it yields once it has."""

    async def witness_cost_s(self, located: Sequence[Located], kind: str) -> tuple[str, float]:
        """What it is, and how long it takes (s): measured, a long one by its first part."""

    async def blank(self, located: Sequence[Located]) -> bool:
        """Whether each byte is zero, which the RAM of a guest that has run never is."""

    async def users(self, located: Located, own: Collection[int]) -> list[tuple[str, int]]:
        """Other processes that have the memory open or mapped: name and PID; ``own`` need not be looked at."""

    def devices(self) -> list[DaxDevice]: ...

    def drivers(self, ram: Ram) -> set[str]:
        """Kernel modules that memory needs to be there again after a kexec, as /sys/module names them."""


class PendingState(Protocol):
    """A vmstate file being written: nothing of it is visible until ``commit``."""

    vm: str
    fd: int
    path: str

    def too_large(self) -> bool:
        """Whether it is larger already than any state may be."""

    def seal(self) -> Vmstate:
        """Fsync, look whether it is whole, digest. Blocking. Raises NotVmstate, OSError."""

    def commit(self, manifest: Manifest) -> None:
        """Make state and manifest durable, in this order. Blocking."""

    def reader(self) -> int:
        """A descriptor to read what was written; it outlives ``abort``. Raises OSError."""

    def abort(self) -> None: ...


class Store(Protocol):
    def live(self, vm: str) -> Manifest | None:
        """The checkpoint that may still be loaded. Raises CheckpointUnreadable."""

    def verify(self, manifest: Manifest) -> None:
        """Read from disk what a save wrote. Blocking. Raises CheckpointUnreadable, NotVmstate, ProofFailed."""

    def room_bytes(self) -> int:
        """Room for checkpoints."""

    def live_all(self) -> list[str]:
        """Names of all VMs with a live or unreadable checkpoint."""

    def checkpointed(self, vm: str) -> bool:
        """True if there is a live checkpoint, readable or not."""

    def begin(self, vm: str, filename: str) -> PendingState: ...

    def reopen(self, vm: str, path: str) -> PendingState:
        """A state file that was written whole, and neither committed nor aborted. Raises OSError."""

    def open_vmstate(self, manifest: Manifest, filename: str) -> int:
        """A descriptor on the state file, proved to be the one the manifest describes. Raises NotVmstate, ProofFailed."""

    def consume(self, manifest: Manifest) -> None:
        """Make it durable that this checkpoint can never be loaded again. Blocking."""

    def restore(self, vm: str, checkpoint: str) -> None:
        """Make the checkpoint that was consumed or discarded last live again: its guest has not run since. Blocking.
        Raises CheckpointUnreadable, OSError."""

    def discard(self, vm: str, suffix: str = "discarded") -> None:
        """Move it aside; nothing loads it any more. The last one of each ``suffix`` is kept. Blocking."""

    def hold(self, vm: str, held: Held) -> None: ...

    def held(self, vm: str) -> Held | None: ...


class Journal(Protocol):
    def append(self, event: str, **facts: object) -> Record:
        """Make a record durable before returning it. Blocking; a few milliseconds."""

    def past(self, vm: str) -> Past:
        """What the records say of this VM; it changes with each that is appended."""

    def records(self) -> list[dict[str, Any]]:
        """For reports, oldest first."""

    def compact_if_grown(self) -> None:
        """Leave out the records that no later decision or report needs. Blocking, up to 50 ms: only while no act is under
        way."""


class Clock(Protocol):
    def now(self) -> float:
        """Epoch seconds; can be stepped."""

    def uptime_s(self) -> float:
        """Seconds since this boot began, suspend included; never stepped."""


class Boot(Protocol):
    """This boot of the host, and the one before."""

    def name(self) -> str:
        """The host's."""

    def boot_id(self) -> str: ...

    def start_id(self) -> str:
        """Of this start of userspace: ``boot_id`` alone, or with a dot and more after a `systemctl soft-reboot`."""

    def kernel(self) -> str: ...

    def userspace_at(self) -> float:
        """When this boot's userspace began (epoch s); 0 if that is unknown."""

    def booted_by_kexec(self) -> bool:
        """False after a reset or a power cut: this kernel was not started by the one before."""

    def boot_ended_at(self, boot_id: str) -> float:
        """When an earlier boot's userspace ended (epoch s); 0 if that is unknown. Blocking."""


class Access(NamedTuple):
    """``closed`` is the file, or the directory ``on_the_way`` to it, that a user can't open; "" if that can't be told. A
    file of that user's is ``loose`` if everybody can read it."""

    closed: str = ""
    on_the_way: bool = False
    loose: bool = False


class Files(Protocol):
    """Programs, firmware and disks of the host, told from others."""

    def program_digest(self, pid: int) -> str:
        """SHA-256 of the program that the process runs, also if its file was replaced since. Blocking."""

    def program_identity(self, path: str) -> str:
        """Tells a program from another that is installed in its place; "" if there is none. Follows links."""

    def program_version(self, path: str) -> str:
        """The version of a QEMU with that of its package, as the program has it; "" if it does not tell. Blocking."""

    def digest_file(self, path: str) -> str:
        """SHA-256; "" if there is no such file, or it can't be read. Blocking."""

    def identify_disk(self, disk: DiskIdentity) -> DiskIdentity:
        """``disk`` as it is now, by its path. Blocking."""

    def open_files(self, pid: int) -> list[OpenFile]:
        """The files and block devices that the process has open, some thousands at most. Blocking; empty if it has
        ended."""

    def working_directory(self, pid: int) -> str:
        """Of the process; "" if it has ended."""

    def access(self, path: str, user: str) -> Access:
        """Whom owner and mode let in. Blocking."""

    def look_at(self, path: str) -> OpenFile | None:
        """What would be opened by ``path``, which must not be QEMU's word; None if nothing would. Blocking."""

    def real_directory(self, path: str) -> str:
        """``path`` without links; it must not be QEMU's word. Blocking."""


class Sockets(Protocol):
    """Names of Unix sockets that two QEMUs want."""

    def keep_sockets(self, paths: Sequence[str], pid: int) -> None:
        """Keep the names of these Unix sockets of this process while another one may take them over."""

    def settle_sockets(self, paths: Sequence[str], pid: int) -> None:
        """This process stayed: its sockets get their names back, and no name is kept any more."""


class Programs(Protocol):
    """Programs that VMs run, kept for as long as what takes their place is not seen to work. All block."""

    def keep(self, vm: str, pid: int, arguments: Sequence[str]) -> None:
        """Keep the program that the process runs, also if its file was replaced since. Raises OSError with why it would not
        be the same again: for one, that it does not run with ``arguments`` alone."""

    def kept(self, vm: str, sha256: str) -> str:
        """The path of the one that is kept, if that is its digest; "" if not."""

    def forget(self, vm: str) -> None:
        """Keep it no more."""


class FirmwareCopies(Protocol):
    """Copies of the firmware that each VM was started with. All block."""

    def keep(self, vm: str, wanted: Firmware) -> None:
        """In place of those that were kept for the VM. Raises OSError."""

    def kept(self, vm: str) -> list[KeptFile]: ...

    def changed(self, vm: str) -> list[KeptFile]:
        """Those whose file is gone, or is not the one that was copied; by its looks, since a guest waits."""

    def forget(self, vm: str) -> None:
        """Keep none any more."""


class Kernels(Protocol):
    """Installed kernels, and the one that is loaded for a kexec."""

    def installed(self) -> list[Kernel]:
        """The one to be chosen without a word first: newest first, and those of the flavour that runs before the others."""

    def command_line(self) -> str:
        """The running kernel's, without what the boot loader added (BOOT_IMAGE=, initrd=)."""

    def findings(self, kernel: Kernel, drivers: Collection[str]) -> list[Finding]:
        """What speaks against a kexec into ``kernel`` on a host whose guests' memory needs these ``drivers``: errors where
        it could not be loaded, mount its root, or find that memory. Reads the initrd to its end; blocking, for minutes
        at the most."""

    def loaded(self) -> bool:
        """Whether a kernel is loaded for a kexec (/sys/kernel/kexec_loaded)."""

    async def load(self, kernel: Kernel, command_line: str) -> None:
        """Raises KernelRefused with what the kernel or kexec said."""

    async def unload(self) -> None:
        """Raises KernelRefused."""


class Kexec(Protocol):
    """The way from this kernel into the next."""

    @property
    def possible(self) -> bool:
        """False where the agent does not run under the host's own systemd."""

    def findings(self) -> list[Finding]:
        """What of the host speaks against a kexec now: units that are not enabled, a shutdown under way, inhibitors."""

    def inhibit(self, why: str) -> AbstractAsyncContextManager[None]:
        """Nobody may restart the host by other means meanwhile."""

    def promise(self, drivers: Collection[str], outlives: Survives) -> None:
        """Tell the gate that every guest is saved in this boot, in RAM that ``outlives`` this, and the next boot that they
        go first. Their memory has these ``drivers``. Raises OSError."""

    def withdraw(self) -> None:
        """Take that back."""

    def end_at_once(self, places: Collection[str]) -> None:
        """The QEMUs in these places (``Place.directory``) hold saved guests: as the host goes down they are ended without
        a question. ``withdraw`` takes that back, too."""

    async def pending(self) -> Survives | None:
        """What guests' RAM has to outlive in what systemd has under way: a kexec, or a soft reboot, which starts userspace
        anew under the kernel that runs; None if it has neither."""

    async def start(self) -> str:
        """Start it. Returns only if the host goes on without it: what systemd said."""

    async def over(self) -> str:
        """Wait for the one under way. Returns only if the host goes on without it."""

    def bring_back(self) -> None:
        """Start the host's services again that a shutdown which was called off has stopped; does not wait."""

    async def minimum_uptime_s(self) -> float:
        """How long the host must have been up before systemd ends a shutdown; 0 if it does not wait for that."""


class Units(Protocol):
    """Other units of the host's systemd; there are none where the agent does not run under it."""

    @property
    def needed(self) -> Collection[str]:
        """The agent's own units, and those that its work needs though no unit says so."""

    async def all(self, names: Collection[str] = ()) -> dict[str, Unit]:
        """By name: all that PID 1 has loaded, and ``names``, which it looks for. Empty if it does not say in time."""

    async def stop(self, name: str) -> str:
        """Stop a unit, however long that takes; returns "" once it has stopped, or why it has not."""

    async def start(self, name: str) -> str:
        """Likewise."""

    def lacking(self, paths: Collection[str], devices: Collection[str], interfaces: Collection[str]) -> list[str]:
        """Units that are not active yet: mounts on the way to ``paths`` that the boot is about to make, ``devices`` by
        their nodes, network ``interfaces``. A start of each waits until it is there."""

    async def stops(self, boot_id: str, since: float, until: float) -> list[UnitStop]:
        """The units that an earlier boot's shutdown has stopped in this time (epoch s); empty without a persistent
        journal."""

    async def boot_times(self) -> BootTimes: ...


class Surroundings(Protocol):
    """What else on this host starts, saves and ends QEMUs that the agent has a part in."""

    def findings(self) -> list[Finding]:
        """What of its settings speaks against that. Reads a few small files."""

    def findings_of(self, vm: str) -> list[Finding]:
        """The same for one VM alone."""


class NoSurroundings:
    """There is nothing of that kind; implements Surroundings."""

    def findings(self) -> list[Finding]:
        return []

    def findings_of(self, vm: str) -> list[Finding]:  # noqa: ARG002 - the port's
        return []


class Hooks(Protocol):
    """Programs of the admin's own."""

    async def run(self, phase: HookPhase, vm: str, upgrade: str, facts: Mapping[str, object]) -> list[HookFailure]:
        """Run those of ``phase`` for a VM, in order; returns those that failed, were unsafe, or took too long. At once
        where there are none."""


class History(Protocol):
    def add(self, timeline: GuestTimeline) -> None: ...

    def all(self) -> list[GuestTimeline]:
        """Every readable record, oldest first. Blocking, the first time for long."""

    def last(self, vm: str) -> GuestTimeline | None:
        """The newest of a VM, as far as ``all`` and ``add`` have seen it."""


class Ports(msgspec.Struct, frozen=True, kw_only=True):
    """Everything below core, in one piece; and the threads in which a VM's files are looked at."""

    definitions: Definitions
    runner: Runner
    memory: Memory
    store: Store
    journal: Journal
    history: History
    hooks: Hooks
    clock: Clock
    boot: Boot
    files: Files
    sockets: Sockets
    programs: Programs
    firmware: FirmwareCopies
    kernels: Kernels
    kexec: Kexec
    units: Units
    domains: Domains = msgspec.field(default_factory=NoDomains)
    threads: Threads = msgspec.field(default_factory=Threads)
    surroundings: Surroundings = msgspec.field(default_factory=NoSurroundings)
