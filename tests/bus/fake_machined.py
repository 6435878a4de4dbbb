# SPDX-License-Identifier: GPL-2.0-or-later
"""A systemd-machined for the private bus. The real one wants PID 1, root, and a system bus of its own.

    python -m tests.bus.fake_machined ADDRESS answers|silence|denies|nothing|numbers

It answers GetMachine, RegisterMachine, UnregisterMachine and GetAll by the signatures of org.freedesktop.machine1(5), and
refuses a name with two dots. With "nothing" all its answers are empty, with "numbers" a machine is one. Prints "ready".
"""

from __future__ import annotations

import sys

from dbus_next.message import Message
from dbus_next.signature import Variant

from tests.bus.stand_in import serve

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


def answer(machined: Machined, message: Message, how: str) -> Message | bool:
    if message.destination != NAME:
        return False
    if how == "silence":
        return True
    if how == "denies":
        return Message.new_error(message, "org.freedesktop.DBus.Error.AccessDenied", "not you")
    if how == "nothing":
        return Message.new_method_return(message)
    if how == "numbers" and message.member == "GetAll":
        return Message.new_method_return(message, "u", [42])
    try:
        return Message.new_method_return(message, *machined.answer(message))
    except Refused as error:
        return Message.new_error(message, *error.args)


if __name__ == "__main__":
    known = Machined()
    serve(sys.argv[1], NAME, lambda message: answer(known, message, sys.argv[2]))
