# SPDX-License-Identifier: GPL-2.0-or-later
"""One run of the host VM: payload in, scenario, verdict and artefacts out.

The guest sees three virtio disks by serial number: its root (an overlay), `payload` (a raw tar) and `artefacts` (a raw
tar written by host-vm-verdict). The scenario's output comes over the second serial port, and with it what the scenario
asks the harness for.
"""

import itertools
import math
import os
import random
import re
import selectors
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from scripts.cpu import cpu_s

from .evidence import collect_artefacts, recover_from_disk
from .image import HostVmError, Image, say
from .qemu import loader_command, qemu_wrapper

# isa-debug-exit ends QEMU with 2 * value + 1; a QEMU that fails exits 1, a guest that powers off 0.
PASS_CODE = 123
FAIL_CODE = 125
STILL_CODE = -1000
"""None that a process ends with."""
STILL_S, STILL_CPU_S = 90.0, 0.1
"""Linux that idles uses many times more."""
TERMINATION_GRACE_S = 10
LABEL_BYTES = 128 << 10
"""Of an NVDIMM's labels: the least that QEMU takes."""
COMMAND_LINE = (
    "root=/dev/vda rw console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off fsck.mode=skip nowatchdog audit=0 "
    "lsm=capability,landlock,yama random.trust_cpu=on no_timer_check tsc=reliable rcupdate.rcu_cpu_stall_timeout=120"
)


class Outcome(Enum):
    """How a run ended."""

    PASS = "pass"  # noqa: S105 # not a password
    FAIL = "fail"
    TIMEOUT = "timeout"
    CRASH = "crash"
    STILL = "stood still"
    """The emulator: its processor waits for an interrupt that never comes. It has nothing to do with what was tested."""


@dataclass(frozen=True)
class RunRequest:
    """What to run and on what machine; sizes as QEMU writes them."""

    scenario: Path
    out: Path
    payload: list[Path] = field(default_factory=list)
    debs: list[Path] = field(default_factory=list)
    timeout_s: float = 900
    memory: str = "4G"
    nvdimm: str = "1G"
    labelled_nvdimm: str = "0"
    virtio_pmem: str = "0"
    disks: dict[str, Path] = field(default_factory=dict)
    """More disks: serial number to a raw file, which the host VM can only read."""
    smp: int = 2
    kernel: str = "cloud"
    append: str = ""
    follow: bool = False
    allow_reboot: bool = False
    port: tuple[int, int] | None = None
    """One of this machine's loopback, and that of eth0 to which it leads. eth0 reaches nothing else."""
    cut_seed: int | None = None
    """Of the power cuts' random instants; None: there are none, and the disks forget nothing but cost no flushes."""


@dataclass(frozen=True)
class RunResult:
    """The verdict, the number of boots that the scenario saw and of power cuts, and the time from first to last."""

    outcome: Outcome
    boots: int
    cuts: int
    duration_s: float


class PowerCuts:
    """Ends QEMU with SIGKILL at a random instant within the bounds that the scenario names.

    Lost with QEMU are the guest's page cache and what the overlay's metadata does not tell of yet. The NVDIMM's file is in
    this machine's page cache and keeps every store, as persistent memory does. A real cut takes more: here a write that
    the guest issued and did not flush may survive, and so do stores that a real CPU had only in its caches.
    """

    BOOT = re.compile(rb"host-vm: boot (\d+)")
    WANTED = re.compile(rb"host-vm: power cut within ([\d.]+) to ([\d.]+) s")
    UNWANTED = re.compile(rb"host-vm: (power cut off|verdict )")

    def __init__(self, seed: int | None, record: Path) -> None:
        self.at = math.inf  # on the monotonic clock
        self.count = 0
        self._seed = seed
        self._random = random.Random(seed)  # noqa: S311 # repeatable on purpose
        self._record = record
        self._boot = 0
        self._delay_s = 0.0
        if seed is not None:
            say(f"power cuts: seed {seed}")
            record.write_text("")

    def hear(self, line: bytes) -> None:
        """Heeds one line of the scenario's serial port."""
        if boot := self.BOOT.search(line):
            self._boot = int(boot[1])
        elif self.UNWANTED.search(line):
            self.at = math.inf
        elif (wanted := self.WANTED.search(line)) and self._seed is not None:
            self._delay_s = self._random.uniform(float(wanted[1]), float(wanted[2]))
            self.at = time.monotonic() + self._delay_s

    def cut(self, qemu: subprocess.Popen[bytes]) -> None:
        qemu.kill()
        self.at = math.inf
        self.count += 1
        text = f"boot {self._boot}: seed {self._seed}: cut after {self._delay_s:.2f} s"
        say(text)
        with self._record.open("a") as record:
            record.write(f"{text}\n")


