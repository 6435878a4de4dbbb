# SPDX-License-Identifier: GPL-2.0-or-later
"""The client side, for cprctl: calls with timeouts, jobs to follow, and errors as they came."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from cpr_agent.bus.bridge import BridgeError, bridge
from cpr_agent.bus.contract import BUS_NAME, ROOT, escape
from cpr_agent.bus.frames import UnsendableError, lacks_arguments
from cpr_agent.bus.library import Message, MessageFlag, MessageType, Variant
from cpr_agent.bus.wire import DAEMON, AddressError, ClientBus, error_text

CALL_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 10.0
BRIDGE_TIMEOUT_S = 120.0
"""How long a person may take to type a password to ssh."""


class CallError(Exception):
    """The agent, or the bus, said no; ``kind`` is the last part of the D-Bus error name."""

    def __init__(self, name: str, text: str) -> None:
        self.kind = name.removeprefix(f"{BUS_NAME}.Error.")
        super().__init__(text)


class Watcher(Protocol):
    """Hears of a job's progress."""

    def step(self, what: str, done: float) -> None:
        """The job's present step, and its progress (0 to 1)."""

    def vm(self, name: str, state: str) -> None:
        """A VM's state when the job begins, and each change of it."""


class NullWatcher:
    """A watcher that ignores all news."""

    def step(self, what: str, done: float) -> None: ...

    def vm(self, name: str, state: str) -> None: ...


@dataclass(frozen=True)
class JobEnd:
    """``result`` is "done", "nothing to do", "cancelled", or the text of the error; ``error`` has its parts; ``guests`` are
    the steps of the job's guests."""

    result: str
    error: dict[str, Any] = field(default_factory=dict)
    guests: dict[str, dict[str, Any]] = field(default_factory=dict)


class Client:
    """A connection to the agent."""

    def __init__(self, bus: ClientBus) -> None:
        self._bus = bus
        self._lost = asyncio.ensure_future(bus.wait_for_disconnect())
        self._lost.add_done_callback(lambda lost: lost.cancelled() or lost.exception())  # known, then: no traceback of it

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(
        cls, address: str | None, host: str = "", timeout_s: float = CONNECT_TIMEOUT_S
    ) -> AsyncIterator[Client]:
        """To the bus at ``address``, or to the system bus, of this machine or by ssh of ``host`` ("user@host:port"). Raises
        CallError if there is none."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                if host:
                    bus = await stack.enter_async_context(bridge(host, BRIDGE_TIMEOUT_S))
                else:
                    async with asyncio.timeout(timeout_s):
                        bus = await ClientBus(address).connect()
            except BridgeError as error:
                raise CallError("NoBus", str(error)) from error
            except (OSError, TimeoutError, EOFError, AddressError) as error:
                raise CallError("NoBus", f"cannot connect to D-Bus: {str(error) or 'timed out'}") from error
            client = cls(bus)
            try:
                yield client
            finally:
                client._lost.cancel()
                bus.disconnect()

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

    async def quietly(self, interface: str, member: str, signature: str = "", *body: Any, timeout_s: float) -> Any:
        """Ask an agent that runs, at its root: none is started for it, and nobody is asked for a password. Raises
        CallError, TimeoutError."""
        message = Message(
            destination=BUS_NAME,
            path=ROOT,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
            flags=MessageFlag.NO_AUTOSTART,
        )
        async with asyncio.timeout(timeout_s):
            return plain((await self._send(message)).body[0])

    async def run_job(self, member: str, options: dict[str, Variant] | None, watcher: Watcher | None = None) -> JobEnd:
        """Start a job and follow it to its end. Raises CallError. The job goes on if this process goes away."""
        return await (await self.start_job(member, options)).end(watcher or NullWatcher())

    async def start_job(self, member: str, options: dict[str, Variant] | None) -> RunningJob:
        """Raises CallError."""
        news: asyncio.Queue[News] = asyncio.Queue()
        self._bus.add_message_handler(lambda message: _hear(message, news))
        for rule in (
            f"type='signal',interface='{BUS_NAME}.Manager',member='JobRemoved',path='{ROOT}'",
            f"type='signal',interface='org.freedesktop.DBus.Properties',path_namespace='{ROOT}'",
            f"type='signal',interface='org.freedesktop.DBus',member='NameOwnerChanged',arg0='{BUS_NAME}'",
        ):
            await self._send(Message(*DAEMON, "AddMatch", signature="s", body=[rule]))
        vms = {path: (name, state) for name, state, path in await self.manager("ListVMs")}
        path = await (self.manager(member) if options is None else self.manager(member, "a{sv}", options))
        return RunningJob(self, path, vms, news)

    async def until_lost(self, other: asyncio.Future[Any]) -> bool:
        """Wait for ``other``; False if the connection was lost first."""
        await asyncio.wait({other, self._lost}, return_when=asyncio.FIRST_COMPLETED)
        return other.done()

    async def _send(self, message: Message) -> Message:
        answer = asyncio.ensure_future(self._bus.call(message))
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                reply = await answer if await self.until_lost(answer) else None
        except TimeoutError:
            raise CallError("Timeout", f"no answer to {message.member} within {CALL_TIMEOUT_S:.0f} s") from None
        except (OSError, EOFError):
            reply = None
        except UnsendableError as error:
            raise CallError("InvalidArgument", f"{message.member} can't be called: {error}") from error
        finally:
            answer.cancel()
        if reply is None:
            raise CallError("NoReply", f"the connection was lost before {message.member} was answered")
        if reply.message_type is MessageType.ERROR:
            raise CallError(str(reply.error_name), error_text(reply))
        if lacks_arguments(reply):
            raise CallError("NoReply", f"the answer to {message.member} can't be read")
        return reply


News = tuple[str, dict[str, Any]]
"""An object's path, and its new values."""


