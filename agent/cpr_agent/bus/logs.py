# SPDX-License-Identifier: GPL-2.0-or-later
"""The object for `systemctl service-log-level`."""

from __future__ import annotations

from typing import Protocol

from cpr_agent.bus.objects import BusObject


class LogSettings(Protocol):
    """Level and target of the log; host.journald.LogControl."""

    level: str
    target: str
    identifier: str

    def set_level(self, level: str) -> None: ...

    def set_target(self, target: str) -> None: ...


class LogObject(BusObject):
    """org.freedesktop.LogControl1(5)."""

    interface = "org.freedesktop.LogControl1"
    path = "/org/freedesktop/LogControl1"

    def __init__(self, logs: LogSettings) -> None:
        self._logs = logs

    def get_LogLevel(self) -> str:
        return self._logs.level

    def set_LogLevel(self, level: str) -> None:
        self._logs.set_level(level)

    def get_LogTarget(self) -> str:
        return self._logs.target

    def set_LogTarget(self, target: str) -> None:
        self._logs.set_target(target)

    def get_SyslogIdentifier(self) -> str:
        return self._logs.identifier
