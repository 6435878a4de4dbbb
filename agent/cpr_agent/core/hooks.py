# SPDX-License-Identifier: GPL-2.0-or-later
"""When the admin's own programs run, and what their failure means. Never while the agent has stopped a guest.

``check`` may veto a save; ``pre-save`` refuses one while all guests run; ``post-load`` is told of, and undoes nothing: its
guest runs already.
"""

from __future__ import annotations

import logging

from cpr_agent.core.events import Event, about
from cpr_agent.core.machine import Machine
from cpr_agent.core.model import HookPhase, RunState
from cpr_agent.core.timeline import GuestTimeline
from cpr_agent.errors import SaveFailed

log = logging.getLogger(__name__)


async def vetoes(machine: Machine) -> list[str]:
    """The objections of the check hooks to a save now, each fit for an admin."""
    found = await machine.ports.hooks.run("check", machine.name, "", _facts(machine))
    return [f"the hook {hook}: {why}" for hook, why in found]


async def before_save(machine: Machine, upgrade: str = "") -> None:
    """Raises SaveFailed with the words of the first hook that failed."""
    for hook, why in await machine.ports.hooks.run("pre-save", machine.name, upgrade, _facts(machine)):
        _log(machine, "pre-save", upgrade, hook, why)
        raise SaveFailed(
            f"could not be saved: the hook {hook}: {why}",
            vm=machine.name,
            left="the guest was not stopped",
            remedy="mend what the hook says, or take its execute permission away",
        )


async def after_load(machine: Machine, timeline: GuestTimeline, run_state: RunState) -> tuple[str, ...]:
    """The failures, each fit for an admin. ``run_state`` is what the load made it: QEMU may not have been asked since."""
    facts = {
        **_facts(machine),
        "run_state": run_state,
        "pause_s": timeline.pause_s,
        "kernel_before": timeline.kernel_before,
        "kernel_after": timeline.kernel_after,
    }
    failures = await machine.ports.hooks.run("post-load", machine.name, timeline.upgrade, facts)
    for hook, why in failures:
        _log(machine, "post-load", timeline.upgrade, hook, why)
    return tuple(f"the hook {hook}: {why}" for hook, why in failures)


def _log(machine: Machine, phase: HookPhase, upgrade: str, hook: str, why: str) -> None:
    log.warning(
        "VM %s: the %s hook %s: %s",
        machine.name,
        phase,
        hook,
        why,
        extra=about(Event.HOOK_FAILED, vm=machine.name, upgrade=upgrade, phase=phase, hook=hook, why=why),
    )


def _facts(machine: Machine) -> dict[str, object]:
    return {
        "description": machine.definition.vm.description if machine.definition else "",
        "run_state": machine.run_state,
        "pid": machine.pid,
        "memory": [
            {"device": one.place, "size": one.size_bytes, "survives": one.survives} for one in machine.occupied_memory()
        ],
    }
