# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent's ports on a host that has libvirt: domains stand beside the agent's own VMs in each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from cpr_agent.core.model import Definition, MemoryIdentity
from cpr_agent.core.ports import Memory, Ports
from cpr_agent.domains.beside import BothDefinitions, BothRunners, BothStores, DomainSurroundings
from cpr_agent.domains.host import LibvirtPaths
from cpr_agent.domains.hub import Domains, Parts
from cpr_agent.domains.lazy import DomainsOnDemand
from cpr_agent.domains.names import Places

if TYPE_CHECKING:
    from cpr_agent.domains.gate import Grants
    from cpr_agent.domains.place import Records


def with_domains(  # noqa: PLR0913 - what a daemon has
    own: Ports, root: Path, run: Path, records: Records, grants: Grants, open_memory: Callable[[str, MemoryIdentity], int]
) -> tuple[Ports, Domains]:
    """``own`` are those for the agent's own VMs; ``root`` is / but for tests, and ``run`` the agent's directory in /run."""
    host, places = LibvirtPaths(root), Places(run)
    domains = Domains(
        Parts(
            host=host,
            places=places,
            records=records,
            grants=grants,
            store=own.store,
            open_memory=open_memory,
            nodes_of=lambda definition: _nodes(own.memory, definition),
        )
    )
    both = replace(
        own,
        definitions=BothDefinitions(own.definitions, domains, own.runner.launched),
        runner=BothRunners(own.runner, domains),
        store=BothStores(own.store, domains),
        domains=DomainsOnDemand(domains, places, host.settings),
        surroundings=DomainSurroundings(root, domains),
    )
    return both, domains


def _nodes(memory: Memory, definition: Definition) -> list[str]:
    """The paths of a definition's memory, as far as they are known without a wait."""
    named = {one.device for one in definition.memory.ranges}
    found = [device.node for device in memory.devices() if f"uuid:{device.uuid}" in named] if named else []
    return [*found, *(name for name in named if name.startswith("/"))]
