# SPDX-License-Identifier: GPL-2.0-or-later
"""The witness against what the machine's memory gives."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cpr_agent.core.model import Located, MemoryIdentity, Survives
from cpr_agent.memory.witness import new_witness, take_witness
from scripts.bench.figures import Figure, Runs
from scripts.bench.goals import GOALS
from scripts.bench.machine import MIB, fill

SIZE_MIB = 2048
ROUNDS = 7


def witness() -> Iterator[Figure]:
    """A C program maps the same file, and reads it with as many threads as the witness has. Both map it anew each time."""
    with tempfile.TemporaryDirectory(prefix="cpr-agent-bench-", dir="/dev/shm") as scratch:
        ram, program = Path(scratch) / "ram", Path(scratch) / "read"
        with ram.open("wb") as file:
            file.truncate(SIZE_MIB * MIB)
        fill(ram, SIZE_MIB * MIB, 1.0)
        source = Path(__file__).with_name("read.c")
        subprocess.run(["gcc", "-O3", "-march=native", "-pthread", "-o", program, source], check=True)
        identity = MemoryIdentity(
            kind="file",
            size_bytes=SIZE_MIB * MIB,
            offset_bytes=0,
            survives=Survives.QEMU_RESTART,
            st_dev=ram.stat().st_dev,
            inode=ram.stat().st_ino,
        )
        located = [Located(identity=identity, node=str(ram))]
        threads = os.cpu_count() or 1
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(ROUNDS):
            read = subprocess.run([program, ram, str(threads)], check=True, stdout=subprocess.PIPE, text=True).stdout
            theirs.append(SIZE_MIB / 1024 / float(read.split()[0]))
            begun = time.monotonic()
            take_witness(located, new_witness("full"))
            ours.append(SIZE_MIB / 1024 / (time.monotonic() - begun))
    raw = {"witness": Runs(ours, "GiB/s"), "plain read": Runs(theirs, "GiB/s")}
    value = raw["witness"].median / raw["plain read"].median
    yield Figure("witness", GOALS["witness"], value, raw, f"{SIZE_MIB} MiB in /dev/shm, {threads} threads each; in turn")
