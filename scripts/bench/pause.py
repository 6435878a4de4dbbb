# SPDX-License-Identifier: GPL-2.0-or-later
"""One guest's pause: through the agent, the bare script and libvirt, each with the same guest in the same run."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from scripts.bench.figures import Figure, Runs
from scripts.bench.goals import GOALS
from scripts.bench.machine import MIB, Pause, fill, machine
from scripts.bench.virsh import Libvirt

ROUNDS = 15
WRITTEN = 0.7
"""How much of a guest's RAM is written, where that matters: to libvirt, which writes all of it to a file."""
SIZES_MIB = (256, 512, 1024, 2048, 4096, 8192)
LIBVIRT_ROUNDS = {512: 5, 4096: 3}


def against_bare() -> Iterator[Figure]:
    """From STOP (QEMU's event) to the reply of CprSave, which comes when all is durable, and to RESUME."""
    ours: list[Pause] = []
    refreshes: list[float] = []
    bare_saves: list[float] = []
    bare_pauses: list[float] = []
    with machine() as here, here.bare("bare", 256) as bare:
        guest = here.guest("web1", 256)
        for _ in range(ROUNDS):  # in turn, so that what disturbs the one disturbs the other
            bare.prepare()
            stopped_at, durable_at = bare.save()
            bare_saves.append(durable_at - stopped_at)
            bare_pauses.append(bare.load() - stopped_at)
            ours.append(here.save_and_load(guest))
            refreshes.append(here.refresh(guest))
        guest.assert_unbroken()
    phases = {name: median(one.phases[name] for one in ours) for name in ours[0].phases}
    told = "the agent's phases: " + ", ".join(f"{name} {took_s:.3f} s" for name, took_s in phases.items())
    yield _ratio("save", [one.save_s for one in ours], bare_saves, "256 MiB; both in turn")
    yield _ratio(
        "pause", refreshes, bare_pauses, "256 MiB; both in turn; by Refresh: the new QEMU is there before the save"
    )
    yield _ratio("pause-by-hand", [one.whole_s for one in ours], bare_pauses, f"256 MiB; both in turn; {told}")


def _ratio(name: str, ours: list[float], theirs: list[float], note: str) -> Figure:
    raw = {"agent": Runs(ours), "bare script": Runs(theirs)}
    return Figure(name, GOALS[name], raw["agent"].median / raw["bare script"].median, raw, note)


def against_libvirt() -> Iterator[Figure]:
    for size_mib, rounds in LIBVIRT_ROUNDS.items():
        with machine() as here:
            guest = here.guest("web1", size_mib, written=WRITTEN)
            by_hand = Runs([here.save_and_load(guest).whole_s for _ in range(ROUNDS)])
            ours = Runs([here.refresh(guest) for _ in range(ROUNDS)])
            guest.assert_unbroken()
        with machine(agent=False) as here, Libvirt(here.directory / "libvirt", here.qemu, here.tiny) as libvirt:
            libvirt.start(size_mib)
            fill(libvirt.ram, size_mib * MIB, WRITTEN)
            theirs = Runs([libvirt.save_and_start() for _ in range(rounds)])
        name = f"virsh-{size_mib}"
        runs = {"agent, by Refresh": ours, "agent, by CprSave and CprLoad": by_hand, "virsh": theirs}
        note = f"no reboot in between; by CprSave and CprLoad {theirs.median / by_hand.median:.1f} times"
        yield Figure(name, GOALS[name], theirs.median / ours.median, runs, note)


def by_ram() -> Iterator[Figure]:
    """Each size in turn with the smallest, so that none has a better time of day than that."""
    small_mib, *larger = SIZES_MIB
    smallest: list[float] = []
    runs: dict[int, Runs] = {}
    with machine() as here:
        small = here.guest("small", small_mib, written=WRITTEN)
        for size_mib in larger:
            guest = here.guest("large", size_mib, written=WRITTEN)
            pauses = [(here.save_and_load(small).whole_s, here.save_and_load(guest).whole_s) for _ in range(ROUNDS)]
            guest.assert_unbroken()
            guest.call("Stop", "s", "hard")
            here.forget(guest)
            smallest = [of_small for of_small, _ in pauses]
            runs[size_mib] = Runs([of_large for _, of_large in pauses])
        small.assert_unbroken()
    runs = {small_mib: Runs(smallest), **runs}  # of the last rounds: those in turn with the largest
    yield Figure(
        "by-ram",
        GOALS["by-ram"],
        runs[larger[-1]].median / runs[small_mib].median,
        {f"{size_mib} MiB": of_size for size_mib, of_size in runs.items()},
        facts={"pause_by_mib": {size_mib: of_size.median for size_mib, of_size in runs.items()}},
    )
