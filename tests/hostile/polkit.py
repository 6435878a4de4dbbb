# SPDX-License-Identifier: GPL-2.0-or-later
"""A polkit for the private bus that lets everybody look.

    python -m tests.hostile.polkit ADDRESS looking|no

"looking" allows ``inspect``, answers nothing when a password may be typed for anything else, and else says no: the user has
an authentication agent of his own, which never answers. "no" denies everything. Prints "ready", "asked" for each
password that a user should type, and "cancelled" for each question that is taken back.
"""

from __future__ import annotations

import asyncio
import sys

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageType
from dbus_next.message import Message

NAME = "org.freedesktop.PolicyKit1"


async def serve(address: str, answer: str) -> None:
    bus = await MessageBus(address).connect()

    def on_message(message: Message) -> Message | bool:
        if message.message_type is not MessageType.METHOD_CALL:
            return False
        if message.member == "CancelCheckAuthorization":
            print("cancelled", flush=True)
            return Message.new_method_return(message)
        if message.member != "CheckAuthorization":
            return False
        _, action, _, flags, _ = message.body
        allowed = answer == "looking" and action.endswith(".inspect")
        if flags & 1 and not allowed and answer == "looking":
            print("asked", flush=True)
            return True
        return Message.new_method_return(message, "(bba{ss})", [[allowed, False, {}]])

    bus.add_message_handler(on_message)
    await bus.request_name(NAME)
    print("ready", flush=True)
    await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]  # dbus_next leaves it untyped


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2]))
