# SPDX-License-Identifier: GPL-2.0-or-later
"""Many guests saved and loaded at once, by the agent's jobs and by as many threads of the bare script."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import mean

from scripts.bench.bare import BareVm
from scripts.bench.figures import Figure, Runs
from scripts.bench.goals import GOALS
from scripts.bench.machine import machine, standing_still
from tests.lab import Guest

NUMBERS = (1, 2, 4, 8, 16, 32)
ROUNDS = 5
SIZE_MIB = 16


@dataclass
class _Rounds:
    """Of one number of VMs; a value each round."""

    wall: list[float] = field(default_factory=list)
    pause: list[float] = field(default_factory=list)
    """Mean of all VMs."""
    cpu: list[float] = field(default_factory=list)
    """Of all QEMUs together; the bare script alone measures it."""


def figures() -> Iterator[Figure]:
    """What QEMU's own CPU time explains of a mean pause: what the QEMUs of the bare script's round with as many VMs used,
    the old ones from `migrate` to their end and the new ones from their start to RESUME, over as many cores as can work
    on it at once. That no agent can avoid. The bare script's QEMUs stand for the agent's, because those share their process
    with the agent's launcher."""
    agent = {number: _Rounds() for number in NUMBERS}
    bare = {number: _Rounds() for number in NUMBERS}
    cores = len(os.sched_getaffinity(0))
    with machine() as here, ThreadPoolExecutor(NUMBERS[-1]) as threads:
        ours: list[Guest] = []
        for number in NUMBERS:
            ours += [here.guest(f"web{one}", SIZE_MIB) for one in range(len(ours), number)]
            for this in range(ROUNDS):
                with standing_still(guest.pid for guest in ours), ExitStack() as vms:
                    names = (f"bare{number}-{this}-{one}" for one in range(number))
                    theirs = list(threads.map(lambda name: vms.enter_context(here.bare(name, SIZE_MIB)), names))
                    _bare_round(bare[number], theirs, threads)
                wall_s, pauses = here.save_and_load_all(number)  # on a host whose QEMUs are all the agent's
                agent[number].wall.append(wall_s)
                agent[number].pause.append(mean(pauses))
        for guest in ours:
            guest.assert_unbroken()
    last = NUMBERS[-1]
    walls = {"agent": Runs(agent[last].wall), "bare script": Runs(bare[last].wall)}
    yield Figure(
        "many-wall",
        GOALS["many-wall"],
        walls["agent"].median / walls["bare script"].median,
        walls,
        f"{SIZE_MIB} MiB each; both in turn",
    )
    explained = {number: Runs(bare[number].cpu).median / min(number, cores) for number in NUMBERS}

    def growth(rounds: dict[int, _Rounds]) -> float:
        return Runs(rounds[last].pause).median / (Runs(rounds[1].pause).median + explained[last] - explained[1])

    note = f"explained: CPU time over {cores} cores, {explained[last]:.3f} s, with 1 VM over one, {explained[1]:.3f} s; "
    note += f"not taken out: {Runs(agent[last].pause).median / Runs(agent[1].pause).median:.1f}x; "
    note += f"the bare script: {growth(bare):.2f}x"
    yield Figure(
        "many-mean",
        GOALS["many-mean"],
        growth(agent),
        {
            f"agent, {last} VMs": Runs(agent[last].pause),
            "agent, 1 VM": Runs(agent[1].pause),
            f"bare script, {last} VMs": Runs(bare[last].pause),
            "bare script, 1 VM": Runs(bare[1].pause),
            f"CPU time of {last} VMs' QEMUs": Runs(bare[last].cpu),
            "CPU time of 1 VM's QEMUs": Runs(bare[1].cpu),
        },
        note,
        facts={
            "bare_script": growth(bare),
            "pause_by_vms": {
                number: {
                    "agent": agent[number].pause,
                    "bare script": bare[number].pause,
                    "explained": [explained[number]],
                }
                for number in NUMBERS
            },
        },
    )


def _bare_round(rounds: _Rounds, vms: Sequence[BareVm], threads: ThreadPoolExecutor) -> None:
    begun = time.monotonic()
    stopped_at = list(threads.map(_save, vms))
    resumed_at = list(threads.map(BareVm.load, vms))
    rounds.wall.append(time.monotonic() - begun)
    rounds.pause.append(mean(resumed_at) - mean(stopped_at))
    rounds.cpu.append(sum(vm.cpu_s for vm in vms))


def _save(vm: BareVm) -> float:
    vm.prepare()
    return vm.save()[0]