def run_host_vm(image: Image, request: RunRequest, scratch: Path) -> RunResult:
    """Boots the host VM and waits for its verdict; `scratch` holds its disks."""
    request.out.mkdir(parents=True, exist_ok=True)
    payload, artefacts, overlay = scratch / "payload.tar", scratch / "artefacts.tar", scratch / "overlay.qcow2"
    pack_payload(payload, request.scenario, request.payload, request.debs)
    with artefacts.open("wb") as file:
        file.truncate(parse_size("4G"))
    create = [*loader_command(image.root, "usr/bin/qemu-img"), "create", "-q", "-f", "qcow2"]
    subprocess.run([*create, "-b", str(image.base), "-F", "raw", str(overlay)], check=True)

    command = _command(image, request, scratch)
    (request.out / "qemu-command").write_text(shlex.join(command) + "\n")
    (request.out / "console.log").write_bytes(b"")
    cuts = PowerCuts(request.cut_seed, request.out / "power-cuts")
    start = time.monotonic()
    with (request.out / "scenario.log").open("wb") as log, (request.out / "qemu.log").open("wb") as errors:
        for cuts_before in itertools.count():
            follower = _Follower(log, start, cuts.hear, show=request.follow)
            code = _run_qemu(command, errors, start + request.timeout_s, follower.feed, cuts)
            if code is None or cuts.count == cuts_before:
                break
    duration_s = time.monotonic() - start

    ends = {PASS_CODE: Outcome.PASS, FAIL_CODE: Outcome.FAIL, None: Outcome.TIMEOUT, STILL_CODE: Outcome.STILL}
    outcome = ends.get(code, Outcome.CRASH)
    boots = (request.out / "scenario.log").read_bytes().count(b"host-vm: boot ")
    if outcome in (Outcome.PASS, Outcome.FAIL):
        collect_artefacts(image.root, artefacts, request.out)
    else:
        recover_from_disk(image.root, overlay, scratch, request.out)
    return RunResult(outcome, boots, cuts.count, duration_s)


def parse_size(text: str) -> int:
    """Bytes of a size with a binary suffix, as QEMU reads it."""
    units = {"K": 10, "M": 20, "G": 30}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if not number.isdigit() or (unit and unit not in units):
        raise HostVmError(f"not a size: {text} (wanted: a number with K, M or G)")
    return int(number) << units.get(unit, 0)


