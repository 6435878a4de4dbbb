# SPDX-License-Identifier: GPL-2.0-or-later
"""An agent of before the page: its objects lack what the page has come to know, and it has none of the newer methods.

    python -m tests.cockpit.older_agent ADDRESS

Prints "ready".
"""

from __future__ import annotations

import asyncio
import sys

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

ROOT = "/org/cpragent1"
VM = {
    "Name": Variant("s", "web1"),
    "State": Variant("s", "running"),
    "Memory": Variant("a{sv}", {"size": Variant("t", 16 << 20), "survives": Variant("s", "kexec")}),
    "Checkpoint": Variant("s", "a word in place of a table"),
}
MANAGER = {"Version": Variant("s", "0.0.9"), "Kernel": Variant("s", "6.1.0"), "Upgrade": Variant("a{sv}", {})}


async def serve(address: str) -> None:
    bus = await MessageBus(address).connect()

    def on_message(message: Message) -> Message | bool:
        if message.message_type is not MessageType.METHOD_CALL or not message.path.startswith(ROOT):
            return False
        if message.member == "GetManagedObjects":
            return Message.new_method_return(message, "a{oa{sa{sv}}}", [{f"{ROOT}/vm/web1": {"org.cpragent1.VM": VM}}])
        if message.member == "GetAll":
            return Message.new_method_return(message, "a{sv}", [MANAGER if message.path == ROOT else VM])
        return Message.new_error(message, "org.freedesktop.DBus.Error.UnknownMethod", f"no {message.member} here")

    bus.add_message_handler(on_message)
    await bus.request_name("org.cpragent1")
    print("ready", flush=True)
    await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]  # dbus_next leaves it untyped


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
