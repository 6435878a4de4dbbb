"""The client side, for cprctl: calls with timeouts, and errors as they came."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType, MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from cpr_agent.bus.contract import BUS_NAME, ROOT, escape

CALL_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 10.0


class CallError(Exception):
    """The agent, or the bus, said no; ``kind`` is the last part of the D-Bus error name."""

    def __init__(self, name: str, text: str) -> None:
        self.kind = name.removeprefix(f"{BUS_NAME}.Error.")
        super().__init__(text)


class Client:
    """A connection to the agent."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus
        self._news: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, address: str | None) -> AsyncIterator[Client]:
        """Raises CallError if there is no bus."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                bus = MessageBus(address) if address else MessageBus(bus_type=BusType.SYSTEM)
                await bus.connect()
        except (OSError, TimeoutError, EOFError) as error:
            raise CallError("NoBus", f"cannot connect to D-Bus: {error or 'timed out'}") from error
        try:
            yield cls(bus)
        finally:
            bus.disconnect()  # type: ignore[no-untyped-call]  # dbus_next leaves it untyped

    async def manager(self, member: str, signature: str = "", *body: Any) -> Any:
        return await self.call(ROOT, f"{BUS_NAME}.Manager", member, signature, *body)

    async def vm(self, name: str, member: str, signature: str = "", *body: Any) -> Any:
        return await self.call(f"{ROOT}/vm/{escape(name)}", f"{BUS_NAME}.VM", member, signature, *body)

    async def properties(self, path: str, interface: str) -> dict[str, Any]:
        values = await self.call(path, "org.freedesktop.DBus.Properties", "GetAll", "s", f"{BUS_NAME}.{interface}")
        return dict(plain(values))

    async def vm_properties(self, name: str) -> dict[str, Any]:
        return await self.properties(f"{ROOT}/vm/{escape(name)}", "VM")

    async def call(self, path: str, interface: str, member: str, signature: str = "", *body: Any) -> Any:
        """The first value of the reply, or None. Raises CallError."""
        message = Message(
            destination=BUS_NAME,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
            flags=MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION,
        )
        reply = await self._send(message)
        return reply.body[0] if reply.body else None

    async def run_job(
        self,
        member: str,
        options: dict[str, Variant] | None,
        progress: Callable[[str, float], None] | None = None,
    ) -> str:
        """Start a job and wait for its end; returns its result, ``"done"`` if all is well. Raises CallError, of kind
        AgentGone if the agent goes away first.

        ``progress`` hears of each step, and how much of all is done (0 to 1). The job goes on if this process goes away.
        """
        self._bus.add_message_handler(self._on_message)
        daemon = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "AddMatch")
        for rule in (
            f"type='signal',interface='{BUS_NAME}.Manager',member='JobRemoved',path='{ROOT}'",
            f"type='signal',interface='org.freedesktop.DBus.Properties',path_namespace='{ROOT}/job'",
            f"type='signal',interface='org.freedesktop.DBus',member='NameOwnerChanged',arg0='{BUS_NAME}'",
        ):
            await self._send(Message(*daemon, signature="s", body=[rule]))
        job = await (self.manager(member) if options is None else self.manager(member, "a{sv}", options))
        lost = asyncio.ensure_future(self._bus.wait_for_disconnect())  # type: ignore[no-untyped-call]
        step, done = "", 0.0
        try:
            while True:
                news = asyncio.ensure_future(self._news.get())
                await asyncio.wait({news, lost}, return_when=asyncio.FIRST_COMPLETED)
                if not news.done():
                    raise CallError("AgentGone", f"the bus went away during: {step}")
                path, values = news.result()
                if path == BUS_NAME:
                    raise CallError("AgentGone", f"the agent went away during: {step}")
                if path == job and "result" in values:
                    return str(values["result"])
                if path == job:
                    step, done = values.get("Step", step), values.get("Progress", done)
                    if progress:
                        progress(step, done)
        finally:
            news.cancel()
            lost.cancel()
            await asyncio.wait({lost})

    def _on_message(self, message: Message) -> bool:
        match message.message_type, message.member:
            case MessageType.SIGNAL, "JobRemoved":
                self._news.put_nowait((message.body[1], {"result": message.body[2]}))
            case MessageType.SIGNAL, "PropertiesChanged":
                self._news.put_nowait((str(message.path), plain(message.body[1])))
            case MessageType.SIGNAL, "NameOwnerChanged" if message.body[0] == BUS_NAME and not message.body[2]:
                self._news.put_nowait((BUS_NAME, {}))
        return False

    async def _send(self, message: Message) -> Message:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                reply = await self._bus.call(message)
        except TimeoutError:
            raise CallError("Timeout", f"no answer to {message.member} within {CALL_TIMEOUT_S:.0f} s") from None
        if reply is None:
            raise CallError("NoReply", f"no answer to {message.member}")
        if reply.message_type is MessageType.ERROR:
            raise CallError(str(reply.error_name), str(reply.body[0]) if reply.body else str(reply.error_name))
        return reply


def plain(value: Any) -> Any:
    """Variants, all the way down, as the values in them."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def options(**values: str | bool | float | None) -> dict[str, Variant]:
    """``a{sv}`` of what is given: None and "" are left out, and names get dashes."""
    kinds = {bool: "b", float: "d", str: "s"}
    return {
        name.replace("_", "-"): Variant(kinds[type(value)], value)
        for name, value in values.items()
        if value is not None and value != ""
    }
