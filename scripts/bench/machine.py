# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab of the tests with a real agent, and bare guests beside it, all of the tiny guest and this machine's own QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cpr_agent.bus.client import Client, options, plain
from scripts.bench.bare import BareVm
from scripts.guest.console import read_console
from tests.lab import PATIENCE_S, ROOT, Guest, Lab, private_bus, until

MIB = 1 << 20
_PREFIX = "cpr-agent-bench-"
_PATTERN_END = 16 << 20
"""Below that the tiny guest has its own pattern."""


class Pause(NamedTuple):
    """Of one guest, in seconds: from STOP to the reply of CprSave, from STOP to RESUME, and the phases of that."""

    save_s: float
    whole_s: float
    phases: dict[str, float]


class Machine:
    """What bare guests have on their command line the guests of the agent have too."""

    def __init__(self, directory: Path, lab: Lab) -> None:
        self.directory, self.lab = directory, lab
        self.qemu, self.tiny = lab.qemu, lab.tiny

    @property
    def agent_pid(self) -> int:
        assert self.lab._agent
        return self.lab._agent.pid

    def guest(self, name: str, size_mib: int, *, written: float = 0.0) -> Guest:
        """One that runs."""
        guest = self.lab.running(name, size=f"{size_mib}M")
        fill(guest.ram, size_mib * MIB, written)
        return guest

    def forget(self, guest: Guest) -> None:
        """Its RAM is given back; it must be stopped."""
        guest.ram.unlink()
        guest.console.unlink()

    @contextlib.contextmanager
    def bare(self, name: str, size_mib: int) -> Iterator[BareVm]:
        """One that runs, until the end."""
        ram, console = self.lab.shm / name, self.directory / f"{name}.console"
        with ram.open("wb") as file:
            file.truncate(size_mib * MIB)
        arguments = ["-machine", "q35,accel=tcg", "-nodefaults", "-kernel", str(self.tiny)]
        arguments += ["-chardev", f"file,id=console,path={console},append=on", "-serial", "chardev:console"]
        vm = BareVm(self.qemu, arguments, ram, size_mib * MIB, self.directory / name)
        vm.start()
        try:
            console_lines(console, 3)
            yield vm
        finally:
            vm.kill()
            ram.unlink()

    def save_and_load(self, guest: Guest) -> Pause:
        """With a CprLoad at once after the reply of CprSave."""
        return asyncio.run(self._save_and_load(guest.name))

    async def _save_and_load(self, name: str) -> Pause:
        async with Client.connected(self.lab.address) as client:
            before = await _loads(client)
            await client.vm(name, "CprSave", "ssa{sv}", "", "reboot", {})
            replied_at = time.time()
            await client.vm(name, "CprLoad", "sa{sv}", "", {})
            (last,) = await _history(client, before, 1)
        return Pause(replied_at - last["stopped-at"], last["pause"], dict(last["phases"]))

    def refresh(self, guest: Guest) -> float:
        """Seconds from STOP to RESUME while the guest's QEMU is replaced, as `cprctl refresh` does it."""
        return asyncio.run(self._refresh(guest.name))

    async def _refresh(self, name: str) -> float:
        async with Client.connected(self.lab.address) as client:
            before = await _loads(client)
            await client.vm(name, "Refresh", "a{sv}", {})
            (last,) = await _history(client, before, 1)
        return float(last["pause"])

    def save_and_load_all(self, guests: int) -> tuple[float, list[float]]:
        """Seconds from the call of SaveAll to the end of the job LoadAll, and each guest's pause."""
        return asyncio.run(self._save_and_load_all(guests))

    async def _save_and_load_all(self, guests: int) -> tuple[float, list[float]]:
        async with Client.connected(self.lab.address) as client:
            before = await _loads(client)
            begun = time.monotonic()
            for member, wanted in (("SaveAll", options(survives="qemu-restart")), ("LoadAll", {})):
                end = await client.run_job(member, wanted)
                if end.result != "done":
                    raise RuntimeError(f"{member}: {end.result}")
            took_s = time.monotonic() - begun
            return took_s, [one["pause"] for one in await _history(client, before, guests)]


async def _loads(client: Client) -> set[str]:
    """The ids of those on record. The agent lists the newest ones alone."""
    return {str(plain(one)["id"]) for one in await client.manager("ListHistory", "a{sv}", {})}


async def _history(client: Client, before: set[str], new: int) -> list[dict[str, Any]]:
    """Those that came after ``before``; they are written after the reply."""
    async with asyncio.timeout(PATIENCE_S):
        while len(await _loads(client) - before) < new:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
        told = [dict(plain(one)) for one in await client.manager("ListHistory", "a{sv}", {})]
    return [one for one in told if one["id"] not in before]


def fill(ram: Path, size_bytes: int, part: float) -> None:
    """Write this part of a guest's RAM, above what the tiny guest uses, from outside: it is shared memory. No page is zero
    and no two are alike."""
    if not part:
        return
    with ram.open("r+b") as file, mmap.mmap(file.fileno(), size_bytes) as memory:
        page = bytearray(b"\xa5" * mmap.PAGESIZE)
        for at in range(_PATTERN_END, min(size_bytes, _PATTERN_END + int(size_bytes * part)), mmap.PAGESIZE):
            page[:8] = at.to_bytes(8, "little")
            memory[at : at + mmap.PAGESIZE] = page


@contextlib.contextmanager
def machine(*, agent: bool = True) -> Iterator[Machine]:
    qemu = shutil.which("qemu-system-x86_64")
    if not qemu:
        raise SystemExit("qemu-system-x86_64 is missing; run: make bootstrap")
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX) as scratch,
        tempfile.TemporaryDirectory(prefix=_PREFIX, dir="/dev/shm") as shm,
    ):
        directory = Path(scratch)
        tiny = directory / "tiny.elf"
        subprocess.run([ROOT / "scripts/guest/build-tiny", tiny], check=True)
        with private_bus(directory) as bus:
            lab = Lab(directory / "root", Path(shm), bus, tiny, qemu)
            try:
                if agent:
                    lab.start_agent()
                yield Machine(directory, lab)
            finally:
                lab.close()


@contextlib.contextmanager
def standing_still(pids: Iterable[int]) -> Iterator[None]:
    """These processes take no time from what is measured: a guest of the tests never idles."""
    stopped = list(pids)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def console_lines(console: Path, lines: int) -> None:
    """Wait until a tiny guest has counted that far."""
    until(lambda: console.exists() and read_console(console, min_lines=0).last >= lines, f"{console} has {lines} lines")
