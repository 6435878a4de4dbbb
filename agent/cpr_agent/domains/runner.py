# SPDX-License-Identifier: GPL-2.0-or-later
"""The QEMUs of domains; implements core.ports.Runner."""

from __future__ import annotations

from cpr_agent.core.model import Inventory, Launch
from cpr_agent.domains.place import DomainPlace, NoPlace, World


class DomainRunner:
    def __init__(self, world: World) -> None:
        self._world = world

    def own(self, name: str) -> DomainPlace:
        return DomainPlace(name, self._world)

    def spare(self, name: str) -> NoPlace:  # noqa: ARG002 - it is none of anybody's
        return NoPlace()

    def adopt(self, name: str) -> None:
        raise AssertionError(f"domain {name} has no spare place")

    def launched(self, name: str) -> Launch | None:
        return self._world.records.launch(name)

    def launched_all(self) -> list[str]:
        return self._world.records.launched_all()

    def trim_logs(self) -> None:
        """libvirt's log daemon does."""

    def inventory(self, name: str) -> Inventory | None:
        return self._world.records.inventory(name)

    def record_inventory(self, name: str, inventory: Inventory) -> None:
        self._world.records.record_inventory(name, inventory)

    def user(self, name: str) -> str:  # noqa: ARG002
        """Nothing that the agent gives or takes depends on whom libvirt runs QEMU as."""
        return ""

    async def assign_user(self, name: str) -> str:  # noqa: ARG002
        """The memory is root's: QEMU's user is that of all domains, and gets it by the gate alone."""
        return "root"

    async def prepare(self, launch: Launch) -> None:
        """libvirt needs nothing of the agent's."""

    def unit(self, name: str) -> str:  # noqa: ARG002
        """libvirt's scope, whose name has a number that changes."""
        return ""