class RunningJob:
    """A job of the agent that ``client`` has started."""

    def __init__(self, client: Client, path: str, vms: dict[str, tuple[str, str]], news: asyncio.Queue[News]) -> None:
        self.path = path
        self._client = client
        self._vms = vms
        self._news = news
        self._step, self._done = "", 0.0
        self._guests: dict[str, dict[str, Any]] = {}

    @property
    def id(self) -> str:
        return self.path.rpartition("/")[2]

    async def end(self, watcher: Watcher) -> JobEnd:
        """Follow it to its end. Raises CallError, of kind AgentGone if the agent goes away first. May be called again after
        it was cancelled."""
        for name, state in self._vms.values():
            watcher.vm(name, state)
        while True:
            news = asyncio.ensure_future(self._news.get())
            try:
                if not await self._client.until_lost(news):
                    raise CallError("AgentGone", f"the bus went away during: {self._step}")
            finally:
                news.cancel()
            path, values = news.result()
            if path == BUS_NAME:
                raise CallError("AgentGone", f"the agent went away during: {self._step}")
            if path == self.path and "result" in values:
                return JobEnd(str(values["result"]), values["error"], self._guests)
            if path == self.path:
                self._step, self._done = values.get("Step", self._step), values.get("Progress", self._done)
                self._guests = values.get("Guests", self._guests)
                watcher.step(self._step, self._done)
            elif "State" in values:
                name = values.get("Name") or self._vms.get(path, ("", ""))[0]
                if name and self._vms.get(path) != (name, values["State"]):
                    self._vms[path] = (name, values["State"])
                    watcher.vm(*self._vms[path])

    async def cancel(self) -> None:
        """Raises CallError if it is too late."""
        await self._client.call(self.path, f"{BUS_NAME}.Job", "Cancel")


def _hear(message: Message, news: asyncio.Queue[News]) -> bool:
    match message.message_type, message.member:
        case MessageType.SIGNAL, "JobRemoved":
            news.put_nowait((message.body[1], {"result": message.body[2], "error": plain(message.body[3])}))
        case MessageType.SIGNAL, "PropertiesChanged":
            news.put_nowait((str(message.path), plain(message.body[1])))
        case MessageType.SIGNAL, "NameOwnerChanged" if message.body[0] == BUS_NAME and not message.body[2]:
            news.put_nowait((BUS_NAME, {}))
    return False


def plain(value: Any) -> Any:
    """Variants, all the way down, as the values in them."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def options(**values: str | bool | float | None) -> dict[str, Variant]:
    """The values as ``a{sv}``: None and "" are left out, and names get dashes."""
    kinds = {bool: "b", float: "d", str: "s"}
    return {
        name.replace("_", "-"): Variant(kinds[type(value)], value)
        for name, value in values.items()
        if value is not None and value != ""
    }
