"""When the admin's own programs run, and what their failure means. Never while the agent has stopped a guest.

``check`` may veto a save; ``pre-save`` refuses one while all guests run; ``post-load`` is told of, and undoes nothing: its
guest runs already.
"""

from __future__ import annotations

import logging

from cpr_agent.core.events import Event, about
from cpr_agent.core.model import HookPhase
from cpr_agent.core.ports import Ports
from cpr_agent.core.timeline import GuestTimeline
from cpr_agent.core.vm_base import VmBase
from cpr_agent.errors import SaveFailed

log = logging.getLogger(__name__)


async def vetoes(ports: Ports, vm: VmBase, upgrade: str = "") -> list[str]:
    """What the check hooks have against a save now, each fit for an admin."""
    return [f"the hook {hook}: {why}" for hook, why in await ports.hooks.run("check", vm.name, upgrade, _facts(vm))]


async def before_save(ports: Ports, vm: VmBase, upgrade: str = "") -> None:
    """Raises SaveFailed with what the first hook that failed said."""
    for hook, why in await ports.hooks.run("pre-save", vm.name, upgrade, _facts(vm)):
        _tell(vm, "pre-save", upgrade, hook, why)
        raise SaveFailed(
            f"could not be saved: the hook {hook}: {why}",
            vm=vm.name,
            left="the guest was not stopped",
            remedy="mend what the hook says, or take its execute permission away",
        )


async def after_load(ports: Ports, vm: VmBase, timeline: GuestTimeline) -> tuple[str, ...]:
    """The failures, each fit for an admin."""
    facts = {
        **_facts(vm),
        "pause_s": timeline.pause_s,
        "kernel_before": timeline.kernel_before,
        "kernel_after": timeline.kernel_after,
    }
    failures = await ports.hooks.run("post-load", vm.name, timeline.upgrade, facts)
    for hook, why in failures:
        _tell(vm, "post-load", timeline.upgrade, hook, why)
    return tuple(f"the hook {hook}: {why}" for hook, why in failures)


def _tell(vm: VmBase, phase: HookPhase, upgrade: str, hook: str, why: str) -> None:
    log.warning(
        "VM %s: the %s hook %s: %s",
        vm.name,
        phase,
        hook,
        why,
        extra=about(Event.HOOK_FAILED, vm=vm.name, upgrade=upgrade, phase=phase, hook=hook, why=why),
    )


def _facts(vm: VmBase) -> dict[str, object]:
    return {
        "description": vm.definition.vm.description if vm.definition else "",
        "run_state": vm.run_state,
        "pid": vm.pid,
        "memory": [{"device": one.place, "size": one.size_bytes, "survives": one.survives} for one in vm.occupied_memory()],
    }
