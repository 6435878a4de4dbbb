# SPDX-License-Identifier: GPL-2.0-or-later
"""What any local user may send.

    python -m tests.hostile.user ADDRESS UID WHAT CALLS CONNECTIONS

Prints "sent" when all calls are, and at the end how often each answer came, in JSON. "storm of WHAT" calls again and again
until its stdin is closed. "flood of WHAT" does so without waiting for an answer, and wants none. "listen" makes no call; it
hears signals until then, and prints those.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
from collections import Counter

from cpr_agent.bus.client import plain
from cpr_agent.bus.library import Message, MessageFlag, MessageType, Variant, marshal
from cpr_agent.bus.wire import DAEMON, ClientBus

NAME, ROOT = "org.cpragent1", "/org/cpragent1"
MANAGER, PROPERTIES = f"{NAME}.Manager", "org.freedesktop.DBus.Properties"
COMMAND_LINE = 'qemu-system-x86_64 -device \'{"x":"\\u0000","fd":1}\' -name guest=\'\\u0000\''
SURROGATE = 'qemu-system-x86_64 -chardev \'{"id":"\\ud800","backend":"stdio"}\''
VARIANTS = [Variant("y", 1)] * 15_000
CALLS: dict[str, tuple[str, str, str, str, list[object]]] = {
    "list": (ROOT, MANAGER, "ListVMs", "", []),
    "check": (ROOT, MANAGER, "Check", "a{sv}", [{}]),
    "check of an upgrade": (ROOT, MANAGER, "Check", "a{sv}", [{"policy": Variant("s", "force")}]),
    "check of a kernel's file": (ROOT, MANAGER, "Check", "a{sv}", [{"kernel-image": Variant("s", "/boot/vmlinuz")}]),
    "check of an initrd": (ROOT, MANAGER, "Check", "a{sv}", [{"initrd": Variant("s", "/etc/shadow")}]),
    "check of many values": (ROOT, MANAGER, "Check", "a{sv}", [{"policy": Variant("av", VARIANTS)}]),
    "list of many values": (ROOT, MANAGER, "ListVMs", "av", [VARIANTS]),
    "check-good": (f"{ROOT}/vm/good", f"{NAME}.VM", "Check", "", []),
    "managed": (ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects", "", []),
    "properties": (f"{ROOT}/vm/good", PROPERTIES, "GetAll", "s", [""]),
    "report": (ROOT, MANAGER, "Report", "ss", ["", "html"]),
    "reload": (ROOT, MANAGER, "Reload", "", []),
    "long key": (ROOT, MANAGER, "Validate", "ss", ["x", ".".join("a" * 30_000) + "=1"]),
    "deep key": (ROOT, MANAGER, "Validate", "ss", ["x", ".".join("a" * 4_000) + "=1"]),
    "NUL in TOML": (ROOT, MANAGER, "Validate", "ss", ["x", '"\\u0000"=1']),
    "NUL in a name": (ROOT, MANAGER, "Import", "sa{sv}", [COMMAND_LINE, {}]),
    "surrogate": (ROOT, MANAGER, "Import", "sa{sv}", [SURROGATE, {}]),
    "slow pattern": (ROOT, MANAGER, "Import", "sa{sv}", ["kvm" * 20_000 + "/", {}]),
    "shorter pattern": (ROOT, MANAGER, "Import", "sa{sv}", ["kvm" * 2_600 + "/", {}]),
    "elsewhere": ("/", PROPERTIES, "Get", "ss", ["a.b", "x"]),
}


async def send(address: str, what: str, calls: int, connections: int) -> Counter[str]:
    path, interface, member, signature, body = CALLS[what.removesuffix(", interactively")]
    flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if what.endswith("interactively") else MessageFlag.NONE
    heard: Counter[str] = Counter()
    buses = [await ClientBus(address).connect() for _ in range(connections)]

    async def call(bus: ClientBus) -> None:
        message = Message(NAME, path, interface, member, signature=signature, body=body, flags=flags)
        try:
            reply = await bus.call(message)
            heard[reply.error_name.rpartition(".")[2] if reply and reply.error_name else "ok"] += 1
        except (OSError, EOFError):
            heard["hung up"] += 1

    under_way = [asyncio.create_task(call(bus)) for bus in buses for _ in range(calls)]
    await asyncio.sleep(0)
    print("sent", flush=True)
    await asyncio.gather(*under_way)
    return heard


async def storm(address: str, what: str, calls: int, connections: int) -> Counter[str]:
    """Make so many calls at a time again and again, as fast as they are answered, until stdin is closed."""
    heard: Counter[str] = Counter()
    buses = [await ClientBus(address).connect() for _ in range(connections)]
    over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # nothing ends it but stdin's end
    path, interface, member, signature, body = CALLS[what]

    async def call(bus: ClientBus) -> None:
        while not over.done():
            reply = await bus.call(Message(NAME, path, interface, member, signature=signature, body=body))
            heard[reply.error_name.rpartition(".")[2] if reply and reply.error_name else "ok"] += 1

    under_way = [asyncio.create_task(call(bus)) for bus in buses for _ in range(calls)]
    await asyncio.sleep(0)
    print("sent", flush=True)
    await asyncio.gather(*under_way)
    return heard


def unasked(signature: str = "", *body: object) -> Message:
    flags = MessageFlag.NO_REPLY_EXPECTED
    return Message(NAME, ROOT, MANAGER, "ListVMs", signature=signature, body=list(body), flags=flags)


def unasked_signal() -> Message:
    signal = Message.new_signal(ROOT, MANAGER, "Changed", "av", [VARIANTS])
    signal.destination = NAME
    return signal


FLOODS = {
    "pings of the bus": lambda: Message(DAEMON[0], DAEMON[1], f"{DAEMON[2]}.Peer", "Ping", flags=unasked().flags),
    "calls": unasked,
    "variants": lambda: unasked("av", VARIANTS),
    "lists": lambda: unasked("aas", [[] for _ in range(15_900)]),
    "signals": unasked_signal,
}


def flood(address: str, what: str, connections: int) -> Counter[str]:
    """Send as fast as the bus takes it, until stdin is closed."""
    hello, message = Message(*DAEMON, "Hello", serial=1), FLOODS[what]()
    message.serial = 7
    frame, over = bytes(marshal(message)), threading.Event()
    sent: Counter[str] = Counter()

    def send_all() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address.partition("path=")[2].partition(",")[0])
            connection.sendall(b"\0AUTH EXTERNAL %s\r\nBEGIN\r\n" % str(os.geteuid()).encode().hex().encode())
            connection.sendall(bytes(marshal(hello)))
            connection.settimeout(0.2)
            rest = memoryview(frame)
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    rest = rest[connection.send(rest) :] or memoryview(frame)
                    sent["frames"] += len(rest) == len(frame)

    threads = [threading.Thread(target=send_all) for _ in range(connections)]
    for thread in threads:
        thread.start()
    print("sent", flush=True)
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
    return sent


async def listen(address: str) -> list[str]:
    bus = await ClientBus(address).connect()
    heard: list[str] = []

    def on_message(message: Message) -> bool:
        if message.message_type is MessageType.SIGNAL and str(message.path).startswith(ROOT):
            heard.append(f"{message.member} {message.path} {plain(message.body)}")
        return False

    bus.add_message_handler(on_message)
    daemon = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
    await bus.call(Message(*daemon, "AddMatch", signature="s", body=["type='signal'"]))
    print("sent", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await bus.call(Message(*daemon, "GetId"))  # whatever was sent before has come
    return heard


def main(arguments: list[str]) -> None:
    address, uid, what, calls, connections = arguments[1:]
    os.setgroups([])
    os.setgid(NOGROUP)
    os.setuid(int(uid))
    if what == "listen":
        print(json.dumps(asyncio.run(listen(address))))
        return
    if what.startswith("flood of "):
        print(json.dumps(flood(address, what.removeprefix("flood of "), int(connections))))
        return
    work = storm if what.startswith("storm of ") else send
    print(json.dumps(asyncio.run(work(address, what.removeprefix("storm of "), int(calls), int(connections)))))


NOGROUP = 65534

if __name__ == "__main__":
    main(sys.argv)
