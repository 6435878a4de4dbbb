# SPDX-License-Identifier: GPL-2.0-or-later
"""core.domains.Domains as it stands in the ports: parser and connection are loaded when an admin first asks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cpr_agent.core.domains import Adoptable, Change
from cpr_agent.core.model import MemoryNode
from cpr_agent.domains.hub import Domains
from cpr_agent.domains.names import Places

if TYPE_CHECKING:
    from cpr_agent.domains.adoption import LibvirtDomains


class DomainsOnDemand:
    """``conf`` is the path of qemu.conf."""

    def __init__(self, domains: Domains, places: Places, conf: Path) -> None:
        self._domains = domains
        self._places = places
        self._conf = conf
        self._loaded: LibvirtDomains | None = None

    @property
    def _all(self) -> LibvirtDomains:
        if self._loaded is None:
            from cpr_agent.domains.adoption import LibvirtDomains

            self._loaded = LibvirtDomains(self._domains.session, self._places, self._conf)
        return self._loaded

    async def adoptable(self, name: str) -> Adoptable:
        return await self._all.adoptable(name)

    async def adoption(self, name: str, memory: MemoryNode, align_bytes: int) -> Change:
        return await self._all.adoption(name, memory, align_bytes)

    async def release(self, name: str) -> Change:
        return await self._all.release(name)

    async def define(self, change: Change) -> None:
        await self._all.define(change)
