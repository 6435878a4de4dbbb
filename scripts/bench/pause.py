"""One guest's pause: through the agent, through the bare script, through libvirt, each with the same guest in the same run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.bare import BareVm
from bench.figures import Figure, Runs, ratio
from bench.machine import Machine, fill

from cpr_agent.bus.client import Client, plain
from tests.lab import Guest

ROUNDS = 15
_MIB = 1 << 20
WRITTEN = 0.7
"""How much of a guest's RAM is written, where that matters: to libvirt, which writes all of it to a file."""


def figures(machine: Machine) -> Iterator[Figure]:
    yield from _against_bare(machine)
    yield from _against_libvirt(machine)
    yield _by_ram(machine)


def _against_bare(machine: Machine) -> Iterator[Figure]:
    guest, bare = machine.guest("web1", 256), machine.bare("bare", 256)
    saves: list[float] = []
    pauses: list[float] = []
    bare_saves: list[float] = []
    bare_pauses: list[float] = []
    for _ in range(ROUNDS):  # in turn, so that what disturbs the one disturbs the other
        bare.prepare()
        stopped_at, durable_at = bare.save()
        bare_saves.append(durable_at - stopped_at)
        bare_pauses.append(bare.load() - stopped_at)
        save_s, pause_s = machine.save_and_load(guest)
        saves.append(save_s)
        pauses.append(pause_s)
    guest.assert_unbroken()
    bare.quit()
    guest.call("Stop", "s", "hard")
    yield ratio(
        "save through D-Bus, from STOP to the reply, which comes when all is durable; 256 MiB, 1 VM",
        ("agent", Runs(saves)),
        ("bare script, same fsyncs", Runs(bare_saves)),
        1.15,
    )
    yield ratio(
        "whole pause without a reboot (save, new QEMU, load); 256 MiB, 1 VM",
        ("agent", Runs(pauses)),
        ("bare script", Runs(bare_pauses)),
        1.25,
    )


def _against_libvirt(machine: Machine) -> Iterator[Figure]:
    for size_mib, reach, rounds in ((512, 40.0, 5), (4096, 150.0, 3)):
        guest = machine.guest("web1", size_mib, written=WRITTEN)
        ours = [machine.save_and_load(guest)[1] for _ in range(rounds)]
        guest.assert_unbroken()
        guest.call("Stop", "s", "hard")
        machine.forget(guest)
        with Libvirt(machine.directory / "libvirt", machine.qemu, machine.tiny) as libvirt:
            libvirt.start(size_mib)
            fill(libvirt.ram, size_mib * _MIB, WRITTEN)
            theirs = [libvirt.save_and_start() for _ in range(rounds)]
        value = Runs(theirs).median / Runs(ours).median
        yield Figure(
            f"whole pause without a reboot, times faster than virsh managedsave + start; {size_mib} MiB, "
            f"{WRITTEN:.0%} of it written",
            value,
            "x",
            reach,
            {"agent": Runs(ours), "virsh managedsave + start": Runs(theirs)},
            at_least=True,
        )


SIZES_MIB = (256, 512, 1024, 2048, 4096, 8192)


def _by_ram(machine: Machine) -> Figure:
    pauses: dict[int, Runs] = {}
    for size_mib in SIZES_MIB:
        guest = machine.guest("web1", size_mib, written=WRITTEN)
        pauses[size_mib] = Runs([machine.save_and_load(guest)[1] for _ in range(ROUNDS)])
        guest.assert_unbroken()
        guest.call("Stop", "s", "hard")
        machine.forget(guest)
    first, last = SIZES_MIB[0], SIZES_MIB[-1]
    return Figure(
        f"pause at {last} MiB against {first} MiB, {WRITTEN:.0%} of it written",
        pauses[last].median / pauses[first].median,
        "x",
        1.1,
        {f"{size} MiB": runs for size, runs in pauses.items()},
        facts={"pause_by_mib": {str(size): runs.median for size, runs in pauses.items()}},
    )
