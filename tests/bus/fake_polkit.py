# SPDX-License-Identifier: GPL-2.0-or-later
"""A polkit for the private bus, where the real one would want a system bus, sessions and rules of this machine.

    python -m tests.bus.fake_polkit ADDRESS yes|no|challenge|error|silence

Prints "ready", and then each action that it is asked about with the flags, and "cancelled" where it is.
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
        if message.message_type is MessageType.METHOD_CALL and message.member == "CancelCheckAuthorization":
            print("cancelled", flush=True)
            return Message.new_method_return(message)
        if message.message_type is not MessageType.METHOD_CALL or message.member != "CheckAuthorization":
            return False
        _, action, _, flags, _ = message.body
        print(action, flags, flush=True)
        if answer == "silence":
            return True
        if answer == "error":
            return Message.new_error(message, f"{NAME}.Error.Failed", "out of order")
        return Message.new_method_return(message, "(bba{ss})", [[answer == "yes", answer == "challenge", {}]])

    bus.add_message_handler(on_message)
    await bus.request_name(NAME)
    print("ready", flush=True)
    await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]  # dbus_next leaves it untyped


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2]))
