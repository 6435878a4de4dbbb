# SPDX-License-Identifier: GPL-2.0-or-later
"""Work that is left once a guest runs again, and that no guest waits for: its timeline, its clock, the post-load hooks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import msgspec
from msgspec.structs import replace

from cpr_agent.core.events import Event, about
from cpr_agent.core.hooks import after_load
from cpr_agent.core.machine import Machine
from cpr_agent.core.model import Manifest, RunState
from cpr_agent.core.timeline import GuestTimeline
from cpr_agent.errors import CprError, QemuFailed

log = logging.getLogger(__name__)


class LoadTimes(msgspec.Struct, frozen=True):
    """Epoch seconds: when a load began, had its memory, and had its state."""

    load_at: float
    memory_at: float
    loaded_at: float


async def report(machine: Machine, manifest: Manifest, times: LoadTimes, resumed_at: float) -> None:
    """Record how the guest came through, which ran at ``resumed_at`` (epoch s), set its clock, and run the hooks."""
    timeline = await _timeline(machine, manifest, times, resumed_at)
    facts = about(Event.LOADED, **entry(manifest, "load"), pause=f"{timeline.pause_s:.3f}")
    log.info("VM %s: loaded, it was stopped for %.3f s", machine.name, timeline.pause_s, extra=facts)
    await _store(machine, timeline)
    if (manifest.run_state == RunState.RUNNING or manifest.wakes) and (clock := await _set_clock(machine, manifest)):
        timeline = replace(timeline, **clock)
        await _store(machine, timeline)
    run_state = RunState.RUNNING if manifest.wakes else RunState(manifest.run_state)
    if problems := await after_load(machine, timeline, run_state):
        await _store(machine, replace(timeline, hook_problems=problems))


def entry(manifest: Manifest, phase: str) -> dict[str, str]:
    """Fields of an entry in the system's journal."""
    return {"vm": manifest.vm, "upgrade": manifest.upgrade, "checkpoint": manifest.id, "phase": phase}


async def _timeline(machine: Machine, manifest: Manifest, loaded: LoadTimes, resumed_at: float) -> GuestTimeline:
    clock, boot, times = machine.ports.clock, machine.ports.boot, manifest.times
    rebooted = boot.boot_id() != manifest.boot_id
    soft = not rebooted and boot.start_id() != manifest.saved_in
    stepped_s = 0.0
    if not rebooted and times.stopped_uptime_s:
        paused_s = clock.uptime_s() - (clock.now() - resumed_at) - times.stopped_uptime_s
        stepped_s = resumed_at - times.stopped_at - paused_s
    return GuestTimeline(
        id=manifest.id,
        vm=machine.name,
        upgrade=manifest.upgrade,
        kernel_before=manifest.kernel,
        kernel_after=boot.kernel(),
        stopped_at=times.stopped_at,
        saved_at=times.durable_at,
        shutdown_at=await asyncio.to_thread(boot.boot_ended_at, manifest.boot_id) if rebooted else 0.0,
        userspace_at=boot.userspace_at() if rebooted or soft else 0.0,
        soft=soft,
        load_at=loaded.load_at - stepped_s,
        memory_at=loaded.memory_at - stepped_s,
        resumed_at=resumed_at - stepped_s,
        by_kexec=not rebooted or boot.booted_by_kexec(),
        loaded_at=loaded.loaded_at - stepped_s,
        run_state=manifest.run_state,
        qemu_before=manifest.qemu.version,
        qemu_after=await _qemu_version(machine),
        witness=manifest.witness.kind,
        state_bytes=manifest.vmstate.size_bytes,
        memory=", ".join(one.place for one in manifest.memory),
        memory_bytes=sum(one.size_bytes for one in manifest.memory),
    )


async def _store(machine: Machine, timeline: GuestTimeline) -> None:
    try:
        await asyncio.to_thread(machine.ports.history.add, timeline)  # it is made durable, and other guests wait
        machine.neighbours.changed(machine.name)
    except OSError as error:  # the guest runs; a report is not worth failing for
        log.warning("VM %s: its timeline could not be stored: %s", machine.name, error)


async def _qemu_version(machine: Machine) -> str:
    """For the record; "" if its QEMU is gone already."""
    with contextlib.suppress(QemuFailed):
        return await machine.qemu.version() if machine.qemu else ""
    return ""


async def _set_clock(machine: Machine, manifest: Manifest) -> dict[str, Any]:
    """A guest's clock stood still with it. Returns the fields of its timeline about that."""
    if machine.qemu is None or (machine.definition and machine.definition.load.resync_clock == "never"):
        return {}
    try:
        behind_s = await machine.qemu.set_guest_clock(machine.ports.clock.now)
    except CprError as error:
        facts = about(Event.CLOCK_NOT_SET, **entry(manifest, "load"))
        log.warning("VM %s: its clock was not set: %s", machine.name, error.what, extra=facts)
        return {"clock_problem": error.what}
    if behind_s is None:
        return {}
    log.info("VM %s: its clock was %.3f s behind, and was set", machine.name, behind_s)
    return {"clock_behind_s": behind_s}
