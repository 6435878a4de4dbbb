# SPDX-License-Identifier: GPL-2.0-or-later
"""The facts of a QEMU that a saved guest depends on: its version, its machine, its CPUs, its TPM."""

from __future__ import annotations

import re
from typing import NamedTuple

from msgspec.structs import replace

from cpr_agent.core.model import CpuFacts, Difference, DiskIdentity, FileDigest, Launch, QemuFacts
from cpr_agent.errors import QemuFailed
from cpr_agent.vm.cmdline import cpu_model, firmware_files
from cpr_agent.vm.qmp import Qmp
from cpr_agent.vm.replies import (
    BLOCK_NODES,
    CPUS,
    MACHINES,
    MODEL_EXPANSION,
    QOM_FEATURE_WORDS,
    QOM_TEXT,
    QOM_TEXTS,
    TPMS,
    VERSION,
    Cpu,
    ModelExpansion,
    Tpm,
    Version,
)

_MACHINE_TYPE: dict[str, object] = {"path": "/machine", "property": "type"}


async def lasting(qmp: Qmp, launch: Launch, version: str) -> QemuFacts:
    """What does not change while a QEMU lives; and how many CPUs it has, which does. Raises QemuFailed."""
    cpus, kind, tpms = await qmp.ask_all([(CPUS, {}), (QOM_TEXT, _MACHINE_TYPE), (TPMS, {})])
    if cpus is None or kind is None:
        raise QemuFailed("QEMU does not say what its machine and its CPUs are", vm=qmp.vm)
    cpu = await _cpu(qmp, cpus)
    return QemuFacts(
        version=version,
        machine_type=_pinned(kind),
        dialect="",
        cpu=replace(cpu, features=await _features(qmp, launch)) if cpu.words else cpu,
        tpm=_named_tpms(tpms or []),
    )


async def cpu_count(qmp: Qmp) -> int:
    cpus = await qmp.ask(CPUS)
    return len(cpus)


def firmware(launch: Launch) -> tuple[FileDigest, ...]:
    """The paths alone, which are those of its command line."""
    return tuple(FileDigest(path=path, sha256="") for path in firmware_files(launch.base_argv))


class Compared(NamedTuple):
    """``lasting`` is None where only QEMU itself could say what that is."""

    version: str
    lasting: QemuFacts | None
    differences: list[Difference]


async def machine_differences(qmp: Qmp, was: QemuFacts, launch: Launch) -> Compared:
    """Parts of its machine that a guest saved in ``was`` would miss. A guest waits for it. Raises QemuFailed."""
    version, kind, tpms, cpus = await qmp.ask_all([(VERSION, {}), (QOM_TEXT, _MACHINE_TYPE), (TPMS, {}), (CPUS, {})])
    is_now = _text_of(version) if version else ""
    out = older(was.version, is_now)
    if (machine := _pinned(kind or "")) != was.machine_type:
        out.append(Difference("machine type", was.machine_type, machine))
    if (tpm := _named_tpms(tpms or [])) != was.tpm:
        out.append(Difference("TPM", ", ".join(was.tpm) or "none", ", ".join(tpm) or "none"))
    cpu = await _cpu(qmp, cpus or [])
    if was.cpu.count and cpu.count != was.cpu.count:
        out.append(Difference("number of CPUs", str(was.cpu.count), str(cpu.count)))
    if gone := _gone(was.cpu.words, cpu.words):
        out.append(Difference("CPU features", await _named(qmp, gone, was.cpu, launch), "they are gone"))
    # The same words in the same QEMU have the same names, for which QEMU would build a CPU.
    same = not out and is_now == was.version and cpu == replace(was.cpu, features=())
    return Compared(is_now, was if same else None, out)


async def remote_disk_differences(qmp: Qmp, was: QemuFacts) -> list[Difference]:
    """Of disks that are no files of this host. Node names that QEMU makes up are others each time."""
    remote = [disk for disk in was.disks if disk.kind == "remote"]
    if not remote:
        return []
    now = {(disk.driver, disk.filename): str(disk.size_bytes) for disk in await disks(qmp)}
    return [
        Difference(f"{disk.filename}: size_bytes", str(disk.size_bytes), size)
        for disk in remote
        if (size := now.get((disk.driver, disk.filename), "missing")) != str(disk.size_bytes)
    ]


async def missing_machine_type(qmp: Qmp, was: QemuFacts) -> list[Difference]:
    machines = {machine.name for machine in await qmp.ask(MACHINES)}
    return [] if was.machine_type in machines else [Difference("machine type", was.machine_type, "not among its types")]


async def disks(qmp: Qmp) -> list[DiskIdentity]:
    return [
        DiskIdentity(node=node.node_name, driver=node.drv, filename=node.file, size_bytes=node.image.virtual_size)
        for node in await qmp.ask(BLOCK_NODES, {"flat": True})
    ]


async def version_of(qmp: Qmp) -> str:
    return _text_of(await qmp.ask(VERSION))


def _text_of(version: Version) -> str:
    package = f" ({version.package})" if version.package else ""
    return f"{version.qemu.major}.{version.qemu.minor}.{version.qemu.micro}{package}"


def older(was: str, now: str) -> list[Difference]:
    if numbers(now) >= numbers(was):
        return []
    return [Difference("version of QEMU", f"{was} (the same or newer is good)", now)]


def numbers(version: str) -> tuple[int, ...]:
    """``10.0.2 (Debian 1:10.0.2+ds-2)`` as (10, 0, 2)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("(")[0])[:3])


def _pinned(machine_type: str) -> str:
    return machine_type.removesuffix("-machine")


async def _cpu(qmp: Qmp, cpus: list[Cpu]) -> CpuFacts:
    """The CPUID words of the first CPU; all are the same model."""
    if not cpus:
        return CpuFacts()
    words = await qmp.property(QOM_FEATURE_WORDS, cpus[0].qom_path, "feature-words", [])
    named = {
        f"{word.cpuid_input_eax:X}.{word.cpuid_input_ecx:X}.{word.cpuid_register}": word.features
        for word in words
        if word.features
    }
    return CpuFacts(count=len(cpus), words=named)


async def _features(qmp: Qmp, launch: Launch) -> tuple[str, ...]:
    wanted: dict[str, object] = {"type": "full", "model": cpu_model(launch.argv)}
    return tuple(sorted((await qmp.ask_optional(MODEL_EXPANSION, ModelExpansion(), wanted)).model.features))


async def _named(qmp: Qmp, gone: dict[str, int], was: CpuFacts, launch: Launch) -> str:
    """Names of features that QEMU took off the model, or that the model has no more; bits where both are unnamed."""
    cpus = await qmp.ask(CPUS)
    taken = await qmp.property(QOM_TEXTS, cpus[0].qom_path, "unavailable-features", [])
    names = {*taken} & {*was.features} | {*was.features} - {*await _features(qmp, launch)}
    bits = ", ".join(f"CPUID {word} {value:#x}" for word, value in gone.items())
    return f"{', '.join(sorted(names))} ({bits})" if names else bits


def _gone(was: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    """The bits of each word that were set, and are not."""
    return {word: missing for word, bits in was.items() if (missing := bits & ~now.get(word, 0))}


def _named_tpms(tpms: list[Tpm]) -> tuple[str, ...]:
    return tuple(f"{tpm.id} {tpm.model} {tpm.options.type}" for tpm in tpms)
