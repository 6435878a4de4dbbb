# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls every method of every interface that the contract has, as whoever runs it; prints a line for each.

    python3 probe.py MODE JOB VM

MODE "act": as a caller who means it, with arguments that fit; "ask": with a signature that fits no method, which is
looked at after the authorization and before anything else: whoever is let through learns that, and nothing happens;
"much": as "act", where a method takes options, with a megabyte of them.
Runs in the host VM on the package's own code.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

sys.path.insert(0, "/usr/lib/cpr-agent")

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType, MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import SignatureTree, Variant

from cpr_agent.bus.contract import BUS_NAME, ROOT, escape, read_contract, standard_interfaces

OPEN = ("org.freedesktop.DBus.Introspectable", "org.freedesktop.DBus.Peer")
"""For everybody, as with any service."""
FITS_NOTHING = "(yy)"
SAMPLES: dict[str, Any] = {"s": "x", "o": ROOT, "b": True, "d": 1.0, "v": Variant("s", "x"), "g": "s"}


def sample(signature: str, mode: str) -> Any:
    if signature == "a{sv}" and mode == "much":
        return {f"append{number}": Variant("s", "x" * (16 << 10)) for number in range(64)}
    if signature.startswith("a"):
        return {} if signature.startswith("a{") else []
    return SAMPLES.get(signature, 1)


async def answer_to(bus: MessageBus, message: Message) -> str:
    message.flags = MessageFlag.NONE  # nobody can type a password here: a no is wanted at once
    reply = await bus.call(message)
    assert reply
    return "done" if reply.message_type is MessageType.METHOD_RETURN else str(reply.error_name).rpartition(".")[2]


async def main(mode: str, job: str, vm: str) -> None:
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    log = "/org/freedesktop/LogControl1"
    own = {"Manager": ROOT, "Job": job, "VM": f"{ROOT}/vm/{escape(vm)}", "LogControl1": log}
    objects = [(own[name.rpartition(".")[2]], interface) for name, interface in read_contract().items()]
    standard = [interface for name, interface in standard_interfaces().items() if name not in OPEN]
    settable = {path: interface.settable for path, interface in objects}
    for path, interface in [*objects, *((path, interface) for path, _ in objects for interface in standard)]:
        if interface.name.endswith("ObjectManager") and path != ROOT:
            continue
        for method in interface.methods.values():
            signature, body = FITS_NOTHING, [[1, 1]]
            if mode == "much" and "a{sv}" not in method.in_signature:
                continue
            if mode != "ask":
                signature = method.in_signature
                body = [sample(kind.signature, mode) for kind in SignatureTree._get(signature).types]
            action = method.action or (method.name == "Set" and settable[path]) or f"{BUS_NAME}.inspect"
            call = Message(BUS_NAME, path, interface.name, method.name, signature=signature, body=body)
            print(path, interface.name, method.name, action, await answer_to(bus, call))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
