# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent comes to the bus once there is one: at boot guests go on before that, and also without a bus (ADR 33)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from cpr_agent.bus.service import Service
from cpr_agent.bus.wire import AddressError, AgentBus
from cpr_agent.core.manager import Manager
from cpr_agent.errors import CprError

log = logging.getLogger(__name__)

FIRST_S, SLOWEST_S = 0.1, 5.0
"""Between two looks for the bus; each wait is twice as long as the one before. No event tells of it everywhere."""


class Presence:
    """``serve`` makes the service of a connection. ``arrived`` is told after that, until it returns true."""

    def __init__(
        self, manager: Manager, address: str | None, serve: Callable[[AgentBus], Service], arrived: Callable[[], bool]
    ) -> None:
        self._manager = manager
        self._address = address
        self._serve = serve
        self._arrived = arrived
        self._service: Service | None = None
        self._bus: asyncio.Future[AgentBus] = asyncio.get_running_loop().create_future()
        self._opened = False

    async def come(self) -> str:
        """Returns "" once the agent has its name on the bus, or why there is no bus. Raises Busy if another process has the
        name: a second agent would act on the same guests; AccessDenied, AddressError."""
        try:
            bus = await Service.connect(self._address)
        except (OSError, EOFError) as error:
            return f"there is no message bus yet: {error or type(error).__name__}"
        # The service is there before the name is: the reply comes together with the call that has started the agent.
        service = self._serve(bus)
        try:
            await Service.own_name(bus)
        except BaseException:
            self._manager.listeners.remove(service)
            bus.disconnect()
            raise
        self._service = service
        self._bus.set_result(bus)
        for vm in self._manager.vms.values():
            service.vm_changed(vm)
        for job in self._manager.jobs.current.values():
            service.job_added(job)
        if self._opened:
            service.open()
        return ""

    async def bus(self) -> AgentBus:
        """The connection, once the agent has its name there."""
        return await asyncio.shield(self._bus)

    def open(self) -> None:
        """Answer calls from now on: those that came before the agent had recovered were kept waiting."""
        self._opened = True
        if self._service:
            self._service.open()

    async def stay(self) -> None:
        """Come to the bus, if the agent is not there, and return once the connection is lost."""
        pause_s, before = FIRST_S, ""
        while self._service is None:
            try:
                why = await self.come()
            except (CprError, OSError, EOFError, AddressError) as error:  # guests are loaded all the same
                why, pause_s = str(error), SLOWEST_S
            if why:
                if why != before:
                    log.warning("%s", why)
                before = why
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, SLOWEST_S)
        arriving = asyncio.create_task(self._arrive())
        try:
            await self._service.disconnected()
        finally:
            arriving.cancel()

    async def _arrive(self) -> None:
        pause_s = FIRST_S
        while not self._arrived():
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, SLOWEST_S)
