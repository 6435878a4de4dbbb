# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections that hear the agent's signals: those that were allowed to ask for what signals tell.

A broadcast would tell every local user of VMs, states and errors, also where polkit keeps ``inspect`` from them. So each
signal goes to each listener by name. A connection that has made an authorized call, as each client does to begin
with, is one until it ends.
"""

from __future__ import annotations

from collections.abc import Iterator

from cpr_agent.bus.authority import trusted

PER_USER = 8
IN_ALL = 64
"""Of users other than root: each listener adds to the time that a change of state takes."""


class Listeners:
    def __init__(self) -> None:
        self._users: dict[str, int] = {}
        """User by connection, the newest last."""

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._users))

    def __len__(self) -> int:
        return len(self._users)

    def add(self, connection: str, uid: int) -> None:
        """Of a user that has too many the oldest goes."""
        if connection in self._users:
            return
        self._users[connection] = uid
        if trusted(uid):
            return
        self._trim([name for name, user in self._users.items() if user == uid], PER_USER)
        self._trim([name for name, user in self._users.items() if not trusted(user)], IN_ALL)

    def discard(self, connection: str) -> None:
        self._users.pop(connection, None)

    def _trim(self, names: list[str], most: int) -> None:
        for name in names[: max(0, len(names) - most)]:
            del self._users[name]