def _command(image: Image, request: RunRequest, scratch: Path) -> list[str]:
    kernel, initrd = image.kernel(request.kernel)
    persistent = [
        *_persistent(scratch / "nvdimm", request.nvdimm, "nvdimm"),
        *_persistent(scratch / "labelled", request.labelled_nvdimm, f"nvdimm,label-size={LABEL_BYTES}", LABEL_BYTES),
        *_persistent(scratch / "virtio-pmem", request.virtio_pmem, "virtio-pmem-pci"),
    ]
    ceiling = sum(map(parse_size, (request.memory, request.nvdimm, request.labelled_nvdimm, request.virtio_pmem, "1G")))
    # Nothing of a run has to survive a crash of this machine; of QEMU's, what the guest flushed.
    cache = "unsafe" if request.cut_seed is None else "writeback"
    # AppArmor says by audit what it denies, and an audit=0 can't be taken back by a later word.
    own = COMMAND_LINE.replace("audit=0 ", "") if "apparmor" in request.append else COMMAND_LINE
    words = [own, *([] if request.cut_seed is None else ["host_vm.power_cuts"]), request.append]

    console = f"file,id=console,path={_quote(request.out / 'console.log')},append=on"

    def disk(name: str, path: Path, file_format: str, *more: str) -> list[str]:
        drive = f"if=none,id={name},format={file_format},cache={cache},discard=unmap,file={_quote(path)}"
        return ["-drive", ",".join([drive, *more]), "-device", f"virtio-blk-pci,drive={name},serial={name}"]

    return [
        str(qemu_wrapper(image.entry)),
        *("-name", "host-vm", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", "q35,nvdimm=on,hpet=off,sata=off,smbus=off,vmport=off"),
        # After a kexec the old kernel's translations are dead weight: a large buffer made that boot twice as slow.
        *("-accel", "tcg,thread=multi,tb-size=256"),
        *("-cpu", "max,-la57", "-smp", str(request.smp)),
        *("-m", f"{request.memory},slots=2,maxmem={ceiling}"),
        *persistent,
        *disk("root", scratch / "overlay.qcow2", "qcow2"),
        *disk("payload", scratch / "payload.tar", "raw"),
        *disk("artefacts", scratch / "artefacts.tar", "raw"),
        *(word for name, path in request.disks.items() for word in disk(name, path, "raw", "readonly=on")),
        *_network(request.port),
        *("-device", "virtio-rng-pci", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
        *("-chardev", console, "-serial", "chardev:console"),
        *("-chardev", "stdio,id=scenario,signal=off", "-serial", "chardev:scenario"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", " ".join(words).strip()),
        *(() if request.allow_reboot else ("-no-reboot",)),
    ]


def _network(port: tuple[int, int] | None) -> list[str]:
    if port is None:
        return []
    forward = f"hostfwd=tcp:127.0.0.1:{port[0]}-:{port[1]}"
    return ["-netdev", f"user,id=network,restrict=on,{forward}", "-device", "virtio-net-pci,netdev=network,romfile="]


def _persistent(path: Path, size: str, device: str, beside: int = 0) -> list[str]:
    """A device of persistent memory of ``size``, with ``beside`` bytes for itself; none of no size. QEMU makes the file."""
    if not parse_size(size):
        return []
    backend = f"memory-backend-file,id={path.name},share=on,size={parse_size(size) + beside}B,mem-path={_quote(path)}"
    return ["-object", backend, "-device", f"{device},id={path.name}0,memdev={path.name}"]


def _quote(path: Path) -> str:
    return str(path).replace(",", ",,")  # a comma in a QEMU option


def pack_payload(target: Path, scenario: Path, payload: Iterable[Path] = (), debs: Iterable[Path] = ()) -> None:
    """Write the tar that a first boot of the image unpacks from the disk whose serial number is `payload`."""

    def add(tar: tarfile.TarFile, source: Path, name: str, mode: int | None = None) -> None:
        def owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.uid = member.gid = 0
            member.uname = member.gname = "root"
            member.mode = mode or member.mode
            return member

        tar.add(source, name, filter=owned_by_root)

    with tarfile.open(target, "w") as tar:
        directory = tarfile.TarInfo("payload")
        directory.type, directory.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(directory)
        add(tar, scenario.resolve(), "scenario", 0o755)
        for source in payload:
            add(tar, source.resolve(), f"payload/{source.resolve().name}")
        for deb in debs:
            add(tar, deb.resolve(), f"deb/{deb.name}")


def _run_qemu(
    command: list[str], errors: BinaryIO, deadline: float, feed: Callable[[bytes], None], cuts: PowerCuts
) -> int | None:
    """Runs QEMU until it exits or is cut off (its code), the deadline passes (None), or it stands still (STILL_CODE).
    Nothing is left running."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as qemu:
        try:
            assert qemu.stdout is not None
            with selectors.DefaultSelector() as selector:
                selector.register(qemu.stdout, selectors.EVENT_READ)
                look, spent_s = time.monotonic() + STILL_S, 0.0
                while (now := time.monotonic()) < deadline:
                    if now >= cuts.at:
                        cuts.cut(qemu)
                    if now >= look:
                        before_s, spent_s, look = spent_s, cpu_s(qemu.pid), now + STILL_S
                        if spent_s - before_s < STILL_CPU_S:
                            return STILL_CODE
                    if not selector.select(max(0.0, min(deadline, cuts.at, look) - now)):
                        continue
                    chunk = os.read(qemu.stdout.fileno(), 65536)
                    feed(chunk)
                    if not chunk:
                        return qemu.wait(TERMINATION_GRACE_S)
            return None
        finally:
            if qemu.poll() is None:
                qemu.terminate()  # lets QEMU write the overlay's metadata
                try:
                    qemu.wait(TERMINATION_GRACE_S)
                except subprocess.TimeoutExpired:
                    qemu.kill()


class _Follower:
    """Keeps the scenario's output, hands it on line by line, and shows it with the time since the start."""

    def __init__(self, log: BinaryIO, start: float, hear: Callable[[bytes], None], *, show: bool) -> None:
        self._log = log
        self._start = start
        self._hear = hear
        self._show = show
        self._rest = b""

    def feed(self, chunk: bytes) -> None:
        self._log.write(chunk)
        self._log.flush()
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        if not chunk and self._rest:  # the end
            lines.append(self._rest)
        for line in lines:
            self._hear(line)
            if not self._show:
                continue
            text = line.decode(errors="replace").rstrip("\r")
            print(f"[{time.monotonic() - self._start:6.1f}] {text}", file=sys.stdout, flush=True)
