# SPDX-License-Identifier: GPL-2.0-or-later
"""A conversation with a domain's QEMU by way of libvirt, which has its monitor: it outlives the agent's own connection, and
is there with every QEMU. While libvirt starts a domain it lets nobody through."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from cpr_agent.domains.connection import Libvirt, MonitorEvent, listen
from cpr_agent.errors import QemuFailed, QemuRefused
from cpr_agent.vm.qmp import EVENTS, MAX_MESSAGE_BYTES, Event, Qmp
from cpr_agent.vm.replies import EVENT_DATA, MESSAGE, UnreadableReplyError


class PassThrough(Qmp):
    """``virsh qemu-monitor-command``; see libvirt's docs/drvqemu.rst. Create it by ``open``."""

    def __init__(self, vm: str, libvirt: Libvirt) -> None:
        super().__init__(vm)
        self._libvirt = libvirt
        self._listening: list[Callable[[], None]] = []

    @classmethod
    async def open(cls, vm: str, libvirt: Libvirt) -> PassThrough:
        """Raises QemuUnreachable, QemuFailed."""
        await libvirt.watch()
        qmp = cls(vm, libvirt)
        heard = libvirt.heard
        qmp._listening = [
            listen(heard.monitor, qmp._on_event),
            listen(heard.ended, qmp._on_end),
            listen(heard.lost, qmp._on_loss),
        ]
        return qmp

    async def _raw(
        self, command: str, arguments: dict[str, object] | None, fd: int | None, timeout_s: float
    ) -> msgspec.Raw:
        assert fd is None, "libvirt opens all files itself"
        message = {"execute": command, **({"arguments": arguments} if arguments else {})}
        text = msgspec.json.encode(message).decode()
        said = (await self._libvirt.monitor_command(self.vm, command, text, timeout_s)).encode()
        try:
            if len(said) > MAX_MESSAGE_BYTES:
                raise UnreadableReplyError(f"it has {len(said)} bytes")
            envelope = MESSAGE.read(said)
        except UnreadableReplyError as error:
            raise QemuFailed(f"QEMU gave an answer to {command} that makes no sense: {error}", vm=self.vm) from error
        if envelope.error:
            raise QemuRefused(f"QEMU refused {command}: {envelope.error.desc}", vm=self.vm)
        return envelope.answer

    async def close(self) -> None:
        for forget in self._listening:
            forget()
        self._listening.clear()

    def _on_event(self, told: MonitorEvent) -> None:
        if told.domain != self.vm or told.name not in EVENTS:
            return
        try:
            status = EVENT_DATA.read(told.data.encode()).status if told.name == "MIGRATION" else ""
            self._hear(Event(told.name, told.at, status))
        except UnreadableReplyError as error:
            self._hear(Event(told.name, 0.0, "", f"QEMU told of {told.name} in a way that makes no sense: {error}"))

    def _on_end(self, domain: str) -> None:
        if domain == self.vm:
            self._end("the domain has ended")

    def _on_loss(self) -> None:
        self._end("libvirt's daemon has ended")
