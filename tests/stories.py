# SPDX-License-Identifier: GPL-2.0-or-later
"""Upgrades as the journal and the history have them, for tests of what is told of them."""

from __future__ import annotations

from typing import Any

from cpr_agent.core.timeline import GuestTimeline
from cpr_agent.report.story import Story, story_of

T0 = 1_790_000_000.0
UPGRADE = "a5c17d40e0f14f6c9e0b6c2a4a1d9f00"


def upgrade(
    guests: int = 3, held: tuple[str, ...] = (), check_s: float = 3.2, names: str = "web{}", **facts: Any
) -> tuple[list[dict[str, Any]], list[GuestTimeline]]:
    """One that went through a kexec, with ``held`` guests of which there are no timelines. Guests are saved in groups, and
    loaded the other way round."""
    started = T0 - check_s
    vms = [names.format(number + 1) for number in range(guests)]
    records: list[dict[str, Any]] = []

    def add(at: float, event: str, boot: str = "one", **more: Any) -> None:
        records.append({"n": len(records), "at": at, "boot": boot, "event": event, **more})

    def phase(at: float, name: str, boot: str = "one", **more: Any) -> None:
        add(at, f"upgrade-{name}", boot, upgrade=UPGRADE, **more)

    phase(started, "checking", kind="upgrade", kernel_from="6.12.43", kernel_to="6.12.57", policy="all-or-nothing", **facts)
    phase(T0 - 0.1, "saving", shut_down=[])
    stops = {vm: T0 + 0.35 * (index * 4 // guests) for index, vm in enumerate(vms)}
    for vm, at in stops.items():
        add(at, "save-begin", vm=vm, checkpoint=f"id-{vm}", run_state="running")
    for vm, at in stops.items():
        add(at + 0.3, "saved", vm=vm, checkpoint=f"id-{vm}", stopped_at=at + 0.02)
    phase(T0 + 1.9, "saved")
    phase(T0 + 2.0, "committing")
    phase(T0 + 21.5, "booted", "two", interrupted="", kernel="6.12.57", userspace_at=T0 + 16.4, by_kexec=True)
    phase(T0 + 22.0, "loading", "two")
    timelines = []
    for index, vm in enumerate(vms):
        if vm in held:
            reason = "the contents of its memory are not what they were"
            evidence = [["witness of 4096 pages", "9f3a" * 8, "41cc" * 8]]
            add(T0 + 24, "held", "two", vm=vm, upgrade=UPGRADE, reason=reason, evidence=evidence)
            continue
        load_at = T0 + 22.1 + 0.8 * ((guests - 1 - index) * 4 // guests)
        timelines.append(
            GuestTimeline(
                id=f"id-{vm}",
                vm=vm,
                upgrade=UPGRADE,
                kernel_before="6.12.43",
                kernel_after="6.12.57",
                stopped_at=stops[vm] + 0.02,
                saved_at=stops[vm] + 0.3,
                shutdown_at=T0 + 6.8,
                userspace_at=T0 + 16.4,
                load_at=load_at,
                memory_at=load_at + 0.4,
                loaded_at=load_at + 1.5 + 0.03 * (index % 7),
                resumed_at=load_at + 1.62 + 0.03 * (index % 7),
                run_state="running",
                qemu_before="10.0.3",
                qemu_after="10.0.13",
                witness="sampled",
                state_bytes=290_000,
                memory="21dfda89-0355-4462-b7ed-7d7a01837540",
                memory_bytes=4 << 30,
                clock_behind_s=24.3,
            )
        )
    failures = [f"VM {vm}: the contents of its memory are not what they were" for vm in held]
    phase(T0 + 28.5, "held" if held else "done", "two", failures=failures, loaded=[t.vm for t in timelines])
    return records, timelines


def told(*arguments: Any, wanted: str = "", **options: Any) -> Story:
    return story_of(wanted, *upgrade(*arguments, **options), host="kvm7.example.net")
