# SPDX-License-Identifier: GPL-2.0-or-later
"""A QMP connection without a QEMU: what one would answer, through the same decoding."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from cpr_agent.errors import QemuRefused
from cpr_agent.vm.qmp import Qmp

Answers = Callable[[str, dict[str, object]], object]
"""By command and arguments; raises LookupError for a command that this QEMU does not have."""


class ScriptedQmp(Qmp):
    def __init__(self, answers: Answers) -> None:
        super().__init__("web1")
        self._answers = answers
        self.asked: list[str] = []

    async def _raw(
        self,
        command: str,
        arguments: dict[str, object] | None,
        fd: int | None,  # noqa: ARG002 - none is asked with one
        timeout_s: float,  # noqa: ARG002 - it is there at once
    ) -> msgspec.Raw:
        self.asked.append(command)
        try:
            return msgspec.Raw(msgspec.json.encode(self._answers(command, arguments or {})))
        except LookupError as error:
            raise QemuRefused(f"The command {command} has not been found", vm=self.vm) from error

    async def close(self) -> None:
        """There is no QEMU."""
