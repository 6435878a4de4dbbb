# SPDX-License-Identifier: GPL-2.0-or-later
"""Valid values for tests to vary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from cpr_agent.core.model import (
    Launch,
    Located,
    Manifest,
    MemoryIdentity,
    QemuFacts,
    SaveTimes,
    Survives,
    Vmstate,
    Witness,
)
from cpr_agent.core.timeline import GuestTimeline

DEVDAX = MemoryIdentity(
    kind="devdax",
    size_bytes=64 << 20,
    offset_bytes=0,
    survives=Survives.KEXEC,
    uuid="21dfda89-0355-4462-b7ed-7d7a01837540",
    resource=0x240000000,
    device_size_bytes=1 << 30,
    align_bytes=2 << 20,
    region="0x240000000+1073741824",
    provider="ACPI.NFIT",
)
FILE = MemoryIdentity(
    kind="file",
    size_bytes=64 << 20,
    offset_bytes=0,
    survives=Survives.QEMU_RESTART,
    path="/dev/shm/web1",
    filesystem="tmpfs",
    st_dev=25,
    inode=7,
    device_size_bytes=64 << 20,
)


def in_file(path: Path, **changes: Any) -> Located:
    """Memory in the file that is at ``path``."""
    info = path.stat()
    identity = replace(FILE, path=str(path), size_bytes=info.st_size, st_dev=info.st_dev, inode=info.st_ino)
    return Located(identity=replace(identity, **changes), node=str(path))


def launch(**changes: Any) -> Launch:
    argv = ("/usr/bin/qemu-system-x86_64", "-machine", "q35", "-m", "67108864B")
    sample = Launch(
        vm="web1",
        kind="start",
        argv=argv,
        base_argv=argv,
        memory=(DEVDAX,),
        nodes=("/dev/dax0.0",),
        memory_fds=(10,),
        sockets={"/run/cpr-agent/vm/web1/agent.sock": 11},
        log="/var/log/cpr-agent/web1.log",
        user="cpr-vm",
        shutdown_timeout_s=60.0,
        definition_digest="0" * 64,
    )
    return replace(sample, **changes)


def manifest(**changes: Any) -> Manifest:
    sample = Manifest(
        id="c0ffee",
        vm="web1",
        mode="reboot",
        survives=Survives.KEXEC,
        run_state="running",
        launch=launch(),
        qemu=QemuFacts(version="10.0.13", machine_type="pc-q35-10.0", dialect="cpr-reboot"),
        qemu_path="/usr/bin/qemu-system-x86_64",
        qemu_sha256="0" * 64,
        memory=(DEVDAX,),
        witness=Witness(kind="sampled", seed=1, pages=4096, digest="d" * 32),
        vmstate=Vmstate(path="/var/lib/cpr-agent/checkpoints/web1/vmstate", size_bytes=1, sha256="0" * 64),
        boot_id="b007",
        kernel="6.12",
        times=SaveTimes(requested_at=1.0, stopped_at=2.0, written_at=3.0, durable_at=4.0),
    )
    return replace(sample, **changes)


def timeline(**changes: Any) -> GuestTimeline:
    times = dict.fromkeys(
        ("stopped_at", "saved_at", "shutdown_at", "userspace_at", "load_at", "memory_at", "resumed_at"), 0.0
    )
    words = {"id": "c", "vm": "web1", "upgrade": "", "kernel_before": "6.1", "kernel_after": "6.1"}
    return GuestTimeline(**{**words, **times, **changes})
