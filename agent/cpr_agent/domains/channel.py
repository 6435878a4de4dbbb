# SPDX-License-Identifier: GPL-2.0-or-later
"""A conversation with a domain's QEMU by way of libvirt, which has its monitor: it outlives the agent's own connection, and
is there with every QEMU. While libvirt starts a domain it lets nobody through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from cpr_agent.domains.connection import Libvirt, MonitorEvent, listen
from cpr_agent.errors import QemuFailed, QemuRefused
from cpr_agent.vm.qmp import COMMAND_TIMEOUT_S, EVENTS, MAX_MESSAGE_BYTES, Event, Qmp
from cpr_agent.vm.replies import EVENT_DATA, MESSAGE, Query, UnreadableReplyError


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
        (said,) = await self._libvirt.monitor_commands(self.vm, command, [_message(command, arguments)], timeout_s)
        return self._answer(command, said)

    async def ask_all(
        self, asked: Sequence[tuple[Query[Any], dict[str, object]]], timeout_s: float = COMMAND_TIMEOUT_S
    ) -> list[Any]:
        """In one go of the domain's thread: a guest may wait."""
        messages = [_message(query.command, arguments) for query, arguments in asked]
        said = await self._libvirt.monitor_commands(self.vm, "what it was asked", messages, timeout_s)
        return [self._read(query, text) for (query, _), text in zip(asked, said, strict=True)]

    def _read(self, query: Query[Any], said: str) -> Any:
        try:
            return self._decode(query, self._answer(query.command, said))
        except QemuRefused:
            return None

    def _answer(self, command: str, said: str) -> msgspec.Raw:
        """Raises QemuRefused, QemuFailed."""
        raw = said.encode()
        try:
            if len(raw) > MAX_MESSAGE_BYTES:
                raise UnreadableReplyError(f"it has {len(raw)} bytes")
            envelope = MESSAGE.read(raw)
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


def _message(command: str, arguments: dict[str, object] | None) -> str:
    return msgspec.json.encode({"execute": command, **({"arguments": arguments} if arguments else {})}).decode()
