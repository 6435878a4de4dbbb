# SPDX-License-Identifier: GPL-2.0-or-later
"""What the fakes of services on the private bus have in common: each is a process of its own under the real one's name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageType
from dbus_next.message import Message


def serve(address: str, name: str, answer: Callable[[Message], Message | bool]) -> None:
    """Print "ready", then answer calls until the bus ends. True leaves one unanswered, False is no such method."""
    asyncio.run(_serve(address, name, answer))


async def _serve(address: str, name: str, answer: Callable[[Message], Message | bool]) -> None:
    bus = await MessageBus(address).connect()
    bus.add_message_handler(lambda message: message.message_type is MessageType.METHOD_CALL and answer(message))
    await bus.request_name(name)
    print("ready", flush=True)
    await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]  # dbus_next leaves it untyped
