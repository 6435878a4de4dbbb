# SPDX-License-Identifier: GPL-2.0-or-later
"""Who depends on a unit of the host: a VM, or the agent. By PID 1's own answer, and by the places of VMs' disks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple

from cpr_agent.core.model import Unit
from cpr_agent.core.ports import Ports
from cpr_agent.core.vm import Vm


class Dependents(NamedTuple):
    """``units`` are all of the host, by name. Of these ``agent`` are the agent's own and those that it needs, ``vms`` those
    of VMs. ``disks`` are paths. The VM's name stands beside each."""

    units: Mapping[str, Unit]
    agent: Collection[str] = ()
    vms: Mapping[str, str] = {}
    disks: Mapping[str, str] = {}

    def unit(self, name: str) -> Unit | None:
        """By its name or another one that it has; None if there is no such unit."""
        found = self.units.get(name) or next((unit for unit in self.units.values() if name in unit.aliases), None)
        return found if found and found.exists else None

    def taken_along(self, unit: Unit) -> dict[str, Unit]:
        """The unit, and all that systemd stops with it, by name."""
        out, waiting = {unit.name: unit}, [unit]
        while waiting:
            for name in waiting.pop().takes_along:
                other = self.units.get(name)
                if other and name not in out:
                    out[name] = other
                    waiting.append(other)
        return out

    def of(self, unit: Unit) -> str:
        """Who needs the unit, and why: fit for an admin; "" for nobody.

        Somebody needs it whose unit would stop with it, is ordered after it, or wants it or one that would stop with it. An
        order alone counts too: whoever gives a VM's unit one has a reason, and no unit is ordered after all others.
        """
        along = self.taken_along(unit)
        somebodys = {**dict.fromkeys(self.agent, "the agent"), **{name: f"VM {vm}" for name, vm in self.vms.items()}}
        if unit.name in somebodys:
            return somebodys[unit.name]
        for name, who in somebodys.items():
            user = self.units.get(name)
            if name in along or (user and (unit.name in user.after or not user.wants.isdisjoint(along))):
                return f"{who} ({name})"
        for mount in (one.mount_point for one in along.values() if one.mount_point):
            for path, vm in self.disks.items():
                if PurePath(path).is_relative_to(mount):
                    return f"VM {vm} ({path})"
        return ""


def dependents(ports: Ports, units: Mapping[str, Unit], vms: Collection[Vm]) -> Dependents:
    disks = {path: vm.name for vm in vms for path in ports.definitions.images(_arguments(vm)) if path.startswith("/")}
    return Dependents(units, ports.units.needed, {vm.unit: vm.name for vm in vms if vm.unit}, disks)


def _arguments(vm: Vm) -> Sequence[str]:
    if launch := vm.launched():
        return launch.argv
    return vm.definition.vm.arguments if vm.definition else ()
