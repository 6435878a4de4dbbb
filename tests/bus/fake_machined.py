# SPDX-License-Identifier: GPL-2.0-or-later
"""A systemd-machined for the private bus. The real one wants PID 1, root, and a system bus of its own.

    python -m tests.bus.fake_machined ADDRESS answers|silence|denies

It answers GetMachine, RegisterMachine, UnregisterMachine and GetAll by the signatures of org.freedesktop.machine1(5), and
refuses a name with two dots. Prints "ready".
"""

from __future__ import annotations

import asyncio
import sys

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

NAME = "org.freedesktop.machine1"
ROOT = "/org/freedesktop/machine1/machine/"


class Refused(Exception):
    """With the error's name and text."""


class Machined:
    def __init__(self) -> None:
        self.machines: dict[str, dict[str, Variant]] = {}

    def answer(self, message: Message) -> tuple[str, list[object]]:
        """Signature and body. Raises Refused."""
        if message.member == "GetAll":
            if (name := message.path.removeprefix(ROOT)) not in self.machines:
                raise Refused("org.freedesktop.DBus.Error.UnknownObject", f"Unknown object {message.path}")
            return "a{sv}", [self.machines[name]]
        name = message.body[0]
        if message.member == "RegisterMachine":
            assert message.signature == "sayssus"
            _, _, service, kind, leader, root = message.body
            assert (kind, root) == ("vm", "")
            if ".." in name:
                raise Refused("org.freedesktop.DBus.Error.InvalidArgs", "Invalid machine name")
            if name in self.machines:
                raise Refused(f"{NAME}.MachineExists", f"Machine '{name}' already exists")
            unit = Variant("s", f"cpr-vm@{name}.service")
            self.machines[name] = {"Service": Variant("s", service), "Leader": Variant("u", leader), "Unit": unit}
            return "o", [ROOT + name]
        if name not in self.machines:
            raise Refused(f"{NAME}.NoSuchMachine", f"No machine '{name}' known")
        if message.member == "UnregisterMachine":
            del self.machines[name]
            return "", []
        assert message.member == "GetMachine"
        return "o", [ROOT + name]


async def serve(address: str, how: str) -> None:
    bus = await MessageBus(address).connect()
    machined = Machined()

    def on_message(message: Message) -> Message | bool:
        if message.message_type is not MessageType.METHOD_CALL or message.destination != NAME:
            return False
        if how == "silence":
            return True
        if how == "denies":
            return Message.new_error(message, "org.freedesktop.DBus.Error.AccessDenied", "not you")
        try:
            return Message.new_method_return(message, *machined.answer(message))
        except Refused as error:
            return Message.new_error(message, *error.args)

    bus.add_message_handler(on_message)
    await bus.request_name(NAME)
    print("ready", flush=True)
    await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]  # dbus_next leaves it untyped


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2]))
